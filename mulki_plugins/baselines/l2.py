"""WC, the weight constraint: hold the weights near those that the task began with."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mulki_plugins.losses import squared_distance
from mulki_plugins.stages.stage import Stage
from mulki_plugins.types import Weight, checked


class WeightConstraint(Stage):
    """Adds weight·Σ(θ − θ_start)² over all weights that learn, θ_start being those before this task.

    As the peer "WC" of Zheng et al., 2023 (ZSCL, arXiv 2303.06628); the sum is over single numbers, not a mean.
    """

    @checked
    def __init__(self, *, weight: Weight = 1.0) -> None:
        super().__init__()
        self.weight = weight
        self._start: dict[str, Tensor] = {}

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self._start = {n: p.detach().clone() for n, p in strategy.model.named_parameters() if p.requires_grad}

    def after_forward(self, strategy: Any, **kwargs: Any) -> None:
        weights = dict(strategy.model.named_parameters())
        moved = squared_distance([weights[name] for name in self._start], list(self._start.values()))
        self.add_loss(strategy, "l2", moved, self.weight)

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self._start = {}
