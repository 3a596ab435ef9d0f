"""Stage 1, eliciting ideas: align images and texts through visual prototypes that follow the student."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from mulki_plugins.losses import class_sums, members_of, prototype_alignment
from mulki_plugins.ranks.collectives import add_up, summed
from mulki_plugins.stages.stage import Part, Stage, Strategy, tasks_of
from mulki_plugins.stages.teachers import Teacher, Teachers
from mulki_plugins.types import Fraction, Weight, checked


class Eliciting(Stage):
    """Stage 1: aligns images and texts through visual prototypes that follow the student.

    L = ½·[CE(s·P tᵀ, class) + CE(s·t Pᵀ, class)], beside the ordinary cross-entropy. The student's visual prototypes P
    start from a teacher's and follow the class means of each batch,
    P_c ← unit(momentum·P_c + (1 − momentum)·mean of z over the batch's class c); the batch's share carries gradient.
    At the task's end they become the previous teacher's prototypes of this task.

    Args:
        weight: Factor of the loss.
        momentum: Share of the old prototypes when they follow a batch's class means.
        start: The teacher whose prototypes P starts from: the pre-trained model (`initial`), or the model before the task.
    """

    requires = ("teachers",)
    paper = "arXiv 2411.06764"
    joins_ranks = True

    @checked
    def __init__(
        self, *, weight: Weight = 1.0, momentum: Fraction = 0.9, start: Literal["initial", "previous"] = "previous"
    ) -> None:
        super().__init__()
        self.weight = weight
        self.momentum = momentum
        self.start = start
        self.prototypes: dict[int, Tensor] = {}

    def before_training_exp(self, strategy: Strategy, **kwargs: Any) -> None:
        teachers = Teachers.of(strategy, self)
        [teacher] = self.reads_prototypes(teachers)
        for task in tasks_of(strategy.adapted_dataset):
            self.prototypes[task] = teachers.prototypes(strategy, teacher, task).clone()

    def reads_prototypes(self, teachers: Teachers) -> Sequence[Teacher]:
        teacher = teachers.initial if self.start == "initial" else teachers.previous
        return [teacher] if teacher is not None else []

    def loss(self, part: Part) -> Tensor:
        if part.task not in self.prototypes:
            return part.z.new_zeros(())
        prototypes = self._moved(self.prototypes[part.task].to(part.z), part.z, part.y)
        self.prototypes[part.task] = prototypes.detach()
        return prototype_alignment(prototypes, part.t, part.s)

    def after_training_exp(self, strategy: Strategy, **kwargs: Any) -> None:
        previous = self._previous(strategy)
        for task in tasks_of(strategy.adapted_dataset):
            previous.prototypes[task] = self.prototypes[task].clone()

    def state_dict(self) -> dict[str, Any]:
        return {"prototypes": dict(self.prototypes)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.prototypes = dict(state["prototypes"])

    def _moved(self, prototypes: Tensor, z: Tensor, y: Tensor) -> Tensor:
        """P after this batch, [C, d], unit norm; classes without a sample keep their prototype."""
        counts = members_of(y, len(prototypes)).sum(0)
        add_up(counts)
        means = summed(class_sums(z, y, len(prototypes))) / counts.clamp(min=1)[:, None]
        moved = F.normalize(self.momentum * prototypes + (1 - self.momentum) * means, dim=1)
        return moved.where((counts > 0)[:, None], prototypes)

    def _previous(self, strategy: Strategy) -> Teacher:
        previous = Teachers.of(strategy, self).previous
        assert previous is not None
        return previous
