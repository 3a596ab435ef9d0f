"""Recalling ideas, beyond the paper: distil what the teachers know of the classes of earlier tasks, from their sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mulki_plugins.losses import Relation, TextRelation
from mulki_plugins.stages.adding import distil_relations
from mulki_plugins.stages.check import check_recalling, refuse
from mulki_plugins.stages.stage import Stage, Strategy, classifier_of, features_of, tasks_of
from mulki_plugins.stages.teachers import Teacher, Teachers
from mulki_plugins.types import Count, Positive, Weight, checked


class Recalling(Stage):
    """Distils the relations of earlier tasks' classes to the prototypes from each teacher, without their images.

    L = Σ_m Σ_r λ_r·mean_c w^m_c·T²·KL(teacher m ‖ student)_c over the teachers m, the relations r that start at a text, and
    a few classes c drawn from all earlier tasks in each step. Their sentences take the place of samples; each relation is a
    distribution over the prototypes of all classes seen, the visual ones being the previous teacher's. The previous teacher
    is the better guide here, since the initial one never learned those tasks: Distinguishing weighs the teachers by how well
    each sentence finds its own visual prototype. Zero on the first task.

    Args:
        weight: Factor of the loss.
        temperature: T of the softened relations; the divergence is multiplied by T².
        relations: Factor λ of each relation; null for text_to_image alone. A relation that is not listed has 0.
        count: Classes drawn from all earlier tasks in each step.
    """

    requires = ("teachers",)

    @checked
    def __init__(
        self,
        *,
        weight: Weight = 1.0,
        temperature: Positive = 2.0,
        relations: dict[TextRelation, Weight] | None = None,
        count: Count = 32,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.temperature = temperature
        given: dict[TextRelation, float] = {"text_to_image": 1.0} if relations is None else relations
        self.relations: dict[Relation, float] = {r: factor for r, factor in given.items() if factor > 0}
        refuse(self, check_recalling({"relations": relations}))
        self.count = count
        self._current: list[int] = []
        """The tasks that are learned now."""
        self._earlier: list[int] = []
        self._drawn = torch.empty(0, dtype=torch.long)
        """The classes drawn in this step, [N], among the concatenated classes of the earlier tasks."""

    def before_training_exp(self, strategy: Strategy, **kwargs: Any) -> None:
        teachers = Teachers.of(strategy, self)
        self._current = sorted(tasks_of(strategy.adapted_dataset))
        for task in self._current:  # the classes of this task are among those to tell apart
            for teacher in self.reads_prototypes(teachers):
                teachers.prototypes(strategy, teacher, task)

    def reads_prototypes(self, teachers: Teachers) -> Sequence[Teacher]:
        return [teachers.previous] if teachers.previous is not None and self.weight else []

    def before_forward(self, strategy: Strategy, **kwargs: Any) -> None:
        """Draw the classes, so that their sentences pass the text tower with those of the batch."""
        model = classifier_of(strategy, self)
        self._earlier = sorted(Teachers.of(strategy, self).seen - set(self._current)) if self.weight else []
        count = sum(len(model.prompts[task].class_names) for task in self._earlier)
        self._drawn = torch.randperm(count)[: self.count] if count else self._drawn[:0]
        model.request(self, self._earlier, self._drawn)

    def after_forward(self, strategy: Strategy, **kwargs: Any) -> None:
        loss = self.sentences_loss(strategy) if len(self._drawn) else strategy.loss.new_zeros(())
        self.add_loss(strategy, self.term, loss, self.weight)

    def after_training_exp(self, strategy: Strategy, **kwargs: Any) -> None:
        classifier_of(strategy, self).request(self, (), self._drawn[:0])

    def sentences_loss(self, strategy: Strategy) -> Tensor:
        """L for the classes of earlier tasks that were drawn, a scalar."""
        teachers, features = Teachers.of(strategy, self), features_of(strategy, self)
        t, s = features.classes[self], features.scale
        drawn = self._drawn.to(t.device, non_blocking=True)
        views = teachers.class_views(strategy, [*self._earlier, *self._current], drawn)
        logits, sentences = [s * view.text @ view.prototypes.T for view in views], [view.text for view in views]
        weights = teachers.weights(logits, drawn, "classes", sentences)
        no_images = t.new_zeros(0)
        return distil_relations(self.relations, no_images, t, views, weights, s, self.temperature, rows="classes")
