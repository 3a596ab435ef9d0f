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

    θ̄ is the mean of the weights after every `every` steps of this task (null, or a task of fewer steps: the last weights
    themselves; start: with θ_start as one of them), θ_start the weights before it. Only weights that learn are touched:
    buffers, such as BatchNorm's, stay as training left them.
    Weight averaging: Izmailov et al., 2018, arXiv 1803.05407; interpolation: Wortsman et al., 2022, arXiv 2109.01903.
    importance: interpolate each weight by how much it matters, see `interpolation_shares`.
    """

    @checked
    def __init__(
        self, *, every: Count | None = 10, inter: Fraction = 0.2, start: bool = False, importance: bool = False
    ) -> None:
        super().__init__()
        self.every = every
        self.inter = inter
        self.start = start
        self.importance = importance
        self._start: dict[str, Tensor] = {}
        self._running = RunningMean()
        self._now = RunningMean()
        """Squared gradients of this task's steps."""
        self._before = RunningMean()
        """The same, over the tasks before: as large as the weights, however many tasks there were."""

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self._start = {n: p.detach().clone() for n, p in strategy.model.named_parameters() if p.requires_grad}
        self._running = RunningMean()
        self._now = RunningMean()
        if self.start:
            self._running.add(self._start)

    def before_update(self, strategy: Any, **kwargs: Any) -> None:
        if self.importance:
            weights = {n: p for n, p in strategy.model.named_parameters() if n in self._start}
            self._now.add({n: _squared(p) for n, p in weights.items()})

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        if self.every and (strategy.clock.train_exp_iterations + 1) % self.every == 0:
            self._running.add({n: p for n, p in strategy.model.named_parameters() if n in self._start})

    @torch.no_grad()
    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        if self._running.count == int(self.start):  # fewer steps than `every`, or no mean asked for
            self._running.add({n: p for n, p in strategy.model.named_parameters() if n in self._start})
        for name, p in strategy.model.named_parameters():
            if name in self._start:
                share = torch.tensor(self.inter).to(p)
                if name in self._before.mean:
                    share = interpolation_shares(self._before.mean[name], self._now.mean[name], self.inter)
                p.copy_(torch.lerp(self._running.mean[name], self._start[name], share))
        if self.importance:
            self._before.add(self._now.mean)
        self._start, self._running, self._now = {}, RunningMean(), RunningMean()


def _squared(weight: Tensor) -> Tensor:
    """The squared gradient; 0 where there is none, or where half precision overflowed and the step is skipped."""
    gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
    return gradient.square().nan_to_num(0.0, 0.0, 0.0)


def interpolation_shares(before: Tensor, now: Tensor, inter: float, damping: float = 1e-3) -> Tensor:
    """How much of the earlier weights is kept, weight by weight: a = inter·F_before / (inter·F_before + (1 − inter)·F_now).

    before, now: importances F ≥ 0 of one tensor's weights, the mean squared gradients over the earlier tasks and over this
    one; returns the like, in 0..1, inter where the two are equal. Both are raised by damping·(their means), so that a
    weight that never had a gradient is interpolated by `inter`.
    The mean of two models under diagonal Fisher information: Matena and Raffel, 2022, arXiv 2111.09832.
    """
    floor = damping * (before.mean() + now.mean()) + torch.finfo(now.dtype).tiny
    kept, new = inter * (before + floor), (1 - inter) * (now + floor)
    return kept / (kept + new)
