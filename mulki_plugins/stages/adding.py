"""Stage 2, adding new ideas: distil the relations of samples and classes to the prototypes, from each teacher."""

from __future__ import annotations

from typing import Any, Literal

from mulki_plugins.losses import RELATIONS, Relation, relation_distillation, relation_logits
from mulki_plugins.options import Positive, Weight, checked
from mulki_plugins.stages.prototypes import tasks_of
from mulki_plugins.stages.stage import Stage, by_task, features_of
from mulki_plugins.stages.teachers import Teachers


class Adding(Stage):
    """Adds weight·Σ_m Σ_r λ_r·mean_b w^m_b·T²·KL(teacher m ‖ student) over the relations r to the prototypes.

    relations: the factor λ of each of image_to_text, image_to_image, text_to_text, text_to_image; one that is not named
    has 0. Both sides are compared against the teacher's prototypes, visual and textual. classes: the prototypes of the
    sample's own `task`, or of all classes `seen` so far, so that the model before this task hands on how it tells these
    images from the classes of earlier tasks, without an image of those. The teachers' shares w are uniform unless
    Distinguishing sets them.
    """

    @checked
    def __init__(
        self,
        *,
        weight: Weight = 1.0,
        temperature: Positive = 2.0,
        relations: dict[Relation, Weight] | None = None,
        classes: Literal["task", "seen"] = "task",
    ) -> None:
        super().__init__()
        self.weight = weight
        self.temperature = temperature
        self.classes = classes
        chosen = dict.fromkeys(RELATIONS, 1.0) if relations is None else relations
        self.relations: dict[Relation, float] = {r: w for r, w in chosen.items() if w > 0}
        if not self.relations:
            raise ValueError("Adding: relations: expected at least one above 0")
        self._visual = any(r.endswith("_to_image") for r in self.relations)

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        teachers = Teachers.of(strategy, self)
        for task in tasks_of(strategy.adapted_dataset) if self._visual else ():
            for teacher in teachers.active:
                teachers.prototypes(strategy, teacher, task)

    def after_forward(self, strategy: Any, **kwargs: Any) -> None:
        features = features_of(strategy, self)
        teachers = Teachers.of(strategy, self)
        total = features.image.new_zeros(())
        for task, rows in by_task(features):
            views = teachers.views(strategy, features, task, rows, seen=self.classes == "seen", visual=self._visual)
            z, t, s = features.image[rows], features.text[task], features.scale
            own = [s * view.image @ view.text.T for view in views]
            weights = teachers.weights(own, strategy.mb_y[rows], task)
            for view, w in zip(views, weights, strict=True):
                loss = relation_distillation(
                    {r: relation_logits(r, z, t, view.prototypes, view.anchors, s) for r in self.relations},
                    {
                        r: relation_logits(r, view.image, view.text, view.prototypes, view.anchors, s)
                        for r in self.relations
                    },
                    self.relations,
                    w,
                    self.temperature,
                )
                total = total + len(rows) / len(features.image) * loss
        self.add_loss(strategy, "adding", total, self.weight)
