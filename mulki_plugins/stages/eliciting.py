"""Stage 1, eliciting ideas: align images and texts through visual prototypes that follow the student."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from mulki_plugins.losses import class_means, prototype_alignment
from mulki_plugins.stages.prototypes import tasks_of
from mulki_plugins.stages.stage import Stage, by_task, features_of
from mulki_plugins.stages.teachers import Teachers
from mulki_plugins.types import Fraction, Weight, checked


class Eliciting(Stage):
    """Adds weight·½·[CE(s·P tᵀ, class) + CE(s·t Pᵀ, class)] beside the ordinary cross-entropy.

    The student's visual prototypes P start from the previous teacher's and follow the class means of each batch,
    P_c ← unit(momentum·P_c + (1 − momentum)·mean of z over the batch's class c); the batch's share carries gradient.
    Where they end, the next previous teacher begins: they are what it knows of the classes of this task.
    """

    @checked
    def __init__(self, *, weight: Weight = 1.0, momentum: Fraction = 0.9) -> None:
        super().__init__()
        self.weight = weight
        self.momentum = momentum
        self.prototypes: dict[int, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"prototypes": dict(self.prototypes)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.prototypes = dict(state["prototypes"])

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        teachers = Teachers.of(strategy, self)
        previous = teachers.previous
        assert previous is not None
        for task in tasks_of(strategy.adapted_dataset):
            self.prototypes[task] = teachers.prototypes(strategy, previous, task).clone()

    def after_forward(self, strategy: Any, **kwargs: Any) -> None:
        features = features_of(strategy, self)
        total = features.image.new_zeros(())
        for task, rows in by_task(features):
            if task in self.prototypes:
                moved = self._moved(task, features.image[rows], strategy.mb_y[rows])
                share = len(rows) / len(features.image)
                total = total + share * prototype_alignment(moved, features.text[task], features.scale)
                self.prototypes[task] = moved.detach()
        self.add_loss(strategy, "eliciting", total, self.weight)

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        previous = Teachers.of(strategy, self).previous
        assert previous is not None
        for task in tasks_of(strategy.adapted_dataset):
            previous.prototypes[task] = self.prototypes[task].clone()

    def _moved(self, task: int, images: Tensor, classes: Tensor) -> Tensor:
        """P after this batch, [C, d], unit norm; classes that the batch has not stay where they are."""
        old = self.prototypes[task].to(images)
        means, counts = class_means(images, classes, len(old))
        new = F.normalize(self.momentum * old + (1 - self.momentum) * means, dim=1)
        return new.where((counts > 0)[:, None], old)
