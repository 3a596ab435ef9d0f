"""CLIP models as continual learners. The names below are imported on first use, because they import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mulki_plugins.libraries import load_lazily

if TYPE_CHECKING:
    from mulki_plugins.models.classifier import ClipClassifier
    from mulki_plugins.models.features import Features
    from mulki_plugins.models.load import LoadedClip, load_clip
    from mulki_plugins.models.text import Prompts

__all__ = ["ClipClassifier", "Features", "LoadedClip", "Prompts", "load_clip"]

__getattr__ = load_lazily(
    __name__,
    {
        "ClipClassifier": "classifier",
        "Features": "features",
        "LoadedClip": "load",
        "load_clip": "load",
        "Prompts": "text",
    },
)
