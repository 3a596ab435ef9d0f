"""The study's tool: what it plans, that it goes on where it stopped, and what it writes."""

import csv
import importlib.util
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from mulki_plugins.registry.catalog import Catalog, Provenance
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.registry.register import Register
from mulki_plugins.streams import TaskStream
from mulki_plugins.streams.mini.stream import ORDERS
from tests.conftest import small_stream

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


def ordered_stream(*, tasks: list[str] | None = None, order: str | list[str] = "I", evaluate_on: str = "test"):
    """The small tasks with the options that a study sets."""
    small = {task.name: task for task in small_stream().tasks}
    names = tasks or list(small)
    if isinstance(order, list):
        names = [name for name in order if name in names]
    return TaskStream(name="ordered", tasks=tuple(small[name] for name in names))


@pytest.fixture
def plan(study, tmp_path, small_parts, monkeypatch):
    """Two strategies on two small tasks in two orders, with an ablation; each run takes about a second."""
    import study_jobs

    monkeypatch.setattr(study_jobs, "_context", lambda: multiprocessing.get_context("fork"))  # they see `ordered` too
    quiet_run = study_jobs.quiet_run

    def with_descriptor(*arguments):
        sys.stderr = sys.__stderr__  # the forked process inherits the test runner's, which has no descriptor
        return quiet_run(*arguments)

    monkeypatch.setattr(study_jobs, "quiet_run", with_descriptor)
    parts = Catalog()
    register = Register(parts, Provenance(distribution="mulki", version=""))
    register.stream("ordered", ordered_stream, summary="small tasks in an order")
    for key, part in parts.parts.items():
        monkeypatch.setitem(catalog().parts, key, part)
    recipe = yaml.safe_load((ROOT / "recipes" / "mtil.yaml").read_text())
    recipe["stream"] = {"name": "ordered", "tasks": ["first", "second"]}
    recipe["model"] = {"name": "small-clip"}
    recipe["train"] |= {"iterations": 2, "batch_size": 4, "schedule": {"warmup": 0}}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(recipe))
    said = {
        "recipe": str(tmp_path / "small.yaml"),
        "orders": {"I": "I", "random": ["second", "first"]},
        "many": ["mulki", "finetune"],
        "few": ["lwf"],
        "seeds": {"I": {"many": [0, 1], "few": []}, "random": {"many": [0], "few": []}},
        "once": ["zero-shot"],
        "alone": {"stream": "mtil-mini", "strategy": "finetune", "seeds": []},
        "ablation": {
            "strategy": "mulki", "seeds": [0], "without": {"without adding": ["adding"]},
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
    import study_jobs

    plan = yaml.safe_load((TOOLS / "study.yaml").read_text())
    jobs = list(study.planned(plan))
    assert len({(j.part, j.order, j.label, j.seed) for j in jobs}) == len(jobs)
    count = {}
    for job in jobs:
        count[job.part, job.order, job.label] = count.get((job.part, job.order, job.label), 0) + 1
    for name in ("mulki", "finetune", "lwf", "wise-ft", "weight-ensemble", "snd", "zscl"):
        assert count["study", "I", name] >= 5
        assert min(count["study", "II", name], count["study", "random", name]) >= 3
    assert all(count["study", order, "zero-shot"] == 1 for order in plan["orders"])
    assert sum(part == "alone" for part, _, _ in count) == 11
    for name in ("joint", "lwf-vr", "l2", "icarl", "ewc", "replay", "si", "mas"):
        assert count["study", "I", name] >= 3
    assert sorted(plan["orders"]["random"]) == sorted(catalog().find("stream", "mtil-mini").tasks)
    assert plan["orders"]["random"] not in (list(ORDERS["I"]), list(ORDERS["II"]))
    for job in [*jobs, *study.choices(plan)]:
        recipe = study_jobs.resolved(plan, job).recipe
        assert recipe.seeds == [job.seed]
        assert recipe.stream.options["evaluate_on"] == ("validation" if job.part == "choice" else "test")
    reported = {job.seed for job in jobs}
    assert plan["choice"]["seed"] not in reported
    budgets = {len(settings) for settings in plan["choice"]["settings"].values()}
    assert budgets == {4, 5}, "every method is given as many settings, and one more where the best lay at their edge"


def test_runs_what_is_missing_and_reports(study, plan, no_slow_output):
    folder = plan.parent
    out = ("--out", str(folder / "out"), "--jobs", "1")
    assert "10 are missing" in invoke(study, plan, "run", "--dry-run", *out).output
    invoke(study, plan, "run", "--only", "study", "--only", "random", *out)
    with (folder / "runs.csv").open() as file:
        first = list(csv.DictReader(file))
    assert [row["label"] for row in first] == ["zero-shot", "mulki", "finetune"]
    assert {row["order"] for row in first} == {"random"}
    assert "3 runs are there, 7 are missing" in invoke(study, plan, "run", *out).output
    assert "10 runs are there, 0 are missing" in invoke(study, plan, "run", *out).output
    marks = "<!-- study: begin -->\nold\n<!-- study: end -->\n<!-- choice: begin -->\n<!-- choice: end -->\n"
    (folder / "results.md").write_text(f"Before.\n{marks}After.\n")
    no_slow_output.undo()  # the report's figure is real
    table = invoke(study, plan, "report").output
    document = (folder / "results.md").read_text()
    assert document.startswith("Before.\n")
    assert document.endswith("After.\n")
    assert "old" not in document
    assert "| setting | Transfer |" in document
    assert "| without adding | 1 |" in document
    assert "Zero-shot: " in document
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
    assert "9 runs are there, 1 are missing" in invoke(study, plan, "run", "--dry-run", *out).output


def test_chooses_on_validation_images(study, plan):
    out = ("--out", str(plan.parent / "out"), "--jobs", "2")
    output = invoke(study, plan, "choose", *out).output
    rows = [line for line in output.splitlines() if line.startswith("| wise-ft:")]
    assert len(rows) == 2
    assert float(rows[0].split("|")[5]) >= float(rows[1].split("|")[5])


def test_a_run_that_fails_ends_no_other(study, plan):
    changed = yaml.safe_load(plan.read_text())
    changed["once"] = []
    changed["many"] = ["finetune"]
    changed["seeds"] = {"I": {"many": [0], "few": []}, "random": {"many": [], "few": []}}
    changed["ablation"] |= {"without": {}, "changed": {"broken": ["device=cuda:7"]}}
    plan.write_text(yaml.safe_dump(changed))
    output = invoke(study, plan, "run", "--out", str(plan.parent / "out"), "--jobs", "1").output
    assert "broken seed 0: FAILED: $.device: cuda:7 is not on this machine" in output
    assert "1 runs are there, 1 are missing" in invoke(study, plan, "run", "--dry-run").output


def test_a_killed_run_ends_no_other(study, plan, monkeypatch):
    """A process that dies takes only its own run with it."""
    import study_jobs

    jobs = [
        study_jobs.Job(part="study", order="I", label=name, seed=0, strategy=name) for name in ("finetune", "zero-shot")
    ]
    monkeypatch.setattr(study_jobs, "undisturbed", study_jobs.run_job, raising=False)
    monkeypatch.setattr(study_jobs, "run_job", dying)
    study_jobs.work_off(yaml.safe_load(plan.read_text()), jobs, plan.parent / "runs.csv", plan.parent / "out", 2, 1)
    with (plan.parent / "runs.csv").open() as file:
        assert [row["label"] for row in csv.DictReader(file)] == ["zero-shot"]


def dying(plan, job, out, threads):
    import study_jobs

    if job.label == "finetune":
        os.kill(os.getpid(), signal.SIGKILL)
    return study_jobs.undisturbed(plan, job, out, threads)


def test_only_what_there_is(study, plan):
    result = CliRunner().invoke(study.main, ["--plan", str(plan), "run", "--only", "mulkee"])
    assert result.exit_code == 2
    assert "no run is of mulkee" in result.output


def test_a_line_of_another_device_is_no_line_of_this_one(study, plan):
    import study_jobs
    from study_report import Line

    said = yaml.safe_load(plan.read_text())
    job = next(iter(study.planned(said)))
    recipe = study_jobs.resolved(said, job).recipe
    from mulki_plugins.training.provenance import fingerprint

    common = {"part": job.part, "order": job.order, "label": job.label, "seed": job.seed, "code": ""}
    here, there = (Line(**common, fingerprint=fingerprint(recipe), device=d, last=50.0) for d in ("cpu", "tpu"))
    assert study.missing(said, [job], [there])[0] == [job]
    assert study.missing(said, [job], [there, here]) == ([], [here])


def test_costs_are_ratios(study):
    table = study.cost_table({"finetune": [(2.0, 100.0), (4.0, 100.0)], "mulki": [(3.0, 110.0), (8.0, 110.0)]})
    assert "| finetune | 1.00 | 1.00 – 1.00 | 1.00 |" in table
    assert "| mulki | 1.75 | 1.50 – 2.00 | 1.10 |" in table
