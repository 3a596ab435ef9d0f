"""Stage 3, distinguishing ideas: weigh the two teachers for each sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from mulki_plugins.losses import Score, mixture_weights, novelty_weights, selection, teacher_scores, teacher_weights
from mulki_plugins.stages.check import check_distinguishing, refuse
from mulki_plugins.stages.stage import Stage, Strategy, tasks_of
from mulki_plugins.stages.teachers import Rows, Teacher, Teachers
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
            sentence for a class of an earlier task, without a score (SnD, arXiv 2403.09296). Or `novelty`: the first
            teacher gets σ(slope·(1 − max_c z^1·P_c − threshold)), P being the second teacher's visual prototypes of all
            classes of earlier tasks: it answers for what resembles none of them. A class of an earlier task is the second
            teacher's alone.
        slope: For `disagreement` and `novelty`: how sharply a sample is assigned to one teacher or the other.
        threshold: For `disagreement`: the distance of the teachers' features above which the second one weighs more; for
            `novelty`: the distance 1 − cos from the nearest prototype above which the first one weighs more.
    """

    requires = ("teachers",)
    per_sample = True
    paper = "arXiv 2411.06764"

    @checked
    def __init__(
        self, *, score: Score = "likelihood", temperature: Positive = 1.0,
        weights: Literal["softmax", "mixture", "disagreement", "novelty"] = "softmax", slope: Positive = 6.0,
        threshold: Weight = 0.2,
    ) -> None:  # fmt: skip
        super().__init__()
        refuse(self, check_distinguishing({"weights": weights, "score": score}))
        self.weights = weights
        self.score = score
        self.temperature = temperature
        self.slope, self.threshold = slope, threshold
        self._prototypes: list[Tensor] = []
        """The previous teacher's visual prototypes of earlier tasks' classes, for `novelty`."""
        self._shares: dict[str, list[tuple[Tensor, int]]] = {}
        """The initial teacher's mean weight and the number of rows of each part of this step, by tag."""

    def before_training_exp(self, strategy: Strategy, **kwargs: Any) -> None:
        self._shares = {}
        teachers = Teachers.of(strategy, self)
        teachers.weigh = self.weigh
        for task in tasks_of(strategy.adapted_dataset):
            for teacher in self.reads_prototypes(teachers):
                teachers.prototypes(strategy, teacher, task)  # kept for later tasks, when this one is an earlier one
        self._prototypes = teachers.earlier_prototypes(tasks_of(strategy.adapted_dataset))

    def reads_prototypes(self, teachers: Teachers) -> Sequence[Teacher]:
        return [teachers.previous] if self.weights == "novelty" and teachers.previous is not None else []

    def weigh(self, logits: list[Tensor], targets: Tensor, rows: Rows, features: Sequence[Tensor] = ()) -> Tensor:
        """w [M, N] from each teacher's logits [N, C] and features [N, d]; the first teacher is the pre-trained model."""
        if self.weights in ("disagreement", "novelty"):
            if len(features) != len(logits):
                raise ValueError(
                    f"Distinguishing: {self.weights} needs each teacher's features; give them to Teachers.weights"
                )
            previous = self._by_features(features, rows).to(logits[0].dtype)
            weights = torch.stack([1 - previous, previous])
        elif self.weights == "mixture":
            weights = mixture_weights(self._scores(logits, targets), 1 / self.temperature)
        else:
            weights = teacher_weights(self._scores(logits, targets), self.temperature)
        if len(targets):
            tag = "train/share/initial" + ("" if rows == "samples" else f"_of_{rows}")
            self._shares.setdefault(tag, []).append((weights[0].detach().mean(), len(targets)))
        return weights

    def _by_features(self, features: Sequence[Tensor], rows: Rows) -> Tensor:
        """The previous teacher's weight for each row [N], from both teachers' features."""
        if self.weights == "disagreement":
            return selection(features[0], features[-1], self.slope, self.threshold)
        z = features[-1]
        if rows == "classes":
            return z.new_ones(len(z))
        prototypes = torch.cat([z[:0], *(each.to(z) for each in self._prototypes)])
        return 1 - novelty_weights(z, prototypes, self.slope, self.threshold)

    def _scores(self, logits: list[Tensor], targets: Tensor) -> list[Tensor]:
        return [teacher_scores(each, targets, self.score) for each in logits]

    def after_backward(self, strategy: Strategy, **kwargs: Any) -> None:
        for tag, parts in self._shares.items():  # one value per tag, even if the batch was split by task
            rows = sum(n for _, n in parts)
            self.log(strategy, tag, torch.stack([mean * (n / rows) for mean, n in parts]).sum())
        self._shares = {}
