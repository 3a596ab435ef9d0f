"""The folder that holds the data sets, as the option `root` says it; imports neither torch nor numpy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mulki_plugins.errors import MulkiError, OptionError


def root_folder(said: str) -> Path:
    """The folder; `~` is the user's home. MulkiError where it is that of a user whom the machine does not know."""
    try:
        return Path(said).expanduser()
    except RuntimeError as error:
        raise MulkiError(f"{said}: this machine has no user of that name") from error


def check(options: Mapping[str, Any]) -> list[OptionError]:
    """What is wrong with the option by itself, whatever lies in the folder."""
    try:
        root_folder(str(options.get("root", "")))
    except MulkiError as error:
        return [OptionError(error.message, ("root",))]
    return []
