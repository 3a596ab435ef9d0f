"""Stage 2, adding new ideas: distil each teacher's relations between samples, classes and prototypes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from mulki_plugins.losses import RELATIONS, Relation, feature_distillation, relation_distillation, relation_logits
from mulki_plugins.stages.check import check_adding, refuse
from mulki_plugins.stages.stage import Part, Stage, Strategy, tasks_of
from mulki_plugins.stages.teachers import Rows, Teacher, Teachers, View
from mulki_plugins.types import Positive, Weight, checked


class Adding(Stage):
    """Stage 2: distils the relations between samples and prototypes from each teacher.

    L = Σ_m Σ_r λ_r·mean_n w^m_n·T²·KL(teacher m ‖ student)_n over the teachers m and the relations r, each a distribution
    over prototypes. The rows n of a relation from images are the samples, of one from texts the task's classes. Teacher and
    student are both compared with the teacher's prototypes, visual and textual. The teachers' weights w are uniform unless
    Distinguishing sets them. `features` φ adds φ·Σ_m [mean_b w^m_b·(1 − z_b·z^m_b) + w̄^m·mean_c (1 − t_c·t^m_c)], w̄ being
    the mean of w over the batch.

    Args:
        weight: Factor of the loss.
        temperature: T of the softened relations; the divergence is multiplied by T².
        relations: Factor λ of each relation; null for all four with 1. A relation that is not listed has 0.
        features: Factor of the distance to each teacher's own image and text features, beside the relations.
        classes: Prototypes of the sample's own `task`, or of all classes `seen` so far: the previous teacher then also
            teaches how these images differ from the classes of earlier tasks, without an image of those.
        targets: A distribution from each teacher, `weighed` by w; or one that is `divided` among them: the initial teacher
            gives the logits of the task's own classes, which neither has learned, the previous one those of earlier tasks'.
    """

    requires = ("teachers",)
    per_sample = True
    paper = "arXiv 2411.06764"

    @checked
    def __init__(
        self,
        *,
        weight: Weight = 1.0,
        temperature: Positive = 2.0,
        relations: dict[Relation, Weight] | None = None,
        features: Weight = 0.0,
        classes: Literal["task", "seen"] = "task",
        targets: Literal["weighed", "divided"] = "weighed",
    ) -> None:
        super().__init__()
        self.weight = weight
        self.temperature = temperature
        self.features = features
        self.classes = classes
        self.targets = targets
        factors = dict.fromkeys(RELATIONS, 1.0) if relations is None else relations
        self.relations: dict[Relation, float] = {r: factor for r, factor in factors.items() if factor > 0}
        given = {"relations": relations, "features": features, "targets": targets, "classes": classes}
        refuse(self, check_adding(given))
        self._visual = any(r.endswith("_to_image") for r in self.relations)

    def before_training_exp(self, strategy: Strategy, **kwargs: Any) -> None:
        if self._visual:  # here, so that no step has to wait for prototypes
            teachers = Teachers.of(strategy, self)
            for task in tasks_of(strategy.adapted_dataset):
                for teacher in self.reads_prototypes(teachers):
                    teachers.prototypes(strategy, teacher, task)

    def reads_prototypes(self, teachers: Teachers) -> Sequence[Teacher]:
        return teachers.active if self._visual else ()

    def loss(self, part: Part) -> Tensor:
        views = part.teachers.views(part, seen=self.classes == "seen", visual=self._visual)
        logits = [part.s * view.image @ view.text.T for view in views]
        weights = part.teachers.weights(logits, part.y, features=[view.image for view in views])
        divided = self.targets == "divided" and len(views) == 2
        distil = distil_divided if divided else partial(distil_relations, weights=weights)
        loss = distil(self.relations, part.z, part.t, views, s=part.s, temperature=self.temperature)
        if not self.features:
            return loss
        for view, w in zip(views, weights, strict=True):
            images, texts = (
                feature_distillation(part.z, view.image, w),
                feature_distillation(part.t, view.text, w.mean()),
            )
            loss = loss + self.features * (images + texts)
        return loss


def distil_relations(
    relations: Mapping[Relation, float], z: Tensor, t: Tensor, views: Sequence[View], weights: Tensor, s: Tensor,
    temperature: float, *, rows: Rows = "samples",
) -> Tensor:  # fmt: skip
    """Σ_m L^m, the sum of `relation_distillation` over the teachers m, a scalar.

    z, t: the student's features; views and weights [M, N]: of the M teachers. rows: what the N weights belong to.
    """
    losses = []
    for view, w in zip(views, weights, strict=True):
        student, teacher = _both_logits(relations, z, t, view, s)
        class_weights = w if rows == "classes" else None
        losses.append(relation_distillation(student, teacher, relations, w, temperature, class_weights))
    return sum(losses[1:], losses[0])


def distil_divided(
    relations: Mapping[Relation, float], z: Tensor, t: Tensor, views: Sequence[View], s: Tensor, temperature: float
) -> Tensor:
    """Σ_r λ_r·mean_n T²·KL(q ‖ student)_n, a scalar: one distribution q over all prototypes, divided among two teachers.

    z, t: the student's features, t [C, d] of the task's own classes. The first teacher gives the logits of these C classes,
    the second one those of the classes after them; the student's logits of a class are with the same teacher's prototypes.
    """
    own = len(t)
    of_initial, of_previous = (_both_logits(relations, z, t, view, s) for view in views)
    student, teacher = (
        {r: torch.cat([initial[r][:, :own], previous[r][:, own:]], 1) for r in relations}
        for initial, previous in zip(of_initial, of_previous, strict=True)
    )
    return relation_distillation(student, teacher, relations, s.new_ones(()), temperature)


def _both_logits(
    relations: Iterable[Relation], z: Tensor, t: Tensor, view: View, s: Tensor
) -> tuple[dict[Relation, Tensor], dict[Relation, Tensor]]:
    """The logits of each relation, of the student and of a teacher, both with the teacher's prototypes."""
    student, teacher = (
        {r: relation_logits(r, images, texts, view.prototypes, view.anchors, s) for r in relations}
        for images, texts in ((z, t), (view.image, view.text))
    )
    return student, teacher
