"""The stream `folders`: the user's own images, one folder for each class."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mulki_plugins.lazy import from_modules

if TYPE_CHECKING:
    from mulki_plugins.streams.folders.stream import folders

__all__ = ["folders"]

__getattr__ = from_modules(__name__, {"folders": "stream"})
