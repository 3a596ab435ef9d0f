"""MulKI's stages as Avalanche plugins; each works in any strategy. Loaded when they are used, since they bring torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mulki_plugins.stages.adding import Adding
    from mulki_plugins.stages.connecting import Connecting
    from mulki_plugins.stages.distinguishing import Distinguishing
    from mulki_plugins.stages.eliciting import Eliciting
    from mulki_plugins.stages.teachers import Teachers

__all__ = ["Adding", "Connecting", "Distinguishing", "Eliciting", "Teachers"]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{name.lower()}"), name)
