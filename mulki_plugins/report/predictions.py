"""predictions/: what was predicted for each test image, a file for the zero-shot row and one for each row of the matrix.

`stream.json` names the tasks and their classes, `images.npz` holds each test image's right class and, where the stream has
files, its path; `row-00.npz` is the zero-shot row and `row-01.npz` the row after the first task. A class is a number over all
classes of the stream, so that an answer from another task is told apart. At MTIL's size it is about 3 MB.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from attrs import field, frozen
from numpy.typing import NDArray

from mulki_plugins.errors import MulkiError, describe_error
from mulki_plugins.files import replacing, write_bytes, write_text

FOLDER = "predictions"
FORMAT = 1
UNREAD = -1
"""The prediction for a test image that could not be read."""
SURE = 255
"""A confidence of one, as it is stored."""
LARGEST = 2**31
"""Bytes that a file may unpack to; a damaged or hostile one must not exhaust the memory."""

_CODEC = ("utf-8", "surrogatepass")  # a path may hold bytes that are no text


@frozen(kw_only=True, eq=False)
class Answers:
    """The answers to one task's test images, in the stream's order."""

    predicted: NDArray[np.int64]
    """[N]: index over all classes of the stream, or UNREAD. An answer that counts as right is the image's own class."""
    confidence: NDArray[np.uint8]
    """[N]: the softmax of the predicted class among the candidates, times SURE."""


@frozen(kw_only=True, eq=False)
class Predictions:
    """What a run predicted for each test image."""

    tasks: list[str]
    rows: list[str]
    """"zero-shot", then the task learned before each row of the matrix. It ends before the first row that was not kept."""
    classes: list[tuple[int, str]]
    """The task and the name of each class of the stream; an index into it identifies a class."""
    _answers: list[list[Answers]] = field(repr=False)
    _labels: list[NDArray[np.int64]] = field(repr=False)
    _files: list[list[str] | None] = field(repr=False)

    def predicted(self, row: int, task: int) -> NDArray[np.int64]:
        """The predicted class of each test image [N], in the stream's order; UNREAD (-1) if it could not be read."""
        return self._answers[row][task].predicted

    def labels(self, task: int) -> NDArray[np.int64]:
        """The right class of each test image [N]."""
        return self._labels[task]

    def right(self, row: int, task: int) -> NDArray[np.bool_]:
        """Whether each test image was classified right [N]; false for those left out, see `counted`."""
        right: NDArray[np.bool_] = self.predicted(row, task) == self.labels(task)
        return right

    def counted(self, row: int, task: int) -> NDArray[np.bool_]:
        """Whether each test image counts [N]: all but those that could not be read."""
        counted: NDArray[np.bool_] = self.predicted(row, task) != UNREAD
        return counted

    def accuracy(self, row: int, task: int) -> float:
        """In percent, exactly as in the matrix."""
        return accuracy_of(self.predicted(row, task), self.labels(task))

    def confidence(self, row: int, task: int) -> NDArray[np.float64]:
        """The probability of the predicted class among the candidates [N], to 1/255."""
        return self._answers[row][task].confidence / SURE

    def file(self, task: int, image: int) -> str:
        """The path of a test image, or its index if the stream has no files."""
        files = self._files[task]
        return f"test image {image}" if files is None else files[image]


def accuracy_of(predicted: NDArray[np.int64], labels: NDArray[np.int64]) -> float:
    """The share of right answers among the images that were read, in percent. ZeroDivisionError if none was."""
    return 100 * int((predicted == labels).sum()) / int((predicted != UNREAD).sum())


def write_stream(
    folder: Path,
    tasks: Sequence[str],
    class_names: Sequence[Sequence[str]],
    labels: Sequence[Sequence[int]],
    files: Sequence[Sequence[str] | None],
) -> None:
    """Write what all rows share, below the run's folder.

    class_names: of each task. labels: each test image's class in its own task. files: the paths of each task's test images,
    None where the stream has no files.
    """
    classes = [[task, name] for task, names in enumerate(class_names) for name in names]
    arrays: dict[str, NDArray[Any]] = {}
    first = 0
    for task, own in enumerate(labels):
        arrays[f"labels-{task}"] = _small(np.asarray(own, dtype=np.int64) + first, len(classes))
        if (paths := files[task]) is not None:
            arrays[f"files-{task}"] = np.array([path.encode(*_CODEC) for path in paths], dtype=np.bytes_)
        first += len(class_names[task])
    below = _folder(folder)
    below.mkdir(exist_ok=True)
    _write(below / "images.npz", arrays)
    data = {"format": FORMAT, "tasks": list(tasks), "classes": classes}
    write_text(below / "stream.json", json.dumps(data, indent=0) + "\n")


def write_row(folder: Path, row: int, answers: Sequence[Answers], classes: int) -> None:
    """Write one row: the answers of each task, among so many classes of the stream. Row 0 is the zero-shot row."""
    arrays: dict[str, NDArray[Any]] = {}
    for task, part in enumerate(answers):
        arrays[f"predicted-{task}"] = _small(part.predicted, classes)
        arrays[f"confidence-{task}"] = part.confidence
    _write(_folder(folder) / f"row-{row:02d}.npz", arrays)


def extend_row(folder: Path, row: int, answers: Mapping[int, Answers], tasks: int, classes: int) -> None:
    """Add the answers to some of the tasks to a row; the row is removed if those to other tasks were not kept."""
    path = _folder(folder) / f"row-{row:02d}.npz"
    try:
        arrays = _read(path)
    except (OSError, ValueError, zipfile.BadZipFile):
        arrays = {}
    for task, part in answers.items():
        arrays[f"predicted-{task}"] = _small(part.predicted, classes)
        arrays[f"confidence-{task}"] = part.confidence
    if all(f"predicted-{task}" in arrays for task in range(tasks)):
        _write(path, arrays)
    else:
        path.unlink(missing_ok=True)


def copy_row(folder: Path, row: int, to: int) -> None:
    """Write a row again as another one."""
    below = _folder(folder)
    write_bytes(below / f"row-{to:02d}.npz", (below / f"row-{row:02d}.npz").read_bytes())


def are_kept(folder: Path) -> bool:
    """Whether a run's folder holds predictions."""
    return (folder / FOLDER / "stream.json").is_file()


def read_predictions(folder: Path) -> Predictions | None:
    """The predictions below a run's folder, or None if the run kept none. MulkiError if they are damaged."""
    if not are_kept(folder):
        return None
    below = folder / FOLDER
    path = below / "stream.json"
    try:
        data = json.loads(path.read_text("utf-8"))
        tasks, classes = _names(data)
        labels, files = [], []
        path = below / "images.npz"
        shared = _read(path)
        for task in range(len(tasks)):
            labels.append(_indices(shared[f"labels-{task}"], len(classes), least=0))
            files.append(_paths(shared.get(f"files-{task}"), len(labels[-1])))
        answers: list[list[Answers]] = []
        paths = [below / f"row-{row:02d}.npz" for row in range(len(tasks) + 1)]
        kept = max((row for row, path in enumerate(paths) if path.is_file()), default=-1)
        for path in paths[: kept + 1]:  # a run that extends another one may lack answers of earlier rows
            arrays = _read(path) if path.is_file() else {}
            answers.append([_answers(arrays, task, labels[task], len(classes)) for task in range(len(tasks))])
    except (OSError, ValueError, TypeError, KeyError, EOFError, RecursionError, zipfile.BadZipFile) as error:
        hint = f"remove {below} to do without; result.json has all accuracies"
        raise MulkiError(f"{path}: the predictions cannot be read: {describe_error(error)}", hint) from error
    if not answers:
        return None
    rows = ["zero-shot", *tasks][: len(answers)]
    return Predictions(tasks=tasks, rows=rows, classes=classes, answers=answers, labels=labels, files=files)


def _folder(run: Path) -> Path:
    below = run / FOLDER
    if below.is_symlink():
        raise MulkiError(f"{below}: is a link, and nothing is written outside the run's folder")
    return below


def _small(indices: NDArray[np.int64], classes: int) -> NDArray[Any]:
    """In the smallest signed integers that hold UNREAD and every class."""
    return indices.astype(np.min_scalar_type(-max(1, classes)))


def _write(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    with replacing(path) as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # mypy takes an array for allow_pickle


def _read(path: Path) -> dict[str, NDArray[Any]]:
    if path.is_symlink():
        raise ValueError("it is a link")
    with zipfile.ZipFile(path) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > LARGEST:
            raise ValueError("it is too large")
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def _names(data: Any) -> tuple[list[str], list[tuple[int, str]]]:
    if data["format"] != FORMAT:
        raise ValueError(f"it has format {data['format']!r}, this version of MulKI reads {FORMAT}")
    tasks, classes = data["tasks"], [(task, name) for task, name in data["classes"]]
    texts = [*tasks, *(name for _, name in classes)]
    if not isinstance(tasks, list) or not tasks or not all(isinstance(text, str) for text in texts):
        raise ValueError("expected the names of tasks and classes")
    if not all(type(task) is int and 0 <= task < len(tasks) for task, _ in classes):
        raise ValueError("expected the task of each class")
    return tasks, classes


def _indices(array: NDArray[Any], classes: int, *, least: int) -> NDArray[np.int64]:
    if array.ndim != 1 or array.dtype.kind != "i":
        raise ValueError(f"expected a list of classes, got {array.dtype} of {array.shape}")
    if array.size and not least <= array.min() <= array.max() < classes:
        raise ValueError(f"expected classes from {least} to {classes - 1}")
    return array.astype(np.int64)


def _answers(arrays: Mapping[str, NDArray[Any]], task: int, labels: NDArray[np.int64], classes: int) -> Answers:
    if f"predicted-{task}" not in arrays:
        return Answers(predicted=np.full(labels.shape, UNREAD, np.int64), confidence=np.zeros(labels.shape, np.uint8))
    predicted, confidence = arrays[f"predicted-{task}"], arrays[f"confidence-{task}"]
    if not predicted.shape == confidence.shape == labels.shape or confidence.dtype != np.uint8:
        raise ValueError(f"expected answers to {len(labels)} images, got {predicted.shape} and {confidence.shape}")
    return Answers(predicted=_indices(predicted, classes, least=UNREAD), confidence=confidence)


def _paths(array: NDArray[Any] | None, images: int) -> list[str] | None:
    if array is None:
        return None
    if array.shape != (images,) or array.dtype.kind != "S":
        raise ValueError(f"expected {images} paths, got {array.dtype} of {array.shape}")
    return [path.decode(*_CODEC) for path in array.tolist()]
