"""The stream `folders`: the user's own images, one folder for each class."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mulki_plugins.libraries import load_lazily

if TYPE_CHECKING:
    from mulki_plugins.streams.folders.stream import folders

__all__ = ["folders"]

__getattr__ = load_lazily(__name__, {"folders": "stream"})
