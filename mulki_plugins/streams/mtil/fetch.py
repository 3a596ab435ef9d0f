"""Downloads by torchvision's own classes, into a folder aside, so that nothing that is there is ever touched."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mulki_plugins.errors import MulkiError
from mulki_plugins.streams.mtil.declaration import Declaration
from mulki_plugins.streams.mtil.found import look
from mulki_plugins.streams.mtil.selection import chosen

ASIDE = ".mulki-fetch"


def fetch(declared: Declaration, root: Path) -> Path:
    """Download one data set to its folder below the root, and say where it is. Needs a network.

    torchvision downloads and unpacks below `root/.mulki-fetch/NAME`; when all is there the folder is renamed to its place.
    What torchvision leaves there (archives) is left there. MulkiError where the place is taken, the disk too small, or the
    download fails; what was downloaded whole by then is used the next time.
    """
    place = root / declared.folder
    if declared.get:
        raise MulkiError(f"{declared.name}: {declared.how_to_get(root)}")
    if place.exists() or place.is_symlink():
        raise MulkiError(
            f"{declared.name}: {place} is there but is not whole, and nothing is overwritten", "move it away first"
        )
    aside = root / ASIDE / declared.name
    try:
        aside.mkdir(parents=True, exist_ok=True)
        needed = 2.1e9 * declared.gigabytes  # the archive, and what comes out of it
        if (free := shutil.disk_usage(aside).free) < needed:
            raise MulkiError(
                f"{declared.name}: {needed / 1e9:.1f} GB are needed in {root}, and {free / 1e9:.1f} GB are free"
            )
        with contextlib.redirect_stdout(sys.stderr):
            _by_torchvision(declared.torchvision, aside)
        os.rename(aside / declared.folder, place)
    except Exception as error:  # the network, the disk, an archive of another checksum
        if isinstance(error, MulkiError):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise MulkiError(f"{declared.name} cannot be downloaded: {reason}", f"by hand: {declared.page}") from error
    return place


def _by_torchvision(name: str, root: Path) -> None:
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    from torchvision import datasets

    getattr(datasets, name)(str(root), download=True)


def fetch_missing(options: dict[str, Any], say: Callable[[str], None]) -> list[str]:
    """Download what a stream `mtil` with these options is missing, one after another; returns what could not be got."""
    root = Path(options.get("root", "data")).expanduser().absolute()
    wrong = []
    for name in chosen(options.get("order", "I"), options.get("tasks")):
        found = look(name, root, options.get("split", "zscl"))
        if found.state != "missing":
            wrong += [
                f"{name}: {problem}; nothing is overwritten: move {found.folder} away first"
                for problem in found.problems
            ]
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
