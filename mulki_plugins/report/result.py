"""result.json: what a run measured. It is written after every task, so finished tasks stay readable."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from attrs import Attribute, asdict, define, field, fields

from mulki_plugins.errors import Mistakes, MulkiError
from mulki_plugins.files import is_locked, write_text
from mulki_plugins.report.folder import is_aside

FILE = "result.json"


def _cells(row: Any) -> Any:
    """A row of accuracies, NaN for a cell that was not measured: null in the file."""
    return [math.nan if value is None else value for value in row] if isinstance(row, list) else row


def _columns(columns: Any) -> Any:
    return {name: _cells(column) for name, column in columns.items()} if isinstance(columns, dict) else columns


def _rows(rows: Any) -> Any:
    return [_cells(row) for row in rows] if isinstance(rows, list) else rows


@define(kw_only=True)
class Result:
    """One run: a recipe, a strategy, a seed."""

    recipe: str
    strategy: str
    seed: int
    status: Literal["running", "complete", "failed", "stopped"] = "running"
    tasks: list[str]
    zero_shot: list[float] = field(factory=list, converter=_cells)
    """Accuracy in percent on each task before any training."""
    matrix: list[list[float]] = field(factory=list, converter=_rows)
    """a[i][j]: accuracy in percent on task j after task i; a row for each finished task.

    NaN, here and in `zero_shot`, for a task that an extension has added and that could not be tested then.
    """
    held_out: dict[str, list[float]] = field(factory=dict, converter=_columns)
    """Accuracy in percent on each task that is tested and never learned: before any training, then after each task."""
    test_images: list[int] = field(factory=list)
    """The number of test images of each task; empty in results of earlier versions."""
    metrics: dict[str, float | None] = field(factory=dict)
    """None for a metric that failed."""
    protocol: dict[str, Any] = field(factory=dict)
    """Stream, split, shots, model, weights and classes: the conditions of the measurement."""
    budget: dict[str, Any] = field(factory=dict)
    """Iterations or epochs of a task's training, and the batch size."""
    base: str = "naive"
    """The training data of each task: naive, cumulative, joint or none."""
    settings: str = ""
    """A fingerprint of the resolved recipe without its seed: runs that share it repeat one experiment."""
    plugins: list[dict[str, Any]] = field(factory=list)
    parts: list[dict[str, str]] = field(factory=list)
    """All registered parts that were used, from the stream to the loggers: kind, name, distribution, version."""
    incomparable: list[str] = field(factory=list)
    """Reasons why the numbers are not comparable with published ones, such as different data."""
    left_out: dict[str, list[int | str]] = field(factory=dict)
    """Unreadable images that were left out, by `<task>/train` and `<task>/test`: file names, or indices of other images."""
    parent: dict[str, Any] = field(factory=dict)
    """Of a run that extends another one: its `folder`, `tasks` (their number), `settings` and `started`."""
    identity: dict[str, Any] = field(factory=dict)
    """Fingerprints of the data, files, weights and code. The recipe is in a file beside this one."""
    versions: dict[str, str] = field(factory=dict)
    device: dict[str, Any] = field(factory=dict)
    seconds: dict[str, Any] = field(factory=dict)
    flops: dict[str, Any] = field(factory=dict)
    """Floating-point operations of the training, see `training/flops.py`: `train` of each task, `step` of one of its steps,
    `total`. None for what is unknown. `begun`, while a task is learned: what was counted of it."""
    parameters: dict[str, int] = field(factory=dict)
    """The number of the model's weights: `trained`, which the training changes, and `all`."""
    started: str = ""
    error: str = ""
    folder: str = ""
    """The folder of the file; not stored in it."""

    @property
    def counted_images(self) -> list[int]:
        """The number of test images of each task that could be read."""
        unread = (len(self.left_out.get(f"{task}/test", ())) for task in self.tasks)
        return [images - lost for images, lost in zip(self.test_images, unread, strict=True)]

    def add_held_out(self, accuracies: Mapping[str, float]) -> None:
        """Extend the columns of the held-out tasks to the rows that the matrix has now, by the last evaluation.

        Where nothing was evaluated since, as in a run that trains nothing, the last value holds on.
        """
        for name, column in self.held_out.items():
            value = accuracies[name] if name in accuracies else column[-1]
            column += [value] * (1 + len(self.matrix) - len(column))

    def continue_from(self, before: Mapping[str, Any]) -> None:
        """Take over the accuracies measured so far, from the result that a checkpoint holds."""
        self.zero_shot, self.matrix = before["zero_shot"], before["matrix"]
        self.held_out = {**self.held_out, **before.get("held_out", {})}

    def write(self, folder: Path) -> None:
        data = as_plain_data(self)
        del data["folder"]
        write_text(folder / FILE, json.dumps(data, indent=1, allow_nan=False) + "\n")


def as_plain_data(result: Result) -> dict[str, Any]:
    """The result as JSON can hold it: None for what was not measured."""

    def plain(_: Any, attribute: Attribute[Any], value: Any) -> Any:
        return None if isinstance(value, float) and math.isnan(value) else value

    return asdict(result, value_serializer=plain)


def read_result(path: Path) -> Result:
    """Read a result. MulkiError if the file holds none. A running run without a process becomes "stopped"."""
    try:
        if not path.is_file():
            raise ValueError("not a regular file")
        data = json.loads(path.read_text("utf-8"), parse_constant=_refuse)
        known = {attribute.name for attribute in fields(Result)} - {"folder"}
        result = Result(**{key: value for key, value in data.items() if key in known}, folder=str(path.parent))
        _check(result)
        if result.status == "running" and is_locked(path.parent) is False:  # it was killed, or the machine went down
            result.status, result.error = "stopped", "its process ended before the run was complete"
    except json.JSONDecodeError as error:
        raise MulkiError(f"{path}: not the result of a run: line {error.lineno} is not JSON") from error
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise MulkiError(f"{path}: not the result of a run: {error}") from error
    return result


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


def _check(result: Result) -> None:
    """ValueError unless every field has the type and shape that readers rely on."""
    lists = (result.tasks, result.matrix, result.zero_shot, result.plugins, result.parts, result.incomparable)
    mappings = (
        result.metrics, result.left_out, result.identity, result.versions, result.device, result.seconds,
        result.parameters, result.parent, result.held_out, result.flops,
    )  # fmt: skip
    if not all(isinstance(value, list) for value in lists) or not all(isinstance(value, dict) for value in mappings):
        raise ValueError("expected lists of tasks, accuracies and plugins, and a mapping of metrics")
    if not all(isinstance(text, str) for text in result.incomparable):
        raise ValueError("expected the reasons in `incomparable` to be text")
    for text in (*result.tasks, *result.metrics, *result.incomparable, *result.held_out):
        str(text).encode()
    for name in ("recipe", "strategy", "status", "base", "settings", "started", "error"):
        if not isinstance(getattr(result, name), str):
            raise ValueError(f"expected {name} to be text")
        getattr(result, name).encode()
    if result.status not in ("running", "complete", "failed", "stopped"):
        raise ValueError(f"expected a status of running, complete, failed or stopped, got {result.status!r}")
    if type(result.seed) is not int or not isinstance(result.protocol, dict):
        raise ValueError("expected an integer seed and a mapping as protocol")
    if not isinstance(result.budget, dict):
        raise ValueError("expected a mapping as budget")
    if not result.tasks:
        raise ValueError("expected at least one task")
    width = len(result.tasks)
    rows = [*result.matrix, *([result.zero_shot] if result.zero_shot else [])]
    if not all(isinstance(task, str) for task in result.tasks) or len(result.matrix) > width:
        raise ValueError("tasks and matrix do not match")
    for row in rows:
        if len(row) != width or not _are_accuracies(row, result):
            raise ValueError(f"expected rows of {width} accuracies from 0 to 100")
    for name, column in result.held_out.items():
        if not isinstance(column, list) or len(column) > 1 + len(result.matrix) or not _are_accuracies(column, result):
            raise ValueError(f"expected accuracies from 0 to 100 for the held-out task {name!r}, at most one a row")
    if not isinstance(result.test_images, list) or not all(type(n) is int and n >= 0 for n in result.test_images):
        raise ValueError("expected numbers of test images")
    if len(result.test_images) not in (0, width):
        raise ValueError("tasks and numbers of test images do not match")
    if not all(v is None or (type(v) in (int, float) and math.isfinite(v)) for v in result.metrics.values()):
        raise ValueError("expected finite numbers as metrics")
    if result.status == "complete" and len(result.matrix) != width:
        raise ValueError(f"the run is marked complete but has only {len(result.matrix)} of {width} rows")


def _are_accuracies(values: Iterable[Any], result: Result) -> bool:
    """Whether all are percentages; NaN only in a run that extends another one."""
    return all(type(v) in (int, float) and (0 <= v <= 100 or (math.isnan(v) and result.parent)) for v in values)


def find_results(folders: Iterable[Path]) -> tuple[list[Result], list[str]]:
    """The results in and below these folders, each once, and the errors of unreadable ones.

    MulkiError if a folder has no result, or if none can be read.
    """
    results: dict[Path, Result] = {}
    errors: dict[Path, str] = {}
    for folder in folders:
        paths = [_result_beside(folder)] if folder.is_file() else list(_result_files(folder))
        if not paths:
            problem = "no such folder" if not folder.exists() else f"no {FILE} in it or below it"
            raise MulkiError(f"{folder}: {problem}", "give the folder of a run, or one above several, such as `runs`")
        for path in paths:
            try:
                results.setdefault(path.resolve(), read_result(path))
            except MulkiError as error:
                errors[path.resolve()] = error.lines()[0]
    if not results:
        raise Mistakes(errors.values())
    return list(results.values()), list(errors.values())


def _result_beside(file: Path) -> Path:
    """The result beside any file of a run, else the file itself. MulkiError if it cannot be a result."""
    if file.name != FILE and (file.parent / FILE).is_file():
        return file.parent / FILE
    if file.suffix != ".json":
        raise MulkiError(f"{file}: not the {FILE} of a run", "give the folder of a run, or one above several")
    return file


def _result_files(folder: Path) -> Iterator[Path]:
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not is_aside(Path(name)))
        if FILE in files:
            yield Path(root) / FILE


def runs_moved_aside(folders: Iterable[Path]) -> list[Path]:
    """The folders of earlier runs that were moved aside; `find_results` skips them."""
    aside = []
    for folder in folders:
        for root, names, _ in os.walk(folder):
            aside += [Path(root) / name for name in sorted(names) if is_aside(Path(name))]
            names[:] = sorted(name for name in names if not is_aside(Path(name)))
    return list(dict.fromkeys(aside))
