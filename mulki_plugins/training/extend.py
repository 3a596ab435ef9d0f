"""Extends a finished run by further tasks, in a folder of its own, as if they had always been there.

The new run begins with copies of what the other one kept: its last checkpoint, the weights after each task, its curves.
Then it goes on as a resumed run does, and nothing in it refers to the other folder again but its name.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import evolve

from mulki_plugins.errors import MulkiError
from mulki_plugins.files import link_or_copy, locked, write_text
from mulki_plugins.models.weights import WEIGHTS
from mulki_plugins.recipe.emit import dump_yaml
from mulki_plugins.recipe.resolve import Resolution
from mulki_plugins.recipe.schema import Recipe, as_data
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.report import predictions
from mulki_plugins.report.folder import prepare_folder
from mulki_plugins.report.progress import ProgressLogger
from mulki_plugins.report.result import Result
from mulki_plugins.training import kept_weights
from mulki_plugins.training.build import build_seeded
from mulki_plugins.training.checkpoint import (
    FOLDER,
    STATE,
    Checkpoint,
    Damaged,
    new_folder,
    read_checkpoint,
    to_extend,
    write_manifest,
)
from mulki_plugins.training.provenance import differences, identity, other_threads
from mulki_plugins.training.run import Run

_AGAIN = "learn all tasks in a new run, with `mulki run`"


def refuse_extension(result: Result, recipe: Recipe) -> None:
    """MulkiError if no run of this strategy, or not this run, can be extended."""
    folder = result.folder
    if result.status != "complete":
        raise MulkiError(
            f"{folder}: this run is not complete: {result.status}",
            f"finish it with `mulki resume {shlex.quote(folder)}`",
        )
    if result.base == "joint":
        raise MulkiError(
            f"{folder}: the strategy {result.strategy!r} learns all tasks at once, so no task can follow", _AGAIN
        )
    for entry in recipe.strategy.plugins:
        if reason := catalog().find("plugin", entry.name).no_resume:
            raise MulkiError(f"{folder}: cannot go on from a run with the plugin {entry.name!r}: {reason}", _AGAIN)


def extend_experiment(parent: Result, resolved: Resolution, folder: Path, *, force: bool = False) -> Result:
    """Extend a finished run by the further tasks of a recipe, in `folder`; returns what result.json holds.

    MulkiError if the run cannot be extended, or if its recipe, data, code or versions have changed since; forced, only if
    its tasks are not the first ones of the recipe.
    """
    recipe, seed = evolve(resolved.recipe, seeds=[parent.seed]), parent.seed
    refuse_extension(parent, recipe)
    end = _last_checkpoint(parent)
    built = build_seeded(recipe, seed)
    progress = ProgressLogger(len(built.stream.tasks))
    before = end.run["identity"]
    if recipe.train.workers == "auto":  # the batches depend on their number
        built = evolve(built, workers=before["recipe"].get("workers", built.workers))
    now = identity(recipe, built, seed)
    if warning := other_threads(before, now):
        progress.say(warning)
    for line in _changes(parent, end, now, force):
        progress.say(f"extending although {line}")
    if aside := prepare_folder(folder):
        progress.say(f"{folder}: moved an earlier run to {aside}")
    with locked(folder):
        write_text(folder / "recipe.yaml", dump_yaml(as_data(recipe)))  # first: so the folder is known as a run's
        for kept in kept_weights.kept_weights(Path(parent.folder)).values():
            _copy_checkpoint(kept, folder / kept_weights.FOLDER, kept.run)
        run = _as_begun(parent, end, recipe, now)
        if recipe.evaluate.classes != "all":  # else the curves are those of answers among fewer classes
            run["loggers"] = _copy_curves(end, Path(parent.folder), folder)
        _copy_predictions(Path(parent.folder), folder)
        begun = _copy_checkpoint(end, folder / FOLDER, run)
        progress.say(f"extending {parent.folder} by {', '.join(list(now['data'])[len(parent.tasks) :])}")
        return Run(recipe, built, folder, seed, progress).execute(begun)


def _last_checkpoint(parent: Result) -> Checkpoint:
    """The checkpoint of the last task's end; of a strategy that trains nothing, that of the start."""
    checkpoint = to_extend(Path(parent.folder), parent.base, len(parent.tasks))
    if checkpoint is None:
        raise MulkiError(
            f"{parent.folder}: holds no checkpoint of its last task's end, from which it could go on",
            f"it was removed, or none were kept (train.checkpoint.keep); {_AGAIN}",
        )
    try:
        checkpoint.verify()
    except Damaged as error:
        raise MulkiError(f"{error.message}; the run cannot be extended without it", _AGAIN) from error
    return checkpoint


def _changes(parent: Result, end: Checkpoint, now: Mapping[str, Any], force: bool) -> list[str]:
    """What has changed apart from the further tasks. MulkiError if anything has, unless forced."""
    before = end.run["identity"]
    tasks, names = list(before["data"]), list(now["data"])
    if names[: len(tasks)] != tasks:
        raise MulkiError(
            f"{parent.folder}: the run learned {', '.join(tasks)}, and the stream begins with "
            f"{', '.join(names[: len(tasks)])}",
            "a stream that extends a run begins with the run's own tasks, in their order",
        )
    if len(names) == len(tasks):
        raise MulkiError(f"{parent.folder}: the stream has no further task", "name one with --task or --tasks")
    kept = [*tasks, *before.get("held_out", {})]
    changed = differences(_of_tasks(before, kept), _of_tasks(now, kept))
    if changed and not force:
        raise MulkiError(
            f"{parent.folder}: cannot be extended: changed since it was run: {'; '.join(changed)}",
            "undo the change, or extend it anyway with --force",
        )
    return changed


def _of_tasks(whole: Mapping[str, Any], tasks: list[str]) -> dict[str, Any]:
    """An identity without the stream's options, and without other tasks than these."""
    result = dict(whole)
    result["recipe"] = {key: value for key, value in whole["recipe"].items() if key != "stream"}
    for key in ("data", "files"):
        result[key] = {task: value for task, value in whole.get(key, {}).items() if task in tasks}
    return result


def _as_begun(parent: Result, end: Checkpoint, recipe: Recipe, now: dict[str, Any]) -> dict[str, Any]:
    """The run as if it had known the further tasks, with empty cells where the model must still be tested."""
    result = dict(end.run["result"])
    further = len(now["data"]) - len(parent.tasks)
    scope_grows = recipe.evaluate.classes == "all"  # more classes to choose from: every accuracy is another one

    def widened(row: list[float | None]) -> list[float | None]:
        return [None] * (len(row) + further) if scope_grows else [*row, *[None] * further]

    result["zero_shot"] = widened(result["zero_shot"])
    result["matrix"] = [widened(row) for row in result["matrix"]]
    if scope_grows:
        result["held_out"] = {name: [None] * len(column) for name, column in result.get("held_out", {}).items()}
    result["parent"] = {
        "folder": parent.folder, "tasks": len(parent.tasks), "settings": parent.settings, "started": parent.started,
    }  # fmt: skip
    return {**end.run, "result": result, "identity": now, "loggers": {}}


def _copy_checkpoint(source: Checkpoint, parent: Path, run: Mapping[str, Any]) -> Checkpoint:
    """The same tensors below another folder, with other results and counters."""
    with new_folder(parent, source.path.name) as part:
        for name in (WEIGHTS, STATE):
            if name in source.files:
                link_or_copy(source.path / name, part / name)
        write_manifest(part, source.moment, None, source.files, run, source.left_out, source.refers)
    return read_checkpoint(parent / source.path.name)


def _copy_predictions(source: Path, target: Path) -> None:
    """Copy the rows that were kept; the answers to the further tasks join them when the model is tested on these."""
    rows = [
        path for path in (source / predictions.FOLDER).glob("row-*.npz") if path.is_file() and not path.is_symlink()
    ]
    for path in rows:
        (target / predictions.FOLDER).mkdir(exist_ok=True)
        shutil.copyfile(path, target / predictions.FOLDER / path.name)


def _copy_curves(end: Checkpoint, source: Path, target: Path) -> dict[str, Any]:
    """Copy the files of MulKI's own loggers; returns how far they reach. Other loggers begin anew."""
    marks = {}
    for name, mark in end.run["loggers"].items():
        files = {"csv": ["metrics.csv"], "tensorboard": list(mark)}.get(name, [])
        present = [source / file for file in files if file == Path(file).name and (source / file).is_file()]
        if present and len(present) == len(files) and not any(path.is_symlink() for path in present):
            for path in present:
                shutil.copyfile(path, target / path.name)
            marks[name] = mark
    return marks
