"""ZSCL: distil the pre-trained model on reference images and texts that belong to no task."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mulki_plugins.baselines.reference import OnReference, encode_tokens
from mulki_plugins.losses import contrastive_distillation
from mulki_plugins.ranks.collectives import gathered
from mulki_plugins.stages.stage import Strategy, classifier_of
from mulki_plugins.stages.teachers import Teacher, Teachers
from mulki_plugins.streams.benchmark import Reference
from mulki_plugins.types import Count, Positive, Weight, checked


class ReferenceDistillation(OnReference):
    """Distils the pre-trained model on reference images and texts.

    L = mean over the teachers of image·KD over the texts + text·KD over the images, on a batch of the reference images and
    all of the reference texts. Teacher and student are both compared with the teacher's texts, encoded once per task, so
    that only the student's image tower is taught, as in the authors' code.
    Zheng et al., 2023, arXiv 2303.06628, whose only teacher is the pre-trained model: `teachers: {use: initial}`.

    Args:
        reference: Reference images and texts.
        image: Factor of the distillation over the texts.
        text: Factor of the distillation over the images.
        temperature: T of the softened similarities.
        batch_size: Reference images per step; null for as many as the task's own.
    """

    requires = ("teachers",)
    needs_reference = True
    paper = "arXiv 2303.06628"
    term = "zscl"

    @checked
    def __init__(
        self,
        *,
        reference: Reference,
        image: Weight = 1.0,
        text: Weight = 1.0,
        temperature: Positive = 2.0,
        batch_size: Count | None = None,
    ) -> None:
        super().__init__(reference, batch_size)
        self.image, self.text, self.temperature = image, text, temperature
        self._texts: dict[Teacher, Tensor] = {}

    def before_training_exp(self, strategy: Strategy, **kwargs: Any) -> None:
        model = classifier_of(strategy, self)
        tokens = model.tokenizer(list(self.reference.texts)).cpu()
        teachers, encoded = Teachers.of(strategy, self).active, self._texts
        self._texts = {t: encoded[t] if t in encoded else encode_tokens(t.model, tokens) for t in teachers}
        super().before_training_exp(strategy, **kwargs)

    def reference_loss(self, strategy: Strategy, x: Tensor, z: Tensor) -> Tensor:
        s, total, z = classifier_of(strategy, self).scale, z.new_zeros(()), gathered(z)
        for teacher, texts in self._texts.items():
            t, z_teacher = texts.to(z), gathered(teacher.images(x).to(z))
            over_texts, over_images = contrastive_distillation(s * z @ t.T, s * z_teacher @ t.T, self.temperature)
            total = total + (self.image * over_texts + self.text * over_images) / len(self._texts)
        return total
