"""`mulki extend`: a finished run learns further tasks, and ends as if they had always been there."""

import json
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from avalanche.training.plugins import SupervisedPlugin
from click.testing import CliRunner
from PIL import Image
from torch import nn

from mulki_plugins.cli import main
from mulki_plugins.errors import MulkiError
from mulki_plugins.models.adapter import Adapter
from mulki_plugins.recipe.resolve import Changes, resolve
from mulki_plugins.registry.catalog import Catalog, Provenance
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.registry.register import Register
from mulki_plugins.report.predictions import read_predictions
from mulki_plugins.report.result import FILE, read_result
from mulki_plugins.streams import TaskStream
from mulki_plugins.testing.small import small_task
from mulki_plugins.training import earlier_rows, provenance
from mulki_plugins.training.checkpoint import checkpoints
from mulki_plugins.training.extend import extend_experiment
from mulki_plugins.training.kept_weights import kept_weights
from mulki_plugins.training.resume import resume_experiment
from mulki_plugins.training.run import run_experiment
from tests.conftest import Killed
from tests.test_resume import torture

__all__ = ["torture"]

SMALL = (
    "model={name: small-clip}", "reference=small-other", "train.iterations=4", "train.schedule.warmup=1",
    "train.batch_size=4", "train.workers=0", "device=cpu", "loggers=[csv]",
)  # fmt: skip
ALL = {
    "first": (("red", "green"), ()), "second": (("blue", "yellow", "grey"), ()),
    "third": (("green", "blue"), ("grass", "sea")), "fourth": (("yellow", "red"), ("a lemon", "a rather ripe cherry")),
}  # fmt: skip
CHANGED = "changed since it was run: "


def chosen(*, tasks: list[str]) -> TaskStream:
    """Colours.

    Args:
        tasks: The names of the tasks.
    """
    if unknown := [task for task in tasks if task not in ALL]:
        raise MulkiError(f"chosen has no task {unknown[0]!r}")
    made = [small_task(t, ALL[t][0], list(ALL).index(t), class_names=ALL[t][1]) for t in tasks]
    return TaskStream(name="chosen", tasks=tuple(made))


class TakesPart(SupervisedPlugin):
    """Changes the answers of an evaluation."""

    def after_eval_forward(self, strategy, **kwargs):
        strategy.mb_output = -strategy.mb_output


class Growing(Adapter):
    """A random vector for each task, added to the image features, and the number of tasks that have ended."""

    def apply(self, clip):
        self.ended = 0
        clip.visual.shifts = nn.ParameterDict()
        clip.visual.register_forward_hook(lambda visual, x, z: z + sum(visual.shifts.values()))

    def before_task(self, clip, task):
        clip.visual.shifts[str(task)] = nn.Parameter(torch.randn(clip.visual.output_dim) / 10)

    def after_task(self, clip, task):
        clip.visual.shifts[str(task)].requires_grad_(False)
        self.ended += 1

    def state_dict(self):
        return {"ended": self.ended}

    def load_state_dict(self, state):
        self.ended = state["ended"]


@pytest.fixture(autouse=True)
def parts(small_parts):
    torch.set_num_threads(1)
    mine = Catalog()
    register = Register(mine, Provenance(distribution="mulki", version=""))
    register.stream("chosen", chosen, summary="colours")
    register.adapter("growing", Growing, summary="a vector a task")
    register.plugin("takes-part", TakesPart, summary="in evaluations")
    catalog().parts.update(mine.parts)
    yield
    for key in mine.parts:
        del catalog().parts[key]


def resolved(strategy, tasks, *settings, with_plugins=()):
    stream = f"stream={{name: chosen, tasks: [{', '.join(list(ALL)[:tasks])}]}}"
    return resolve("mtil", Changes(strategy=strategy, settings=(stream, *SMALL, *settings), with_plugins=with_plugins))


def run(tmp_path, name, strategy, tasks, *settings, **changes):
    folder = tmp_path / name
    run_experiment(resolved(strategy, tasks, *settings, **changes), 0, tmp_path, folder=folder)
    return folder


def extended(parent, folder, strategy, tasks, *settings, force=False, **changes):
    recipe = resolved(strategy, tasks, *settings, **changes)
    extend_experiment(read_result(parent / FILE), recipe, folder, force=force)
    return folder


def mulki(*arguments, ok=True):
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    assert done.exit_code == (0 if ok else 2), done.output + done.stderr
    assert "Traceback" not in done.output + done.stderr
    return done


def result(folder):
    return json.loads((folder / FILE).read_text())


def curves(folder):
    """The points, but for the means over tasks: those before the extension are means over fewer tasks."""
    lines = (folder / "metrics.csv").read_text().splitlines()
    return sorted(line for line in lines if not line.startswith("eval/mean"))


def assert_same(one, other):
    """Rows, metrics, weights, the plugins' states, the kept weights and the points of the curves are the same."""
    a, b = result(one), result(other)
    for key in ("tasks", "zero_shot", "matrix", "metrics", "status", "settings"):
        assert a[key] == b[key], key
    ends = [{c.path.name: c.files for c in checkpoints(folder)[0]} for folder in (one, other)]
    assert max(ends[0]) == max(ends[1])
    assert ends[0][max(ends[0])] == ends[1][max(ends[1])]
    kept = [{tasks: c.files for tasks, c in kept_weights(folder).items()} for folder in (one, other)]
    assert kept[0] == kept[1]
    if json.loads((one / FILE).read_text())["protocol"]["classes"] != "all":  # other classes, other curves
        assert curves(one) == curves(other)


def contents(folder):
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


STRATEGIES = [
    ("mulki-plus", (), ()), ("replay", (), ()), ("icarl", (), ()), ("ewc", (), ()), ("si", (), ()), ("zscl", (), ()),
    ("finetune", ("strategy.base=cumulative",), ()), ("zero-shot", (), ()),
    ("mulki-plus", ("evaluate.classes=seen",), ()), ("mulki", (), ()), ("finetune", ("evaluate.classes=all",), ()),
    ("finetune", ("model.adapters=[{growing: {}}]",), ()),
    ("finetune", ("model.adapters=[{lora: {merge_each_task: true}}]",), ()),
    ("zero-shot", ("evaluate.classes=seen",), ()), ("zero-shot", ("evaluate.classes=all",), ()),
]  # fmt: skip


@pytest.mark.flops
@pytest.mark.parametrize(("strategy", "settings", "added"), STRATEGIES)
def test_two_tasks_and_one_more_are_a_run_of_three(tmp_path, strategy, settings, added):
    three = run(tmp_path, "three", strategy, 3, *settings, with_plugins=added)
    two = run(tmp_path, "two", strategy, 2, *settings, with_plugins=added)
    before = contents(two)
    more = extended(two, tmp_path / "more", strategy, 3, *settings, with_plugins=added)
    assert contents(two) == before
    assert_same(three, more)
    counted = [result(folder)["flops"] for folder in (two, three, more)]
    assert counted[1]["step"] == counted[2]["step"]
    assert counted[0]["train"] == counted[1]["train"][:2] == counted[2]["train"][:2]
    assert counted[2]["total"] == sum(counted[2]["train"]) == pytest.approx(counted[1]["total"], rel=0.05)
    parent = result(more)["parent"]
    assert parent["folder"] == str(two)
    assert parent["tasks"] == 2
    assert parent["settings"] == result(two)["settings"] != result(more)["settings"]


def test_several_in_a_row_with_the_run_before_deleted_each_time(tmp_path):
    four = run(tmp_path, "four", "mulki-plus", 4)
    now = run(tmp_path, "two", "mulki-plus", 2)
    for tasks in (3, 4):
        more = extended(now, tmp_path / f"more-{tasks}", "mulki-plus", tasks)
        shutil.rmtree(now)
        now = more
    assert_same(four, now)
    assert result(now)["parent"]["folder"] == str(tmp_path / "more-3")


def test_two_tasks_at_once_with_another_seed(tmp_path):
    for name, tasks in (("four", 4), ("two", 2)):
        run_experiment(resolved("mulki-plus", tasks), 7, tmp_path, folder=tmp_path / name)
    more = extended(tmp_path / "two", tmp_path / "more", "mulki-plus", 4)
    assert result(more)["seed"] == 7
    assert_same(tmp_path / "four", more)


@pytest.mark.parametrize("when", ["in a further task", "while the earlier rows are filled"])
def test_killed_and_resumed(tmp_path, kill_at, monkeypatch, when, capsys):
    every = "train.checkpoint.every=2"
    four = run(tmp_path, "four", "mulki-plus", 4, every)
    two = run(tmp_path, "two", "mulki-plus", 2, every)
    if when == "in a further task":
        kill_at(4, 3)
    else:
        load = earlier_rows._load
        monkeypatch.setattr(earlier_rows, "_load", lambda model, kept, pretrained: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        extended(two, tmp_path / "more", "mulki-plus", 4, every)
    shutil.rmtree(two)
    assert read_result(tmp_path / "more" / FILE).status == "failed"
    if when != "in a further task":
        monkeypatch.setattr(earlier_rows, "_load", load)
    resume_experiment(resolve(str(tmp_path / "more" / "recipe.yaml")), 0, tmp_path / "more")
    begun = "task-04-step-000002" if when == "in a further task" else "task-02-second"
    assert f"resuming from {begun}" in capsys.readouterr().err
    assert_same(four, tmp_path / "more")


def test_its_recipe_runs_from_scratch(tmp_path):
    more = extended(run(tmp_path, "two", "finetune", 2), tmp_path / "more", "finetune", 3)
    again = tmp_path / "again"
    run_experiment(resolve(str(more / "recipe.yaml")), 0, tmp_path, folder=again)
    assert result(again)["parent"] == {}
    assert_same(again, more)


@pytest.mark.parametrize("harm", ["not kept", "damaged", "a plugin takes part"])
def test_without_the_weights_the_cells_are_empty_and_metrics_say_so(tmp_path, capsys, harm):
    settings = ("train.checkpoint.weights=last",) if harm == "not kept" else ()
    changes = {"with_plugins": ("takes-part",)} if harm == "a plugin takes part" else {}
    three = run(tmp_path, "three", "finetune", 3, *settings, **changes)
    assert (three / "weights").exists() == (harm != "not kept")
    if harm == "damaged":
        path = three / "weights" / "task-01-first" / "weights.safetensors"
        path.write_bytes(path.read_bytes()[:-8] + bytes(8))
    four = run(tmp_path, "four", "finetune", 4, *settings, **changes)
    capsys.readouterr()
    more = extended(three, tmp_path / "more", "finetune", 4, *settings, **changes)
    said = capsys.readouterr().err
    a, b = result(four), result(more)
    gone = {"not kept": [1, 2], "damaged": [1], "a plugin takes part": [0, 1, 2]}[harm]
    names = ", ".join("zero-shot" if row == 0 else list(ALL)[row - 1] for row in gone)
    assert f"not tested on the further tasks: the model after {names}: " in said
    if harm == "a plugin takes part":
        gone = [0, 1, 2]
        assert "the plugin 'takes-part' takes part in evaluations" in said
    rows = [a["zero_shot"], *a["matrix"]]
    expected = [[*row[:3], None] if i in gone else row for i, row in enumerate(rows)]
    assert [b["zero_shot"], *b["matrix"]] == expected
    assert b["metrics"]["transfer"] is None
    assert b["metrics"]["average"] is None
    assert b["metrics"]["last"] == a["metrics"]["last"]
    assert b["metrics"]["forgetting"] == a["metrics"]["forgetting"]
    assert said.count("warning: ") == 1, "one for the cells and the metrics that need them"
    read = read_result(more / FILE)
    assert np.isnan(read.matrix[0][3])
    assert b["status"] == read.status == "complete"
    table = mulki("results", more).stdout
    first = next(line for line in table.splitlines() if line.startswith("first"))
    assert first.split()[-2:] == ["-", "-"]
    assert "Transfer -" in table
    assert json.loads(mulki("results", more, "--json").stdout)["runs"][0]["matrix"][0][3] is None
    assert (more / "matrix.csv").read_text().splitlines()[2].endswith(",")
    summary = mulki("results", more, run(tmp_path, "two", "finetune", 2)).stdout.splitlines()
    numbers = r"\s+".join(f"{b['metrics'][name]:.2f}" for name in ("last", "forgetting"))
    assert any(re.search(rf"{numbers}(\s+-\s+-)?$", line) for line in summary), summary
    assert any(re.search(r"\s-\s+-(\s|$)", line) for line in summary), "Transfer and Average have no value"


def test_what_cannot_be_extended(tmp_path, monkeypatch, kill_at):
    def refused(parent, match, strategy="finetune", tasks=4, *settings, **changes):
        with pytest.raises(MulkiError, match=match):
            extended(parent, tmp_path / "more", strategy, tasks, *settings, **changes)
        assert not (tmp_path / "more").exists()

    refused(run(tmp_path, "joint", "joint", 3), "learns all tasks at once", "joint")
    refused(run(tmp_path, "none kept", "finetune", 3, "train.checkpoint.keep=0"), "holds no checkpoint of its last")
    three = run(tmp_path, "three", "finetune", 3)
    refused(three, "the stream has no further task", tasks=3)
    refused(three, f"{CHANGED}recipe.train.iterations was 4, is 5", "finetune", 4, "train.iterations=5")
    versions = provenance._versions
    with monkeypatch.context() as patch:
        patch.setattr(provenance, "_versions", lambda: {**versions(), "torch": "9.9"})
        refused(three, f"{CHANGED}versions.torch was .* is 9.9")
        forced = extended(three, tmp_path / "forced", "finetune", 4, force=True)
        assert result(forced)["status"] == "complete"
    with monkeypatch.context() as patch:
        patch.setitem(ALL, "second", (("yellow", "blue", "grey"), ()))
        refused(three, f"{CHANGED}data.second was 24 ")
    with monkeypatch.context() as patch:
        marks = provenance.marks_of
        patch.setattr(provenance, "marks_of", lambda stream: marks(stream) | {"first": {"test": {"contents": "x"}}})
        refused(three, f"{CHANGED}task first: its test images have other contents")
    reverse = resolve(
        "mtil", Changes(settings=("stream={name: chosen, tasks: [second, first, third, fourth]}", *SMALL))
    )
    with pytest.raises(
        MulkiError, match="learned first, second, third, and the stream begins with second, first, third"
    ):
        extend_experiment(read_result(three / FILE), reverse, tmp_path / "more", force=True)
    weights = three / "checkpoints" / "task-03-third" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8] + bytes(8))
    refused(three, "the run cannot be extended without it")
    kill_at(2, 2)
    with pytest.raises(Killed):
        run(tmp_path, "half", "finetune", 3)
    refused(tmp_path / "half", "this run is not complete: failed$")
    agem = run(tmp_path, "agem", "finetune", 2, with_plugins=("avalanche.agem",))
    refused(agem, "cannot go on from a run with the plugin 'avalanche.agem'", with_plugins=("avalanche.agem",))


def test_the_command_on_named_tasks(tmp_path):
    two = run(tmp_path, "runs/mine/finetune/seed-0", "finetune", 2)
    done = mulki("extend", two, "--tasks", "third,fourth")
    more = tmp_path / "runs" / "mine" / "finetune+tasks=third,fourth" / "seed-0"
    assert f"extends {two}, which learned 2 tasks" in done.stdout
    assert_same(run(tmp_path, "four", "finetune", 4), more)
    done = mulki("extend", two, "--tasks", "third", "--tasks", "fourth", "--out", tmp_path / "other", "--json")
    assert json.loads(done.stdout)["runs"][0]["matrix"] == result(more)["matrix"]
    stream = "{name: chosen, tasks: [first, second, third]}"
    mulki("extend", two, "--stream", stream, "--out", tmp_path / "declared")
    assert result(tmp_path / "declared")["tasks"] == ["first", "second", "third"]
    assert len(mulki("results", tmp_path / "runs").stdout.splitlines()) >= 4


def test_a_run_may_be_named_by_a_dot(tmp_path, monkeypatch):
    two = run(tmp_path, "runs/mine/finetune/seed-0", "finetune", 2)
    monkeypatch.chdir(two)
    mulki("extend", ".", "--tasks", "third")
    assert result(tmp_path / "runs/mine/finetune+tasks=third/seed-0")["tasks"] == ["first", "second", "third"]
    shutil.rmtree("checkpoints")
    (two / "result.json").write_text(json.dumps(result(two) | {"status": "failed"}))
    assert "moved an earlier run to" in mulki("resume", ".").stderr
    assert (two.parent / "seed-0.before-1").is_dir()
    assert result(two)["status"] == "complete"


def test_it_is_begun_by_one_process(tmp_path, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    before = signal.getsignal(signal.SIGTERM)
    refused = mulki("extend", tmp_path, "--tasks", "third", ok=False)
    signal.signal(signal.SIGTERM, before)  # a rank bears it for a while
    assert "one process begins an extension; start without torchrun" in refused.stderr


def test_mistakes_on_the_command_line(tmp_path):
    two = run(tmp_path, "runs/mine/finetune/seed-0", "finetune", 2)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "diary.txt").write_text("mine")
    for words, said in [
        (["--tasks", "third", "--out", tmp_path], "is the folder of the run itself, or above or below it"),
        (["--tasks", "third", "--out", two / "x"], "is the folder of the run itself, or above or below it"),
        (["--tasks", "third", "--out", tmp_path / "taken"], "exists and is not the folder of a run"),
        ([], "no further task; name a folder with --task"),
        (["--task", tmp_path], "the run's stream is 'chosen', which is not made of folders; name its tasks with --tasks"),
        (["--task", tmp_path, "--tasks", "third"], "use one of them"),
        (["--stream", "{name: choosen}"], "error: --stream: $.stream.name: "),
        (["--tasks", "fifth"], "fifth"),
    ]:  # fmt: skip
        assert said in mulki("extend", two, *words, ok=False).stderr, words
    assert "no run here" in mulki("extend", tmp_path, "--tasks", "third", ok=False).stderr
    assert (tmp_path / "taken" / "diary.txt").read_text() == "mine"


def pictures(root, classes, seed):
    rng = np.random.default_rng(seed)
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(6):
            Image.fromarray(rng.integers(0, 255, (12, 12, 3), dtype=np.uint8)).save(root / name / f"{i}.png")
    return root


def test_the_command_on_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, (name, classes) in enumerate(
        {"pets": ("cat", "dog"), "fruit": ("fig", "pear"), "boats": ("ark", "tug")}.items()
    ):
        pictures(tmp_path / "data" / name, classes, i)
    settings = [word for setting in (*SMALL, "evaluate.classes=seen") for word in ("--set", setting)]

    def whole(*names):
        mulki("new", "recipe", *(f"data/{name}" for name in names), "--out", f"{len(names)}.yaml", "--name", "mine")
        return mulki("run", f"{len(names)}.yaml", *settings, "--out", f"runs-{len(names)}")

    whole("pets", "fruit")
    whole("pets", "fruit", "boats")
    [two], [three] = (list(tmp_path.glob(f"runs-{n}/mine/*/seed-0")) for n in (2, 3))
    mulki("extend", two, "--task", "data/boats", "--out", "more")
    a, b = result(three), result(tmp_path / "more")
    assert (a["zero_shot"], a["matrix"], a["metrics"]) == (b["zero_shot"], b["matrix"], b["metrics"])
    files = [checkpoints(folder)[0][0].files for folder in (three, tmp_path / "more")]
    assert files[0] == files[1]
    entry = "{name: ships, images: data/boats, class_names: [an ark, a tug]}"
    mulki("extend", two, "--task", entry, "--out", "ships")
    assert result(tmp_path / "ships")["tasks"] == ["pets", "fruit", "ships"]
    assert "no such folder" in mulki("extend", two, "--task", "data/nothing", ok=False).stderr
    pictures(tmp_path / "elsewhere" / "pets", ("x", "y"), 9)
    cut = mulki("extend", two, "--task", "{name: boats,", ok=False).stderr  # the shell split it
    assert "put a value with spaces in quotes: --task '{name: birds, images: DIR}'" in cut
    done = mulki("extend", two, "--task", "elsewhere/pets", ok=False)
    assert "--task elsewhere/pets: the task 'pets' is there already" in done.stderr
    unnamed = mulki("extend", two, "--task", "{images: data/boats}", "--task", "data/boats", ok=False).stderr
    assert "$.stream.tasks[2].name: missing" in unnamed
    both = mulki("extend", two, "--task", "data/nothing", "--task", "elsewhere/pets", ok=False).stderr
    assert "no such folder" in both
    assert "is there already" in both
    typed = done.stderr.partition("of its own: --task ")[2].strip().strip("'")
    assert typed == "{name: pets-3, images: elsewhere/pets}"
    mulki("extend", two, "--task", typed, "--out", "pets")
    assert result(tmp_path / "pets")["tasks"] == ["pets", "fruit", "pets-3"]
    assert "--tasks: the run's stream is made of folders" in mulki("extend", two, "--tasks", "x", ok=False).stderr
    (tmp_path / "data" / "pets" / "cat" / "0.png").unlink()
    assert (
        "changed since it was run: data.pets"
        in mulki("extend", two, "--task", "data/boats", "--out", "z", ok=False).stderr
    )


def test_the_curves_of_tensorboard_show_the_whole_history(tmp_path, torture):
    loggers = "loggers=[tensorboard]"
    two = run(tmp_path, "two", "finetune", 2, loggers)
    more = extended(two, tmp_path / "more", "finetune", 3, loggers)
    points = [(tag, step) for tag, step, _ in torture.points(more)]
    for task in ("first", "second", "third"):
        assert sorted(step for tag, step in points if tag == f"eval/accuracy/{task}") == [0, 1, 2, 3]
    assert len(set(points)) == len(points)
    assert sum(tag == "train/lr" for tag, _ in points) == 12


def test_only_an_extended_run_may_have_empty_cells(tmp_path):
    more = extended(run(tmp_path, "two", "finetune", 2), tmp_path / "more", "finetune", 3)
    data = result(more)
    data["matrix"][0][2] = None
    (more / FILE).write_text(json.dumps(data))
    assert np.isnan(read_result(more / FILE).matrix[0][2])
    (more / FILE).write_text(json.dumps({**data, "parent": {}}))
    with pytest.raises(MulkiError, match="rows of 3 accuracies"):
        read_result(more / FILE)


def test_predictions_of_an_extended_zero_shot_run_are_those_of_the_whole(tmp_path, capsys):
    kept = "evaluate.predictions=true"
    parent = run(tmp_path, "two", "zero-shot", 2, kept)
    found = read_predictions(extended(parent, tmp_path / "more", "zero-shot", 3, kept))
    whole = read_predictions(run(tmp_path, "three", "zero-shot", 3, kept))
    assert "predictions cannot be written" not in capsys.readouterr().err
    assert found.rows == whole.rows
    for row in range(len(whole.rows)):
        assert [found.accuracy(row, task) for task in range(3)] == [whole.accuracy(row, task) for task in range(3)]
