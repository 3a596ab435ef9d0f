"""Stage 4, making connections: average the weights within a task, and interpolate with those from before it."""

from __future__ import annotations

from typing import Any, Literal

import torch
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor

from mulki_plugins.errors import MulkiError
from mulki_plugins.stages.check import check_connecting, refuse
from mulki_plugins.stages.importance import Importance, RunningMean
from mulki_plugins.stages.protocols import Strategy
from mulki_plugins.stages.weights import WeightsInUse
from mulki_plugins.types import Count, Fraction, checked

Tower = Literal["image", "text"]


class Connecting(SupervisedPlugin):
    """Stage 4: averages the weights within a task and interpolates with the weights before it.

    θ ← (1 − inter)·θ̄ + inter·θ_start at a task's end, θ̄ being the mean of the weights after every `every` steps of the task
    and θ_start the weights before it. In a task shorter than `every` steps the last weights are the only snapshot. Only
    weights that learn are touched: buffers, such as BatchNorm's, stay as training left them. With `initial`, the weights
    θ_0 from before the first task join in: θ ← (1 − initial)·[(1 − inter)·θ̄ + inter·θ_start] + initial·θ_0.
    Weight averaging: Izmailov et al., 2018, arXiv 1803.05407; interpolation: Wortsman et al., 2022, arXiv 2109.01903.

    Args:
        every: Steps between two snapshots of the running mean; null for one at the task's end.
        inter: Share of the weights from before the task.
        initial: Share of the weights from before the first task in the result.
        start: Make the weights at the task's start a snapshot too.
        importance: Interpolate each weight by how much it matters to the tasks before and to this one, see `Importance`.
        initial_importance: Let θ_0 join in by how much each weight matters to the pre-trained model and to the tasks so far,
            instead of with the same share everywhere; only with `importance` and `initial`.
        towers: The share of the weights from before the task for the image and the text tower, in place of `inter`.
    """

    per_sample = True
    paper = "arXiv 2411.06764"

    @checked
    def __init__(
        self, *, every: Count | None = 10, inter: Fraction = 0.2, initial: Fraction = 0.0, start: bool = False,
        importance: bool = False, initial_importance: bool = False, towers: dict[Tower, Fraction] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        joined = {"initial": initial, "importance": importance, "initial_importance": initial_importance}
        refuse(self, check_connecting(joined))
        self.every = every
        self.inter = inter
        self.initial = initial
        self.start = start
        self.towers: dict[Tower, float] = dict(towers or {})
        self.importance = Importance(keeps_initial=initial_importance) if importance else None
        self._initial: dict[str, Tensor] = {}
        self._start: dict[str, Tensor] = {}
        self._learning: WeightsInUse | None = None
        """The weights that learn in this task: no step walks through the model again."""
        self._mean = RunningMean()

    def before_training(self, strategy: Strategy, **kwargs: Any) -> None:
        if self.initial and not self._initial:  # also on resume, where it runs on the pre-trained weights
            self._initial = {n: w.detach().clone() for n, w in WeightsInUse(strategy.model).now().items()}

    def before_training_exp(self, strategy: Strategy, **kwargs: Any) -> None:
        self._learning = WeightsInUse(strategy.model)
        self._start = {n: w.detach().clone() for n, w in self._learning.now().items()}
        self._mean = RunningMean()
        if self.start:
            self._mean.add(self._start)
        if self.importance:
            if self._learning.are_computed:
                raise MulkiError(
                    "connecting: importance is defined for the model's own weights, not for those that an adapter computes",
                    "set strategy.connecting.importance=false",
                )
            self.importance.begin_task(strategy.model, list(self._start), strategy.adapted_dataset)

    def before_update(self, strategy: Strategy, **kwargs: Any) -> None:
        if self.importance:
            scaler = getattr(strategy, "scaler", None)  # MulKI's own training: only float16's gradients are scaled
            self.importance.add_gradients(self._now(), may_overflow=scaler is None or scaler.is_enabled())

    @torch.no_grad()
    def after_training_iteration(self, strategy: Strategy, **kwargs: Any) -> None:
        if self.every and (strategy.clock.train_exp_iterations + 1) % self.every == 0:
            self._mean.add(self._now())

    @torch.no_grad()
    def after_training_exp(self, strategy: Strategy, **kwargs: Any) -> None:
        if self._mean.count == int(self.start):  # fewer steps than `every`, or no mean requested
            self._mean.add(self._now())
        self._learning = WeightsInUse(strategy.model)  # some may be new objects
        now = {name: weight for name, weight in self._now().items() if name in self._start}
        names = list(now)
        means, start = ([each[name] for name in names] for each in (self._mean.mean, self._start))
        if self.importance:
            self.importance.end_steps()
            shares = [torch.as_tensor(self.importance.share(n, self._inter(n))).to(p) for n, p in now.items()]
            merged = [torch.lerp(*each) for each in zip(means, start, shares, strict=True)]
        elif self.towers:
            merged = [torch.lerp(m, s, self._inter(n)) for n, m, s in zip(names, means, start, strict=True)]
        else:
            merged = list(torch._foreach_lerp(means, start, self.inter)) if names else []
        if self._initial:  # weights that were added later have no value of that time
            merged = [
                torch.lerp(m, self._initial[n], self._initial_share(n, m)) if n in self._initial else m
                for n, m in zip(names, merged, strict=True)
            ]
        if self.importance:
            self.importance.end_task()
        self._learning.assign(dict(zip(names, merged, strict=True)))
        self._start, self._learning, self._mean = {}, None, RunningMean()

    def _now(self) -> dict[str, Tensor]:
        assert self._learning is not None
        return self._learning.now()

    def _inter(self, name: str) -> float:
        """The share of the earlier values of a weight."""
        inside = name.removeprefix("module.")  # without DistributedDataParallel's wrapper
        if not inside.startswith("clip."):
            return self.inter
        return self.towers.get("image" if inside.startswith("clip.visual.") else "text", self.inter)

    def _initial_share(self, name: str, weight: Tensor) -> Tensor | float:
        """The share of the values of a weight from before the first task."""
        share = self.importance.initial_share(name, self.initial) if self.importance else self.initial
        return share.to(weight) if isinstance(share, Tensor) else share

    def state_dict(self) -> dict[str, Any]:
        """The means so far; θ_start is restored from the weights before the task."""
        importance = self.importance or Importance()
        return {
            "running": self._mean.state_dict(),
            "now": importance.now.state_dict(),
            "before": importance.before.state_dict(),
            **({"initial": dict(importance.initial)} if importance.keeps_initial else {}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._mean = RunningMean.from_state(state["running"])
        if self.importance:
            self.importance.now = RunningMean.from_state(state["now"])
            self.importance.before = RunningMean.from_state(state["before"])
            self.importance.initial = dict(state.get("initial", {}))
