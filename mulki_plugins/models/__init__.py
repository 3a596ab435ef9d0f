"""CLIP models as continual learners. The names below are loaded when they are used, since they bring torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mulki_plugins.models.classifier import ClipClassifier, Features
    from mulki_plugins.models.load import LoadedClip, load_clip
    from mulki_plugins.models.prompts import Prompts

__all__ = ["ClipClassifier", "Features", "LoadedClip", "Prompts", "load_clip"]

_HOMES = {
    "ClipClassifier": "classifier",
    "Features": "classifier",
    "LoadedClip": "load",
    "load_clip": "load",
    "Prompts": "prompts",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
