"""MulKI's stages as Avalanche plugins for any strategy. They are imported on first use, because they import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mulki_plugins.libraries import load_lazily

if TYPE_CHECKING:
    from mulki_plugins.stages.adding import Adding
    from mulki_plugins.stages.connecting import Connecting
    from mulki_plugins.stages.distinguishing import Distinguishing
    from mulki_plugins.stages.eliciting import Eliciting
    from mulki_plugins.stages.preserving import Preserving
    from mulki_plugins.stages.recalling import Recalling
    from mulki_plugins.stages.rehearsing import Rehearsing
    from mulki_plugins.stages.rephrasing import Rephrasing
    from mulki_plugins.stages.teachers import Teachers

__all__ = [
    "Adding", "Connecting", "Distinguishing", "Eliciting", "Preserving", "Recalling", "Rehearsing", "Rephrasing",
    "Teachers",
]  # fmt: skip

__getattr__ = load_lazily(__name__, {name: name.lower() for name in __all__})
