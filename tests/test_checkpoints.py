"""Checkpoints cost the training nothing: they are copied, then written by a thread; by minutes, by steps, or both."""

import errno
import hashlib
import json
import os
import threading
from pathlib import Path

import pytest
import torch

from mulki_plugins.errors import MulkiError
from mulki_plugins.recipe.resolve import Changes, resolve
from mulki_plugins.training import checkpoint, checkpointing, kept_weights
from mulki_plugins.training.checkpoint import (
    FOLDER,
    MANIFEST,
    Damaged,
    Moment,
    amend,
    checkpoints,
    latest_checkpoint,
    new_folder,
    prune,
    read_checkpoint,
    write_checkpoint,
)
from mulki_plugins.training.checksums import digest
from mulki_plugins.training.resume import resume_experiment
from mulki_plugins.training.run import run_experiment
from mulki_plugins.training.snapshot import put_back, take_snapshot
from tests.conftest import Killed
from tests.test_resume import torture

__all__ = ["torture"]

SMALL = (
    "stream={name: small}", "model={name: small-clip}", "train.iterations=6", "train.schedule.warmup=1",
    "train.batch_size=4", "device=cpu", "loggers=[csv]",
)  # fmt: skip


@pytest.fixture(autouse=True)
def small_world(small_parts):
    torch.set_num_threads(1)


def resolved(*settings, strategy="finetune"):
    return resolve("mtil", Changes(strategy=strategy, settings=(*SMALL, *settings)))


@pytest.fixture
def minute_per_step(monkeypatch):
    """A clock that moves on by one minute before each step's end, and the moments of the step checkpoints."""
    now, moments = [0.0], []
    after_step, save_step = checkpointing.Checkpointing.after_step, checkpointing.Checkpointing._save_step

    def stepped(self):
        now[0] += 60
        after_step(self)

    def saved(self, steps):
        moments.append((self.tasks + 1, steps))
        save_step(self, steps)

    monkeypatch.setattr(checkpointing.Checkpointing, "clock", staticmethod(lambda: now[0]))
    monkeypatch.setattr(checkpointing.Checkpointing, "after_step", stepped)
    monkeypatch.setattr(checkpointing.Checkpointing, "_save_step", saved)
    return moments


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ("{minutes: 2}", [2, 4]), ("{minutes: 2.5}", [3]), ("{minutes: 5}", [5]), ("{minutes: 6}", []),
        ("{minutes: null}", []), ("{minutes: null, every: 2}", [2, 4]), ("{every: 3}", [3]),
        ("{minutes: 2, every: 3}", [2, 3, 5]), ("{minutes: 1}", [1, 2, 3, 4, 5]), ("{minutes: 1, keep: 0}", []),
    ],
)  # fmt: skip
def test_when_a_checkpoint_is_due(tmp_path, minute_per_step, settings, steps):
    """Time counts from the checkpoint before, also from one after so many steps; the last step of a task needs none."""
    run_experiment(resolved(f"train.checkpoint={settings}"), 0, tmp_path, folder=tmp_path / "run")
    assert minute_per_step == [(task, step) for task in (1, 2, 3) for step in steps]


def test_the_default_is_ten_minutes():
    settings = resolved().recipe.train.checkpoint
    assert (settings.minutes, settings.every, settings.keep, settings.weights) == (10, None, 2, "all")


@pytest.mark.parametrize("minutes", [1, 2, 3])
def test_whenever_the_clock_says_so_the_run_ends_the_same(
    tmp_path, torture, minute_per_step, kill_at, left_alone, minutes
):
    _, alone = left_alone(resolved(strategy="mulki-plus"))
    recipe = resolved(f"train.checkpoint={{minutes: {minutes}}}", strategy="mulki-plus")
    kill_at(2, 4)
    with pytest.raises(Killed):
        run_experiment(recipe, 0, tmp_path, folder=tmp_path / "killed")
    latest, _ = latest_checkpoint(tmp_path / "killed")
    assert latest.moment == Moment(1, {1: 4, 2: 4, 3: 3}[minutes])
    resume_experiment(recipe, 0, tmp_path / "killed")
    (alone / "recipe.yaml").write_bytes((tmp_path / "killed" / "recipe.yaml").read_bytes())
    assert torture.differing(alone, tmp_path / "killed") == []


class SlowDisk:
    """Holds each write until the test lets it go, and counts."""

    def __init__(self, monkeypatch):
        self.save, self.free, self.begun, self.threads = checkpoint.save_file, threading.Event(), 0, set()
        self.together, self.most = 0, 0
        monkeypatch.setattr(checkpoint, "save_file", self)

    def __call__(self, tensors, path, **options):
        self.begun += 1
        self.threads.add(threading.current_thread())
        self.together += 1
        self.most = max(self.most, self.together)
        assert self.free.wait(60)
        self.save(tensors, path, **options)
        self.together -= 1


def at_steps(monkeypatch, action):
    """Call the action with the task and the step after each step's checkpoint."""
    after_step = checkpointing.Checkpointing.after_step

    def stepped(self):
        after_step(self)
        action(self, self.tasks + 1, self.strategy.clock.train_exp_iterations)

    monkeypatch.setattr(checkpointing.Checkpointing, "after_step", stepped)


def test_training_goes_on_while_a_checkpoint_is_written_and_changes_nothing_in_it(tmp_path, monkeypatch):
    disk, seen = SlowDisk(monkeypatch), []

    def action(run, task, step):
        if (task, step) == (1, 2):
            seen.append({name: value.clone() for name, value in checkpointing.weights_of(run.strategy).items()})
        if (task, step) == (1, 3):
            seen.append(list((run.folder / FOLDER).glob("task-01*")))
            disk.free.set()

    at_steps(monkeypatch, action)
    settings = "train.checkpoint={every: 2, keep: 9}"
    run_experiment(resolved(settings, "train.iterations=4"), 0, tmp_path, folder=tmp_path / "run")
    at_two, present = seen
    assert present == [], "step 3 was taken before the checkpoint of step 2 was there"
    written = read_checkpoint(tmp_path / "run" / FOLDER / "task-01-step-000002")
    written.verify()
    assert all(torch.equal(value, at_two[name]) for name, value in written.weights().items())
    optimizer = written.state()["optimizer"]["state"]
    assert {int(entry["step"]) for entry in optimizer.values()} == {2}
    assert threading.main_thread() not in disk.threads


def test_the_next_one_waits_for_the_one_before(tmp_path, monkeypatch):
    disk = SlowDisk(monkeypatch)
    threading.Timer(0.5, disk.free.set).start()
    run_experiment(resolved("train.checkpoint={every: 1, keep: 30}"), 0, tmp_path, folder=tmp_path / "run")
    assert disk.most == 1
    assert disk.begun == 18
    moments = [c.moment for c in checkpoints(tmp_path / "run")[0]]
    steps = [Moment(task, step) for task in range(3) for step in range(1, 6)]
    assert sorted(moments) == sorted([*steps, *map(Moment, range(4))])


def test_an_evaluation_goes_on_while_the_end_of_a_task_is_written(tmp_path, monkeypatch):
    disk, learned, evaluated, present = SlowDisk(monkeypatch), checkpointing.Checkpointing.learned, [], []
    settle = checkpointing.Checkpointing.evaluated

    def after_learned(self, *arguments):
        learned(self, *arguments)
        evaluated.append(len(self.result.matrix))

    def after_evaluation(self):
        present.append((self.folder / FOLDER / "task-01-first").exists())
        disk.free.set()
        settle(self)

    monkeypatch.setattr(checkpointing.Checkpointing, "learned", after_learned)
    monkeypatch.setattr(checkpointing.Checkpointing, "evaluated", after_evaluation)
    run_experiment(resolved(), 0, tmp_path, folder=tmp_path / "run")
    assert present[0] is False
    end = read_checkpoint(tmp_path / "run" / FOLDER / "task-03-third")
    assert len(end.run["result"]["matrix"]) == 3, "amended after the evaluation"
    assert evaluated == [0, 1, 2]


def test_an_error_of_the_thread_ends_the_run_and_names_the_step(tmp_path, monkeypatch):
    reached = []

    def full(tensors, path, **options):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(checkpoint, "save_file", full)
    at_steps(monkeypatch, lambda run, task, step: reached.append((task, step)))
    settings = "train.checkpoint={every: 2}"
    with pytest.raises(MulkiError) as caught:
        run_experiment(resolved(settings, "train.iterations=100"), 0, tmp_path, folder=tmp_path / "run")
    assert caught.value.lines()[0].startswith("task first, step 2: ")
    assert "No space left" in caught.value.lines()[0]
    assert reached[-1][0] == 1
    assert 2 <= reached[-1][1] < 100
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "failed"
    assert [path.name for path in (tmp_path / "run" / FOLDER).iterdir()] == ["start"]
    with pytest.raises(MulkiError, match="task first, its end: "):
        run_experiment(resolved(), 0, tmp_path, folder=tmp_path / "other")


def test_an_error_of_the_thread_beside_another_one_is_a_warning(tmp_path, monkeypatch, capsys):
    def gone(tensors, path, **options):
        raise OSError(errno.EIO, "Input/output error", str(path))

    def action(run, task, step):
        if step == 2:
            raise Killed

    monkeypatch.setattr(checkpoint, "save_file", gone)
    at_steps(monkeypatch, action)
    with pytest.raises(Killed):
        run_experiment(resolved("train.checkpoint={every: 2}"), 0, tmp_path, folder=tmp_path / "run")
    assert "warning: the checkpoint of task first, step 2 could not be written: OSError" in capsys.readouterr().err


def tensors():
    return {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}


def write(run, tasks=1, steps=0, weights=None, base=None, name=None, **progress):
    run.mkdir(exist_ok=True)
    name = name or f"task-{tasks}-{steps}"
    weights = tensors() if weights is None else weights
    return write_checkpoint(
        run, name, Moment(tasks, steps), base=base, weights=weights, state={"a": [1, torch.arange(3)]},
        progress={"learned": [0], **progress}, metadata={"x": "y"},
    )  # fmt: skip


def test_what_is_written_is_read_again(tmp_path):
    written = write(tmp_path, 2, 5, base="task-2-0", extra=7)
    assert (written.moment, written.base, written.run["extra"]) == (Moment(2, 5), "task-2-0", 7)
    again = read_checkpoint(written.path)
    again.verify()
    assert {n: v.tolist() for n, v in again.weights().items()} == {n: v.tolist() for n, v in tensors().items()}
    assert again.state()["a"][1].tolist() == [0, 1, 2]
    assert again.files["state.pt"] == hashlib.sha256((written.path / "state.pt").read_bytes()).hexdigest()
    assert again.files["weights.safetensors"] == digest(tensors(), tensors().__getitem__)
    assert sorted(os.listdir(tmp_path / FOLDER)) == ["task-2-5"]
    assert again.files["state.pt"] not in repr(again)
    bare = write(tmp_path, 0, 0, weights={})
    assert sorted(os.listdir(bare.path)) == [MANIFEST, "state.pt"]
    assert bare.weights() == {}
    assert bare.end_of_task() is bare


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_told_as_such_and_names_the_file():
    """torch hides the system's error behind one of its own."""
    with pytest.raises(OSError, match="/dev/full") as caught:
        checkpoint.write_state(Path("/dev/full"), {"a": torch.zeros(10**6)})
    assert caught.value.errno == errno.ENOSPC


def test_each_file_is_hashed_once_while_it_is_written(tmp_path, monkeypatch):
    """Nothing is read back: the checksums are those of what was to be written."""
    counted = []

    def count(names, tensor_of):
        counted.append(sorted(names))
        return digest(names, tensor_of)

    def read_back(path):
        raise AssertionError(f"{path} is read back")

    monkeypatch.setattr(checkpoint, "digest", count)
    monkeypatch.setattr(checkpoint, "checksum_of", read_back)
    written = write(tmp_path)
    assert counted == [["b", "w"]]
    monkeypatch.undo()
    written.verify()


def test_views_and_shared_weights_are_written_as_their_own(tmp_path):
    base = torch.arange(12.0)
    weights = {"all": base, "part": base[3:6], "same": base, "across": base.reshape(3, 4).T}
    again = write(tmp_path, weights=weights).weights()
    assert {name: value.tolist() for name, value in again.items()} == {n: v.tolist() for n, v in weights.items()}


def test_an_interrupted_write_leaves_the_one_before(tmp_path):
    write(tmp_path, 1)

    def interrupted():
        with new_folder(tmp_path / FOLDER, "task-2-0") as part:
            (part / "state.pt").write_text("half")
            assert part.name == ".task-2-0.part"
            raise Killed

    with pytest.raises(Killed):
        interrupted()
    assert os.listdir(tmp_path / FOLDER) == ["task-1-0"]
    (tmp_path / FOLDER / ".task-3-0.part").mkdir()
    (tmp_path / FOLDER / ".task-3-0.part" / MANIFEST).write_text("{}")
    latest, problems = latest_checkpoint(tmp_path)
    assert (latest.moment, problems) == (Moment(1), [])
    prune(tmp_path, latest, 2)
    assert os.listdir(tmp_path / FOLDER) == ["task-1-0"]
    assert write(tmp_path, 1, weights={}).weights() == {}, "it replaces one of its name"


def test_prune_keeps_the_latest_and_what_they_build_on(tmp_path):
    write(tmp_path, 0)
    write(tmp_path, 1)
    write(tmp_path, 1, 2, base="task-1-0")
    newest = write(tmp_path, 1, 4, base="task-1-0")
    write(tmp_path, 2)
    prune(tmp_path, newest, 2)
    assert sorted(os.listdir(tmp_path / FOLDER)) == ["task-1-0", "task-1-2", "task-1-4"]
    prune(tmp_path, newest, 1)
    assert sorted(os.listdir(tmp_path / FOLDER)) == ["task-1-0", "task-1-4"]


def test_the_latest_that_is_whole_together_with_its_base(tmp_path):
    assert latest_checkpoint(tmp_path) == (None, [])
    write(tmp_path, 0, weights={})
    base = write(tmp_path, 1)
    write(tmp_path, 1, 2, base="task-1-0")
    assert latest_checkpoint(tmp_path)[0].moment == Moment(1, 2)
    (base.path / "weights.safetensors").unlink()
    latest, problems = latest_checkpoint(tmp_path)
    assert latest.moment == Moment(0)
    assert len(problems) == 2
    assert all("task-1-0" in problem for problem in problems)
    with pytest.raises(Damaged, match="cannot be read"):
        base.verify()


def test_amend_replaces_results_and_nothing_else(tmp_path):
    written = write(tmp_path, 1, extra=1)
    amended = amend(written, {"extra": 2})
    assert amended.run == {"extra": 2}
    assert (amended.files, amended.moment, amended.base) == (written.files, written.moment, None)
    amended.verify()


@pytest.mark.parametrize("what", ["weights.safetensors", "state.pt", MANIFEST])
def test_links_in_a_checkpoint_are_not_followed(tmp_path, what):
    written = write(tmp_path / "run")
    (written.path / what).rename(tmp_path / what)
    (written.path / what).symlink_to(tmp_path / what)
    with pytest.raises(Damaged, match="is a link"):
        read_checkpoint(written.path).verify()


def test_a_folder_that_is_a_link_is_neither_written_nor_read(tmp_path):
    write(tmp_path / "elsewhere")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / FOLDER).symlink_to(tmp_path / "elsewhere" / FOLDER)
    with pytest.raises(MulkiError, match="is a link, and nothing is written outside"):
        write(tmp_path / "run", 2)
    assert checkpoints(tmp_path / "run") == ([], [])
    write(tmp_path / "other", 1)
    (tmp_path / "other" / FOLDER / "task-9-0").symlink_to(tmp_path / "elsewhere" / FOLDER / "task-1-0")
    assert [c.path.name for c in checkpoints(tmp_path / "other")[0]] == ["task-1-0"]


@pytest.mark.parametrize("key", ["base", "files"])
def test_a_manifest_names_no_file_elsewhere(tmp_path, key):
    written = write(tmp_path)
    manifest = json.loads((written.path / MANIFEST).read_text())
    del manifest["sha256"]
    manifest[key] = "../task-1-0" if key == "base" else {"../state.pt": "x"}
    (written.path / MANIFEST).write_text(checkpoint._signed(manifest))
    with pytest.raises(Damaged, match="names a file outside"):
        read_checkpoint(written.path)


def test_a_state_that_unpacks_to_more_than_its_size_is_refused(tmp_path):
    import zipfile

    written = write(tmp_path)
    with zipfile.ZipFile(written.path / "state.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**6))
    written.files["state.pt"] = hashlib.sha256((written.path / "state.pt").read_bytes()).hexdigest()
    with pytest.raises(Damaged, match="it is compressed"):
        written.state()


def test_a_snapshot_shares_nothing_and_knows_the_devices():
    state_of = {"list": [torch.ones(2), (torch.zeros(1), 3)], "text": "x", "set": {1, 2}}
    weights = {"w": torch.ones(3)}
    snapshot = take_snapshot(weights, state_of)
    weights["w"] += 1
    state_of["list"][0] += 1
    snapshot.wait()
    assert snapshot.weights["w"].tolist() == [1, 1, 1]
    assert snapshot.state["list"][0].tolist() == [1, 1]
    assert snapshot.state["list"][1][1:] == (3,)
    assert (snapshot.state["text"], snapshot.state["set"], snapshot.devices) == ("x", {1, 2}, [])
    moved = put_back(snapshot.state, ["cpu", "meta"])
    assert [moved["list"][0].device.type, moved["list"][1][0].device.type] == ["cpu", "meta"]
    if not torch.cuda.is_available():  # a checkpoint of a GPU on a machine without one
        assert put_back(snapshot.state, ["cuda:0", "cpu"])["list"][0].device.type == "cpu"


def test_a_state_of_another_device_goes_back_there(tmp_path):
    """The thread writes copies in host memory; the devices are kept beside them."""
    written = write_checkpoint(
        tmp_path, "x", Moment(1), base=None, weights={}, progress={},
        state={"a": torch.ones(1), "b": torch.ones(2), checkpoint.DEVICES: ["cpu", "meta"]},
    )  # fmt: skip
    read = written.state()
    assert (read["a"].device.type, read["b"].device.type, set(read)) == ("cpu", "meta", {"a", "b"})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_snapshot_of_a_gpu():
    weight = torch.ones(1000, 1000, device="cuda")
    snapshot = take_snapshot({"w": weight}, {"m": [weight.clone(), torch.zeros(1)]})
    weight += 1
    snapshot.wait()
    assert snapshot.weights["w"].is_pinned()
    assert snapshot.weights["w"].sum() == 10**6
    assert snapshot.devices == ["cuda:0", "cpu"]
    assert put_back(snapshot.state, snapshot.devices)["m"][0].is_cuda


@pytest.mark.parametrize("links", [True, False])
def test_weights_after_each_task_stay_when_their_checkpoint_goes(tmp_path, monkeypatch, links):
    if not links:

        def none(source, target):
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", none)
    end = write(tmp_path, 1)
    kept_weights.keep_weights(tmp_path, end, {"model": {"more": torch.ones(1)}})
    file = tmp_path / "weights" / "task-1-0" / "weights.safetensors"
    assert file.samefile(end.path / "weights.safetensors") == links
    newest = write(tmp_path, 2)
    prune(tmp_path, newest, 1)
    assert not end.path.exists()
    [(tasks, kept)] = kept_weights.kept_weights(tmp_path).items()
    kept.verify()
    assert (tasks, kept.run, kept.state()["model"]["more"].tolist()) == (1, {"learned": [0]}, [1])
    assert kept.weights()["w"].tolist() == tensors()["w"].tolist()
    (tmp_path / "weights" / ".half.part").mkdir()
    (tmp_path / "weights" / "broken").mkdir()
    assert list(kept_weights.kept_weights(tmp_path)) == [1]


def test_a_run_keeps_the_weights_after_each_task_unless_told_otherwise(tmp_path):
    for name, settings, kept in (("all", (), [1, 2, 3]), ("last", ("train.checkpoint.weights=last",), [])):
        folder = tmp_path / name
        run_experiment(resolved(*settings), 0, tmp_path, folder=folder)
        assert list(kept_weights.kept_weights(folder)) == kept
    run_experiment(resolved(strategy="joint"), 0, tmp_path, folder=tmp_path / "joint")
    assert not (tmp_path / "joint" / "weights").exists()


@pytest.mark.parametrize("what", ["weights.safetensors", "state.pt"])
def test_other_contents_are_noticed_before_they_are_read(tmp_path, what):
    written = write(tmp_path)
    written.files[what] = "0" * 64
    with pytest.raises(Damaged, match=f"{what}: its checksum differs"):
        written.verify()
    with pytest.raises(Damaged, match=f"{what}: its checksum differs"):
        written.weights() if what == "weights.safetensors" else written.state()


def test_a_manifest_that_was_changed_or_is_of_another_version(tmp_path):
    write(tmp_path, 0)
    written = write(tmp_path, 1)
    path = written.path / MANIFEST
    text = path.read_text()
    path.write_text(text.replace('"tasks": 1', '"tasks": 5'))
    with pytest.raises(Damaged, match="its checksum is wrong"):
        read_checkpoint(written.path)
    latest, problems = latest_checkpoint(tmp_path)
    assert latest.moment == Moment(0)
    assert len(problems) == 1
    assert "its checksum is wrong" in problems[0]
    for name in os.listdir(tmp_path / FOLDER):
        manifest = json.loads(text)
        del manifest["sha256"]
        assert manifest["format"] == 2
        (tmp_path / FOLDER / name / MANIFEST).write_text(checkpoint._signed({**manifest, "format": 4}))
    with pytest.raises(checkpoint.OtherFormat, match="it has format 4, this version reads 2 and 3"):
        latest_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="JSON"):
        checkpoint._signed({"loss": float("nan")})


def test_everything_is_synced_before_a_checkpoint_has_its_name(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    if not os.path.exists("/proc/self/fd"):
        pytest.skip("cannot tell which files are synced")
    before = len(os.listdir("/proc/self/fd"))
    write(tmp_path)
    part = str(tmp_path / FOLDER / ".task-1-0.part")
    assert synced[:2] == [f"{part}/state.pt", f"{part}/weights.safetensors"]
    assert synced[2].startswith(f"{part}/.manifest.json.")
    assert synced[3:] == [part, str(tmp_path / FOLDER)]
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_system_s_own_error_comes_out_of_safetensors(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def full(tensors, path, **options):
        raise SafetensorError(text)

    monkeypatch.setattr(checkpoint, "save_file", full)
    text = "Error while serializing: I/O error: No space left on device (os error 28)"
    with pytest.raises(OSError, match=r"No space left on device: .*weights.safetensors") as caught:
        write(tmp_path)
    assert caught.value.errno == errno.ENOSPC
    text = "something else"
    with pytest.raises(SafetensorError, match="something else"):
        write(tmp_path)
    assert os.listdir(tmp_path / FOLDER) == []


def test_what_a_killed_run_left_is_not_mixed_in_and_goes(tmp_path):
    for name in (".task-1-0.part", ".task-0-0.part"):
        (tmp_path / FOLDER / name).mkdir(parents=True)
        (tmp_path / FOLDER / name / "old").write_text("x")
    written = write(tmp_path, 1)
    assert sorted(os.listdir(written.path)) == [MANIFEST, "state.pt", "weights.safetensors"]
    write(tmp_path, 0)
    prune(tmp_path, written, 1)
    assert os.listdir(tmp_path / FOLDER) == ["task-1-0"]


def test_where_a_tensor_of_a_missing_gpu_goes():
    storage = object()
    assert checkpoint._on_this_machine(storage, "cpu") is None
    expected = None if torch.cuda.is_available() else storage
    assert checkpoint._on_this_machine(storage, "cuda:0") is expected


def test_a_checkpoint_cannot_be_changed_and_metadata_are_kept(tmp_path):
    from attrs.exceptions import FrozenInstanceError
    from safetensors import safe_open

    written = write(tmp_path)
    with pytest.raises(FrozenInstanceError):
        written.base = "x"
    assert written != read_checkpoint(written.path)
    with safe_open(written.path / "weights.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "x": "y"}
