"""What was predicted for each test image: kept for each row, read again, equal to the matrix."""

import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from mulki_plugins.errors import MulkiError
from mulki_plugins.models import ClipClassifier
from mulki_plugins.models.text import Prompts
from mulki_plugins.recipe.resolve import Changes, resolve
from mulki_plugins.report.predictions import (
    UNREAD,
    Answers,
    read_predictions,
    write_row,
    write_stream,
)
from mulki_plugins.training.accuracy import index_candidates
from mulki_plugins.training.resume import resume_experiment
from mulki_plugins.training.run import Run, run_experiment
from tests.conftest import Killed, SmallTokenizer

pytestmark = pytest.mark.usefixtures("small_parts")

FEW = ("stream=small", "model=small-clip", "train.iterations=4", "train.batch_size=4", "train.schedule.warmup=0",
       "evaluate.batch_size=5", "loggers=[]")  # fmt: skip


def toy(*settings, strategy="finetune"):
    return resolve("mtil", Changes(strategy=strategy, settings=(*FEW, *settings)))


def rows_of(result):
    return [result.zero_shot, *result.matrix]


def answers_equal(one, other):
    return all(
        np.array_equal(one.predicted(row, task), other.predicted(row, task))
        for row in range(len(one.rows))
        for task in range(len(one.tasks))
    )


@pytest.mark.parametrize("classes", ["task", "seen", "all"])
@pytest.mark.parametrize("strategy", ["finetune", "joint", "zero-shot"])
def test_they_give_the_matrix(classes, strategy, tmp_path):
    result = run_experiment(toy(f"evaluate.classes={classes}", strategy=strategy), 0, tmp_path / "runs")
    kept = read_predictions(next((tmp_path / "runs").rglob("seed-0")))
    assert kept.tasks == result.tasks
    assert kept.rows == ["zero-shot", *result.tasks]
    for row, accuracies in enumerate(rows_of(result)):
        for task, accuracy in enumerate(accuracies):
            assert kept.accuracy(row, task) == accuracy
            assert 100 * kept.right(row, task).sum() / kept.counted(row, task).sum() == accuracy
    assert [name for task, name in kept.classes if task == 2] == ["grass", "sea"]


def test_a_resumed_zero_shot_run_repeats_its_row(tmp_path, monkeypatch):
    recipe = toy(strategy="zero-shot")

    def killed(self):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Run, "train_nothing", killed)
        with pytest.raises(Killed):
            run_experiment(recipe, 0, tmp_path, folder=tmp_path / "run")
    result = resume_experiment(recipe, 0, tmp_path / "run")
    kept = read_predictions(tmp_path / "run")
    assert len(kept.rows) == 4
    assert [kept.accuracy(3, task) for task in range(3)] == result.matrix[-1]


def test_a_class_that_two_tasks_share_is_the_images_own(loaded):
    """In the union of all tasks `cat` is one class; for an image of the second task it is that task's."""
    tasks = [Prompts(["cat", "dog"]), Prompts(["owl", "cat"]), Prompts(["CAT", "cat", "eel"])]
    model = ClipClassifier(loaded.clip, SmallTokenizer(), tasks)
    assert index_candidates(model, 1, None).tolist() == [2, 3]
    assert index_candidates(model, 0, [0, 1]).tolist() == [0, 1, 2]
    assert index_candidates(model, 1, [0, 1]).tolist() == [3, 1, 2]
    assert index_candidates(model, 1, [1]).tolist() == [2, 3]
    assert index_candidates(model, 0, [1]).tolist() == [2, 3], "a task that is none of the candidates' own"


def test_a_killed_and_resumed_run_keeps_the_same(tmp_path, kill_at):
    steps = toy("train.checkpoint.every=1")
    run_experiment(steps, 0, tmp_path, folder=tmp_path / "undisturbed")
    kill_at(2, 2)
    with pytest.raises(Killed):
        run_experiment(steps, 0, tmp_path, folder=tmp_path / "killed")
    assert read_predictions(tmp_path / "killed").rows == ["zero-shot", "first"]
    resume_experiment(steps, 0, tmp_path / "killed")
    for path in (tmp_path / "undisturbed" / "predictions").iterdir():
        assert path.read_bytes() == (tmp_path / "killed" / "predictions" / path.name).read_bytes(), path.name


def test_none_are_kept_if_the_recipe_says_so(tmp_path):
    without, plain = toy("evaluate.predictions=false"), toy()
    result = run_experiment(without, 0, tmp_path, folder=tmp_path / "run")
    assert not (tmp_path / "run" / "predictions").exists()
    assert read_predictions(tmp_path / "run") is None
    assert result.settings == run_experiment(plain, 0, tmp_path, folder=tmp_path / "other").settings


def written(folder, images=6, classes=(("cat", "dog"), ("cat", "b", "c")), files=(None, None)):
    labels = [[i % len(names) for i in range(images)] for names in classes]
    write_stream(folder, ["x", "y"], classes, labels, files)
    total = sum(map(len, classes))
    for row in range(3):
        parts = [np.arange(images) % total, np.full(images, UNREAD)]
        sure = np.full(images, 51, dtype=np.uint8)
        write_row(folder, row, [Answers(predicted=part, confidence=sure) for part in parts], total)


def test_what_is_read_is_what_was_written(tmp_path):
    paths = ["a.png", "b/\udcff.png", "new\nline", "花", "", "x" * 300]
    written(tmp_path, files=(paths, None))
    kept = read_predictions(tmp_path)
    assert kept.classes == [(0, "cat"), (0, "dog"), (1, "cat"), (1, "b"), (1, "c")]
    assert kept.labels(1).tolist() == [2, 3, 4, 2, 3, 4]
    assert kept.predicted(2, 0).tolist() == [0, 1, 2, 3, 4, 0]
    assert kept.right(2, 0).tolist() == [True, True, False, False, False, False]
    assert not kept.right(0, 1).any()
    assert not kept.counted(0, 1).any()
    assert kept.confidence(0, 0).tolist() == [0.2] * 6
    assert [kept.file(0, i) for i in range(6)] == paths
    assert kept.file(1, 3) == "test image 3"


def test_a_row_that_was_not_kept_has_no_answers_and_the_last_one_ends_them(tmp_path):
    written(tmp_path)
    (tmp_path / "predictions" / "row-01.npz").unlink()
    kept = read_predictions(tmp_path)
    assert kept.rows == ["zero-shot", "x", "y"]
    assert not kept.counted(1, 0).any()
    assert kept.counted(2, 0).any()
    (tmp_path / "predictions" / "row-02.npz").unlink()
    assert read_predictions(tmp_path).rows == ["zero-shot"]
    (tmp_path / "predictions" / "row-00.npz").unlink()
    assert read_predictions(tmp_path) is None


def test_the_size_at_that_of_mtil(tmp_path):
    """97,209 test images of 1,200 classes: four of five right, the wrong ones anywhere."""
    random = np.random.default_rng(0)
    labels = np.sort(random.integers(0, 1200, 97_209))
    write_stream(tmp_path, ["all"], [[f"class {i}" for i in range(1200)]], [labels.tolist()], [None])
    for row in range(12):
        wrong = random.random(len(labels)) < 0.2
        predicted = np.where(wrong, random.integers(0, 1200, len(labels)), labels)
        sure = random.integers(0, 256, len(labels)).astype(np.uint8)
        write_row(tmp_path, row, [Answers(predicted=predicted, confidence=sure)], 1200)
    size = sum(path.stat().st_size for path in (tmp_path / "predictions").iterdir())
    assert size < 5e6
    assert (tmp_path / "predictions" / "row-00.npz").stat().st_size < 0.4e6


def rewrite(path, **changes):
    with np.load(path) as arrays:
        kept = dict(arrays)
    np.savez(path, **{**kept, **changes})


def more_classes(folder):
    data = json.loads((folder / "stream.json").read_text())
    (folder / "stream.json").write_text(json.dumps({**data, "classes": [[7, "cat"]]}))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "row-01.npz").write_bytes(b""),
        lambda folder: (folder / "row-01.npz").write_bytes((folder / "row-01.npz").read_bytes()[:100]),
        lambda folder: (folder / "stream.json").write_text("{}"),
        lambda folder: (folder / "stream.json").write_text("[" * 100_000),
        lambda folder: (folder / "images.npz").unlink(),
        more_classes,
        lambda folder: rewrite(folder / "row-00.npz", **{"predicted-0": np.array([99] * 6)}),
        lambda folder: rewrite(folder / "row-00.npz", **{"predicted-0": np.array([0, 1])}),
        lambda folder: rewrite(folder / "row-00.npz", **{"predicted-0": np.array([0.0] * 6)}),
        lambda folder: rewrite(folder / "row-00.npz", **{"predicted-0": np.array([{}] * 6, dtype=object)}),
        lambda folder: rewrite(folder / "images.npz", **{"labels-0": np.array([-1] * 6)}),
    ],
)
def test_damaged_ones_are_an_error_that_names_the_file(spoil, tmp_path):
    written(tmp_path)
    spoil(tmp_path / "predictions")
    with pytest.raises(MulkiError, match=r"predictions/\S+: the predictions cannot be read"):
        read_predictions(tmp_path)


def test_a_file_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    written(tmp_path)
    with zipfile.ZipFile(tmp_path / "predictions" / "row-00.npz", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.npy", b"\0" * 10_000_000)
    monkeypatch.setattr("mulki_plugins.report.predictions.LARGEST", 9_000_000)
    with pytest.raises(MulkiError, match="too large"):
        read_predictions(tmp_path)


def test_a_link_in_their_place_is_not_written_through(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "predictions").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(MulkiError, match="is a link"):
        written(tmp_path / "run")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_images_that_cannot_be_read_are_known_by_name_and_do_not_count(tmp_path):
    for part in ("train", "test"):
        for i, colour in enumerate(("red", "green")):
            (tmp_path / "data" / part / colour).mkdir(parents=True)
            for j in range(4):
                picture = Image.new("RGB", (16, 16), (200 - 150 * i, 30 + 150 * i, 10 * j))
                picture.save(tmp_path / "data" / part / colour / f"{j}.png")
    broken = tmp_path / "data" / "test" / "green" / "2.png"
    broken.write_bytes(broken.read_bytes()[:40])
    stream = f"stream={{name: folders, tasks: [{{name: colours, train: {tmp_path}/data/train, test: {tmp_path}/data/test}}]}}"
    few = ("model=small-clip", "train.iterations=2", "train.batch_size=4", "train.schedule.warmup=0", "loggers=[]")
    recipe = resolve("mtil", Changes(strategy="finetune", settings=(*few, stream, "train.unreadable=skip")))
    result = run_experiment(recipe, 0, tmp_path, folder=tmp_path / "run")
    kept = read_predictions(tmp_path / "run")
    assert [kept.accuracy(row, 0) for row in range(2)] == [result.zero_shot[0], result.matrix[0][0]]
    [left_out] = [i for i in range(8) if not kept.counted(1, 0)[i]]
    assert kept.file(0, left_out) == str(broken)
    assert kept.predicted(1, 0)[left_out] == UNREAD
    assert not kept.right(1, 0)[left_out]
    assert result.left_out["colours/test"] == [str(broken)]
