"""Stage 4, making connections: average the weights within a task, and interpolate with those from before it."""

from __future__ import annotations

from typing import Any

import torch
from attrs import define, field
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor

from mulki_plugins.options import Count, Fraction, checked


@define(eq=False)
class RunningMean:
    """The mean of the snapshots so far, tensor by tensor: θ̄ ← θ̄ + (θ − θ̄)/n."""

    count: int = 0
    mean: dict[str, Tensor] = field(factory=dict)

    @torch.no_grad()
    def add(self, weights: dict[str, Tensor]) -> None:
        self.count += 1
        for name, weight in weights.items():
            if self.count == 1:
                self.mean[name] = weight.detach().clone()
            else:
                self.mean[name].lerp_(weight.detach(), 1 / self.count)


class Connecting(SupervisedPlugin):
    """Sets the weights at a task's end to (1 − inter)·θ̄ + inter·θ_start.

    θ̄ is the mean of the weights after every `every` steps of this task (null: the last weights themselves), θ_start the
    weights before it. Only weights that learn are touched: buffers, such as BatchNorm's, stay as training left them.
    Weight averaging: Izmailov et al., 2018, arXiv 1803.05407; interpolation: Wortsman et al., 2022, arXiv 2109.01903.
    """

    @checked
    def __init__(self, *, every: Count | None = 10, inter: Fraction = 0.2) -> None:
        super().__init__()
        self.every = every
        self.inter = inter
        self._start: dict[str, Tensor] = {}
        self._running = RunningMean()

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self._start = {n: p.detach().clone() for n, p in strategy.model.named_parameters() if p.requires_grad}
        self._running = RunningMean()

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        if self.every and (strategy.clock.train_exp_iterations + 1) % self.every == 0:
            self._running.add({n: p for n, p in strategy.model.named_parameters() if n in self._start})

    @torch.no_grad()
    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        for name, p in strategy.model.named_parameters():
            if name in self._start:
                learned = self._running.mean.get(name, p)
                p.copy_(torch.lerp(learned, self._start[name], self.inter))
        self._start, self._running = {}, RunningMean()
