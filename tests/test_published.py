"""The published tables as data, and runs beside them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from mulki_plugins.cli import main
from mulki_plugins.metrics import average_by_task, last_by_task, transfer_by_task
from mulki_plugins.report.published_rows import (
    DATASETS,
    METRICS,
    ORDERS,
    STEP_METRICS,
    explanations,
    order_of,
    published_rows,
    rows_of,
)
from mulki_plugins.report.result import Result
from mulki_plugins.streams.class_steps import step_sizes

MATRICES = json.loads((Path(__file__).parent / "data" / "published_matrices.json").read_text())["matrices"]
BY_TASK = {"transfer": transfer_by_task, "average": average_by_task, "last": last_by_task}
ROW_OF = {"Continual finetune": "Continual fine-tuning"}
"""What a method is called in the rows, where that is not as in the result files."""


def row(method, order, metric, shots="full", classes="task"):
    [found] = [r for r in rows_of(order, classes, shots) if (r.method, r.metric) == (method, metric)]
    return found


@pytest.mark.parametrize("table", MATRICES, ids=lambda t: f"{t['method']}-{t['order']}")
@pytest.mark.parametrize("metric", METRICS)
def test_rows_agree_with_the_published_matrices_cell_by_cell(table, metric):
    values = BY_TASK[metric](table["matrix"])
    tasks = table["tasks"][1:] if metric == "transfer" else table["tasks"]
    found = row(ROW_OF.get(table["method"], table["method"]), table["order"], metric)
    assert found.cells == pytest.approx(dict(zip(tasks, values, strict=True)), abs=0.0501)
    assert found.mean == pytest.approx(values.mean(), abs=0.0501)
    assert "zscl" in found.sources


def test_a_rows_mean_is_that_of_its_cells():
    """The sources round each cell, and some their mean from unrounded cells of a re-run."""
    slips = []
    for found in published_rows():
        if found.cells:
            own = sum(found.cells.values()) / len(found.cells)
            if abs(own - found.mean) > 0.08:
                slips.append((found.method, found.shots, found.metric))
                assert "a slip in the source" in found.note
    assert slips == [("DPW", "16", "transfer")]


def test_every_row_says_what_it_was_measured_on_and_where_it_is_from():
    said = explanations()
    keys = set()
    for r in published_rows():
        assert r.split in said["splits"]
        assert r.shots in said["shots"]
        assert r.classes in said["classes"]
        assert r.sources
        assert set(r.sources) <= set(said["sources"])
        assert 0 <= r.mean <= 100
        assert all(0 <= value <= 100 for value in r.cells.values())
        if r.metric in STEP_METRICS:
            data, base, increment = re.fullmatch(r"(\S+) B(\d+) Inc(\d+)", r.order).groups()
            classes = {"ImageNet-R": 200, "CUB": 200, "ObjectNet": 200, "SUN": 300}.get(data, 100)
            assert (r.classes, r.split, r.cells) == ("seen", "c3box", {})
            assert r.tasks == len(step_sizes(classes, int(base), int(increment)))
        else:
            assert r.order in ORDERS
            assert r.metric in METRICS
            assert r.tasks == (10 if r.classes == "all" else 11)
        if r.cells:
            first = ORDERS[r.order][0]
            assert set(r.cells) == set(DATASETS) - ({first} if r.metric == "transfer" else set()), r
        keys.add((r.method, r.order, r.shots, r.classes, r.metric))
    assert len(keys) == len(published_rows()), "no row stands twice"


def test_what_is_there():
    whole = [
        "CLIP zero-shot", "Continual fine-tuning", "LwF", "iCaRL", "LwF-VR", "WiSE-FT", "ZSCL*", "ZSCL", "MoE-Adapters",
        "DIKI", "GIFT", "DPW small", "DPW",
    ]  # fmt: skip
    for order in ORDERS:
        assert {r.method for r in rows_of(order, "task", "full") if r.cells} == set(whole)
        assert all(row(name, order, metric).cells for name in whole for metric in METRICS)
    assert {r.method for r in rows_of("I", "task", "16") if r.cells} == {"DIKI", "MoE-Adapters", "DPW"}
    assert {r.method for r in rows_of("I", "seen", "full")} == {"ZSCL", "MoE-Adapters", "CoLeCLIP", "DPeCLIP", "DPW"}
    assert len(rows_of("I", "task", "5")) == 7 * 3 + 3
    assert row("MulKI", "I", "transfer").mean == 70.1
    assert row("MulKI", "I", "average").mean == 77.3
    assert not [r for r in published_rows() if r.method == "MulKI" and r.metric == "last"], "not given anywhere"
    assert row("GIFT", "II", "last").cells["StanfordCars"] == 81.0
    assert row("DPW", "II", "last").cells["CIFAR100"] == 87.9
    assert row("MoE-Adapters", "I", "last", classes="seen").cells["EuroSAT"] == 0.0
    assert {row(name, "I", "last").split for name in ("DIKI", "DPW", "DPW small")} == {"coop"}
    assert {row(name, "I", "last").split for name in ("ZSCL", "MoE-Adapters", "GIFT")} == {"zscl"}
    assert row("RAIL-Primal", "II", "last", "16", "all").mean == 81.8


def test_the_orders():
    assert tuple(sorted(DATASETS, key=str.lower)) == DATASETS
    assert sorted(ORDERS["II"]) == sorted(DATASETS)
    assert order_of(MATRICES[-1]["tasks"], "task") == "II"
    assert order_of(DATASETS[:10], "task") is None
    assert order_of([name for name in DATASETS if name != "CIFAR100"], "all") == "I"


PROTOCOL = {"stream": "mtil", "split": "zscl", "model": "ViT-B-16", "pretrained": "openai", "classes": "task"}


def write(folder, table=MATRICES[2], tasks=None, protocol=None, **more):
    """A run whose matrix is a published one: of ZSCL, order I, unless another is given."""
    names = table["tasks"] if tasks is None else tasks
    n = len(names)
    zero_shot = row("CLIP zero-shot", "I", "last").cells
    folder.mkdir(parents=True)
    said = {**PROTOCOL, **(protocol or {})}
    defaults = {"seed": 0, "strategy": "mine", "status": "complete", "budget": {"iterations": 1000, "batch_size": 64}}
    Result(
        recipe="mtil-vitb16", tasks=names, zero_shot=[zero_shot.get(name, 50.0) for name in names],
        matrix=[line[:n] for line in table["matrix"][:n]], protocol={k: v for k, v in said.items() if v is not None},
        **{**defaults, **more},
    ).write(folder)  # fmt: skip


def results(*arguments):
    done = CliRunner().invoke(main, ["results", *(str(a) for a in arguments)])
    assert done.exit_code == 0, done.output + done.stderr
    return done.stdout


def against(folder, *more):
    return results(folder, "--against", "published", *more)


def test_a_run_of_the_protocol_stands_beside_its_peers(tmp_path):
    write(tmp_path / "a")
    lines = against(tmp_path).splitlines()
    assert not any("warning" in line for line in lines)
    assert lines[0].startswith(
        "Published on MTIL, order I: every test set among its own classes (MTIL); all training images"
    )
    tables = {line.split()[0]: i for i, line in enumerate(lines) if line.startswith(("Transfer", "Average", "Last"))}
    for name, start in tables.items():
        assert lines[start].split()[1:] == [*DATASETS, "mean", "source"]
        mine = next(line for line in lines[start:] if line.startswith("mtil-vitb16 / mine / seed 0"))
        zscl = next(line for line in lines[start:] if line.startswith("ZSCL "))
        cells = mine.split()[6:-1]
        assert cells == zscl.split()[1:12], "the run's matrix is ZSCL's"
        assert len(cells) == 11
        assert (cells[0] == "-") == (name == "Transfer")
        body = lines[start : start + 34]
        titles = [line.strip() for line in body if line.startswith("  ")]
        assert titles[0] == "split zscl, the runs' own"
        assert titles[1] == "split coop: not the runs', not comparable with them"
        place = {
            text: next(i for i, line in enumerate(body) if line.startswith(text))
            for text in ("GIFT ", "  split coop", "DIKI ")
        }
        assert place["GIFT "] < place["  split coop"] < place["DIKI "]
    assert any(line.startswith("source zscl: ZSCL's result files") for line in lines)
    assert any(line.startswith("split coop: CoOp's published files") for line in lines)


def test_the_order_is_the_runs_unless_another_is_asked_for(tmp_path):
    write(tmp_path / "a", MATRICES[3])
    text = against(tmp_path)
    assert "order II:" in text
    assert "warning" not in text
    assert text.splitlines()[2].split()[1:4] == list(ORDERS["II"][:3])
    other = against(tmp_path, "--order", "I")
    assert "warning: the runs learned order II, the tables show order I" in other
    assert "mine / seed 0 (!)" in other
    done = CliRunner().invoke(main, ["results", str(tmp_path), "--order", "I"])
    assert done.exit_code == 2
    assert "--order needs --against" in done.stderr


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"protocol": {"split": "coop"}}, "the split is coop: the rows of the split zscl are not comparable"),
        ({"protocol": {"split": "coop", "shots": 5}}, "the split is coop; no published row of this protocol is known"),
        ({"protocol": {"split": None}}, "the runs do not record the split"),
        ({"protocol": {"model": "ViT-B-32"}}, "the backbone is ViT-B-32; the published tables use ViT-B-16"),
        ({"protocol": {"pretrained": "laion2b_s34b_b88k"}}, "the pre-trained weights are laion2b_s34b_b88k; the"),
        ({"protocol": {"pretrained": None}}, "the pre-trained weights are random, or not recorded; the"),
        ({"protocol": {"images": "validation"}}, "accuracy was measured on validation images"),
        ({"protocol": {"shots": 7}}, "nothing is published for order I, classes task, 7 images a class; shown is order I"),
        ({"protocol": {"classes": "all"}}, "X-TAIL is published on ten data sets"),
        ({"tasks": ["MNIST", "Caltech101"]}, "2 tasks were learned, without Aircraft, CIFAR100"),
        ({"tasks": [*DATASETS[1:], "Aircraft"]}, "an order that is neither I nor II"),
        ({"budget": {"epochs": 3, "batch_size": 32}}, "the budget of a task is epochs 3, batch size 32; ZSCL's"),
        ({"incomparable": ["DTD is not the published data set"]}, "DTD is not the published data set"),
        ({"left_out": {"Food/test": [3, 7]}}, "unreadable images were left out of Food/test"),
        ({"base": "joint"}, "it has no Transfer and no Average"),
        ({"zero_shot": [24.3, 93.3, *[50.0] * 9]}, "published zero-shot accuracy on Caltech101 (93.3, published 88.4), CIFAR100"),
    ],
)  # fmt: skip
def test_what_differs_is_said_and_marked(changes, warning, tmp_path):
    zero_shot = changes.pop("zero_shot", None)
    write(tmp_path / "a", **changes)
    if zero_shot:
        path = tmp_path / "a" / "result.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"zero_shot": zero_shot}))
    lines = against(tmp_path).splitlines()
    assert any(line.startswith("warning: ") and warning in line for line in lines), lines[:4]
    assert any(line.startswith("mtil-vitb16 / mine / seed 0 (!)") for line in lines)
    data = json.loads(against(tmp_path, "--json"))["comparisons"][0]
    assert data["runs"][0]["comparable"] is False
    assert any(warning in line for line in data["runs"][0]["warnings"])


def test_rows_of_another_split_are_never_called_the_runs_own(tmp_path):
    write(tmp_path / "a", protocol={"split": "coop"})
    titles = [line.strip() for line in against(tmp_path).splitlines() if line.startswith("  split")]
    assert titles[0].startswith("split coop, the runs' own (but see the warnings")
    assert titles[1] == "split zscl: not the runs', not comparable with them"
    published = json.loads(against(tmp_path, "--json"))["comparisons"][0]["published"]
    assert {row["method"] for row in published if row["same_split"]} == {"DIKI", "DPW", "DPW small"}


def test_few_shots_and_scopes_have_their_own_rows(tmp_path):
    write(tmp_path / "five" / "a", protocol={"shots": 5}, budget={"iterations": 500, "batch_size": 64})
    text = against(tmp_path / "five")
    assert "5 images a class" in text.splitlines()[0]
    assert "warning" not in text
    assert "CoDyRA" in text
    assert "GIFT" not in text
    ten = [name for name in DATASETS if name != "CIFAR100"]
    write(tmp_path / "all" / "a", tasks=ten, protocol={"classes": "all", "split": "coop", "shots": 16})
    lines = against(tmp_path / "all").splitlines()
    assert [line for line in lines if line.startswith("warning")] == [
        "warning: X-TAIL is published on ten data sets, without CIFAR100, and with one template for all of them"
        " (evaluate.template)"
    ]
    assert any(line.startswith("RAIL-Primal ") for line in lines)
    write(tmp_path / "seen" / "a", protocol={"classes": "seen"})
    text = against(tmp_path / "seen")
    assert "CoLeCLIP" in text
    assert "GIFT" not in text


def test_a_run_of_another_stream_is_in_no_table_with_the_published_numbers(tmp_path):
    write(tmp_path / "a", tasks=["digits", "scans", "faces"], protocol={"stream": "mtil-mini", "split": None})
    lines = against(tmp_path).splitlines()
    assert lines[0].startswith("warning: nothing here is comparable: the stream is mtil-mini")
    assert lines[1].startswith("mtil-vitb16 / mine / seed 0, on mtil-mini:   Transfer ")
    assert lines[3].startswith("Published on MTIL, order I")
    assert not any("mtil-vitb16" in line or "runs' own" in line for line in lines[2:])
    data = json.loads(against(tmp_path, "--json"))["comparisons"][0]
    assert data["runs"][0]["comparable"] is False
    assert not any(row["same_split"] for row in data["published"])


def test_seeds_are_averaged_and_protocols_kept_apart(tmp_path):
    for seed, shift in ((0, 0.0), (1, 2.0)):
        table = {**MATRICES[0], "matrix": [[value / 2 + shift for value in line] for line in MATRICES[0]["matrix"]]}
        write(tmp_path / f"{seed}", table, seed=seed)
    write(tmp_path / "other", strategy="theirs", protocol={"split": "coop"})
    write(tmp_path / "short", strategy="shorter", budget={"iterations": 10, "batch_size": 64})
    write(tmp_path / "broken", strategy="left", status="failed", error="x")
    first, second = sorted(
        json.loads(against(tmp_path, "--json"))["comparisons"], key=lambda c: c["split_of_runs"] == "coop"
    )
    mine = next(run for run in first["runs"] if run["strategy"] == "mine")
    assert mine["seeds"] == [0, 1]
    assert mine["metrics"]["last"]["std"] == pytest.approx(2**0.5)
    assert mine["metrics"]["transfer"]["by_dataset"]["Caltech101"] == pytest.approx(67.108295 / 2 + 1, abs=1e-3)
    assert {run["strategy"]: run["comparable"] for run in first["runs"]} == {"mine": True, "shorter": False}
    assert [run["strategy"] for run in second["runs"]] == ["theirs"]
    text = against(tmp_path)
    assert text.count("Published on MTIL, order I") == 2
    assert "mtil-vitb16 / mine / 2 seeds " in text
    assert "± 1.41" in text
    assert "warning: mtil-vitb16 / shorter / seed 0: the budget of a task is iterations 10" in text
    assert "left out: mtil-vitb16 / left / seed 0" in text


def test_one_task_or_an_old_result_is_no_crash(tmp_path):
    write(tmp_path / "one", tasks=["MNIST"])
    write(
        tmp_path / "old", strategy="old", protocol={"split": None, "pretrained": None, "model": "ViT-B-16"}, budget={}
    )
    assert "1 task was learned, without Aircraft" in against(tmp_path / "one")
    assert "do not record the split" in against(tmp_path / "old")


def test_it_needs_no_torch(tmp_path):
    write(tmp_path / "a")
    code = (
        "import sys\nfrom mulki_plugins.cli import main\n"
        f"try: main(['results', {str(tmp_path)!r}, '--against', 'published'])\nexcept SystemExit as e: assert not e.code\n"
        "assert not {'torch', 'avalanche', 'open_clip', 'matplotlib'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "MoE-Adapters" in done.stdout


NEWER = {
    "I": {
        "PACT": (71.8, 81.1, 90.5), "CMAP": (74.2, 80.5, 88.7), "TRGE": (69.8, 78.5, 87.6), "AFA": (70.3, 78.5, 87.2),
        "FARA": (70.1, 78.1, 86.6), "LEBA": (69.2, 77.9, 87.3),
    },
    "II": {"FARA": (65.9, 76.3, 86.3), "LEBA": (65.1, 75.6, 86.4), "IAP": (64.9, 75.1, 85.9)},
}  # fmt: skip


def test_newer_rows_are_marked_as_second_hand():
    for order, methods in NEWER.items():
        for method, values in methods.items():
            found = [row(method, order, metric) for metric in METRICS]
            assert tuple(r.mean for r in found) == values
            assert {(r.split, r.sources) for r in found} == {("not stated", ("notes",))}


STEPS = {
    "stream": "split", "of": "mtil CIFAR100", "base": 0, "increment": 10, "class_order": 1993, "split": "zscl",
    "model": "ViT-B-16", "pretrained": "laion400m_e32", "classes": "seen",
}  # fmt: skip


def write_steps(folder, steps=10, **protocol):
    """A run whose accuracy among seen classes is 80 after the first step, and one less after each further one."""
    folder.mkdir(parents=True)
    Result(
        recipe="split-cifar100", strategy="mine", seed=0, status="complete", tasks=[f"CIFAR100-{i + 1}" for i in range(steps)],
        zero_shot=[75.0] * steps, matrix=[[80.0 - k] * steps for k in range(steps)], test_images=[10] * steps,
        protocol={**STEPS, **protocol},
    ).write(folder)  # fmt: skip


def test_class_incremental_runs_stand_beside_their_own_rows(tmp_path):
    write_steps(tmp_path / "b0")
    text = against(tmp_path / "b0")
    assert text.startswith(
        "Published class by class on CIFAR100 B0 Inc10: learned tasks among the classes of all learned"
    )
    assert "laion400m_e32" in text.splitlines()[0]
    tables = text.split("\nIncremental")
    lines = [line for table in tables[1:] for line in table.splitlines()]
    means = [line.split()[-1] for line in lines if line.startswith("split-cifar100 / mine")]
    assert means == ["75.50", "71.00"]
    assert any(line.split()[:2] == ["SimpleCIL", "(1)"] and "84.2" in line for line in lines)
    assert "split c3box, the runs' own" in text
    assert "MTIL" not in "\n".join(lines[:4]), "no row of another benchmark"
    data = json.loads(against(tmp_path / "b0", "--json"))["comparisons"][0]
    assert data["runs"][0]["comparable"] is True
    assert data["runs"][0]["metrics"]["incremental"]["mean"] == 75.5
    shown = {(r["method"], r["metric"]): r["mean"] for r in data["published"]}
    assert shown["CLIP zero-shot", "incremental"] == 81.81
    assert shown["BOFA", "incremental-last"] == 79.18
    write_steps(tmp_path / "b50", steps=6, base=50)
    shown = {(r["method"], r["metric"]): r["mean"] for r in
             json.loads(against(tmp_path / "b50", "--json"))["comparisons"][0]["published"]}  # fmt: skip
    assert (shown["CLIP zero-shot", "incremental"], shown["RAPF", "incremental"]) == (76.49, 83.41)


@pytest.mark.parametrize(
    ("protocol", "warning"),
    [
        ({"steps": 5}, "5 of the 10 steps were learned: no mean is comparable"),
        ({"pretrained": "openai"}, "the pre-trained weights are openai; most published rows use laion400m_e32"),
        ({"model": "RN50"}, "the backbone is RN50"),
        ({"class_order": 1}, "the classes come in that of seed 1; the published tables use seed 1993"),
        ({"class_order": None}, "the classes come in an order of their own; the published tables use seed 1993"),
        ({"shots": 16}, "training used 16 images a class"),
        ({"template": "a {}."}, "one template was used"),
        ({"of": "mtil Food"}, "the images of Food are parted in another way"),
        ({"increment": 7}, "nothing here is comparable: the stream is split"),
        ({"of": "folders birds"}, "nothing here is comparable: the stream is split"),
        ({"classes": "task"}, "nothing here is comparable: the stream is split"),
    ],
)
def test_what_keeps_class_incremental_runs_from_being_compared(tmp_path, protocol, warning):
    write_steps(tmp_path / "a", **protocol)
    assert f"warning: {warning}" in against(tmp_path)


def test_the_protocol_of_xtail_needs_its_template(tmp_path):
    names = [name for name in DATASETS if name != "CIFAR100"]
    xtail = {"classes": "all", "split": "coop", "shots": 16}
    write(tmp_path / "a", tasks=names, protocol=xtail)
    write(tmp_path / "b", tasks=names, protocol={**xtail, "template": "a photo of a {}."}, strategy="other")
    assert "with one template for all of them (evaluate.template)" in against(tmp_path / "a")
    assert "warning" not in against(tmp_path / "b")
