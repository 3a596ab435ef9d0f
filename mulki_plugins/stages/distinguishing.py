"""Stage 3, distinguishing ideas: weigh the two teachers for each sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from mulki_plugins.losses import Score, mixture_weights, selection, teacher_scores, teacher_weights
from mulki_plugins.stages.stage import Stage, Strategy
from mulki_plugins.stages.teachers import Rows, Teachers
from mulki_plugins.types import Positive, Weight, checked


class Distinguishing(Stage):
    """Stage 3: weighs the two teachers for each sample.

    w^m ∝ exp(−ℓ^m/κ), Σ_m w^m = 1, ℓ^m being how unsure teacher m is of the sample. It adds no loss: it gives its weights
    to the Teachers, and the stages that distil ask those. For a class of an earlier task the sample is its sentence and the
    target its visual prototype.

    Args:
        score: ℓ: the cross-entropy on the true class (`likelihood`), the entropy of the prediction (`entropy`), or how far
            the best wrong class is ahead of the true one (`margin`).
        temperature: κ: the larger, the more equal the weights.
        weights: `softmax` as above, or `mixture`: the second teacher gets σ((ℓ^0 − ℓ^1) / (κ·(ℓ^0 + ℓ^1))), which depends
            on the relative difference of the scores alone. A mixture needs scores ≥ 0, so not `margin`. Or `disagreement`:
            the second teacher gets σ(slope·(‖z^0 − z^1‖ − threshold)), from the teachers' features of the image, or of the
            sentence for a class of an earlier task, without a score (SnD, arXiv 2403.09296).
        slope: For `disagreement`: how sharply a sample is assigned to one teacher or the other.
        threshold: For `disagreement`: the distance of the teachers' features above which the second one weighs more.
    """

    requires = ("teachers",)
    per_sample = True
    paper = "arXiv 2411.06764"

    @checked
    def __init__(
        self, *, score: Score = "likelihood", temperature: Positive = 1.0,
        weights: Literal["softmax", "mixture", "disagreement"] = "softmax", slope: Positive = 6.0, threshold: Weight = 0.2,
    ) -> None:  # fmt: skip
        super().__init__()
        if weights == "mixture" and score == "margin":
            raise ValueError(
                "Distinguishing: weights: a mixture needs scores of at least 0, and a margin may be negative"
            )
        self.weights = weights
        self.score = score
        self.temperature = temperature
        self.slope, self.threshold = slope, threshold
        self._shares: dict[str, list[tuple[Tensor, int]]] = {}
        """The initial teacher's mean weight and the number of rows of each part of this step, by tag."""

    def before_training_exp(self, strategy: Strategy, **kwargs: Any) -> None:
        self._shares = {}
        Teachers.of(strategy, self).weigh = self.weigh

    def weigh(self, logits: list[Tensor], targets: Tensor, rows: Rows, features: Sequence[Tensor] = ()) -> Tensor:
        """w [M, N] from each teacher's logits [N, C] and features [N, d]; the first teacher is the pre-trained model."""
        if self.weights == "disagreement":
            if len(features) != len(logits):
                raise ValueError(
                    "Distinguishing: disagreement needs each teacher's features; give them to Teachers.weights"
                )
            previous = selection(features[0], features[-1], self.slope, self.threshold).to(logits[0].dtype)
            weights = torch.stack([1 - previous, previous])
        elif self.weights == "mixture":
            weights = mixture_weights(self._scores(logits, targets), 1 / self.temperature)
        else:
            weights = teacher_weights(self._scores(logits, targets), self.temperature)
        if len(targets):
            tag = "train/share/initial" + ("" if rows == "samples" else f"_of_{rows}")
            self._shares.setdefault(tag, []).append((weights[0].detach().mean(), len(targets)))
        return weights

    def _scores(self, logits: list[Tensor], targets: Tensor) -> list[Tensor]:
        return [teacher_scores(each, targets, self.score) for each in logits]

    def after_backward(self, strategy: Strategy, **kwargs: Any) -> None:
        for tag, parts in self._shares.items():  # one value per tag, even if the batch was split by task
            rows = sum(n for _, n in parts)
            self.log(strategy, tag, torch.stack([mean * (n / rows) for mean, n in parts]).sum())
        self._shares = {}
