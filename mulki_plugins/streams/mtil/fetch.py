"""Downloads by torchvision's own classes, into a folder aside, so that nothing that is there is ever touched."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mulki_plugins.errors import MulkiError, describe_error
from mulki_plugins.failures import explain_failure
from mulki_plugins.libraries import import_libraries
from mulki_plugins.streams.mtil.declaration import ORDERS, Declaration
from mulki_plugins.streams.mtil.found import look
from mulki_plugins.streams.mtil.root import root_folder
from mulki_plugins.streams.selection import chosen

ASIDE = ".mulki-fetch"


def fetch(declared: Declaration, root: Path) -> Path:
    """Download one data set to its folder below the root, and say where it is. Needs a network.

    torchvision downloads and unpacks in a new folder `root/.mulki-fetch/NAME-1`, or 2 and so on, since it would take what an
    attempt that was cut short has unpacked for the whole; when it is done the data set's folder is renamed to its place. What
    else is there (archives) is left there. MulkiError where the place is taken, the disk too small, or the download fails.
    """
    place = root / declared.folder
    if declared.get:
        raise MulkiError(f"{declared.name}: {declared.how_to_get(root)}")
    if place.is_symlink() or (place.exists() and not (place.is_dir() and not any(place.iterdir()))):
        raise MulkiError(
            f"{declared.name}: {place} is there but is not whole, and nothing is overwritten", "move it away first"
        )
    try:
        aside = _new_folder(root / ASIDE, declared.name)
        needed = 2.1e9 * declared.gigabytes  # the archive, and what comes out of it
        if (free := shutil.disk_usage(aside).free) < needed:
            raise MulkiError(
                f"{declared.name}: {needed / 1e9:.1f} GB are needed in {root}, and {free / 1e9:.1f} GB are free"
            )
        with contextlib.redirect_stdout(sys.stderr):
            _by_torchvision(declared.torchvision, aside)
        os.rename(aside / declared.folder, place)  # over an empty folder, but over nothing else
    except Exception as error:  # the network, the disk, an archive of another checksum
        if isinstance(error, MulkiError):
            raise
        reason, hint = explain_failure(error) or (describe_error(error), "")
        hint = f"{hint}; by hand: {declared.page}" if hint else f"by hand: {declared.page}"
        raise MulkiError(f"{declared.name} cannot be downloaded: {reason}", hint) from error
    return place


def _new_folder(below: Path, name: str) -> Path:
    below.mkdir(parents=True, exist_ok=True)
    for i in itertools.count(1):
        folder = below / f"{name}-{i}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            break
    return folder


def _by_torchvision(name: str, root: Path) -> None:
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    import_libraries("torch")
    from torchvision import datasets

    getattr(datasets, name)(str(root), download=True)


def fetch_missing(options: dict[str, Any], say: Callable[[str], None]) -> list[str]:
    """Download what a stream `mtil` with these options is missing, one after another; returns what could not be got."""
    root = root_folder(options.get("root", "data")).absolute()
    wrong = []
    for name in chosen("mtil", ORDERS, options.get("order"), options.get("tasks")):
        found = look(name, root, options.get("split", "zscl"))
        if found.state != "missing":
            first = "" if found.declared.get else f"; nothing is overwritten: move {found.folder} away first"
            wrong += [f"{name}: {problem}{first}" for problem in found.problems]
            say(f"{name}: {'there' if not found.problems else 'there, but not whole'}: {found.folder}")
            continue
        try:
            say(
                f"{name}: downloading about {found.declared.gigabytes:g} GB to {root}"
                if not found.declared.get
                else f"{name}: cannot be downloaded"
            )
            say(f"{name}: {fetch(found.declared, root)}")
        except MulkiError as error:
            wrong += error.lines()
    return wrong
