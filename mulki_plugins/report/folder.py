"""A run's folder: `<out>/<recipe>/<strategy>/seed-<n>`; an earlier run there is moved aside, never overwritten.

Runs of other settings have a folder of their own beside it: `<strategy>+lr=0.001`.
"""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path
from typing import Any

from mulki_plugins.errors import MulkiError
from mulki_plugins.files import locked
from mulki_plugins.recipe.resolve import resolve
from mulki_plugins.recipe.schema import Recipe
from mulki_plugins.recipe.settings import compare_settings, fingerprint, folder_label, list_settings

_ASIDE = re.compile(r"\.before-\d+$")


def run_folder(out: Path, recipe: Recipe, seed: int) -> Path:
    """Where the run goes. The names were checked: none leads out of `out`."""
    return out / recipe.name / recipe.strategy.name / f"seed-{seed}"


def choose_folder(
    out: Path, recipe: Recipe, seed: int, *, variant: str = "", name: str = "", resuming: bool = False
) -> Path:
    """Where a run goes from the command line: where its settings were run before, or where no others were.

    variant: what the command line changes, as part of a folder's name. name: the folder's name in the strategy's place.
    resuming: a changed recipe is looked for where the recipe was run, so that the change can be told.
    """
    parent, last = out / recipe.name, f"seed-{seed}"
    if name:
        return parent / name / last
    first = parent / "+".join(filter(None, (recipe.strategy.name, variant)))
    own, there = list_settings(recipe), _settings_at(first, last)
    if there == own or (there is None and not resuming):
        return first / last
    for place in sorted(parent.glob(f"{glob.escape(recipe.strategy.name)}+*")):
        if _settings_at(place, last) == own:
            return place / last
    if not there or resuming:
        return first / last
    other = first.with_name(f"{first.name}+{folder_label(compare_settings(there, own))}")
    if _settings_at(other, last) is not None:  # others again, which the same words describe
        other = other.with_name(f"{other.name}+{fingerprint(recipe)[:6]}")
    return other / last


def settings_at(folder: Path) -> dict[str, Any] | None:
    """The settings of the run in a folder; None where no recipe is there that can be read."""
    try:
        return list_settings(resolve(str(folder / "recipe.yaml")).recipe)
    except MulkiError:
        return None


def _settings_at(place: Path, first: str) -> dict[str, Any] | None:
    """The settings of a folder's runs, one for each seed: empty where they cannot be read, None where there is no run."""
    for folder in (place / first, *sorted(place.glob("seed-*"))):
        if not is_aside(folder) and (folder / "recipe.yaml").is_file():
            return settings_at(folder) or {}
    return None


def prepare_folder(folder: Path) -> Path | None:
    """Make the folder, empty; returns where an earlier run's was moved to, if there was one. MulkiError if it cannot."""
    aside = None
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            with locked(folder):  # an earlier run may be moved, one that is going on may not
                pass
            number = 1
            while (aside := folder.with_name(f"{folder.name}.before-{number}")).exists():
                number += 1
            folder.rename(str(aside))
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MulkiError(
            f"{folder}: the run's folder cannot be made: {error.strerror or error}", "choose another with --out"
        ) from error
    return aside


def refuse_links(folder: Path) -> None:
    """MulkiError where something in a run's folder is a link: what is written through it would lie outside."""
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            if (Path(root) / name).is_symlink():
                raise MulkiError(
                    f"{Path(root) / name}: is a link, and nothing is written outside a run's folder", "remove it"
                )


def is_aside(folder: Path) -> bool:
    """Whether a folder holds an earlier run that was moved aside."""
    return bool(_ASIDE.search(folder.name))
