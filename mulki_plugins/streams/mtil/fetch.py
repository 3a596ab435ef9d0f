"""Downloads by torchvision's own classes into a separate folder, so that existing files are never touched."""

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
from mulki_plugins.streams.mtil.coop import split_file
from mulki_plugins.streams.mtil.dataset import DatasetOnDisk, look
from mulki_plugins.streams.mtil.declaration import ORDERS, Declaration, root_folder
from mulki_plugins.streams.names import select_tasks

ASIDE = ".mulki-fetch"


def fetch(declared: Declaration, root: Path) -> Path:
    """Download one data set to its folder in the root, and return that folder. Needs a network.

    torchvision downloads and unpacks into a new folder `root/.mulki-fetch/NAME-1` (or 2, ...), since it would mistake what
    an interrupted attempt has unpacked for the whole. Then the data set's folder is renamed to its place; the archives stay.
    MulkiError if the folder exists, the disk is too small, or the download fails.
    """
    target = root / declared.folder
    if declared.get:
        raise MulkiError(f"{declared.name}: {declared.how_to_get(root)}")
    if target.is_symlink() or (target.exists() and not (target.is_dir() and not any(target.iterdir()))):
        what = f"{declared.name}: {target} is there but is not whole, and nothing is overwritten"
        raise MulkiError(what, "move it away first")
    try:
        aside = _make_folder(root / ASIDE, declared.name)
        needed = 2.1e9 * declared.gigabytes  # for the archive and its contents
        if (free := shutil.disk_usage(aside).free) < needed:
            what = f"{needed / 1e9:.1f} GB are needed in {root}, and {free / 1e9:.1f} GB are free"
            raise MulkiError(f"{declared.name}: {what}")
        with contextlib.redirect_stdout(sys.stderr):
            _download(declared.torchvision, aside)
        os.rename(aside / declared.folder, target)  # replaces an empty folder, and nothing else
    except Exception as error:  # the network, the disk, an archive with another checksum
        if isinstance(error, MulkiError):
            raise
        reason, hint = explain_failure(error) or (describe_error(error), "")
        hint = f"{hint}; by hand: {declared.page}" if hint else f"by hand: {declared.page}"
        raise MulkiError(f"{declared.name} cannot be downloaded: {reason}", hint) from error
    return target


def _make_folder(parent: Path, name: str) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    for i in itertools.count(1):
        folder = parent / f"{name}-{i}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            break
    return folder


def _download(name: str, root: Path) -> None:
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    import_libraries("torch")
    from torchvision import datasets

    getattr(datasets, name)(str(root), download=True)


def fetch_missing(options: dict[str, Any], say: Callable[[str], None]) -> list[str]:
    """Download the missing data sets of a stream `mtil` with these options, one by one; returns the failures as messages.

    say: receives a line of progress.
    """
    root = root_folder(options.get("root", "data")).absolute()
    failures = []
    for name in select_tasks("mtil", ORDERS, options.get("order"), options.get("tasks")):
        dataset = look(name, root, options.get("split", "zscl"))
        declared = dataset.declared
        if dataset.state != "missing":
            failures += _problems(dataset)
            say(f"{name}: {'there, but not whole' if dataset.problems else 'there'}: {dataset.folder}")
            continue
        action = "cannot be downloaded" if declared.get else f"downloading about {declared.gigabytes:g} GB to {root}"
        say(f"{name}: {action}")
        try:
            say(f"{name}: {fetch(declared, root)}")
        except MulkiError as error:
            failures += error.lines()
        else:
            failures += _problems(look(name, root, dataset.split))
    return failures


def _problems(dataset: DatasetOnDisk) -> list[str]:
    """What a data set lacks. No download brings CoOp's split file, so that the folder need not make room for one."""
    away = f"; nothing is overwritten: move {dataset.folder} away first"
    own = str(split_file(dataset.declared, dataset.folder.parent)) if dataset.declared.split_file else ""
    return [
        f"{dataset.declared.name}: {problem}{'' if dataset.declared.get or (own and problem.startswith(own)) else away}"
        for problem in dataset.problems
    ]
