"""`mulki results`: runs side by side, by task and by class, in each format and at each width."""

import csv
import io
import json
import re
import statistics

import numpy as np
import pytest
from click.testing import CliRunner

from mulki_plugins.characters import width
from mulki_plugins.cli import main
from mulki_plugins.recipe.emit import dump_yaml
from mulki_plugins.recipe.resolve import Changes, resolve
from mulki_plugins.recipe.schema import as_data
from mulki_plugins.report.by_class import accuracy_by_class, confusion, worst_images
from mulki_plugins.report.formats import Table, render
from mulki_plugins.report.predictions import SURE, UNREAD, Answers, read_predictions, write_row, write_stream
from mulki_plugins.report.result import Result

MTIL = ["animals", "digits", "faces", "flags", "food", "letters", "objects", "scans", "shapes", "textures", "travel"]


def a_run(folder, strategy="mulki", seed=0, tasks=("a", "b", "c"), **more):
    """A complete run with a random matrix."""
    random = np.random.default_rng(seed + len(strategy))
    matrix = random.uniform(10, 99.9, (len(tasks), len(tasks))).round(2).tolist()
    last = statistics.fmean(matrix[-1])
    result = Result(
        recipe="mtil", strategy=strategy, seed=seed, tasks=list(tasks), zero_shot=matrix[0], matrix=matrix,
        **{
            "status": "complete", "metrics": {"last": last, "forgetting": 100 - last}, "protocol": {"classes": "task"},
            "seconds": {"total": 250.0 + 100 * seed}, "device": {"peak_memory_mib": 812.4},
            "parameters": {"trained": 2_800_000, "all": 2_800_001}, "flops": {"total": 3_210_000_000_000}, **more,
        },
    )  # fmt: skip
    folder.mkdir(parents=True)
    result.write(folder)
    return result


def results(*arguments, columns=80):
    done = CliRunner().invoke(main, ["results", *map(str, arguments)], env={"COLUMNS": str(columns)})
    return done


def printed(*arguments, columns=80):
    done = results(*arguments, columns=columns)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_eleven_tasks_fit_in_eighty_columns(tmp_path):
    run = a_run(tmp_path / "run", tasks=MTIL)
    lines = printed(tmp_path / "run").splitlines()[1:]
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["after", *map(str, range(1, 12)), "mean"]
    for i, task in enumerate(MTIL):
        assert lines[3 + i].split() == [
            str(i + 1), task, *(f"{value:.1f}" for value in run.matrix[i]), f"{statistics.fmean(run.matrix[i]):.1f}"
        ]  # fmt: skip
    wide = printed(tmp_path / "run", columns=120).splitlines()[1:]
    assert wide[0].split() == ["after", *MTIL, "mean"]
    assert wide[-1] == lines[-1], "the metrics"


def test_an_unfinished_matrix_still_explains_its_numbers(tmp_path):
    run = a_run(tmp_path / "run", tasks=MTIL)
    run.status, run.matrix, run.metrics, run.error = "failed", run.matrix[:2], {}, "OSError: gone"
    run.write(tmp_path / "run")
    text = printed(tmp_path / "run")
    assert "11 travel" in text
    assert "failed: 2 of 11 tasks finished; OSError: gone" in text


def test_more_tasks_than_fit_are_broken_into_blocks(tmp_path):
    run = a_run(tmp_path / "run", tasks=[f"task-{i}" for i in range(30)])
    text = printed(tmp_path / "run")
    assert max(map(len, text.splitlines()[1:])) <= 80
    numbers = re.findall(r"\b\d+\.\d\b", text)
    assert len(numbers) == 31 * 31, "each accuracy and each mean once"
    assert f"{run.matrix[17][23]:.1f}" in numbers


def test_the_summary_has_cost_and_what_was_just_learned(tmp_path):
    runs = [a_run(tmp_path / f"{name}-{seed}", name, seed) for name in ("mulki", "ewc") for seed in (0, 1)]
    header, _, *lines = printed(tmp_path, columns=200).splitlines()
    assert re.split(r"  +", header) == [
        "recipe", "strategy", "seeds", "last", "forgetting", "just learned", "time", "memory", "trained", "flops",
    ]  # fmt: skip
    diagonals = [statistics.fmean(run.matrix[i][i] for i in range(3)) for run in runs[:2]]
    mulki = next(line for line in lines if "mulki" in line)
    assert f"{statistics.fmean(diagonals):.2f} ± {statistics.stdev(diagonals):.2f}" in mulki
    assert mulki.endswith("5.0 min  812 MiB    2.8 M  3.21 TFLOP")
    for line in printed(tmp_path).splitlines():
        assert len(line) <= 80
    data = json.loads(printed(tmp_path, "--json"))
    [summary] = [entry for entry in data["summary"] if entry["strategy"] == "mulki"]
    assert summary["just_learned"] == {"mean": statistics.fmean(diagonals), "std": statistics.stdev(diagonals)}
    assert summary["costs"]["time"]["mean"] == 300
    assert {run["strategy"] for run in data["runs"]} == {"mulki", "ewc"}


@pytest.mark.parametrize("spoilt", [{"total": "long"}, {"total": -1}, {"total": None}, {"total": [1]}, {}])
def test_a_cost_that_is_no_number_is_left_out(tmp_path, spoilt):
    a_run(tmp_path / "a", seconds=spoilt)
    a_run(tmp_path / "b", "ewc")
    mulki = next(line for line in printed(tmp_path, columns=200).splitlines() if "mulki" in line)
    assert mulki.split()[-7:] == ["-", "812", "MiB", "2.8", "M", "3.21", "TFLOP"]


def test_sorted_by_any_column(tmp_path):
    for name in ("x", "yy", "zzz"):
        a_run(tmp_path / name, name, seconds={"total": 1000.0 / len(name)})
    a_run(tmp_path / "none", "none", metrics={}, seconds={})

    def order(by):
        return [
            row["strategy"] for row in csv.DictReader(io.StringIO(printed(tmp_path, "--sort", by, "--format", "csv")))
        ]

    def numbers(by):
        rows = csv.DictReader(io.StringIO(printed(tmp_path, "--sort", by, "--format", "csv")))
        return [float(row[by]) for row in rows if row[by]]

    assert numbers("last") == sorted(numbers("last"), reverse=True)
    assert numbers("forgetting") == sorted(numbers("forgetting")), "less is better"
    assert order("last")[-1] == order("time")[-1] == "none"
    assert order("time")[:3] == ["zzz", "yy", "x"]
    assert order("name") == ["none", "x", "yy", "zzz"]
    refused = results(tmp_path, "--sort", "lst")
    assert refused.exit_code == 2
    assert "did you mean 'last'?" in refused.stderr


def test_orders_of_a_stream_have_a_column(tmp_path):
    for order in ("I", "II"):
        recipe = resolve("mtil", Changes(settings=(f"stream.order={order}",))).recipe
        folder = tmp_path / order
        a_run(folder, tasks=MTIL if order == "I" else MTIL[::-1], settings=order)
        (folder / "recipe.yaml").write_text(dump_yaml(as_data(recipe)))
    rows = list(csv.DictReader(io.StringIO(printed(tmp_path, "--format", "csv"))))
    assert [(row["strategy"], row["order"]) for row in rows] == [("mulki", "I"), ("mulki", "II")]


def test_runs_beside_each_other_task_by_task(tmp_path):
    runs = {(name, seed): a_run(tmp_path / f"{name}{seed}", name, seed) for name in ("p", "q") for seed in (0, 1)}
    rows = list(csv.DictReader(io.StringIO(printed(tmp_path, "--by-task", "--format", "csv"))))
    values = {(row["table"].split()[0], row["task"]): row for row in rows}
    last = [runs["p", seed].matrix[2][1] for seed in (0, 1)]
    assert float(values["At", "b"]["p"]) == pytest.approx(statistics.fmean(last), abs=1e-4)
    assert float(values["At", "b"]["p std"]) == pytest.approx(statistics.stdev(last), abs=1e-4)
    learned = [runs["q", seed].matrix[1][1] for seed in (0, 1)]
    assert float(values["When", "b"]["q"]) == pytest.approx(statistics.fmean(learned), abs=1e-4)
    before = [statistics.fmean(runs["q", seed].matrix[i][2] for i in range(2)) for seed in (0, 1)]
    assert float(values["Before", "c"]["q"]) == pytest.approx(statistics.fmean(before), abs=1e-4)
    assert ("Before", "a") not in values, "the first task is never tested before it is learned"
    assert len(printed(tmp_path, "--by-task").split("At the end (Last)")) == 2


EVIL = "\x1b[31m&%$#_{}~^\\|<script>=1+1"


def test_no_format_lets_a_name_do_anything(tmp_path):
    table = Table(title=EVIL, head=["name", EVIL], rows=[[EVIL, 1.0], ["=1+1", (2.0, 0.5)], ["-x", None]], foot=[EVIL])
    for form in ("text", "latex", "csv", "md"):
        assert "\x1b" not in render([table], form, 80)
    latex = [line for line in render([table], "latex", 80).splitlines() if not line.startswith("%")]
    assert all(line.count("&") - line.count(r"\&") == 1 for line in latex if line.endswith(r" \\"))
    assert r"\textbackslash{}" in latex[2]
    assert re.search(r"(?<!\\)[#%_]", "".join(latex)) is None
    rows = list(csv.reader(io.StringIO(render([table], "csv", 80))))
    assert [row[0] for row in rows] == ["name", rows[1][0], "'=1+1", "'-x"]
    assert rows[2][1:] == ["2.0000", "0.5000"]
    assert rows[3][1:] == ["", ""]
    markdown = render([table], "md", 80)
    assert "<script>" not in markdown
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 3 for line in markdown.splitlines() if line.startswith("|"))


def test_every_format_has_the_numbers_of_a_run(tmp_path):
    run = a_run(tmp_path / "run")
    for form in ("text", "latex", "md"):
        assert f"{run.matrix[1][2]:.1f}" in printed(tmp_path / "run", "--format", form)
    rows = list(csv.DictReader(io.StringIO(printed(tmp_path / "run", "--format", "csv"))))
    assert [float(row["c"]) for row in rows] == pytest.approx([run.zero_shot[2], *(row[2] for row in run.matrix)])
    assert r"\toprule" in printed(tmp_path / "run", "--format", "latex")


def test_blocks_keep_wide_characters_in_their_columns():
    names = ["花" * 8, "Мир", "cafe\u0301"]
    table = Table(title="", head=["task", *names], rows=[[name, 1.0, 22.0, 3.0] for name in names])
    for line in render([table], "text", 30).splitlines():
        assert width(line) <= 36


@pytest.fixture
def kept(tmp_path):
    """A run of two tasks whose answers are known: five images of `cat` and five of `dog`, two of `owl`."""
    folder = tmp_path / "run"
    a_run(folder, tasks=("pets", "birds"), left_out={"pets/test": ["pets/9.png"]})
    files = [[f"pets/{i}.png" for i in range(10)], None]
    write_stream(folder, ["pets", "birds"], [["cat", "dog"], ["owl", "cat"]], [[0] * 5 + [1] * 5, [0, 0]], files)
    pets = [
        [0, 0, 0, 0, 0, 0, 0, 0, 0, UNREAD],
        [0, 0, 0, 0, 0, 1, 1, 1, 1, UNREAD],
        [0, 0, 0, 1, 3, 1, 3, 3, 2, UNREAD],
    ]
    sure = [0.9, 0.9, 0.9, 0.5, 0.6, 0.9, 1.0, 0.7, 0.8, 0.0]
    for row in range(3):
        answers = [(pets[row], sure), ([2, 2], [1.0, 1.0])]
        parts = [
            Answers(predicted=np.array(p), confidence=(np.array(s) * SURE).round().astype(np.uint8)) for p, s in answers
        ]
        write_row(folder, row, parts, 4)
    return folder


def test_accuracy_and_confusion_by_hand(kept):
    predictions = read_predictions(kept)
    cat, dog = accuracy_by_class(predictions, 0)
    assert (cat.images, dog.images) == (5, 4), "the image that could not be read does not count"
    assert cat.accuracies == {"zero-shot": 100.0, "just learned": 100.0, "last": 60.0}
    assert dog.accuracies == {"zero-shot": 0.0, "just learned": 100.0, "last": 25.0}
    assert cat.confused_with == [(1, 1), (3, 1)]
    assert dog.confused_with == [(3, 2), (2, 1)], "the most frequent first"
    columns, counts = confusion(predictions, 0)
    assert columns == [0, 1, 2, 3]
    assert counts.tolist() == [[3, 1, 0, 1], [0, 1, 1, 2]]
    assert [(image.file, image.label, image.predicted) for image in worst_images(predictions, 0, 2)] == [
        ("pets/6.png", 1, 3),
        ("pets/8.png", 1, 2),
    ]


def test_the_command_shows_classes_and_images(kept):
    text = printed(kept, "--by-class", "pets", "--worst", "1")
    assert re.search(r"dog +4 +0\.0 +100\.0 +25\.0 +cat \(birds\) 2, owl \(birds\) 1", text)
    assert text.index("dog  ") < text.index("cat  "), "the worst class first"
    assert "pets/6.png" in text
    assert "pets/8.png" not in text
    assert "left out, since they could not be read: pets/9.png" in text
    data = json.loads(printed(kept, "--by-class", "pets", "--json"))["runs"][0]
    assert data["classes"][0]["confused_with"][0] == {"task": "pets", "class": "dog", "images": 1}
    assert data["worst_images"][0]["predicted"] == {"task": "birds", "class": "cat"}
    assert data["left_out"] == ["pets/9.png"]
    table = list(csv.reader(io.StringIO(printed(kept, "--confusion", "pets", "--format", "csv"))))
    assert table == [
        ["class", "cat", "dog", "owl (birds)", "cat (birds)"],
        ["cat", "3", "1", "0", "1"],
        ["dog", "0", "1", "1", "2"],
    ]


def test_what_cannot_be_shown_is_said(kept, tmp_path):
    a_run(tmp_path / "old", "ewc")
    both = results(kept, tmp_path / "old", "--by-class", "pets")
    assert both.exit_code == 0
    assert "old: it kept no predictions" in both.stderr
    for arguments, hint in (
        ([tmp_path / "old", "--by-class", "a"], "evaluate.predictions=true"),
        ([kept, "--by-class", "pest"], "did you mean 'pets'?"),
        ([kept, "--by-class", "pets", "--by-task"], "give one of them"),
        ([kept, "--format", "csv", "--json"], "exclude each other"),
        ([kept, "--by-task", "--json"], "--by-task has no JSON"),
        ([kept, "--by-class", "first", "--sort", "last"], "--sort is for the comparison of runs"),
        ([kept, "--confusion", "pets", "--json"], "--format csv"),
    ):
        done = results(*arguments)
        assert done.exit_code == 2, arguments
        assert hint in done.stderr
