"""Stage 4, making connections: average the weights within a task, and interpolate with those from before it."""

from __future__ import annotations

from typing import Any

import torch
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor

from mulki_plugins.models.classifier import ClipClassifier
from mulki_plugins.stages.importance import RunningMean, interpolation_shares, rescaled, sensitivity, squared_gradient
from mulki_plugins.types import Count, Fraction, checked


class Connecting(SupervisedPlugin):
    """Sets the weights at a task's end to (1 − inter)·θ̄ + inter·θ_start.

    θ̄ is the mean of the weights after every `every` steps of this task (null, or a task of fewer steps: the last weights
    themselves; start: with θ_start as one of them), θ_start the weights before it. Only weights that learn are touched:
    buffers, such as BatchNorm's, stay as training left them.
    Weight averaging: Izmailov et al., 2018, arXiv 1803.05407; interpolation: Wortsman et al., 2022, arXiv 2109.01903.
    importance: interpolate each weight by how much it matters, see `interpolation_shares`: to the tasks before, by the mean
    of their squared gradients, with the pre-trained model as the first of them, by how much its features depend on it (of a
    ClipClassifier; with another model the first task's weights are interpolated alike).
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
        self._pretrained: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        """The means so far; the weights before the task are those with which it begins."""
        return {
            "running": self._running.state_dict(),
            "now": self._now.state_dict(),
            "before": self._before.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._running, self._now, self._before = (RunningMean.of(state[name]) for name in ("running", "now", "before"))

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self._start = {n: p.detach().clone() for n, p in strategy.model.named_parameters() if p.requires_grad}
        self._running = RunningMean()
        self._now = RunningMean()
        if self.start:
            self._running.add(self._start)
        model = getattr(strategy.model, "module", strategy.model)
        if self.importance and not self._before.count and isinstance(model, ClipClassifier):
            learning = {n: p for n, p in strategy.model.named_parameters() if n in self._start}
            self._pretrained = sensitivity(model, learning, strategy.adapted_dataset)

    def before_update(self, strategy: Any, **kwargs: Any) -> None:
        if self.importance:
            weights = {n: p for n, p in strategy.model.named_parameters() if n in self._start}
            self._now.add({n: squared_gradient(p) for n, p in weights.items()})

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        if self.every and (strategy.clock.train_exp_iterations + 1) % self.every == 0:
            self._running.add({n: p for n, p in strategy.model.named_parameters() if n in self._start})

    @torch.no_grad()
    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        if self._running.count == int(self.start):  # fewer steps than `every`, or no mean asked for
            self._running.add({n: p for n, p in strategy.model.named_parameters() if n in self._start})
        if self._pretrained:
            self._before.add(rescaled(self._pretrained, self._now.mean))
            self._pretrained = {}
        for name, p in strategy.model.named_parameters():
            if name in self._start:
                share = torch.tensor(self.inter).to(p)
                if name in self._before.mean:
                    share = interpolation_shares(self._before.mean[name], self._now.mean[name], self.inter)
                p.copy_(torch.lerp(self._running.mean[name], self._start[name], share))
        if self.importance:
            self._before.add(self._now.mean)
        self._start, self._running, self._now = {}, RunningMean(), RunningMean()
