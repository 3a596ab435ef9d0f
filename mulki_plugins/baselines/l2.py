"""WC, the weight constraint: hold the weights near those at the task's start."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mulki_plugins.losses import squared_distance
from mulki_plugins.stages.stage import Stage, Strategy
from mulki_plugins.stages.weights import WeightsInUse
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
        self._learning: WeightsInUse | None = None
        self._start: list[Tensor] = []

    def before_training_exp(self, strategy: Strategy, **kwargs: Any) -> None:
        self._learning = WeightsInUse(strategy.model)
        self._start = [w.detach().clone() for w in self._learning.now().values()]

    def after_forward(self, strategy: Strategy, **kwargs: Any) -> None:
        assert self._learning is not None
        distance = squared_distance(list(self._learning.now().values()), self._start)
        self.add_loss(strategy, self.term, distance, self.weight)

    def after_training_exp(self, strategy: Strategy, **kwargs: Any) -> None:
        self._learning, self._start = None, []
