"""MulKI's stages as Avalanche plugins; each works in any strategy. Loaded when they are used, since they bring torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mulki_plugins.lazy import from_modules

if TYPE_CHECKING:
    from mulki_plugins.stages.adding import Adding
    from mulki_plugins.stages.connecting import Connecting
    from mulki_plugins.stages.distinguishing import Distinguishing
    from mulki_plugins.stages.eliciting import Eliciting
    from mulki_plugins.stages.teachers import Teachers

__all__ = ["Adding", "Connecting", "Distinguishing", "Eliciting", "Teachers"]

__getattr__ = from_modules(__name__, {name: name.lower() for name in __all__})
