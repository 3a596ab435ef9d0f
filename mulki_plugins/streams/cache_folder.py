"""Where MulKI keeps what it can make again: `$MULKI_CACHE`, or `mulki` in the user's cache folder."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO


def cache_folder() -> Path:
    """The folder; it need not exist."""
    if chosen := os.environ.get("MULKI_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mulki"


def keep(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    """Written to a name of its own, then renamed; where the folder cannot be written nothing is kept."""
    part = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
            part = Path(file.name)
            write(file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError:
        if part:
            part.unlink(missing_ok=True)
