"""Recalling ideas, beyond the paper: distil what the teachers know of the classes of earlier tasks, from their sentences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mulki_plugins.losses import Relation, TextRelation
from mulki_plugins.stages.adding import distil_relations
from mulki_plugins.stages.stage import Stage, Strategy, autocast_of, classifier_of, features_of, tasks_of
from mulki_plugins.stages.teachers import Teachers
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
        if not self.relations:
            raise ValueError("Recalling: relations: expected at least one above 0")
        self.count = count

    def before_training_exp(self, strategy: Strategy, **kwargs: Any) -> None:
        teachers = Teachers.of(strategy, self)
        for task in tasks_of(strategy.adapted_dataset):  # the classes of this task are among those to tell apart
            if teachers.previous is not None and self.weight:
                teachers.prototypes(strategy, teachers.previous, task)

    def after_forward(self, strategy: Strategy, **kwargs: Any) -> None:
        loss = self.sentences_loss(strategy) if self.weight else strategy.loss.new_zeros(())
        self.add_loss(strategy, self.term, loss, self.weight)

    def sentences_loss(self, strategy: Strategy) -> Tensor:
        """L for a draw of the classes of earlier tasks, a scalar."""
        model, features = classifier_of(strategy, self), features_of(strategy, self)
        teachers, s = Teachers.of(strategy, self), features.scale
        earlier = sorted(teachers.seen - features.text.keys())
        classes = [(task, c) for task in earlier for c in range(len(model.prompts[task].class_names))]
        if not classes:
            return s.new_zeros(())
        drawn = torch.randperm(len(classes))[: self.count]
        with autocast_of(strategy):
            t = model.encode_classes([classes[index] for index in drawn.tolist()])
        drawn = drawn.to(t.device)
        views = teachers.class_views(strategy, [*earlier, *features.text], drawn)
        weights = teachers.weights([s * view.text @ view.prototypes.T for view in views], drawn, "classes")
        no_images = t.new_zeros(0)
        return distil_relations(self.relations, no_images, t, views, weights, s, self.temperature, rows="classes")
