"""Rephrasing ideas, beyond the paper: the task's classes in its other templates, which an evaluation uses too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mulki_plugins.losses import smoothed_cross_entropy
from mulki_plugins.stages.stage import Part, Stage, Strategy, autocast_of, classifier_of
from mulki_plugins.stages.words import Phrases
from mulki_plugins.types import Fraction, Weight, checked


class Rephrasing(Stage):
    """Classifies the batch's images among their classes in another template of the task, drawn in each step.

    L = CE(s·z t'ᵀ, y), t' being the features of the sentences in that template. Training uses a task's first template, an
    evaluation the mean over all; so the others are taught as well. Zero for a task of one template.

    Args:
        weight: Factor of the loss.
        smoothing: Label smoothing.
    """

    @checked
    def __init__(self, *, weight: Weight = 1.0, smoothing: Fraction = 0.0) -> None:
        super().__init__()
        self.weight = weight
        self.smoothing = smoothing
        self._drawn = 0.0
        """Which of the other templates, in 0..1."""
        self._phrases: Phrases | None = None

    def before_training_exp(self, strategy: Strategy, **kwargs: Any) -> None:
        self._phrases = Phrases(classifier_of(strategy, self))

    def before_forward(self, strategy: Strategy, **kwargs: Any) -> None:
        self._drawn = float(torch.rand(())) if self.weight else 0.0

    def after_training_exp(self, strategy: Strategy, **kwargs: Any) -> None:
        self._phrases = None

    def loss(self, part: Part) -> Tensor:
        assert self._phrases is not None
        templates = self._phrases.templates(part.task)
        if templates == 1 or not self.weight:
            return part.z.new_zeros(())
        with autocast_of(part.strategy):
            t = self._phrases.features([(part.task, 1 + int(self._drawn * (templates - 1)))])
        return smoothed_cross_entropy(part.s * part.z @ t.T, part.y, self.smoothing)
