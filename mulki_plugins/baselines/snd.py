"""SnD, select and distil: both teachers on reference images, each where it knows better."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mulki_plugins.baselines.reference import OnReference
from mulki_plugins.losses import selection, selective_distillation
from mulki_plugins.ranks.collectives import gathered
from mulki_plugins.stages.stage import Strategy
from mulki_plugins.stages.teachers import Teachers
from mulki_plugins.streams.benchmark import Reference
from mulki_plugins.types import Count, Positive, Weight, checked


class SelectiveDistillation(OnReference):
    """Distils both teachers' features on reference images, each where it knows better.

    L = previous·mean_b w_b·‖z_b − z^p_b‖² + initial·mean_b (1 − w_b)·‖z_b − z⁰_b‖² on a batch of reference images, z⁰ and z^p
    being the two teachers' features and w_b = σ(slope·(‖z⁰_b − z^p_b‖ − threshold)): where the teachers disagree, the image
    resembles what has been learned, and the model before this task teaches it. Texts are not distilled.
    Yu et al., 2024, arXiv 2403.09296. Their released code multiplies the mean weight with the mean loss because of a wrong
    shape; here each sample has its own weight, as in their paper.

    Args:
        reference: Reference images.
        previous: Factor of the distance to the model before the task.
        initial: Factor of the distance to the pre-trained model.
        slope: How sharply an image is assigned to one teacher or the other.
        threshold: Disagreement of the teachers above which the model before the task teaches the image.
        batch_size: Reference images per step; null for twice the task's own, as in the authors' code.
    """

    requires = ("teachers",)
    needs_reference = True
    paper = "arXiv 2403.09296"
    term = "snd"

    @checked
    def __init__(
        self,
        *,
        reference: Reference,
        previous: Weight = 9.0,
        initial: Weight = 0.5,
        slope: Positive = 6.0,
        threshold: Weight = 0.2,
        batch_size: Count | None = None,
    ) -> None:
        super().__init__(reference, batch_size)
        self.previous, self.initial = previous, initial
        self.slope, self.threshold = slope, threshold

    def default_batch_size(self, strategy: Strategy) -> int:
        return 2 * strategy.train_mb_size

    def before_training_exp(self, strategy: Strategy, **kwargs: Any) -> None:
        Teachers.of(strategy, self).require("both", "snd")
        super().before_training_exp(strategy, **kwargs)

    def reference_loss(self, strategy: Strategy, x: Tensor, z: Tensor) -> Tensor:
        features = [gathered(teacher.images(x).to(z)) for teacher in Teachers.of(strategy, self).active]
        z = gathered(z)
        initial, previous = features[0], features[-1]  # one and the same on the first task
        w = selection(initial, previous, self.slope, self.threshold)
        self.log(strategy, "train/share/previous", w.mean())
        to_previous, to_initial = selective_distillation(z, initial, previous, w)
        return self.previous * to_previous + self.initial * to_initial
