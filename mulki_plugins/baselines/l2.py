"""WC, the weight constraint: hold the weights near those at the task's start."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mulki_plugins.losses import squared_distance
from mulki_plugins.stages.stage import Stage, Strategy, learning_weights
from mulki_plugins.types import Weight, checked


class WeightConstraint(Stage):
    """Holds the weights near those before this task (WC).

    L = weight·Σ(θ − θ_start)² over all weights that learn, θ_start being those before this task; a sum over single numbers,
    not a mean. The peer "WC" of Zheng et al., 2023 (ZSCL, arXiv 2303.06628).

    Args:
        weight: Factor of the squared distance.
    """

    per_sample = True
    term = "l2"
    paper = "arXiv 2303.06628"

    @checked
    def __init__(self, *, weight: Weight = 1.0) -> None:
        super().__init__()
        self.weight = weight
        self._learning: list[nn.Parameter] = []
        self._start: list[Tensor] = []

    def before_training_exp(self, strategy: Strategy, **kwargs: Any) -> None:
        self._learning = list(learning_weights(strategy.model).values())
        self._start = [p.detach().clone() for p in self._learning]

    def after_forward(self, strategy: Strategy, **kwargs: Any) -> None:
        self.add_loss(strategy, self.term, squared_distance(self._learning, self._start), self.weight)

    def after_training_exp(self, strategy: Strategy, **kwargs: Any) -> None:
        self._learning, self._start = [], []
