"""How much each weight matters: to what was learned before, and to what is learned now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from attrs import define, field
from torch import Tensor, nn

from mulki_plugins.models.classifier import ClipClassifier
from mulki_plugins.stages.protocols import Dataset, unwrapped
from mulki_plugins.stages.statistics import evaluating, evaluation_batches


@define(eq=False)
class RunningMean:
    """The mean of the snapshots so far, tensor by tensor: θ̄ ← θ̄ + (θ − θ̄)/n."""

    count: int = 0
    mean: dict[str, Tensor] = field(factory=dict)

    @torch.no_grad()
    def add(self, weights: Mapping[str, Tensor]) -> None:
        self.count += 1
        if known := [name for name in weights if name in self.mean]:
            snapshot = [weights[name].detach() for name in known]
            torch._foreach_lerp_([self.mean[name] for name in known], snapshot, 1 / self.count)
        for name, weight in weights.items():
            if name not in self.mean:
                self.mean[name] = weight.detach().clone()

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "mean": dict(self.mean)}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> RunningMean:
        """The inverse of `state_dict`."""
        return cls(state["count"], dict(state["mean"]))


@define(eq=False)
class Importance:
    """The importance F ≥ 0 of each weight: to this task, and on average to the tasks before.

    The importance to a task is the mean squared gradient over its steps. The pre-trained model counts as the first task
    before: its importances are its `sensitivity` on the first task's images and classes, rescaled to the sum of that task's.
    A model that is not a ClipClassifier has none, so the first task's weights are all interpolated alike.
    """

    now: RunningMean = field(factory=RunningMean)
    """Squared gradients of this task's steps."""
    before: RunningMean = field(factory=RunningMean)
    """Importances to the tasks before: as large as the weights, however many tasks there were."""
    pretrained: dict[str, Tensor] = field(factory=dict)
    """Sensitivity of the pre-trained model, during the first task."""
    keeps_initial: bool = False
    """Whether `initial` is kept: as large as the weights."""
    initial: dict[str, Tensor] = field(factory=dict)
    """Importances to the pre-trained model, from the first task's end."""

    def begin_task(self, model: nn.Module, names: Sequence[str], dataset: Dataset) -> None:
        """names: the weights that learn."""
        self.now = RunningMean()
        classifier = unwrapped(model)
        if names and not self.before.count and isinstance(classifier, ClipClassifier):
            parameters = dict(model.named_parameters())
            self.pretrained = sensitivity(classifier, {name: parameters[name] for name in names}, dataset)

    def add_gradients(self, weights: Mapping[str, Tensor], *, may_overflow: bool = True) -> None:
        """Add the squared gradients of a step. may_overflow: a gradient may be infinite, and then counts as 0."""
        squares = squared_gradients(list(weights.values()), may_overflow=may_overflow)
        self.now.add(dict(zip(weights, squares, strict=True)))

    def end_steps(self) -> None:
        """Count the pre-trained model as the first of the tasks before."""
        if self.pretrained:
            scaled = rescaled(self.pretrained, self.now.mean)
            self.before.add(scaled)
            self.initial = scaled if self.keeps_initial else {}
            self.pretrained = {}

    def share(self, name: str, inter: float) -> Tensor | float:
        """The share of the weights' earlier values, see `interpolation_shares`; `inter` without anything to compare."""
        if name not in self.before.mean:
            return inter
        return interpolation_shares(self.before.mean[name], self.now.mean[name], inter)

    def initial_share(self, name: str, initial: float) -> Tensor | float:
        """The share of the pre-trained values: by their importance to that model, and to the tasks so far on average.

        b = initial·F⁰ / (initial·F⁰ + (1 − initial)·F), F being the mean over all tasks, this one too. Call it after
        `end_steps`. `initial` without anything to compare.
        """
        if name not in self.initial:
            return initial
        f0, count = self.initial[name], self.before.count  # the pre-trained model is one of those before
        learned = (self.before.mean[name] * count - f0 + self.now.mean[name]) / count
        return interpolation_shares(f0, learned.clamp(min=0), initial)

    def end_task(self) -> None:
        """Add this task's importances to those of the tasks before."""
        self.before.add(self.now.mean)
        self.now = RunningMean()


def interpolation_shares(before: Tensor, now: Tensor, inter: float, damping: float = 1e-3) -> Tensor:
    """The share of the earlier value, weight by weight: a = inter·F_before / (inter·F_before + (1 − inter)·F_now).

    before, now: importances F ≥ 0 of one tensor's weights. Returns shares in 0..1 of the same shape, `inter` where the two
    are equal. Both are raised by damping·(their means), so that a weight that never had a gradient is interpolated by
    `inter`. The mean of two models under diagonal Fisher information: Matena and Raffel, 2022, arXiv 2111.09832.
    """
    floor = damping * (before.mean() + now.mean()) + torch.finfo(now.dtype).tiny
    kept, new = inter * (before + floor), (1 - inter) * (now + floor)
    return kept / (kept + new)


@torch.no_grad()
def squared_gradients(weights: Sequence[Tensor], *, may_overflow: bool = True) -> list[Tensor]:
    """The squared gradient of each weight; 0 without one, and where half precision overflowed and the step is skipped."""
    gradients = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
    squares = list(torch._foreach_mul(gradients, gradients)) if gradients else []
    for square in squares if may_overflow else ():
        square.nan_to_num_(0.0, 0.0, 0.0)
    return squares


def rescaled(importances: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Importances of another kind, scaled to the same sum over all weights as `like`."""
    total, wanted = (sum((f.sum() for f in each.values()), torch.zeros(())) for each in (importances, like))
    factor = wanted / total if total > 0 else torch.tensor(0.0)
    return {name: f * factor.to(f) for name, f in importances.items()}


def sensitivity(
    model: ClipClassifier, weights: Mapping[str, Tensor], dataset: Dataset, *, batches: int = 12, batch_size: int = 32
) -> dict[str, Tensor]:
    """How much each weight moves the features of a data set: E[(∂/∂θ (mean z·v + mean t·u))²], v and u random unit vectors.

    For the pre-trained model, whose training cannot be observed, in place of the squared gradients of a loss. Uses batches
    of images through the evaluation transform and the classes of their tasks, with a fixed seed. Returns a tensor ≥ 0 for
    each weight; the model's mode and torch's random state are left unchanged.
    After Aljundi et al., 2018 (MAS, arXiv 1711.09601), who take the gradient of the features' squared norm.
    """
    generator = torch.Generator().manual_seed(0)
    mean = RunningMean()
    with evaluating(model), torch.enable_grad():
        for x, _, labels in evaluation_batches(dataset, batch_size, generator=generator, most=batches * batch_size):
            z = model.encode_image(x.to(model.scale.device))
            texts = [model.encode_text(int(task), all_templates=False) for task in torch.unique(labels)]
            moved = torch.stack([_along_random(features, generator) for features in (z, *texts)]).sum()
            gradients = torch.autograd.grad(moved, list(weights.values()), allow_unused=True)
            pairs = zip(weights.items(), gradients, strict=True)
            mean.add({name: torch.zeros_like(w) if g is None else g.square() for (name, w), g in pairs})
    return mean.mean


def _along_random(features: Tensor, generator: torch.Generator) -> Tensor:
    """The mean component of the features [N, d] along random unit vectors, one per feature: a scalar."""
    directions = F.normalize(torch.randn(features.shape, generator=generator), dim=1)
    return (features * directions.to(features)).sum(1).mean()
