"""Runs with prepared test images: the same numbers with the cache and without, and the keys of a recipe for loading."""

import errno
import os

import pytest
import torch
from attrs import evolve
from PIL import Image

from mulki_plugins.errors import MulkiError
from mulki_plugins.recipe.resolve import Changes, resolve
from mulki_plugins.recipe.settings import fingerprint
from mulki_plugins.streams.task import TaskStream
from mulki_plugins.training import build
from mulki_plugins.training.accuracy import AccuracyRecorder
from mulki_plugins.training.build import choose_workers
from mulki_plugins.training.provenance import identity
from mulki_plugins.training.resume import resume_experiment
from mulki_plugins.training.run import run_experiment
from tests.conftest import Killed, end_loaders, small_stream

SMALL = (
    "model={name: small-clip}", "train.iterations=4", "train.schedule.warmup=0", "train.batch_size=4",
    "train.checkpoint.every=2", "device=cpu", "loggers=[]", "evaluate.batch_size=5",
)  # fmt: skip


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MULKI_CACHE", str(tmp_path / "own"))
    return tmp_path / "own" / "pixels"


# a recipe's keys


@pytest.mark.parametrize("value", ["of", "none", "Auto", "''"])
def test_a_mistyped_word_is_no_folder(value):
    with pytest.raises(MulkiError, match="expected auto, off or a folder, got"):
        resolve("mtil", Changes(settings=(f"evaluate.cache={value}",)))


@pytest.mark.parametrize("value", ["auto", "off", "./pixels", "~/pixels", "/scratch/pixels", "tests"])
def test_it_changes_no_fingerprint(value):
    assert fingerprint(resolve("mtil", Changes(settings=(f"evaluate.cache={value}",))).recipe) == fingerprint(
        resolve("mtil").recipe
    )


@pytest.mark.parametrize("value", ["-1", "atuo", "1.5", "null"])
def test_workers_are_auto_or_a_number(value):
    with pytest.raises(MulkiError, match=r"train\.workers"):
        resolve("mtil", Changes(settings=(f"train.workers={value}",)))


def test_workers_are_chosen_from_the_cores(monkeypatch):
    stream = small_stream()
    files = TaskStream(name="files", tasks=(*stream.tasks[1:], _with_paths(stream.tasks[0])))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    assert choose_workers("auto", stream, 16) == 0
    assert choose_workers("auto", stream, 2000) == 11
    assert choose_workers("auto", files, 16) == 11
    assert choose_workers(3, stream, 16) == 3
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
    assert choose_workers("auto", files, 16) == 0
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(300)), raising=False)
    assert choose_workers("auto", files, 16) == build.MOST_WORKERS


def _with_paths(task):
    class InFiles(type(task.test)):
        def path(self, index):
            return f"{index}.png"

    return evolve(task, test=InFiles(task.test.images, task.test.labels))


# whole runs


@pytest.fixture
def photos(tmp_path):
    """Two tasks of two classes in files, some larger than the model's images, and one file that is no image."""
    stream = small_stream()
    for task in stream.tasks[:2]:
        for part, images in (("train", task.train), ("test", task.test)):
            for i in range(len(images)):
                image, label = images[i]
                folder = tmp_path / task.name / part / task.class_names[label]
                folder.mkdir(parents=True, exist_ok=True)
                image.resize((16 + i, 20)).save(folder / f"{i}.png")
    (tmp_path / "second" / "test" / "grey" / "2.png").write_bytes(b"no image")
    return tmp_path


def resolved(photos, *settings):
    tasks = ", ".join(f"{{name: {n}, train: {photos}/{n}/train, test: {photos}/{n}/test}}" for n in ("first", "second"))
    stream = f"stream={{name: folders, tasks: [{tasks}]}}"
    changes = Changes(strategy="finetune", settings=(*SMALL, stream, "train.unreadable=skip", *settings))
    return resolve("mtil", changes)


def measured(recipe, out, monkeypatch):
    """The result of a run, and all logits of its evaluations."""
    logits, record = [], AccuracyRecorder.after_eval_iteration

    def after_eval_iteration(self, strategy):
        logits.append(strategy.mb_output.clone())
        return record(self, strategy)

    with monkeypatch.context() as patch:
        patch.setattr(AccuracyRecorder, "after_eval_iteration", after_eval_iteration)
        return run_experiment(recipe, 0, out), logits


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_gives_the_same_logits_with_the_cache_and_without(
    small_parts, photos, tmp_path, monkeypatch, own_cache, workers
):
    number = f"train.workers={workers}"
    without, expected = measured(resolved(photos, "evaluate.cache=off", number), tmp_path / "off", monkeypatch)
    assert not own_cache.exists()
    for name, setting in (("first", "auto"), ("second", "auto"), ("other", f"{tmp_path}/scratch")):
        found, logits = measured(resolved(photos, f"evaluate.cache={setting}", number), tmp_path / name, monkeypatch)
        assert (found.zero_shot, found.matrix, found.left_out) == (without.zero_shot, without.matrix, without.left_out)
        assert len(logits) == len(expected)
        assert all(map(torch.equal, logits, expected))
    assert found.left_out == {"second/test": [str(photos / "second" / "test" / "grey" / "2.png")]}
    assert len(list(own_cache.iterdir())) == len(list((tmp_path / "scratch").iterdir())) == 2


def test_its_later_evaluations_open_no_test_image(small_parts, photos, tmp_path, monkeypatch, own_cache):
    opened, whole = [], Image.open
    monkeypatch.setattr(Image, "open", lambda path, *rest: (opened.append(str(path)), whole(path, *rest))[1])
    run_experiment(resolved(photos), 0, tmp_path / "a")
    tests = [path for path in opened if "/test/" in path]
    assert len(tests) == len(set(tests)) > 10
    opened.clear()
    run_experiment(resolved(photos), 0, tmp_path / "b")
    assert [path for path in opened if "/test/" in path] == []


def test_a_bundled_stream_has_no_pictures_in_its_later_evaluations(small_parts, tmp_path, monkeypatch, own_cache):
    changes = Changes(strategy="zero-shot", settings=(*SMALL, "stream={name: small}", "evaluate.classes=seen"))
    made, whole = [], Image.fromarray
    monkeypatch.setattr(Image, "fromarray", lambda *rest: (made.append(rest), whole(*rest))[1])
    run_experiment(resolve("mtil", changes), 0, tmp_path / "out")
    assert len(made) == sum(len(task.test) for task in small_stream().tasks)  # of four evaluations
    assert not own_cache.exists()


def test_a_limit_of_nothing_turns_it_off_without_a_word(small_parts, photos, tmp_path, monkeypatch, own_cache, capsys):
    monkeypatch.setenv("MULKI_CACHE_LIMIT", "0")
    run_experiment(resolved(photos), 0, tmp_path)
    assert not own_cache.exists()
    assert "cached" not in capsys.readouterr().err


def test_a_run_on_a_full_disk_warns_and_goes_on(small_parts, photos, tmp_path, monkeypatch, own_cache, capsys):
    expected = run_experiment(resolved(photos, "evaluate.cache=off"), 0, tmp_path / "off")

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    found = run_experiment(resolved(photos), 0, tmp_path / "full")
    assert found.matrix == expected.matrix
    assert capsys.readouterr().err.count("no more test images are cached: No space left on device") == 1


def test_a_run_resumes_bit_identically_with_the_cache(small_parts, photos, tmp_path, monkeypatch, own_cache, kill_at):
    recipe = resolved(photos)
    alone = run_experiment(resolved(photos, "evaluate.cache=off"), 0, tmp_path / "alone")
    kill_at(2, 3)
    with pytest.raises(Killed):
        run_experiment(recipe, 0, tmp_path / "killed")
    [folder] = (path.parent for path in (tmp_path / "killed").rglob("result.json"))
    resumed = resume_experiment(recipe, 0, folder)
    assert (resumed.zero_shot, resumed.matrix, resumed.left_out) == (alone.zero_shot, alone.matrix, alone.left_out)


def test_a_resumed_run_keeps_the_number_of_workers(small_parts, photos, tmp_path, monkeypatch, own_cache, kill_at):
    recipe, used = resolved(photos, "train.workers=auto"), []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    kill_at(2, 3)
    with pytest.raises(Killed):
        run_experiment(recipe, 0, tmp_path)
    end_loaders()
    [folder] = (path.parent for path in tmp_path.rglob("result.json"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    monkeypatch.setattr(
        "mulki_plugins.training.run.identity",
        lambda recipe, built, seed: (used.append(built.workers), identity(recipe, built, seed))[1],
    )
    assert resume_experiment(recipe, 0, folder).status == "complete"
    assert used == [1]
