"""A run's folder: `<out>/<recipe>/<strategy>/seed-<n>`. An earlier run there is moved aside, never overwritten.

Runs with other settings get a folder beside it: `<strategy>+lr=0.001`.
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
_FIRST = frozenset({"recipe.yaml", "log.txt", "classes.json", "weights", "predictions", "metrics.csv"})
"""What a run or an extension writes first: all that is there if it is killed early."""


def run_folder(out: Path, recipe: Recipe, seed: int) -> Path:
    """The folder of a run of the library. Recipe and strategy names are checked, so it lies below `out`."""
    return out / recipe.name / recipe.strategy.name / f"seed-{seed}"


def choose_folder(
    out: Path, recipe: Recipe, seed: int, *, variant: str = "", name: str = "", resuming: bool = False
) -> Path:
    """The folder of a run from the command line: the one that holds runs of its settings, else one without other settings.

    variant: the command line's changes, as part of a folder's name. name: replaces the strategy in the folder's path.
    resuming: prefer the folder of the unchanged recipe, so that `resume` can report what differs.
    """
    parent, seed_name = out / recipe.name, f"seed-{seed}"
    if name:
        return parent / name / seed_name
    usual = parent / "+".join(filter(None, (recipe.strategy.name, variant)))
    wanted, present = list_settings(recipe), _settings_below(usual, seed_name)
    if present == wanted or (present is None and not resuming):
        return usual / seed_name
    for candidate in sorted(parent.glob(f"{glob.escape(recipe.strategy.name)}+*")):
        if _settings_below(candidate, seed_name) == wanted:
            return candidate / seed_name
    if not present or resuming:
        return usual / seed_name
    folder = usual.with_name(f"{usual.name}+{folder_label(compare_settings(present, wanted))}")
    if _settings_below(folder, seed_name) is not None:  # yet other settings that the same words describe
        folder = folder.with_name(f"{folder.name}+{fingerprint(recipe)[:6]}")
    return folder / seed_name


def settings_at(folder: Path) -> dict[str, Any] | None:
    """The settings of the run in a folder; None without a readable recipe."""
    try:
        return list_settings(resolve(str(folder / "recipe.yaml")).recipe)
    except MulkiError:
        return None


def _settings_below(parent: Path, seed_name: str) -> dict[str, Any] | None:
    """The settings shared by the runs in a folder, one run per seed. Empty if unreadable, None without a run."""
    for folder in (parent / seed_name, *sorted(parent.glob("seed-*"))):
        if not is_aside(folder) and (folder / "recipe.yaml").is_file():
            return settings_at(folder) or {}
    return None


def holds_run(folder: Path) -> bool:
    """Whether a folder is empty or that of a run, even of one that was killed before its first result."""
    names = {entry.name for entry in os.scandir(folder)} if folder.is_dir() else {""}
    begun = {"recipe.yaml", "log.txt"} <= names or (names <= _FIRST and bool(names & {"recipe.yaml", "log.txt"}))
    return not names or begun or bool(names & {"result.json", "checkpoints"})


def named(folder: Path) -> Path:
    """The same folder with a name of its own, for `.` and `..`."""
    return folder.resolve() if folder.name in ("", "..") else folder


def prepare_folder(folder: Path) -> Path | None:
    """Make the folder, empty. Returns the new path of an earlier run that was in it. MulkiError on failure."""
    aside = None
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            if not holds_run(folder):
                raise MulkiError(f"{folder}: exists and is not the folder of a run", "choose another one with --out")
            with locked(folder):  # an error if that run is still going on
                pass
            number = 1
            while (aside := folder.with_name(f"{folder.name}.before-{number}")).exists():
                number += 1
            folder.rename(str(aside))
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MulkiError(
            f"{folder}: the run's folder cannot be made: {error.strerror or error}", "choose another one with --out"
        ) from error
    return aside


def refuse_links(folder: Path) -> None:
    """MulkiError if a run's folder contains a link: writing through it would change files outside."""
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            if (Path(root) / name).is_symlink():
                raise MulkiError(
                    f"{Path(root) / name}: is a link; a run writes only inside its folder", "remove the link"
                )


def is_aside(folder: Path) -> bool:
    """Whether a folder's name marks an earlier run that was moved aside."""
    return bool(_ASIDE.search(folder.name))
