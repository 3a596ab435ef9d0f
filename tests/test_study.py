"""The study's tool: what it plans, that it goes on where it stopped, and what it writes."""

import csv
import importlib.util
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from mulki_plugins.registry.discovery import catalog
from mulki_plugins.streams.mini.stream import ORDERS

ROOT = Path(__file__).parent.parent
TOOLS = ROOT / "tools"


@pytest.fixture(scope="module")
def study():
    sys.path.insert(0, str(TOOLS))
    spec = importlib.util.spec_from_file_location("study", TOOLS / "study.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["study"] = module
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(TOOLS))


@pytest.fixture
def plan(tmp_path):
    """Two strategies on two tasks in two orders, with an ablation, in steps that take seconds."""
    recipe = yaml.safe_load((ROOT / "recipes" / "mtil.yaml").read_text())
    recipe["stream"]["tasks"] = ["digits", "scans"]
    recipe["train"] |= {"iterations": 2, "batch_size": 4, "schedule": {"warmup": 0}}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(recipe))
    said = {
        "recipe": str(tmp_path / "small.yaml"),
        "orders": {"I": "I", "random": ["scans", "digits"]},
        "many": ["mulki", "finetune"],
        "few": ["zero-shot"],
        "seeds": {"I": {"many": [0, 1], "few": [0, 1]}, "random": {"many": [0], "few": []}},
        "once": ["zero-shot"],
        "ablation": {
            "strategy": "mulki", "seeds": [0], "without": ["adding"],
            "changed": {"only the previous teacher": ["strategy.teachers.use=previous"]},
        },
        "choice": {"seed": 9, "settings": {"wise-ft": [["strategy.connecting.inter=0.1"], ["strategy.connecting.inter=0.9"]]}},
    }  # fmt: skip
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(said))
    return tmp_path / "plan.yaml"


def invoke(study, plan, *words):
    folder = plan.parent
    result = CliRunner().invoke(study.main, ["--plan", str(plan), "--table", str(folder / "runs.csv"), *words])
    assert result.exit_code == 0, result.output
    return result


def test_the_shipped_plan_covers_what_is_promised(study):
    plan = yaml.safe_load((TOOLS / "study.yaml").read_text())
    jobs = list(study.planned(plan))
    assert len({(j.part, j.order, j.label, j.seed) for j in jobs}) == len(jobs)
    count = {}
    for job in jobs:
        count[job.part, job.order, job.label] = count.get((job.part, job.order, job.label), 0) + 1
    for name in ("mulki", "finetune", "lwf", "wise-ft", "weight-ensemble", "snd", "zscl"):
        assert count["study", "I", name] >= 5
        assert min(count["study", "II", name], count["study", "random", name]) >= 3
    for name in ("joint", "lwf-vr", "l2", "icarl", "ewc", "replay", "si", "mas"):
        assert count["study", "I", name] >= 3
    assert sorted(plan["orders"]["random"]) == sorted(catalog().find("stream", "mtil-mini").tasks)
    assert plan["orders"]["random"] not in (list(ORDERS["I"]), list(ORDERS["II"]))
    for job in [*jobs, *study.choices(plan)]:
        recipe = study.resolved(plan, job).recipe
        assert recipe.seeds == [job.seed]
        assert recipe.stream.options["evaluate_on"] == ("validation" if job.part == "choice" else "test")
    reported = {job.seed for job in jobs}
    assert plan["choice"]["seed"] not in reported
    budgets = {len(settings) for settings in plan["choice"]["settings"].values()}
    assert len(budgets) == 1, "every method is given as many settings to choose from"


def test_runs_what_is_missing_and_reports(study, plan):
    folder = plan.parent
    out = ("--out", str(folder / "out"), "--jobs", "1")
    assert "9 are missing" in invoke(study, plan, "run", "--dry-run", *out).output
    invoke(study, plan, "run", "--only", "study", "--only", "random", *out)
    with (folder / "runs.csv").open() as file:
        first = list(csv.DictReader(file))
    assert [(row["label"], row["order"]) for row in first] == [("mulki", "random"), ("finetune", "random")]
    assert "2 runs are there, 7 are missing" in invoke(study, plan, "run", *out).output
    assert "9 runs are there, 0 are missing" in invoke(study, plan, "run", *out).output
    (folder / "results.md").write_text("Before.\n<!-- study: begin -->\nold\n<!-- study: end -->\nAfter.\n")
    table = invoke(study, plan, "report", "--docs", str(folder)).output
    document = (folder / "results.md").read_text()
    assert document.startswith("Before.\n")
    assert document.endswith("After.\n")
    assert "old" not in document
    assert "| without adding | 1 |" in document
    assert "| only the previous teacher | 1 |" in table
    assert (folder / "study.png").stat().st_size > 10_000
    with (folder / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    mulki = [row for row in rows if (row["part"], row["order"], row["label"]) == ("study", "I", "mulki")]
    mean = sum(float(row["last"]) for row in mulki) / 2
    line = next(line for line in table.splitlines() if line.startswith("| mulki | 2"))
    assert f"{mean:.1f} ±" in line
    assert float(mulki[0]["memory"]) > 100
    assert float(mulki[0]["seconds"]) > 0
    changed = yaml.safe_load(plan.read_text())
    changed["ablation"]["changed"]["only the previous teacher"] = ["strategy.teachers.use=initial"]
    plan.write_text(yaml.safe_dump(changed))
    assert "8 runs are there, 1 are missing" in invoke(study, plan, "run", "--dry-run", *out).output


def test_chooses_on_validation_images(study, plan):
    out = ("--out", str(plan.parent / "out"), "--jobs", "2")
    output = invoke(study, plan, "choose", *out).output
    rows = [line for line in output.splitlines() if line.startswith("| wise-ft:")]
    assert len(rows) == 2
    assert float(rows[0].split("|")[5]) >= float(rows[1].split("|")[5])


def test_a_run_that_fails_ends_no_other(study, plan):
    changed = yaml.safe_load(plan.read_text())
    changed["few"] = []
    changed["many"] = ["finetune"]
    changed["seeds"] = {"I": {"many": [0], "few": []}, "random": {"many": [], "few": []}}
    changed["ablation"] |= {"without": [], "changed": {"broken": ["device=cuda:7"]}}
    plan.write_text(yaml.safe_dump(changed))
    output = invoke(study, plan, "run", "--out", str(plan.parent / "out"), "--jobs", "1").output
    assert "broken seed 0: FAILED: $.device: cuda:7 is not on this machine" in output
    assert "1 runs are there, 1 are missing" in invoke(study, plan, "run", "--dry-run").output


def test_costs_are_ratios(study):
    table = study.cost_table({"finetune": [(2.0, 100.0), (4.0, 100.0)], "mulki": [(3.0, 110.0), (8.0, 110.0)]})
    assert "| finetune | 1.00 | 1.00 – 1.00 | 1.00 |" in table
    assert "| mulki | 1.75 | 1.50 – 2.00 | 1.10 |" in table
