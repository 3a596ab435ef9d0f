"""`evaluate.held_out`: tasks that are tested after each task and never learned, in columns of their own."""

import csv
import json

import pytest
import torch
from click.testing import CliRunner

from mulki_plugins.cli import main
from mulki_plugins.errors import MulkiError
from mulki_plugins.metrics import average, last
from mulki_plugins.recipe.resolve import Changes, resolve
from mulki_plugins.report.result import FILE, read_result
from mulki_plugins.streams.task import hold_out
from mulki_plugins.training.extend import extend_experiment
from mulki_plugins.training.resume import resume_experiment
from mulki_plugins.training.run import run_experiment
from tests.conftest import Killed, small_stream
from tests.test_extend import parts as extendable  # noqa: F401  the stream `chosen`

SMALL = (
    "stream={name: small}", "model={name: small-clip}", "reference=small-other", "train.iterations=4",
    "train.schedule.warmup=1", "train.batch_size=4", "train.checkpoint.every=2", "device=cpu", "loggers=[csv]",
)  # fmt: skip
HELD = "evaluate.held_out=[second]"


@pytest.fixture(autouse=True)
def small_world(extendable):  # noqa: F811
    torch.set_num_threads(1)


def resolved(*settings, strategy="mulki"):
    return resolve("recipes/mtil.yaml", Changes(strategy=strategy, settings=(*SMALL, *settings)))


def run(tmp_path, name, *settings, strategy="mulki"):
    run_experiment(resolved(*settings, strategy=strategy), 0, tmp_path, folder=tmp_path / name)
    return tmp_path / name


def result(folder):
    return json.loads((folder / FILE).read_text())


def mulki(*arguments, code=0):
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    assert done.exit_code == code, done.output + done.stderr
    return done.output


@pytest.mark.parametrize("strategy", ["mulki", "finetune"])
def test_a_held_out_task_is_tested_and_never_learned(tmp_path, strategy):
    whole = result(run(tmp_path, "whole", strategy=strategy))
    held = result(run(tmp_path, "held", HELD, strategy=strategy))
    assert (whole["tasks"], held["tasks"]) == (["first", "second", "third"], ["first", "third"])
    assert list(held["held_out"]) == ["second"]
    column = held["held_out"]["second"]
    assert len(column) == 3
    assert held["zero_shot"] == [whole["zero_shot"][0], whole["zero_shot"][2]]
    assert column[0] == whole["zero_shot"][1]
    assert held["matrix"][0] == [whole["matrix"][0][0], whole["matrix"][0][2]], "the first task is learned alike"
    assert column[1] == whole["matrix"][0][1]
    matrix = held["matrix"]
    assert held["metrics"]["last"] == pytest.approx(last(matrix))
    assert held["metrics"]["average"] == pytest.approx(average(matrix))


def test_it_changes_no_number_of_the_matrix(tmp_path):
    """The stream without the task, and with it held out, under each scope."""
    for classes in ("task", "seen", "all"):
        scope = f"evaluate.classes={classes}"
        chosen = "stream={name: chosen, tasks: [first, second]}", scope
        more = "stream={name: chosen, tasks: [first, fourth, second]}", "evaluate.held_out=[fourth]", scope
        without, held = result(run(tmp_path, f"a-{classes}", *chosen)), result(run(tmp_path, f"b-{classes}", *more))
        assert without["held_out"] == {}
        for key in ("tasks", "zero_shot", "matrix", "metrics"):
            assert without[key] == held[key], (classes, key)


def test_it_is_tested_among_its_own_classes_and_with_all_among_those_of_the_stream_too(tmp_path):
    columns = {}
    for classes in ("task", "seen", "all"):
        settings = HELD, f"evaluate.classes={classes}"
        columns[classes] = result(run(tmp_path, classes, *settings, strategy="zero-shot"))["held_out"]["second"]
    assert columns["seen"] == columns["task"], "it is never learned"
    assert columns["all"][0] <= columns["task"][0]
    whole = result(run(tmp_path, "whole", "evaluate.classes=all", strategy="zero-shot"))
    assert columns["all"] == [whole["zero_shot"][1]] * 3, "its own classes beside the stream's"


@pytest.mark.parametrize("strategy", ["zero-shot", "joint"])
def test_strategies_that_train_nothing_or_once(tmp_path, strategy):
    held = result(run(tmp_path, "run", HELD, strategy=strategy))
    column = held["held_out"]["second"]
    assert len(column) == 3
    assert column[1] == column[2]
    assert (column[0] == column[1]) or strategy == "joint"


def test_a_resumed_run_keeps_its_columns(tmp_path, kill_at):
    stream = "stream={name: chosen, tasks: [first, second, fourth]}"
    settings = stream, "evaluate.held_out=[fourth]", "train.iterations=8", "train.optimizer.lr=0.01"
    alone = result(run(tmp_path, "alone", *settings, strategy="finetune"))
    column = alone["held_out"]["fourth"]
    assert len(set(column)) > 1
    kill_at(2, 3)
    with pytest.raises(Killed):
        run(tmp_path, "killed", *settings, strategy="finetune")
    folder = tmp_path / "killed"
    assert result(folder)["held_out"]["fourth"] == column[:2]
    with pytest.raises(MulkiError, match="held_out"):
        resume_experiment(resolved(stream, *settings[2:], strategy="finetune"), 0, folder)
    resume_experiment(resolved(*settings, strategy="finetune"), 0, folder)
    for key in ("held_out", "matrix", "metrics"):
        assert result(folder)[key] == alone[key]


@pytest.mark.parametrize("classes", ["task", "all"])
def test_an_extended_run_keeps_its_columns(tmp_path, classes):
    def settings(*tasks):
        names = ", ".join(tasks)
        return f"stream={{name: chosen, tasks: [{names}]}}", "evaluate.held_out=[fourth]", f"evaluate.classes={classes}"

    run(tmp_path, "parent", *settings("first", "second", "fourth"))
    alone = result(run(tmp_path, "alone", *settings("first", "second", "third", "fourth")))
    extend_experiment(
        read_result(tmp_path / "parent" / FILE),
        resolved(*settings("first", "second", "third", "fourth")),
        tmp_path / "more",
    )
    extended = result(tmp_path / "more")
    assert extended["held_out"] == alone["held_out"]
    assert extended["matrix"] == alone["matrix"]
    mulki("extend", tmp_path / "parent", "--tasks", "third", "--out", tmp_path / "by-command")
    assert result(tmp_path / "by-command")["held_out"] == alone["held_out"]
    refused = mulki("extend", tmp_path / "parent", "--tasks", "fourth", code=2)
    assert "the run holds fourth out of its training (evaluate.held_out); learn it in a new run" in refused


def test_where_it_is_shown(tmp_path):
    folder = run(tmp_path, "run", HELD, strategy="finetune")
    column = result(folder)["held_out"]["second"]
    with (folder / "matrix.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["after", "first", "third", "second (held out)"]
    assert [float(row[-1]) for row in rows[1:]] == pytest.approx(column, abs=1e-4)
    table = mulki("results", folder)
    assert table.splitlines()[1].split() == ["after", "first", "third", "mean", "(second)"]
    assert "in brackets: held out, tested and never learned" in table
    assert "(second)" in mulki("results", folder, "--format", "md")
    by_task = mulki("results", folder, "--by-task")
    held = by_task[by_task.index("Held out") :]
    assert f"{column[-1]:.1f}" in held
    assert f"{column[0]:.1f}" in held
    mulki("report", folder, "--out", tmp_path / "report")
    [page] = (tmp_path / "report").glob("*.html") if (tmp_path / "report").is_dir() else [tmp_path / "report"]
    text = page.read_text("utf-8")
    assert f"{column[-1]:.2f} (zero-shot {column[0]:.1f})" in text[text.index("Held-out tasks") :]
    assert json.loads(mulki("results", folder, "--json"))["runs"][0]["held_out"] == {"second": column}


def test_an_older_result_without_the_field_stays_readable(tmp_path):
    folder = run(tmp_path, "run", strategy="finetune")
    data = result(folder)
    del data["held_out"], data["test_images"]
    (folder / FILE).write_text(json.dumps(data))
    assert read_result(folder / FILE).held_out == {}
    for wrong in ({"second": [101.0]}, {"second": [1.0] * 9}, {"second": 3}, [1]):
        (folder / FILE).write_text(json.dumps({**data, "held_out": wrong}))
        with pytest.raises(MulkiError):
            read_result(folder / FILE)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("evaluate.held_out=[fod]",), r"\$.evaluate.held_out\[0\]: the stream has no task 'fod' .did you mean 'food'"),
        (("evaluate.held_out=[food,food]",), "the task 'food' is held out twice"),
        (("stream.tasks=[food]", "evaluate.held_out=[food]"), "every task of the stream is held out"),
        (("stream.tasks=[flags]", "evaluate.held_out=[food]"), "the stream has no task 'food'"),
        (("evaluate.held_out=[food]", "train.per_task={food: {lr: 1e-3}}"), "is held out .*so it is never trained"),
        (("evaluate.held_out=food",), "expected a list"),
    ],
)
def test_names_are_checked_before_anything_is_built(settings, message):
    with pytest.raises(MulkiError, match=message):
        resolve("mtil", Changes(settings=settings))


def test_names_are_checked_when_the_stream_is_built():
    stream = small_stream()
    with pytest.raises(MulkiError, match=r"the stream has no task 'secnd' .did you mean 'second'"):
        hold_out(stream, ["secnd"])
    with pytest.raises(MulkiError, match="none is left to learn"):
        hold_out(stream, ["first", "second", "third"])
    part = hold_out(stream, ["third"])
    assert ([task.name for task in part.tasks], [task.name for task in part.held_out]) == (
        ["first", "second"],
        ["third"],
    )
