"""Where MulKI keeps what it can make again: `$MULKI_CACHE`, or `mulki` in the user's cache folder."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from mulki_plugins.libraries import provide_user


def cache_folder() -> Path:
    """The folder; it need not exist."""
    if chosen := os.environ.get("MULKI_CACHE"):
        return Path(chosen)
    provide_user()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mulki"


def keep(path: Path, write: Callable[[IO[bytes]], None]) -> str:
    """Write to a temporary name, then rename. Returns why the folder cannot be written, and nothing is kept; else ""."""
    part = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
            part = Path(file.name)
            write(file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        if part:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
        return error.strerror or str(error)
    return ""
