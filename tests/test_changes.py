"""What has changed since a run was stopped: files, recipe, loggers, weights; it is told, and nothing is mixed up."""

import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from avalanche.training.plugins import SupervisedPlugin
from PIL import Image
from torch import nn

from mulki_plugins.errors import MulkiError
from mulki_plugins.recipe.resolve import Changes, resolve
from mulki_plugins.registry.catalog import Catalog, Provenance
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.registry.register import Register
from mulki_plugins.streams import ArrayImages, Task, TaskStream
from mulki_plugins.streams.folders.stream import folders
from mulki_plugins.training import marks, provenance
from mulki_plugins.training.checkpoint import MANIFEST, _signed, checkpoints
from mulki_plugins.training.provenance import differences
from mulki_plugins.training.resume import resume_experiment
from mulki_plugins.training.run import run_experiment
from tests.conftest import Killed
from tests.test_run import mulki

SMALL = (
    "stream={name: small}", "model={name: small-clip}", "train.iterations=4", "train.schedule.warmup=1",
    "train.batch_size=4", "train.checkpoint.every=2", "device=cpu",
)  # fmt: skip


@pytest.fixture(autouse=True)
def small_world(small_parts):
    torch.set_num_threads(1)


def resolved(*settings, with_plugins=()):
    return resolve("mtil", Changes(strategy="finetune", settings=(*SMALL, *settings), with_plugins=with_plugins))


@pytest.fixture
def half(tmp_path, kill_at):
    """A run that was killed in its second task."""

    def begun(*settings, step=2, with_plugins=()):
        recipe = resolved(*settings, with_plugins=with_plugins)
        kill_at(2, step)
        with pytest.raises(Killed):
            run_experiment(recipe, 0, tmp_path)
        return recipe, tmp_path / "mtil" / recipe.recipe.strategy.name / "seed-0"

    return begun


def fill(root, classes=("cat", "dog"), each=10):
    rng = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(each):
            Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(root / name / f"{i:02}.bmp")
    return root


@pytest.fixture
def photos(tmp_path):
    """Two tasks of files of one size: `a` with folders for training and test, `b` of which a fifth is held out."""
    fill(tmp_path / "a" / "train")
    fill(tmp_path / "a" / "test")
    fill(tmp_path / "b")
    a = {"name": "a", "train": str(tmp_path / "a" / "train"), "test": str(tmp_path / "a" / "test")}
    return tmp_path, lambda: folders(tasks=[a, {"name": "b", "images": str(tmp_path / "b")}])


def swap(one, other):
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def rename_all(root):
    for name in ("cat", "dog"):
        for path in sorted((root / "b" / name).iterdir()):
            path.rename(path.with_name(f"img_{path.name}"))


def rewrite(path):
    time = path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    os.utime(path, ns=(time + 1, time + 1))


def exchange(root):
    swap(root / "a" / "train" / "cat" / "00.bmp", root / "a" / "train" / "dog" / "03.bmp")


CHANGES = {
    "renamed": (rename_all, ["task b: its training", "task b: its test"]),
    "exchanged": (exchange, ["task a: its training"]),
    "same size": (lambda root: rewrite(root / "a" / "test" / "dog" / "01.bmp"), ["task a: its test"]),
    "added": (
        lambda root: shutil.copy(root / "b" / "cat" / "00.bmp", root / "b" / "cat" / "x.bmp"),
        ["task b: its training"],
    ),
    "removed": (lambda root: (root / "a" / "train" / "cat" / "09.bmp").unlink(), ["task a: its training"]),
}


@pytest.mark.parametrize("read", [0, marks.READ], ids=["by times", "by contents"])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_files_are_noticed_and_the_task_is_named(photos, monkeypatch, change, read):
    monkeypatch.setattr(marks, "READ", read)
    root, stream = photos
    for i, path in enumerate(sorted(root.rglob("*.bmp"))):
        os.utime(path, ns=(10**18 + i, 10**18 + i))
    before = json.loads(json.dumps(marks.marks_of(stream())))
    assert marks.image_changes(before, marks.marks_of(stream())) == []
    done, expected = CHANGES[change]
    done(root)
    lines = marks.image_changes(before, marks.marks_of(stream()))
    for begin in expected:
        assert any(line.startswith(begin) for line in lines), lines
    assert {line[: len("task a")] for line in lines} == {begin[: len("task a")] for begin in expected}


def test_a_copy_of_a_small_data_set_is_no_change_and_of_a_large_one_says_so(photos, monkeypatch):
    root, stream = photos
    small = marks.marks_of(stream())
    monkeypatch.setattr(marks, "READ", 0)
    large = marks.marks_of(stream())
    for path in root.rglob("*.bmp"):
        os.utime(path, (1, 1))
    assert all("a copy changes nothing" in line for line in marks.image_changes(large, marks.marks_of(stream())))
    monkeypatch.undo()
    assert marks.image_changes(small, marks.marks_of(stream())) == []


def test_exchanged_pixels_are_noticed():
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 255, (6, 4, 4, 3), dtype=np.uint8), np.zeros(6, dtype=np.int64)

    def stream(images):
        task = Task(
            name="t",
            class_names=("x",),
            templates=("{}",),
            train=ArrayImages(images, labels),
            test=ArrayImages(images, labels),
        )
        return TaskStream(name="s", tasks=(task,))  # fmt: skip

    before = marks.marks_of(stream(pixels))
    assert marks.image_changes(before, marks.marks_of(stream(pixels.copy()))) == []
    assert len(marks.image_changes(before, marks.marks_of(stream(pixels[::-1])))) == 2


def test_what_an_older_checkpoint_did_not_note_is_no_change():
    old = {"recipe": {"lr": 1}, "data": {"t": "4"}, "versions": {"torch": "2"}}
    now = {**old, "versions": {"torch": "2", "numpy": "1"}, "files": {"t": {"train": {"names": "x"}}}, "threads": 3}
    assert differences(old, now) == []


def test_a_run_on_renamed_files_does_not_go_on(tmp_path, half, photos):
    root, _ = photos
    tasks = f"[{{name: a, images: {root / 'a' / 'train'}}}, {{name: b, images: {root / 'b'}}}]"
    recipe, folder = half(f"stream={{name: folders, tasks: {tasks}}}")
    rename_all(root)
    with pytest.raises(
        MulkiError, match=r"cannot resume: changed since the checkpoint: .*task b: its training images are other files"
    ):
        resume_experiment(recipe, 0, folder)
    assert resume_experiment(recipe, 0, folder, force=True).status == "complete"


def test_other_threads_are_told(half, capsys, monkeypatch):
    recipe, folder = half()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    resume_experiment(recipe, 0, folder)
    assert "began with 1 threads and resumes with 2" in capsys.readouterr().err


def test_tasks_in_another_order_are_refused_even_by_force(half, monkeypatch):
    recipe, folder = half()
    from mulki_plugins.training import provenance

    noted = provenance._data
    monkeypatch.setattr(provenance, "_data", lambda stream: dict(reversed(noted(stream).items())))
    with pytest.raises(
        MulkiError, match="began with the tasks first, second, third, and the recipe has third, second, first"
    ):
        resume_experiment(recipe, 0, folder, force=True)


@pytest.fixture
def complete(tmp_path):
    recipe = resolved()
    run_experiment(recipe, 0, tmp_path)
    return recipe, tmp_path / "mtil" / "finetune" / "seed-0"


def test_a_complete_run_is_compared(complete, capsys, monkeypatch):
    recipe, folder = complete
    found = resume_experiment(recipe, 0, folder)
    assert "already complete" in capsys.readouterr().err
    with pytest.raises(MulkiError, match=r"complete, but with other settings: recipe.train.iterations was 4, is 6"):
        resume_experiment(resolved("train.iterations=6"), 0, folder)
    forced = resume_experiment(resolved("train.iterations=6"), 0, folder, force=True)
    assert forced.matrix == found.matrix
    assert "shown although recipe.train.iterations was 4, is 6" in capsys.readouterr().err
    assert resume_experiment(resolved("summary=x", "loggers=[]", "train.workers=1"), 0, folder).matrix == found.matrix
    marks = provenance.marks_of
    monkeypatch.setattr(provenance, "marks_of", lambda stream: {t: {"train": {"contents": "x"}} for t in marks(stream)})
    with pytest.raises(MulkiError, match="task first: its training images have other contents"):
        resume_experiment(recipe, 0, folder)


def test_reference_images_belong_to_the_data_of_a_run(tmp_path):
    def noted(value):
        images = ArrayImages(np.full((4, 8, 8, 3), value, np.uint8), [0, 0, 1, 1])
        stream = TaskStream(
            name="r", tasks=(Task(name="words", class_names=("a", "b"), templates=("{}",), train=images, test=images),)
        )
        return json.loads(json.dumps(marks.marks_of_reference(stream)))

    assert marks.image_changes(noted(1), noted(1)) == []
    assert marks.image_changes(noted(1), noted(2)) == [
        "task words (reference): its training images have other contents"
    ]
    assert marks.marks_of_reference(None) == {}


def test_parts_of_a_mixed_stream_tell_its_protocol():
    def protocol(of):
        stream = f"stream={{name: mixed, of: {of}}}"
        return provenance._protocol(resolve("mtil", Changes(strategy="zero-shot", settings=(stream,))).recipe)

    first, other = "{name: mtil-mini, tasks: [digits, shapes]", "{name: mtil-mini, tasks: [food]"
    assert protocol(f"[{first}}}]") == protocol(f"[{first}, evaluate_on: test}}]")
    assert protocol(f"[{first}, evaluate_on: validation}}]")["images"] == "validation"
    assert protocol(f"[{first}, shots: 4}}, {other}}}]")["shots"] == [4, None]
    assert "images" not in protocol(f"[{first}}}, {{name: split, of: {other}}}, increment: 2}}]")
    assert protocol(f"[{first}}}], evaluate_on: validation")["images"] == "validation"


def test_of_other_code_and_versions_a_complete_run_only_says_so(complete, capsys, monkeypatch):
    recipe, folder = complete
    from mulki_plugins.training import provenance

    monkeypatch.setattr(provenance, "_versions", lambda: {"torch": "9.9"})
    assert resume_experiment(recipe, 0, folder).status == "complete"
    assert re.search(r"measured when versions.torch was \S+, is 9.9", capsys.readouterr().err)


def test_a_complete_run_of_an_older_version_is_compared_as_far_as_it_says(complete, capsys):
    recipe, folder = complete
    data = json.loads((folder / "result.json").read_text())
    del data["identity"]
    (folder / "result.json").write_text(json.dumps(data))
    shutil.rmtree(folder / "checkpoints")
    assert resume_experiment(recipe, 0, folder).status == "complete"
    (folder / "recipe.yaml").unlink()
    assert resume_experiment(recipe, 0, folder).status == "complete"
    assert "its recipe cannot be read" in capsys.readouterr().err


def test_a_changed_recipe_is_told_from_the_command_line(tmp_path):
    words = [word for setting in SMALL for word in ("--set", setting)]
    text = mulki("show", "mtil", "--strategy", "finetune", *words).stdout
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(text)
    mulki("run", recipe, "--out", tmp_path / "runs")
    recipe.write_text(text.replace("iterations: 4", "iterations: 6"))
    done = mulki("run", recipe, "--out", tmp_path / "runs", "--resume", ok=False)
    assert done.exit_code == 2
    assert "recipe.train.iterations was 4, is 6" in done.stderr
    done = mulki("run", recipe, "--out", tmp_path / "runs")
    assert "finetune+iterations=6" in done.stdout
    assert not list(tmp_path.rglob("*.before-*"))


LOGGERS = [
    ("[tensorboard, csv]", "[csv]"), ("[csv, tensorboard]", "[tensorboard, csv]"), ("[csv]", "[tensorboard]"),
    ("[csv]", "[tensorboard, csv]"), ("[tensorboard]", "[csv, tensorboard]"), ("[]", "[csv]"), ("[csv]", "[]"),
]  # fmt: skip


@pytest.mark.parametrize(("before", "after"), LOGGERS)
def test_loggers_are_known_by_their_names(half, before, after):
    _, folder = half(f"loggers={before}", step=3)
    kept = {path: path.stat().st_size for path in folder.glob("events.*")}
    assert resume_experiment(resolved(f"loggers={after}"), 0, folder).status == "complete"
    assert all(path.is_file() for path in kept)
    if "tensorboard" not in after:
        assert {path: path.stat().st_size for path in folder.glob("events.*")} == kept, "nothing of it is touched"
    if "csv" in after:
        tags = [tuple(line.split(",")[:2]) for line in (folder / "metrics.csv").read_text().splitlines()]
        assert len(set(tags)) == len(tags), "no point is there twice"
        assert tags[0] == ("tag", "step")


def test_a_checkpoint_of_another_version_is_refused_and_kept(half):
    recipe, folder = half(step=3)
    for path in (folder / "checkpoints").glob(f"*/{MANIFEST}"):
        manifest = json.loads(path.read_text())
        del manifest["sha256"]
        path.write_text(_signed({**manifest, "format": 1}))
    with pytest.raises(MulkiError, match="another version of MulKI wrote this checkpoint: it has format 1"):
        resume_experiment(recipe, 0, folder)
    assert list((folder / "checkpoints").iterdir())


def test_curves_that_a_checkpoint_does_not_name_are_kept(half):
    recipe, folder = half("loggers=[tensorboard]", step=3)
    other = folder / "events.out.tfevents.1.elsewhere.1.0"
    other.write_bytes(b"somebody's")
    resume_experiment(recipe, 0, folder)
    assert (folder / "events.out.superseded.1.elsewhere.1.0").read_bytes() == b"somebody's"


class Adapter(SupervisedPlugin):
    """Adds a weight for each task, and adds those of a loaded state again where it is told to."""

    again = False

    def before_training(self, strategy, **kwargs):
        self.model = strategy.model

    def before_training_exp(self, strategy, **kwargs):
        self.grow(int(strategy.experience.task_label))
        strategy.make_optimizer()

    def grow(self, task):
        if not hasattr(self.model, f"added_{task}"):
            self.model.register_parameter(f"added_{task}", nn.Parameter(torch.ones(2, 2) * task))

    def before_backward(self, strategy, **kwargs):
        strategy.loss = strategy.loss + getattr(self.model, f"added_{int(strategy.experience.task_label)}").sum()

    def state_dict(self):
        return {"tasks": [task for task in range(3) if hasattr(self.model, f"added_{task}")]}

    def load_state_dict(self, state):
        for task in state["tasks"] if self.again else ():
            self.grow(task)


@pytest.fixture
def adapter():
    mine = Catalog()
    Register(mine, Provenance(distribution="mulki", version="")).plugin(
        "adapter", Adapter, summary="grows", adds_parameters=True
    )
    catalog().parts.update(mine.parts)
    yield Adapter
    for key in mine.parts:
        del catalog().parts[key]


def test_weights_that_are_not_there_again_are_no_silent_loss(half, adapter):
    recipe, folder = half(step=3, with_plugins=("adapter",))
    with pytest.raises(MulkiError, match=r"holds weights that the model does not have: 'added_0'"):
        resume_experiment(recipe, 0, folder)


def test_weights_that_a_plugin_adds_again_are_restored(half, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(adapter, "again", True)
    recipe, folder = half(step=3, with_plugins=("adapter",))
    resume_experiment(recipe, 0, folder)
    run_experiment(recipe, 0, tmp_path / "alone")
    alone = tmp_path / "alone" / folder.relative_to(tmp_path)
    one, other = (checkpoints(place)[0][0].state()["model"] for place in (folder, alone))
    assert set(one) == set(other) >= {"added_0", "added_1", "added_2"}
    assert all(torch.equal(one[name], other[name]) for name in one)
