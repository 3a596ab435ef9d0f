"""Write a report's files, and never over a file that is no report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mulki_plugins.errors import MulkiError
from mulki_plugins.files import write_text
from mulki_plugins.report.page.paper import CSV_HEAD, LATEX_MARK
from mulki_plugins.report.page.render import MARK

_MARKS = {"--out": MARK, "--latex": LATEX_MARK, "--csv": ",".join(CSV_HEAD)}
"""What a file of each option begins with, if an earlier report wrote it."""


def check_targets(targets: Mapping[str, Path | None]) -> dict[str, Path]:
    """The files to write, by option. MulkiError if one cannot be written, is named twice, or holds something else."""
    chosen = {option: path for option, path in targets.items() if path is not None}
    if len({path.resolve() for path in chosen.values()}) < len(chosen):
        raise MulkiError(f"{' and '.join(chosen)} name the same file", "give each a file of its own")
    for option, path in chosen.items():
        if not path.parent.is_dir():
            raise MulkiError(f"{option}: {path.parent}: no such folder", "create it first")
        if path.exists() and _MARKS[option] not in _beginning(path):
            raise MulkiError(f"{option}: {path}: exists and is no report of MulKI", "choose another name, or remove it")
    return chosen


def _beginning(path: Path) -> str:
    """The first characters of a file; empty if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(500).decode("utf-8", "replace")
    except OSError:
        return ""


def save(path: Path, text: str) -> None:
    """Write a file atomically. MulkiError if that fails."""
    try:
        write_text(path, text)
    except OSError as error:
        raise MulkiError(f"{path}: cannot be written: {error.strerror or error}", "choose another file") from error
