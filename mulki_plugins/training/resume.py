"""Resumes a run in its folder from its latest whole checkpoint. A complete run is compared with the recipe and read."""

from __future__ import annotations

import contextlib
from pathlib import Path

from attrs import evolve

from mulki_plugins.errors import MulkiError
from mulki_plugins.files import locked
from mulki_plugins.ranks.collectives import is_first, of_all
from mulki_plugins.recipe.resolve import Resolution, resolve
from mulki_plugins.recipe.schema import Recipe
from mulki_plugins.recipe.settings import select_decisive
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.report.folder import refuse_links
from mulki_plugins.report.progress import ProgressLogger
from mulki_plugins.report.result import FILE, Result, read_result
from mulki_plugins.training.build import build_seeded
from mulki_plugins.training.checkpoint import Checkpoint, checkpoints, latest_checkpoint, read_checkpoint
from mulki_plugins.training.provenance import differences, identity
from mulki_plugins.training.run import Run, start


def resume_experiment(
    resolved: Resolution, seed: int, folder: Path, *, force: bool = False, verbosity: int = 0
) -> Result:
    """Resume a run; start it again if it has no checkpoint.

    MulkiError if recipe, data, code or versions have changed since, unless forced, or if a plugin cannot be resumed.
    """
    recipe = evolve(resolved.recipe, seeds=[seed])
    progress = ProgressLogger(0, verbosity=verbosity)
    if (result := _complete(folder)) is not None:
        for line in _compare(result, recipe, seed, folder, force):
            progress.say(line)
        progress.say(f"{folder}: already complete")
        return result
    for entry in recipe.strategy.plugins:
        if reason := catalog().find("plugin", entry.name).no_resume:
            raise MulkiError(
                f"{folder}: cannot resume a run with the plugin {entry.name!r}: {reason}", "start it again"
            )
    with locked(folder) if is_first() else contextlib.nullcontext():
        refuse_links(folder)
        checkpoint, problems = _latest(folder)
        for line in problems:
            progress.say(f"{line}; it is skipped")
        if checkpoint is not None:
            with progress.during(f"building the stream {recipe.stream.name} and the model {recipe.model.name}"):
                built = build_seeded(recipe, seed)
            return Run(recipe, built, folder, seed, progress).execute(checkpoint, force)
    progress.say(f"{folder}: no checkpoint to resume from, so the run starts again")
    return start(recipe, seed, folder, progress)


def _latest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The latest checkpoint that is whole, as the first rank finds it: the others take the same."""
    found, problems = latest_checkpoint(folder) if is_first() else (None, [])
    [path, *_] = of_all(str(found.path) if found else "")
    if is_first() or not path:
        return found, problems
    return read_checkpoint(Path(path)), []


def _complete(folder: Path) -> Result | None:
    try:
        result = read_result(folder / FILE)
    except MulkiError:  # a run that was killed may have left none
        return None
    return result if result.status == "complete" else None


def _compare(result: Result, recipe: Recipe, seed: int, folder: Path, force: bool) -> list[str]:
    """What to say about a complete run. MulkiError if its numbers are not those that the recipe asks for."""
    changed: list[str] = []
    notes: list[str] = []
    try:
        before = resolve(str(folder / "recipe.yaml")).recipe
    except MulkiError:
        notes.append(f"{folder}: its recipe cannot be read, and is not compared")
    else:
        changed = differences({"recipe": select_decisive(before)}, {"recipe": select_decisive(recipe)})
    measured_with = result.identity or next((c.run["identity"] for c in checkpoints(folder)[0]), {})
    if measured_with and not changed:
        try:
            now = identity(recipe, build_seeded(recipe, seed), seed)
        except MulkiError as error:
            notes.append(f"{folder}: its data and weights cannot be compared: {error.lines()[0]}")
        else:
            inputs, environment = ("data", "files", "weights"), ("code", "versions", "device")
            changed, other = (
                differences(*({k: each[k] for k in keys if k in measured_with} for each in (measured_with, now)))
                for keys in (inputs, environment)
            )
            notes += [f"{folder}: measured when {line}" for line in other]
    if changed and not force:
        raise MulkiError(
            f"{folder}: this run is complete, but with other settings: {'; '.join(changed)}",
            "undo the change, start a new run without --resume, or show this one with --force",
        )
    return [*notes, *(f"{folder}: shown although {line}" for line in changed)]
