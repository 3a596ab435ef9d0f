"""A run that extends another one, some of whose accuracies could not be measured: every view of it leaves them out."""

import json
import shutil

import pytest
from click.testing import CliRunner

from mulki_plugins.cli import main
from mulki_plugins.recipe.resolve import Changes, resolve
from mulki_plugins.report.formats import Table, render
from mulki_plugins.training.run import run_experiment
from tests.conftest import small_world

FEW = ("model={name: small-clip}", "train.iterations=2", "train.batch_size=4", "train.schedule.warmup=0", "loggers=[]")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of two tasks, and one of three that extends it, without the accuracies after the first task."""
    folder = tmp_path_factory.mktemp("gaps")
    with small_world():
        for name, stream in (("short", "small-other"), ("long", "small")):
            chosen = resolve("mtil", Changes(strategy="finetune", settings=(f"stream={stream}", *FEW)))
            run_experiment(chosen, 0, folder, folder=folder / "mtil" / name / "seed-0")
        run = folder / "mtil" / "long" / "seed-0"
        data = json.loads((run / "result.json").read_text())
        data["matrix"][0][1:] = [None, None]
        data["metrics"]["transfer"] = data["metrics"]["average"] = None
        data["parent"] = {"folder": "short", "tasks": 1, "settings": "", "started": ""}
        (run / "result.json").write_text(json.dumps(data))
        (run / "predictions" / "row-01.npz").unlink()
        yield folder, run


def mulki(*arguments):
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output + done.stderr
    assert "nan" not in done.stdout.lower()
    return done


@pytest.mark.parametrize("form", ["text", "csv", "md", "latex"])
@pytest.mark.parametrize("view", [[], ["--by-task"], ["--by-class", "third"], ["--confusion", "third"]])
def test_a_table_has_no_number_there(runs, view, form):
    folder, run = runs
    for where in (run, folder):
        mulki("results", where, *view, "--format", form)


def test_json_has_null_there(runs):
    data = json.loads(mulki("results", runs[1], "--json").stdout, parse_constant=pytest.fail)
    assert data["runs"][0]["matrix"][0][1:] == [None, None]
    assert data["summary"][0]["by_task"]["transfer"] == {}


def test_the_report_and_its_tables_have_no_number_there(runs, tmp_path):
    folder, _ = runs
    mulki("report", folder, "--out", tmp_path / "r.html", "--csv", tmp_path / "r.csv", "--latex", tmp_path / "r.tex")
    for name in ("r.html", "r.csv", "r.tex"):
        assert "nan" not in (tmp_path / name).read_text().replace("isNaN(", "").lower()
    assert (tmp_path / "r.html").read_text().count('<td class="none"><b>–</b>') == 2


def test_a_run_without_the_task_is_passed_over(runs):
    folder, _ = runs
    done = mulki("results", folder, "--by-class", "third")
    assert "short/seed-0: it has no task third" in done.stderr
    missing = CliRunner().invoke(main, ["results", str(folder), "--by-class", "thirt"])
    assert missing.exit_code == 2
    assert "did you mean 'third'?" in missing.stderr


def test_runs_of_other_folders_are_named_by_their_tasks(runs, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    _, run = runs
    tasks = []
    for name in ("first", "second", "third", "fourth", "fifth"):
        for picture in ("a/1.png", "a/2.png", "b/1.png", "b/2.png"):
            (tmp_path / "data" / name / picture).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "data" / name / picture).write_bytes(b"x")
        tasks.append({"name": name, "images": str(tmp_path / "data" / name)})
        if len(tasks) > 2:
            copied = tmp_path / "runs" / name / "seed-0"
            shutil.copytree(run, copied)
            data = json.loads((run / "result.json").read_text())
            names = [task["name"] for task in tasks]
            matrix = [[50.0] * len(names) for _ in names]
            data |= {
                "tasks": names,
                "matrix": matrix,
                "zero_shot": matrix[0],
                "settings": name,
                "test_images": [8] * len(names),
            }
            (copied / "result.json").write_text(json.dumps(data))
            recipe = {
                "name": "mtil", "stream": {"name": "folders", "tasks": tasks}, "model": {"name": "mulki-tiny"},
                "strategy": "finetune", "train": {"iterations": 2, "batch_size": 2 + len(tasks), "optimizer": {"lr": 0.1}},
            }  # fmt: skip
            (copied / "recipe.yaml").write_text(json.dumps(recipe))
    text = mulki("results", tmp_path / "runs").stdout
    assert "finetune tasks=first,second,third batch_size=5 " in text
    assert "finetune tasks=first,second,third,fourth batch_size=6 " in text
    assert "finetune tasks=first,...,fifth batch_size=7 " in text
    assert "images=" not in text


def test_a_terminal_is_not_steered_by_names_and_long_ones_are_cut():
    table = Table(title="\u202etitle", head=["class", "\u2067" + "x" * 300], rows=[["\u202ered", 1.0]], foot=["\u202e"])
    text = render([table], "text", 80)
    assert not set(text) & set("\u202e\u2067")
    assert max(map(len, text.splitlines())) <= 90
    assert "x" * 300 in render([table], "csv", 80)


def test_one_task_is_not_tasks(runs):
    assert "which learned 1 task\n" in mulki("results", runs[1]).stdout
