"""The model that a path means: a run's folder, a checkpoint in it, or an exported folder. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from attrs import frozen

from mulki_plugins.characters import printable
from mulki_plugins.errors import MulkiError, describe_error
from mulki_plugins.models.weights import EXPORTED, FINAL, WEIGHTS
from mulki_plugins.recipe.schema import Precision, Recipe, as_recipe
from mulki_plugins.recipe.yaml import read_yaml
from mulki_plugins.report.classes import FILE as CLASSES
from mulki_plugins.report.classes import TaskTexts, read_classes
from mulki_plugins.report.folder import is_aside
from mulki_plugins.report.result import FILE as RESULT
from mulki_plugins.report.result import Result, read_result

RECIPE = "recipe.yaml"
CONFIG = "open_clip_config.json"
"""open_clip's description of a model, in an exported folder."""
_MANIFEST = "manifest.json"
_NAMED = 5
"""Runs that are named at most if the user must choose one."""
_EXAMPLE = "give a run's folder, such as runs/mtil/mulki-plus/seed-0, or an exported one"


@frozen(kw_only=True, eq=False)
class Source:
    """Where a trained model lies, and what it has learned."""

    folder: Path
    """The run's folder, or the exported one."""
    exported: bool
    weights: Path | None
    """The file of its weights; None for the pre-trained ones that the recipe names."""
    tasks: tuple[TaskTexts, ...]
    """The texts of all tasks; empty if the run did not keep them."""
    learned: tuple[int, ...]
    """The indices of the tasks that it has learned."""
    steps: int = 0
    """The steps into the task after these, if the weights are those of a moment within it."""
    recipe: Recipe | None
    """None for an export whose recipe was removed."""
    result: Result | None
    """None for an export."""
    complete: bool = True
    """Whether the weights are those of a run's end."""
    checkpoint: Path | None = None
    """The checkpoint that was asked for, if one was."""
    notices: tuple[str, ...] = ()

    @property
    def precision(self) -> Precision:
        return self.recipe.train.precision if self.recipe else "fp32"

    @property
    def batch_size(self) -> int:
        """The batch size of the run's evaluations."""
        return self.recipe.evaluate.batch_size if self.recipe else 256


def find_source(path: Path) -> Source:
    """The model at a path. MulkiError if there is none, or if it has not learned any task yet."""
    path = path.expanduser()
    folder = path.parent if path.is_file() else path
    if not path.exists():
        raise MulkiError(f"{path}: no such folder", "relative paths start in the current folder")
    if is_export(folder):
        return _exported(folder)
    if (folder / _MANIFEST).is_file() and _is_run(folder.parent.parent):
        return _run(folder.parent.parent, folder)
    if _is_run(folder):
        return _run(folder, None)
    return _run(_only_run_below(folder), None)


def is_export(folder: Path) -> bool:
    """Whether `mulki export` wrote the folder."""
    return (folder / CONFIG).is_file() and (folder / CLASSES).is_file()


def _is_run(folder: Path) -> bool:
    return (folder / RECIPE).is_file() and (folder / RESULT).is_file()


def _only_run_below(folder: Path) -> Path:
    below = sorted(file.parent for file in folder.rglob(RESULT) if _is_run(file.parent))
    runs = [run for run in below if not any(is_aside(part) for part in (run, *run.parents))]
    if not runs:
        raise MulkiError(f"{folder}: neither a run nor an exported model", _EXAMPLE)
    if len(runs) > 1:
        more = f" and {len(runs) - _NAMED} more" if len(runs) > _NAMED else ""
        named = ", ".join(map(str, runs[:_NAMED]))
        raise MulkiError(f"{folder}: {len(runs)} runs are below it", f"give one of {named}{more}")
    return runs[0]


def _exported(folder: Path) -> Source:
    classes = read_classes(folder)
    if not (folder / EXPORTED).is_file():
        raise MulkiError(f"{folder}: the exported model is incomplete: {EXPORTED} is missing", "export it again")
    learned = tuple(range(len(classes.tasks))) if classes.learned is None else classes.learned
    return Source(
        folder=folder,
        exported=True,
        weights=folder / EXPORTED,
        tasks=classes.tasks,
        learned=learned,
        recipe=_read_recipe(folder / RECIPE) if (folder / RECIPE).is_file() else None,
        result=None,
    )


def _read_recipe(path: Path) -> Recipe:
    """A resolved recipe. Its parts and data are not checked: they may no longer be on this machine."""
    value = read_yaml(path).value
    try:
        return as_recipe(value)
    except Exception as error:  # the conversion collects errors of many types in groups
        hint = "it was written by another version of MulKI, or changed by hand"
        raise MulkiError(f"{path}: not the recipe of a run: {describe_error(error)}", hint) from error


def _run(folder: Path, checkpoint: Path | None) -> Source:
    recipe, result = _read_recipe(folder / RECIPE), read_result(folder / RESULT)
    tasks = read_classes(folder).tasks if (folder / CLASSES).is_file() else ()
    if tasks and [task.name for task in tasks] != result.tasks:
        raise MulkiError(f"{folder / CLASSES}: its tasks are not those of {RESULT}", "the folder mixes two runs")
    every = tuple(range(len(result.tasks)))
    done = result.status == "complete"
    weights: Path | None = None
    learned, steps, notices, complete = every, 0, [], True
    if checkpoint is not None:
        weights, learned, steps = _of_checkpoint(checkpoint, every)
        complete = learned == every and not steps
        if not complete:
            notices.append(_progress(f"{checkpoint}: the checkpoint", result, learned, steps))
    elif done and recipe.strategy.base != "none":
        weights = _final_weights(folder, len(every))
    elif not done:
        weights, learned = _latest(folder, result)
        complete = False
        notices.append(_progress(f"{folder}: the run is {result.status}; this", result, learned))
    return Source(
        folder=folder,
        exported=False,
        weights=weights,
        tasks=tasks,
        learned=learned,
        steps=steps,
        recipe=recipe,
        result=result,
        complete=complete,
        checkpoint=checkpoint,
        notices=tuple(notices),
    )


def _progress(what: str, result: Result, learned: tuple[int, ...], steps: int = 0) -> str:
    last = printable(result.tasks[learned[-1]])
    after = f"{what} is the model after {len(learned)} of {len(result.tasks)} tasks, the last one {last}"
    begun = steps_into(result, learned, steps)
    return after + (f", and {printable(begun)}" if begun else "")


def steps_into(result: Result, learned: tuple[int, ...], steps: int) -> str:
    """How far into the task after these a moment is, `6 steps into cars`; empty at the end of a task."""
    if not steps or len(learned) >= len(result.tasks):
        return ""
    return f"{steps} step{'s' * (steps > 1)} into {result.tasks[len(learned)]}"


def _final_weights(folder: Path, tasks: int) -> Path:
    """The weights of a complete run. MulkiError if it kept none."""
    if (folder / FINAL).is_file():
        return folder / FINAL
    for count, _, path in _checkpoints(folder):
        if count == tasks:
            return path / WEIGHTS
    hint = "run it again with train.checkpoint.keep of 1 or more"
    raise MulkiError(f"{folder}: the run kept no weights after its last task", hint)


def _latest(folder: Path, result: Result) -> tuple[Path, tuple[int, ...]]:
    """The weights after the latest task of a run that is not complete, and the tasks learned by then."""
    found = [entry for entry in _checkpoints(folder) if entry[0]]
    if not found:
        hint = f"finish it with `mulki resume {folder}`"
        raise MulkiError(f"{folder}: the run is {result.status} and has kept no weights after a task", hint)
    count, learned, path = max(found)
    return path / WEIGHTS, learned or tuple(range(count))


def _of_checkpoint(checkpoint: Path, every: tuple[int, ...]) -> tuple[Path | None, tuple[int, ...], int]:
    """A checkpoint's weights, the tasks learned by then, and the steps into the next one."""
    count, steps, learned = read_manifest(checkpoint)
    learned = tuple(i for i in learned or range(count) if i in every)
    if not learned:
        hint = "name a checkpoint of a later moment, or the run's folder"
        raise MulkiError(f"{checkpoint}: at this checkpoint the run had not learned any task", hint)
    if not (checkpoint / WEIGHTS).is_file():
        raise MulkiError(f"{checkpoint}: the checkpoint holds no weights")
    return checkpoint / WEIGHTS, learned, steps


def _checkpoints(folder: Path) -> list[tuple[int, tuple[int, ...], Path]]:
    """The checkpoints at the end of a task that hold weights: the number of tasks, the tasks learned, the folder."""
    parent = folder / "checkpoints"
    found = []
    for path in sorted(parent.iterdir()) if parent.is_dir() else ():
        if path.name.startswith(".") or not (path / WEIGHTS).is_file():
            continue
        try:
            count, steps, learned = read_manifest(path)
        except MulkiError:
            continue
        if not steps:
            found.append((count, learned, path))
    return found


def read_manifest(checkpoint: Path) -> tuple[int, int, tuple[int, ...]]:
    """The number of tasks learned, of steps into the next task, and the indices of the tasks learned."""
    path = checkpoint / _MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text("utf-8"))
        run = manifest.get("run", {})
        return int(manifest["tasks"]), int(manifest["steps"]), tuple(int(i) for i in run.get("learned", ()))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise MulkiError(f"{path}: the checkpoint is damaged: {describe_error(error)}") from error
