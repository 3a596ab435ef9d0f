"""RAIL: a ridge regression from random features of the frozen model to the classes, solved anew after each task."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from mulki_plugins.models.head import Head, Scope, TrainingImages
from mulki_plugins.types import Count, Fraction, Positive, checked

_SMALLEST = 1e-3
"""Fused values below it continue the logarithm as a straight line."""


class Rail(Head):
    """Regresses the classes on random features of the frozen model, in closed form.

    φ = ReLU(f·H), with f the unit-norm features and H [d, width] uniform in ±1/√d, drawn once from the run's seed;
    W = (Σ φᵀφ + ridge·I)⁻¹ Σ φᵀy over all images so far, with y one-hot over all classes so far. The sums are kept in double
    precision, so the order of tasks and batches does not matter. With p the zero-shot probabilities over the scope: where
    their largest is a learned class, the answer is (1 − fusion)·p + fusion·φW, 0 for classes not learned, elsewhere p.
    The sums of earlier tasks are those of the features as they were. They stay exact if the image tower is frozen, with
    `model.train` as `none` or `text`; one that is trained must change its features little.
    Xu et al., 2024, arXiv 2406.18868, in its primal form, whose batchwise recursion gives the same W. There the width is
    15000, the ridge 0.1 and the fusion 0.8. The sums take 8·width² bytes.

    Args:
        width: The number of random features.
        ridge: Factor λ of the squared norm of W.
        fusion: Share of the regression in the answer.
        features: `projected` for the image features, as the authors do; `pooled` for what the tower's last projection reads,
            which is wider, of unit norm too. Not every image tower has pooled ones.
    """

    paper = "arXiv 2406.18868"
    asked_in_training = False
    """Its logits have slopes that no training should follow."""
    portable = "rail.py.template"
    portable_state = ("hidden", "weights", "learned")
    hidden: Tensor | None
    """H [d, width]."""
    gram: Tensor | None
    """Σ φᵀφ [width, width]."""
    moments: Tensor | None
    """Σ φᵀy [width, C], of all classes so far."""
    weights: Tensor | None
    """W [width, C]."""
    learned: Tensor | None
    """[tasks, 3]: each learned task, its first column in W, and the number of its classes."""

    @checked
    def __init__(
        self,
        *,
        width: Count = 1024,
        ridge: Positive = 0.1,
        fusion: Fraction = 0.8,
        features: Literal["projected", "pooled"] = "projected",
    ) -> None:
        super().__init__()
        self.features, self.reads_pooled = features, features == "pooled"
        self.width, self.ridge, self.fusion = width, ridge, fusion
        for name in ("hidden", "gram", "moments", "weights", "learned"):
            self.register_buffer(name, None)

    def begin(self, width: int) -> None:
        self.hidden = (2 * torch.rand(width, self.width) - 1) / math.sqrt(width)

    def random_features(self, z: Tensor) -> Tensor:
        """φ [B, width] in double precision, of what is last in z: the pooled features, or the image features alone."""
        assert self.hidden is not None
        return torch.relu(z[:, -len(self.hidden) :].double() @ self.hidden.double())

    def after_task(self, task: int, images: TrainingImages) -> None:
        def term(z: Tensor, y: Tensor) -> dict[str, Tensor]:
            phi = self.random_features(z)
            targets = torch.nn.functional.one_hot(y, images.classes).double()
            return {"gram": phi.T @ phi, "moments": phi.T @ targets}

        sums = images.sum(term)
        start = 0 if self.moments is None else self.moments.shape[1]
        row = torch.tensor([[task, start, images.classes]], device=sums["gram"].device)
        if self.gram is None or self.moments is None or self.learned is None:
            self.gram, self.moments, self.learned = sums["gram"], sums["moments"], row
        else:
            self.gram = self.gram + sums["gram"]
            self.moments = torch.cat([self.moments, sums["moments"]], 1)
            self.learned = torch.cat([self.learned, row])
        self.weights = ridge_regression(self.gram, self.moments, self.ridge)

    def forward(self, z: Tensor, scope: Scope) -> Tensor:
        logits = scope.text_logits(z)
        known = [row for row in ([] if self.learned is None else self.learned.tolist()) if row[0] in scope.places]
        if not known:
            return logits
        assert self.weights is not None
        phi, p = self.random_features(z), logits.double().softmax(1)
        scores = torch.zeros_like(p)
        is_learned = torch.zeros(p.shape[1], dtype=torch.bool, device=p.device)
        for task, start, classes in known:
            places = torch.tensor(list(scope.places[task]), device=p.device)
            # a class that two tasks share has a column for each: their sum is the regression to both together
            scores = scores.index_add(1, places, phi @ self.weights[:, start : start + classes])
            is_learned[places] = True
        fused = (1 - self.fusion) * p + self.fusion * scores
        return torch.where(is_learned[p.argmax(1)][:, None], as_logits(fused).to(logits.dtype), logits)


def ridge_regression(gram: Tensor, moments: Tensor, ridge: float) -> Tensor:
    """W = (G + ridge·I)⁻¹ Q [m, C], by Cholesky, from G = ΦᵀΦ [m, m] and Q = ΦᵀY [m, C]; ridge > 0."""
    regular = gram.clone()
    regular.diagonal().add_(ridge)
    return torch.cholesky_solve(moments, torch.linalg.cholesky(regular))


def as_logits(values: Tensor) -> Tensor:
    """Logits in the order of the values, whose softmax is their share of the sum where they are not close to 0 or below."""
    line = math.log(_SMALLEST) + values / _SMALLEST - 1
    return torch.where(values > _SMALLEST, values.clamp(min=_SMALLEST).log(), line)
