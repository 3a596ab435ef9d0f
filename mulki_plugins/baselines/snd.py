"""SnD, select and distil: two teachers on reference images, each heard where it knows better."""

from __future__ import annotations

from typing import Any

from mulki_plugins.baselines.zscl import OnReference, ReferenceBatches
from mulki_plugins.losses import selection, selective_distillation
from mulki_plugins.stages.stage import autocast_of, classifier_of
from mulki_plugins.stages.teachers import Teachers
from mulki_plugins.streams.reference import Reference
from mulki_plugins.types import Count, Positive, Weight, checked


class SelectiveDistillation(OnReference):
    """Adds previous·mean_b w_b·‖z_b − z^p_b‖² + initial·mean_b (1 − w_b)·‖z_b − z⁰_b‖² on a batch of reference images.

    z⁰, z^p are the two teachers' features and w_b = σ(slope·(‖z⁰_b − z^p_b‖ − threshold)): where the teachers disagree, the
    image is like what has been learned, and the model before this task is heard. Texts are not distilled.
    batch_size: reference images a step; null for twice the task's, as the authors have it.
    Yu et al., 2024, arXiv 2403.09296. Their released code multiplies the mean weight with the mean loss, by a mistake of
    shapes; here each sample has its own weight, as their paper says.
    """

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
        super().__init__()
        self.reference = reference
        self.previous, self.initial = previous, initial
        self.slope, self.threshold = slope, threshold
        self.batch_size = batch_size

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        size = self.batch_size or 2 * strategy.train_mb_size
        self._batches = ReferenceBatches(self.reference, size, int(kwargs.get("num_workers") or 0))

    def after_forward(self, strategy: Any, **kwargs: Any) -> None:
        assert self._batches is not None
        x = next(self._batches).to(strategy.device)
        with autocast_of(strategy):
            z = classifier_of(strategy, self).encode_image(x)
        views = [teacher.images(x).to(z) for teacher in Teachers.of(strategy, self).active]
        initial, previous = views[0], views[-1]  # on the first task the two are one
        weights = selection(initial, previous, self.slope, self.threshold)
        to_previous, to_initial = selective_distillation(z, initial, previous, weights)
        self.log(strategy, "train/share/previous", weights.mean())
        self.add_loss(strategy, "snd", self.previous * to_previous + self.initial * to_initial)

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self._batches = None
