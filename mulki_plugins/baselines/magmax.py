"""MagMax: merge the tasks' weights by the largest change of each single weight."""

from __future__ import annotations

from typing import Any

import torch
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor

from mulki_plugins.stages.protocols import Strategy
from mulki_plugins.stages.weights import WeightsInUse
from mulki_plugins.types import Positive, checked


class MagMax(SupervisedPlugin):
    """Merges the weights after each task with those of the tasks before, by the largest change of each weight.

    θ ← θ_0 + factor·τ, where τ holds, for each single weight, the change θ_t − θ_0 of the task t that moved it farthest; of two
    equal ones the later. The next task starts from θ_t, not from the merged weights. So this keeps θ_0, θ_t and τ, however many
    tasks there are. Only weights that learn are merged, not buffers; weights that join after the first task stay as trained.
    Marczak et al., 2024, arXiv 2407.06322.

    Args:
        factor: Factor of the merged change.
    """

    per_sample = True
    sequential = True
    paper = "arXiv 2407.06322"

    @checked
    def __init__(self, *, factor: Positive = 0.5) -> None:
        super().__init__()
        self.factor = factor
        self._initial: dict[str, Tensor] = {}
        """θ_0"""
        self._trained: dict[str, Tensor] = {}
        """θ_t"""
        self._largest: dict[str, Tensor] = {}
        """τ"""

    def before_training(self, strategy: Strategy, **kwargs: Any) -> None:
        if not self._initial:  # also on resume, where it runs on the pre-trained weights
            self._initial = _copy_of(strategy.model)

    def before_training_exp(self, strategy: Strategy, **kwargs: Any) -> None:
        """Put the weights that the last task ended with in the place of the merged ones."""
        WeightsInUse(strategy.model).assign(self._trained)

    @torch.no_grad()
    def after_training_exp(self, strategy: Strategy, **kwargs: Any) -> None:
        weights = WeightsInUse(strategy.model)
        self._trained = {n: w.detach().clone() for n, w in weights.now().items() if n in self._initial}
        for name, weight in self._trained.items():
            change = weight - self._initial[name]
            self._largest[name] = larger(self._largest[name], change) if name in self._largest else change
        weights.assign({n: self._initial[n] + self.factor * self._largest[n] for n in self._trained})

    def state_dict(self) -> dict[str, Any]:
        """θ_t and τ; θ_0 are the pre-trained weights."""
        return {"trained": self._trained, "largest": self._largest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._trained, self._largest = dict(state["trained"]), dict(state["largest"])


def larger(one: Tensor, other: Tensor) -> Tensor:
    """For each number the one of larger magnitude; `other` if both are equal."""
    return torch.where(other.abs() >= one.abs(), other, one)


def _copy_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in WeightsInUse(model).now().items()}
