"""The peers' methods as Avalanche plugins, each from its source. Loaded when they are used, since they bring torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mulki_plugins.baselines.icarl import ICarl
    from mulki_plugins.baselines.l2 import WeightConstraint
    from mulki_plugins.baselines.lwf import LearningWithoutForgetting
    from mulki_plugins.baselines.snd import SelectiveDistillation
    from mulki_plugins.baselines.zscl import ReferenceDistillation

__all__ = ["ICarl", "LearningWithoutForgetting", "ReferenceDistillation", "SelectiveDistillation", "WeightConstraint"]

_HOMES = {
    "ICarl": "icarl",
    "LearningWithoutForgetting": "lwf",
    "ReferenceDistillation": "zscl",
    "SelectiveDistillation": "snd",
    "WeightConstraint": "l2",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
