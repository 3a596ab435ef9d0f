"""How much each weight matters: to what was learned before, and to what is learned now."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from attrs import define, field
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mulki_plugins.models.classifier import ClipClassifier


@define(eq=False)
class RunningMean:
    """The mean of the snapshots so far, tensor by tensor: θ̄ ← θ̄ + (θ − θ̄)/n."""

    count: int = 0
    mean: dict[str, Tensor] = field(factory=dict)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "mean": dict(self.mean)}

    @classmethod
    def of(cls, state: dict[str, Any]) -> RunningMean:
        """The one whose `state_dict` this is."""
        return cls(state["count"], dict(state["mean"]))

    @torch.no_grad()
    def add(self, weights: dict[str, Tensor]) -> None:
        self.count += 1
        for name, weight in weights.items():
            if name in self.mean:
                self.mean[name].lerp_(weight.detach(), 1 / self.count)
            else:
                self.mean[name] = weight.detach().clone()


def squared_gradient(weight: Tensor) -> Tensor:
    """The squared gradient; 0 where there is none, or where half precision overflowed and the step is skipped."""
    gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
    return gradient.square().nan_to_num(0.0, 0.0, 0.0)


def sensitivity(
    model: ClipClassifier, weights: dict[str, nn.Parameter], dataset: Any, *, batches: int = 12, batch_size: int = 32
) -> dict[str, Tensor]:
    """How much each weight moves the features of a data set: E[(∂/∂θ (mean z·v + mean t·u))²], v and u random unit vectors.

    For the pre-trained model, whose training cannot be looked at, in the place of squared gradients of a loss. Batches of
    images through the evaluation transform, and the classes of their tasks; always the same ones and the same vectors.
    Returns a tensor ≥ 0 like each weight; the model's mode and torch's random state stay.
    After Aljundi et al., 2018 (MAS, arXiv 1711.09601), who take the gradient of the features' squared norm.
    """
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(dataset.eval(), batch_size=batch_size, shuffle=True, generator=generator)
    learning, found = model.training, RunningMean()
    model.eval()
    for _, batch in zip(range(batches), loader, strict=False):
        x, labels = batch[0].to(model.scale.device), batch[-1] if len(batch) > 2 else torch.zeros(1, dtype=torch.long)
        with torch.enable_grad():
            z = model.encode_image(x)
            texts = [model.encode_text(int(task), all_templates=False) for task in labels.unique()]
            moved = torch.stack([_along_random(each, generator) for each in (z, *texts)]).sum()
            gradients = torch.autograd.grad(moved, list(weights.values()), allow_unused=True)
        pairs = zip(weights.items(), gradients, strict=True)
        found.add({name: torch.zeros_like(w) if g is None else g.square() for (name, w), g in pairs})
    model.train(learning)
    return found.mean


def _along_random(features: Tensor, generator: torch.Generator) -> Tensor:
    """The mean of the features' parts along random unit vectors, one for each: [N, d] -> a scalar."""
    directions = F.normalize(torch.randn(features.shape, generator=generator), dim=1)
    return (features * directions.to(features)).sum(1).mean()


def rescaled(importances: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Importances of another sort, with the same sum over all weights as `like`."""
    own, wanted = (sum(f.sum() for f in each.values()) for each in (importances, like))
    factor = wanted / own if own > 0 else torch.tensor(0.0)
    return {name: f * factor.to(f) for name, f in importances.items()}  # type: ignore[union-attr]


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
