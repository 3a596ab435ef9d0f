"""result.json: what a run measured. Written after every task, so that what is finished stays readable."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from attrs import asdict, define, field

from mulki_plugins.errors import Mistakes, MulkiError
from mulki_plugins.files import is_locked, write_text
from mulki_plugins.report.folder import is_aside

FILE = "result.json"


@define(kw_only=True)
class Result:
    """One run: a recipe, a strategy, a seed."""

    recipe: str
    strategy: str
    seed: int
    status: Literal["running", "complete", "failed", "stopped"] = "running"
    tasks: list[str]
    zero_shot: list[float] = field(factory=list)
    """Accuracy in percent on each task before any training."""
    matrix: list[list[float]] = field(factory=list)
    """a[i][j]: accuracy in percent on task j after task i; as many rows as tasks were finished."""
    metrics: dict[str, float | None] = field(factory=dict)
    """None: the metric failed."""
    protocol: dict[str, Any] = field(factory=dict)
    """What the numbers were measured on and by: stream, split, shots, model, weights, classes."""
    budget: dict[str, Any] = field(factory=dict)
    """What a task's training was given: iterations or epochs, and the batch size."""
    base: str = "naive"
    """What a task's training saw: naive, cumulative, joint or none."""
    settings: str = ""
    """A fingerprint of the resolved recipe but its seed: runs that share it are repetitions of one experiment."""
    plugins: list[dict[str, Any]] = field(factory=list)
    parts: list[dict[str, str]] = field(factory=list)
    """Everything registered that took part, from the stream to the loggers: kind, name, distribution, version."""
    incomparable: list[str] = field(factory=list)
    """What keeps the numbers from standing beside published ones: data that are not the published."""
    left_out: dict[str, list[int | str]] = field(factory=dict)
    """The files of images that could not be read and were left out, by `<task>/train` and `<task>/test`; of images that are
    no files, their places."""
    identity: dict[str, Any] = field(factory=dict)
    """What else it was measured with, in fingerprints: data, files, weights, code; the recipe is beside it."""
    versions: dict[str, str] = field(factory=dict)
    device: dict[str, Any] = field(factory=dict)
    seconds: dict[str, Any] = field(factory=dict)
    started: str = ""
    error: str = ""
    folder: str = ""
    """Where it was read from or is written to; not part of the file."""

    def write(self, folder: Path) -> None:
        data = asdict(self)
        del data["folder"]
        write_text(folder / FILE, json.dumps(data, indent=1, allow_nan=False) + "\n")


def read_result(path: Path) -> Result:
    """The result in a file; MulkiError where it is none. A run whose process is gone is not "running" but "stopped"."""
    try:
        if not path.is_file():
            raise ValueError("it is no regular file")
        data = json.loads(path.read_text("utf-8"))
        known = {a.name for a in Result.__attrs_attrs__} - {"folder"}  # type: ignore[attr-defined]
        result = Result(**{key: value for key, value in data.items() if key in known}, folder=str(path.parent))
        _check(result)
        if result.status == "running" and is_locked(path.parent) is False:  # it was killed, or the machine went down
            result.status, result.error = "stopped", "its process ended before it was done"
    except json.JSONDecodeError as error:
        raise MulkiError(f"{path}: this is no result of a run: line {error.lineno} is no JSON") from error
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise MulkiError(f"{path}: this is no result of a run: {error}") from error
    return result


def _check(result: Result) -> None:
    """That the numbers have the shapes that everything else relies on."""
    lists = (result.tasks, result.matrix, result.zero_shot, result.plugins, result.parts, result.incomparable)
    mappings = (result.metrics, result.left_out, result.identity, result.versions, result.device)
    if not all(isinstance(value, list) for value in lists) or not all(isinstance(value, dict) for value in mappings):
        raise ValueError("expected lists of tasks, accuracies and plugins, and a mapping of metrics")
    if not all(isinstance(text, str) for text in result.incomparable):
        raise ValueError("expected texts that say what keeps the numbers from being compared")
    for text in (*result.tasks, *result.metrics, *result.incomparable):
        str(text).encode()
    for name in ("recipe", "strategy", "status", "base", "settings", "started", "error"):
        if not isinstance(getattr(result, name), str):
            raise ValueError(f"expected {name} to be text")
        getattr(result, name).encode()
    if result.status not in ("running", "complete", "failed", "stopped"):
        raise ValueError(f"expected a status of running, complete, failed or stopped, got {result.status!r}")
    if type(result.seed) is not int or not isinstance(result.protocol, dict):
        raise ValueError("expected a number as seed and a mapping as protocol")
    if not isinstance(result.budget, dict):
        raise ValueError("expected a mapping as budget")
    if not result.tasks:
        raise ValueError("expected at least one task")
    width = len(result.tasks)
    rows = [*result.matrix, *([result.zero_shot] if result.zero_shot else [])]
    if not all(isinstance(task, str) for task in result.tasks) or len(result.matrix) > width:
        raise ValueError("tasks and matrix do not fit together")
    for row in rows:
        if len(row) != width or not all(type(v) in (int, float) and 0 <= v <= 100 for v in row):
            raise ValueError(f"expected rows of {width} accuracies from 0 to 100")
    if not all(v is None or (type(v) in (int, float) and math.isfinite(v)) for v in result.metrics.values()):
        raise ValueError("expected finite numbers as metrics")
    if result.status == "complete" and len(result.matrix) != width:
        raise ValueError(f"the run is called complete, but {len(result.matrix)} of {width} rows are there")


def find_results(folders: Iterable[Path]) -> tuple[list[Result], list[str]]:
    """The results in these folders and below them, each once, and what is wrong with those that cannot be read.

    MulkiError where a folder has none, or where none can be read.
    """
    found: dict[Path, Result] = {}
    wrong: dict[Path, str] = {}
    for folder in folders:
        paths = [_of_run(folder)] if folder.is_file() else list(_below(folder))
        if not paths:
            what = "no such folder" if not folder.exists() else f"no {FILE} in it or below it"
            raise MulkiError(f"{folder}: {what}", "give the folder of a run, or one above several, such as `runs`")
        for path in paths:
            try:
                found.setdefault(path.resolve(), read_result(path))
            except MulkiError as error:
                wrong[path.resolve()] = error.lines()[0]
    if not found:
        raise Mistakes(wrong.values())
    return list(found.values()), list(wrong.values())


def _of_run(file: Path) -> Path:
    """The result beside a run's file; a file of its own otherwise. MulkiError where it is surely none."""
    if file.name != FILE and (file.parent / FILE).is_file():
        return file.parent / FILE
    if file.suffix != ".json":
        raise MulkiError(f"{file}: this is no {FILE} of a run", "give the folder of a run, or one above several")
    return file


def moved_aside(folders: Iterable[Path]) -> list[Path]:
    """The earlier runs below these folders that were moved aside and are not among their results."""
    found = []
    for folder in folders:
        for root, names, _ in os.walk(folder):
            found += [Path(root) / name for name in sorted(names) if is_aside(Path(name))]
            names[:] = sorted(name for name in names if not is_aside(Path(name)))
    return list(dict.fromkeys(found))


def _below(folder: Path) -> Iterator[Path]:
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not is_aside(Path(name)))
        if FILE in files:
            yield Path(root) / FILE
