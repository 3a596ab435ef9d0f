"""Stage 2, adding new ideas: distil the relations of samples and classes to the prototypes, from each teacher."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from mulki_plugins.losses import RELATIONS, Relation, TextRelation, relation_distillation, relation_logits
from mulki_plugins.models.classifier import Features
from mulki_plugins.stages.prototypes import tasks_of
from mulki_plugins.stages.stage import Stage, autocast_of, by_task, classifier_of, features_of
from mulki_plugins.stages.teachers import Teachers, View
from mulki_plugins.types import Count, Positive, Weight, checked


class Adding(Stage):
    """Adds weight·Σ_m Σ_r λ_r·mean_b w^m_b·T²·KL(teacher m ‖ student) over the relations r to the prototypes.

    relations: the factor λ of each of image_to_text, image_to_image, text_to_text, text_to_image; one that is not named
    has 0. Both sides are compared against the teacher's prototypes, visual and textual. classes: the prototypes of the
    sample's own `task`, or of all classes `seen` so far, so that the model before this task hands on how it tells these
    images from the classes of earlier tasks, without an image of those. The teachers' shares w are uniform unless
    Distinguishing sets them.

    earlier: the same for the relations that start at a text, with the sentences of `earlier_classes` classes a step, drawn
    from all earlier tasks, in the place of samples, against the prototypes of all classes seen. Of those the previous
    teacher knows more than the initial one, which would have them as they were before they were learned.
    """

    @checked
    def __init__(
        self,
        *,
        weight: Weight = 1.0,
        temperature: Positive = 2.0,
        relations: dict[Relation, Weight] | None = None,
        classes: Literal["task", "seen"] = "task",
        earlier: dict[TextRelation, Weight] | None = None,
        earlier_classes: Count = 32,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.temperature = temperature
        self.classes = classes
        chosen = dict.fromkeys(RELATIONS, 1.0) if relations is None else relations
        self.relations: dict[Relation, float] = {r: w for r, w in chosen.items() if w > 0}
        if not self.relations:
            raise ValueError("Adding: relations: expected at least one above 0")
        self.earlier: dict[Relation, float] = {r: w for r, w in (earlier or {}).items() if w > 0}
        self.earlier_classes = earlier_classes
        self._visual = any(r.endswith("_to_image") for r in self.relations)

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        teachers = Teachers.of(strategy, self)
        asked = list(teachers.active) if self._visual else []
        if self.earlier and teachers.previous and teachers.previous not in asked:
            asked.append(teachers.previous)
        for task in tasks_of(strategy.adapted_dataset):
            for teacher in asked:
                teachers.prototypes(strategy, teacher, task)

    def after_forward(self, strategy: Any, **kwargs: Any) -> None:
        features = features_of(strategy, self)
        teachers = Teachers.of(strategy, self)
        total = features.image.new_zeros(())
        for task, rows in by_task(features):
            views = teachers.views(strategy, features, task, rows, seen=self.classes == "seen", visual=self._visual)
            z, t, s = features.image[rows], features.text[task], features.scale
            weights = teachers.weights([s * view.image @ view.text.T for view in views], strategy.mb_y[rows])
            loss = self._distilled(self.relations, z, t, views, weights, s)
            total = total + len(rows) / len(features.image) * loss
        self.add_loss(strategy, "adding", total + self._of_earlier(strategy, features, teachers), self.weight)

    def _of_earlier(self, strategy: Any, features: Features, teachers: Teachers) -> Tensor:
        """The loss of sentences of earlier tasks' classes; 0 on the first task."""
        s, model = features.scale, classifier_of(strategy, self)
        earlier = sorted(teachers.seen - features.text.keys())
        classes = [(task, c) for task in earlier for c in range(len(model.prompts[task].class_names))]
        if not self.earlier or not classes:
            return s.new_zeros(())
        places = torch.randperm(len(classes))[: self.earlier_classes]
        with autocast_of(strategy):
            t = model.encode_classes([classes[place] for place in places.tolist()])
        places = places.to(t.device)
        views = teachers.class_views(strategy, [*earlier, *features.text], places)
        weights = teachers.weights([s * view.text @ view.prototypes.T for view in views], places, "classes")
        return self._distilled(self.earlier, t.new_zeros(0), t, views, weights, s, of_classes=True)

    def _distilled(
        self, relations: dict[Relation, float], z: Tensor, t: Tensor, views: list[View], weights: Tensor, s: Tensor, *,
        of_classes: bool = False,
    ) -> Tensor:  # fmt: skip
        """The sum over the teachers of their relations' divergences, with weights of samples or of classes."""
        total = t.new_zeros(())
        for view, w in zip(views, weights, strict=True):
            student, teacher = (
                {r: relation_logits(r, image, text, view.prototypes, view.anchors, s) for r in relations}
                for image, text in ((z, t), (view.image, view.text))
            )
            own = w if of_classes else None
            total = total + relation_distillation(student, teacher, relations, w, self.temperature, own)
        return total
