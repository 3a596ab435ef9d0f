"""What can go wrong in the middle of a run: a clear error, everything finished still there, and a run that goes on after."""

import errno
import io
import json
import os
import re
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from avalanche.training.plugins import SupervisedPlugin

from mulki_plugins.errors import MulkiError, UnexpectedError, UnreadableImage
from mulki_plugins.recipe.resolve import Changes, resolve
from mulki_plugins.registry.catalog import Catalog, Provenance
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.registry.register import Register
from mulki_plugins.report import progress
from mulki_plugins.report.predictions import read_predictions
from mulki_plugins.report.result import read_result
from mulki_plugins.streams import Task, TaskStream
from mulki_plugins.streams.benchmark import MAX_CONSECUTIVE, ReadableImages
from mulki_plugins.training import checkpoint, records, run
from mulki_plugins.training.explain import quiet_writers
from mulki_plugins.training.resume import resume_experiment
from mulki_plugins.training.run import run_experiment
from tests.conftest import small_stream

SMALL = (
    "stream={name: small}", "model={name: small-clip}", "train.iterations=5", "train.schedule.warmup=1",
    "train.batch_size=4", "train.checkpoint.every=2", "device=cpu", "loggers=[csv]",
)  # fmt: skip


class Fault(SupervisedPlugin):
    """Does what a test has told it to, once, at the third step of the second task."""

    wanted = None

    def before_backward(self, strategy, **kwargs):
        clock = strategy.clock
        if Fault.wanted and (clock.train_exp_counter, clock.train_exp_iterations) == (1, 2):
            wanted, Fault.wanted = Fault.wanted, None
            wanted(strategy)


@pytest.fixture(autouse=True)
def fault(small_parts):
    torch.set_num_threads(1)
    mine = Catalog()
    register = Register(mine, Provenance(distribution="somebodys-plugins", version="1.2"))
    register.plugin("fault", Fault, summary="fails")
    register.stream("broken", broken_stream, summary="with images that cannot be read")
    catalog().parts.update(mine.parts)
    yield
    Fault.wanted = None
    for key in mine.parts:
        del catalog().parts[key]


def resolved(*settings, strategy="finetune"):
    return resolve(
        "recipes/mtil.yaml", Changes(strategy=strategy, settings=(*SMALL, *settings), with_plugins=("fault",))
    )


def failing(tmp_path, wanted, *settings):
    """The lines of the error, the run's folder, and the recipe to go on with."""
    recipe = resolved(*settings)
    Fault.wanted = wanted
    with pytest.raises(MulkiError) as caught:
        run_experiment(recipe, 0, tmp_path)
    folder = tmp_path / "mtil" / "finetune-with-fault" / "seed-0"
    return caught.value.lines(), folder, recipe


def goes_on(recipe, folder, capsys, begun="task-02-step-000002"):
    found = read_result(folder / "result.json")
    assert found.status == "failed"
    assert len(found.matrix) == 1
    assert resume_experiment(recipe, 0, folder).status == "complete"
    assert f"resuming from {begun}" in capsys.readouterr().err


@pytest.mark.parametrize(("value", "said"), [(float("nan"), "nan"), (float("inf"), "inf")])
def test_a_loss_that_is_no_number_stops_with_its_terms(tmp_path, capsys, value, said):
    def wanted(strategy):
        strategy.loss = strategy.loss * value

    [line], folder, recipe = failing(tmp_path, wanted)
    who = "made so by the plugin 'fault' in its before_backward"
    assert line.startswith(f"task second, step 3: the loss is {said}, {who} (cross_entropy ")
    assert f"fault {said}" in line
    assert "train.optimizer.lr" in line
    goes_on(recipe, folder, capsys)


def test_out_of_memory_names_the_settings_that_help(tmp_path, capsys):
    def wanted(strategy):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    [line], folder, recipe = failing(tmp_path, wanted)
    assert line.startswith("task second, step 3: out of memory: another 20.00 GiB were needed; ")
    for setting in ("train.batch_size", "train.precision=bf16", "model.train=image"):
        assert setting in line
    goes_on(recipe, folder, capsys)


def test_the_cpus_own_words_for_no_memory_are_known(tmp_path):
    def wanted(strategy):
        torch.empty(2**60)

    [line], _, _ = failing(tmp_path, wanted)
    assert "out of memory" in line
    assert "train.batch_size" in line


def test_a_plugin_that_raises_is_named_with_its_callback_and_task(tmp_path, capsys):
    def wanted(strategy):
        raise KeyError("no such thing\nat all")

    [line], folder, recipe = failing(tmp_path, wanted)
    assert line.startswith(
        "task second, step 3: the plugin 'fault' of somebodys-plugins 1.2 in its before_backward failed: "
        "KeyError: 'no such thing\\nat all' (tests/test_faults.py:"
    )
    assert "log.txt" in line
    goes_on(recipe, folder, capsys)


def test_the_log_holds_the_progress_and_the_traceback_of_what_ended_the_run(tmp_path, capsys):
    def wanted(strategy):
        raise ValueError("wrong:\n\tin two lines")

    [line], folder, recipe = failing(tmp_path, wanted)
    assert "ValueError: wrong: in two lines" in line
    assert str(folder / "log.txt") in line
    text = (folder / "log.txt").read_text()
    assert "zero-shot: mean accuracy" in text
    assert 'raise ValueError("wrong' in text
    assert json.loads((folder / "result.json").read_text())["error"].endswith(line.partition(";")[0])
    goes_on(recipe, folder, capsys)
    again = (folder / "log.txt").read_text()
    assert again.startswith(text)
    assert "resuming from" in again[len(text) :]
    assert again.rstrip().endswith("complete")


def test_an_error_that_nobody_foresaw_keeps_its_whole_last_line(tmp_path, monkeypatch):
    def fails(self):
        raise RuntimeError("mat1 and mat2:\n\t3 and 4")

    monkeypatch.setattr(run.Run, "count_left_out", fails)
    alone = resolve("recipes/mtil.yaml", Changes(strategy="finetune", settings=SMALL))  # no part is of this module
    with pytest.raises(UnexpectedError) as caught:
        run_experiment(alone, 0, tmp_path)
    assert caught.value.status == 1
    [line] = caught.value.lines()
    assert "RuntimeError: mat1 and mat2: 3 and 4" in line
    assert "log.txt" in line


def test_a_picture_a_table_or_a_terminal_that_fails_costs_the_run_nothing(tmp_path, monkeypatch, capsys):
    def fails(*args):
        raise ValueError("no picture")

    def gone(*args, **options):
        raise OSError(errno.EIO, "Input/output error")

    text = records.write_text
    monkeypatch.setattr(records, "matrix_figure", fails)
    monkeypatch.setattr(
        records, "write_text", lambda path, data: fails() if path.suffix == ".csv" else text(path, data)
    )
    assert run_experiment(resolved(), 0, tmp_path).status == "complete"
    said = capsys.readouterr().err
    assert said.count("warning: ") == 2
    assert "no picture" in said
    folder = tmp_path / "mtil" / "finetune-with-fault" / "seed-0"
    assert read_result(folder / "result.json").status == "complete"
    assert "Traceback" in (folder / "log.txt").read_text()

    monkeypatch.setattr(progress.click, "echo", gone)
    monkeypatch.setattr(sys, "stderr", None)
    assert run_experiment(resolved(), 0, tmp_path / "again").status == "complete"


def test_predictions_or_final_weights_that_cannot_be_written_cost_the_run_nothing(tmp_path, monkeypatch, capsys):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(records, "write_row", full)
    monkeypatch.setattr(run, "write_final_weights", full)
    assert run_experiment(resolved(), 0, tmp_path).status == "complete"
    said = capsys.readouterr().err
    assert "warning: the predictions cannot be written; the run goes on: " in said
    assert "warning: the final weights cannot be written; the run goes on: " in said
    folder = tmp_path / "mtil" / "finetune-with-fault" / "seed-0"
    assert read_result(folder / "result.json").status == "complete"
    assert read_predictions(folder) is None


def test_a_terminal_shows_any_name_and_may_be_closed(monkeypatch):
    class Terminal(io.StringIO):
        closed_now = False

        def isatty(self):
            return True

        def write(self, text):
            if self.closed_now:
                raise OSError(errno.EIO, "Input/output error")
            return super().write(text)

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    bar = progress.ProgressLogger(1)
    clock = SimpleNamespace(train_exp_counter=0, train_exp_iterations=0)
    strategy = SimpleNamespace(
        clock=clock, steps=3, budgets=1, experience=SimpleNamespace(task_name="[/bold] :smile: $x$")
    )
    bar.before_training_exp(strategy, [])
    bar.after_training_iteration(strategy, [])
    terminal.closed_now = True
    with quiet_writers():
        bar.after_training_iteration(strategy, [])
        bar.after_training_exp(strategy, [])
        bar.stop()
    assert "[/bold] :smile:" in terminal.getvalue()


def test_a_killed_worker_is_said_to_be_one(tmp_path, capsys):
    def wanted(strategy):
        import multiprocessing

        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGKILL)

    [line], folder, recipe = failing(tmp_path, wanted, "train.workers=2", "train.iterations=20")
    # torch notices the signal first, or the empty queue: it depends on the machine's load
    assert re.search("a loader's worker process (ended|was ended by the signal Killed)", line)
    assert "train.workers" in line
    goes_on(recipe, folder, capsys, begun="task-02-step-")  # batches that had been fetched are still trained on


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EACCES])
def test_a_disk_that_takes_no_more_loses_nothing_that_was_there(tmp_path, capsys, monkeypatch, number):
    save = checkpoint.save_file
    written = []

    def full(tensors, path, **options):
        written.append(path)
        if len(written) > 3:
            raise OSError(number, os.strerror(number), str(path))
        return save(tensors, path, **options)

    monkeypatch.setattr(checkpoint, "save_file", full)
    recipe = resolved()
    with pytest.raises(MulkiError, match=os.strerror(number)) as caught:
        run_experiment(recipe, 0, tmp_path)
    folder = tmp_path / "mtil" / "finetune-with-fault" / "seed-0"
    assert caught.value.lines()[0].startswith("task second, step 2: ")  # the checkpoint after it
    assert not list((folder / "checkpoints").glob(".*"))
    monkeypatch.undo()
    assert resume_experiment(recipe, 0, folder).status == "complete"
    assert "resuming from" in capsys.readouterr().err


class Unreadable:
    """A task's images, of which some cannot be read."""

    def __init__(self, images, wrong, error):
        self.images, self.wrong, self.error = images, set(wrong), error

    @property
    def targets(self):
        return self.images.targets

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        if index in self.wrong:
            raise self.error
        return self.images[index]


WRONG = {"train": (), "test": (), "error": OSError("image file is truncated")}


def broken_stream() -> TaskStream:
    def broken(task: Task) -> Task:
        return Task(
            name=task.name, class_names=task.class_names, templates=task.templates,
            train=Unreadable(task.train, WRONG["train"], WRONG["error"]),
            test=Unreadable(task.test, WRONG["test"], WRONG["error"]),
        )  # fmt: skip

    return TaskStream(name="broken", tasks=tuple(broken(task) for task in small_stream().tasks))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("part", "said"), [("train", "training image 3 cannot"), ("test", "test image 2 cannot")])
def test_an_unreadable_image_stops_the_run_and_is_named(tmp_path, monkeypatch, workers, part, said):
    monkeypatch.setitem(WRONG, part, {"train": (3,), "test": (2,)}[part])
    with pytest.raises(MulkiError) as caught:
        run_experiment(resolved("stream={name: broken}", f"train.workers={workers}"), 0, tmp_path)
    [line] = caught.value.lines()
    assert f"first: {said} be read: OSError: image file is truncated" in line
    assert "train.unreadable=skip" in line
    assert "Traceback" not in line


def test_an_error_of_the_streams_own_keeps_its_words(tmp_path, monkeypatch):
    monkeypatch.setitem(WRONG, "train", (3,))
    monkeypatch.setitem(WRONG, "error", MulkiError("photos/cat.jpg: this image cannot be decoded"))
    with pytest.raises(MulkiError, match=r"photos/cat.jpg: this image cannot be decoded"):
        run_experiment(resolved("stream={name: broken}", "train.workers=1"), 0, tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_left_out_and_counted(tmp_path, monkeypatch, capsys, workers):
    monkeypatch.setitem(WRONG, "train", (0, 3))
    monkeypatch.setitem(WRONG, "test", (1,))
    recipe = resolved(
        "stream={name: broken}",
        "train.unreadable=skip",
        "train.epochs=1",
        "train.iterations=null",
        f"train.workers={workers}",
    )
    result = run_experiment(recipe, 0, tmp_path)
    assert result.left_out["first/train"] == [0, 3]
    assert {name: places for name, places in result.left_out.items() if name.endswith("/test")} == {
        f"{task}/test": [1] for task in ("first", "second", "third")
    }
    right = np.array(result.zero_shot) / 100 * np.array([7, 11, 7])  # of eight, twelve and eight images
    np.testing.assert_allclose(right, right.round(), atol=1e-9)
    assert "first/train: 2 images cannot be read and are left out" in capsys.readouterr().err
    folder = tmp_path / "mtil" / "finetune-with-fault" / "seed-0"
    assert json.loads((folder / "result.json").read_text())["left_out"]["first/train"] == [0, 3]


def test_the_error_names_the_image_that_was_tried_last():
    class Missing(Unreadable):
        def __getitem__(self, index):
            raise MulkiError(f"{index}.jpg: gone", "copy it again")

    images = Missing(small_stream().tasks[0].train, (), None)
    readable = ReadableImages(images, "first", training=True, unreadable="skip")
    tried = min(len(images), MAX_CONSECUTIVE)
    with pytest.raises(UnreadableImage) as caught:
        readable[3]
    last = (3 + tried - 1) % len(images)
    [line] = caught.value.lines()
    assert line == f"{tried} consecutive images could not be read; the last error: {last}.jpg: gone; copy it again"
    images.__class__ = Unreadable
    images.wrong, images.error = set(range(len(images))), OSError("truncated")
    with pytest.raises(UnreadableImage, match=rf"first: training image {last} cannot be read: OSError: truncated"):
        readable[3]


def test_a_folder_that_vanished_is_not_skipped_image_by_image(tmp_path, monkeypatch):
    monkeypatch.setitem(WRONG, "train", range(24))
    monkeypatch.setitem(WRONG, "error", FileNotFoundError(2, "No such file or directory", "photos/1.jpg"))
    with pytest.raises(MulkiError, match=r"consecutive images could not be read; the last error: .*photos/1.jpg"):
        run_experiment(resolved("stream={name: broken}", "train.unreadable=skip"), 0, tmp_path)
