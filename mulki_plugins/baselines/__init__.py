"""The peers' methods as Avalanche plugins. They are imported on first use, because they import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mulki_plugins.libraries import load_lazily

if TYPE_CHECKING:
    from mulki_plugins.baselines.avalanche import SynapticIntelligence
    from mulki_plugins.baselines.icarl import ICarl
    from mulki_plugins.baselines.l2 import WeightConstraint
    from mulki_plugins.baselines.lwf import LearningWithoutForgetting
    from mulki_plugins.baselines.magmax import MagMax
    from mulki_plugins.baselines.snd import SelectiveDistillation
    from mulki_plugins.baselines.zscl import ReferenceDistillation

__all__ = [
    "ICarl", "LearningWithoutForgetting", "MagMax", "ReferenceDistillation", "SelectiveDistillation",
    "SynapticIntelligence", "WeightConstraint",
]  # fmt: skip

__getattr__ = load_lazily(
    __name__,
    {
        "ICarl": "icarl",
        "LearningWithoutForgetting": "lwf",
        "MagMax": "magmax",
        "ReferenceDistillation": "zscl",
        "SelectiveDistillation": "snd",
        "SynapticIntelligence": "avalanche",
        "WeightConstraint": "l2",
    },
)
