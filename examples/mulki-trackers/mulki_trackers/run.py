"""What a tracker needs to know about a run, from its folder: names, recipe, end, and the tracker's own id of it."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from attrs import frozen

from mulki_plugins.errors import MulkiError


@frozen
class RunFolder:
    """The folder of a run."""

    path: Path

    @property
    def name(self) -> str:
        """`mtil/mulki-plus/seed-0`: the last three parts of the folder's path."""
        return "/".join(self.path.absolute().parts[-3:])

    @property
    def group(self) -> str:
        """`mtil/mulki`: what the seeds of one strategy share."""
        return "/".join(self.path.absolute().parts[-3:-1])

    @property
    def recipe(self) -> dict[str, Any]:
        """The resolved recipe; empty if it cannot be read."""
        try:
            value = yaml.safe_load((self.path / "recipe.yaml").read_text("utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            return {}
        return value if isinstance(value, dict) else {}

    @property
    def complete(self) -> bool:
        """Whether result.json says that the run is complete."""
        try:
            return bool(json.loads((self.path / "result.json").read_text("utf-8"))["status"] == "complete")
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def read_id(self, tracker: str) -> str | None:
        """The tracker's id of this run; None before it has begun."""
        try:
            return self._file(tracker).read_text("utf-8").strip() or None
        except (OSError, ValueError):
            return None

    def keep_id(self, tracker: str, value: str) -> None:
        """Keep the id, so that a resumed run goes on under it."""
        self._file(tracker).write_text(f"{value}\n", "utf-8")

    def _file(self, tracker: str) -> Path:
        return self.path / f"{tracker}-run.txt"


def load(tracker: str) -> Any:
    """Import the tracker's package. MulkiError if it is not installed."""
    try:
        return import_module(tracker)
    except ImportError as error:
        raise MulkiError(f"{tracker} is not installed: {error}", f"pip install 'mulki-trackers[{tracker}]'") from error
