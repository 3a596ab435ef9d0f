"""ZSCL: distil the pre-trained model on reference images and texts that are no task's own."""

from __future__ import annotations

from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mulki_plugins.baselines.lwf import encoded
from mulki_plugins.losses import contrastive_distillation
from mulki_plugins.stages.stage import Stage, autocast_of, classifier_of
from mulki_plugins.stages.teachers import Teacher, Teachers
from mulki_plugins.streams.reference import Reference
from mulki_plugins.types import Count, Positive, Weight, checked


class OnReference(Stage):
    """A stage that takes a batch of reference images at each step, and keeps its place among them."""

    def __init__(self) -> None:
        super().__init__()
        self._batches: ReferenceBatches | None = None

    def state_dict(self) -> dict[str, Any]:
        """How many batches of this task have been used; which they are follows from its beginning."""
        return {"used": self._batches.used if self._batches else 0}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._batches:
            self._batches.skip_to(state["used"])


class ReferenceDistillation(OnReference):
    """Adds image·KD over the texts and text·KD over the images between each teacher and the student on a reference batch.

    reference: images and texts to distil on; a batch of the images a step, all of the texts. The teacher's texts stand on
    both sides, encoded once per task, so that only the student's image tower is taught, as in the authors' code.
    batch_size: reference images a step; null for as many as the task's.
    Zheng et al., 2023, arXiv 2303.06628 (whose teacher is the pre-trained model: `teachers: {use: initial}`).
    """

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
        super().__init__()
        self.reference = reference
        self.image, self.text, self.temperature = image, text, temperature
        self.batch_size = batch_size
        self._texts: dict[Teacher, Tensor] = {}

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        model = classifier_of(strategy, self)
        tokens = model.tokenizer(list(self.reference.texts)).to(model.scale.device)
        teachers, known = Teachers.of(strategy, self).active, self._texts
        self._texts = {t: known[t] if t in known else encoded(t.model, tokens) for t in teachers}
        size = self.batch_size or strategy.train_mb_size
        self._batches = ReferenceBatches(self.reference, size, int(kwargs.get("num_workers") or 0))

    def after_forward(self, strategy: Any, **kwargs: Any) -> None:
        model = classifier_of(strategy, self)
        assert self._batches is not None
        x = next(self._batches).to(strategy.device)
        with autocast_of(strategy):
            z, s = model.encode_image(x), model.scale
        total = z.new_zeros(())
        for teacher, texts in self._texts.items():
            t = texts.to(z)
            known = teacher.images(x).to(z)
            over_texts, over_images = contrastive_distillation(s * z @ t.T, s * known @ t.T, self.temperature)
            total = total + (self.image * over_texts + self.text * over_images) / len(self._texts)
        self.add_loss(strategy, "zscl", total)

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self._batches = None


class ReferenceBatches:
    """Batches of reference images without end, shuffled anew each time around; the last of a round may be smaller.

    The order follows from torch's state at the beginning, and moves it no further.
    """

    def __init__(self, reference: Reference, batch_size: int, workers: int = 0) -> None:
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        loader = DataLoader(
            reference.images, batch_size=batch_size, shuffle=True, generator=generator, num_workers=workers,
            persistent_workers=workers > 0,
        )  # fmt: skip
        self._batches = (batch for _ in count() for batch in loader)
        self.used = 0

    def __next__(self) -> Tensor:
        self.used += 1
        batch: Tensor = next(self._batches)
        return batch

    def skip_to(self, used: int) -> None:
        """Drop batches until so many have been used."""
        while self.used < used:
            next(self)
