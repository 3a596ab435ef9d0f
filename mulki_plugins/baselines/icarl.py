"""iCaRL for CLIP-like models: herded exemplars of earlier tasks, and the previous model distilled on them."""

from __future__ import annotations

from typing import Any

from avalanche.training.plugins import ReplayPlugin

from mulki_plugins.baselines.exemplars import HerdedExemplars
from mulki_plugins.losses import distillation
from mulki_plugins.ranks import collectives
from mulki_plugins.stages.stage import Stage, Strategy, classifier_of, features_of, tasks_of
from mulki_plugins.stages.teachers import Teachers
from mulki_plugins.types import Count, Positive, Weight, checked


class ICarl(Stage):
    """Keeps herded exemplars of earlier tasks, trains on them and distils the previous model on them.

    L = weight·mean_b T²·KL(previous model ‖ student)_b over the exemplars b in the batch, each among its own task's classes,
    like the cross-entropy. The classification by nearest exemplars is not used: CLIP's texts classify.
    Rebuffi et al., 2017, arXiv 1611.07725; for CLIP in Zheng et al., 2023 (arXiv 2303.06628), whose code herds by data set,
    distils from the pre-trained model and loses the pairing of features and images.

    Args:
        memory: Number of images to keep in all, the same number of each class.
        batch_size: Kept images per batch; null for as many as the task's own.
        weight: Factor of the distillation.
        temperature: T of the softened logits.
    """

    requires = ("teachers",)
    conflicts = ("avalanche.replay",)
    keeps_images = True
    paper = "arXiv 1611.07725"

    @checked
    def __init__(
        self,
        *,
        memory: Count = 550,
        batch_size: Count | None = None,
        weight: Weight = 1.0,
        temperature: Positive = 2.0,
    ) -> None:
        super().__init__()
        self.weight, self.temperature = weight, temperature
        self.exemplars = HerdedExemplars(memory)
        self._replay = ReplayPlugin(mem_size=memory, batch_size_mem=batch_size, storage_policy=self.exemplars)
        self._current: set[int] = set()

    def before_training_exp(self, strategy: Strategy, **kwargs: Any) -> None:
        Teachers.of(strategy, self).require("previous", "icarl")
        self.exemplars.restore(strategy)
        self._current = tasks_of(strategy.adapted_dataset)
        self._replay.before_training_exp(strategy, **kwargs)

    def after_forward(self, strategy: Strategy, **kwargs: Any) -> None:
        total = features_of(strategy, self).image.new_zeros(())
        parts = [part for part in self.parts(strategy) if part.task not in self._current]
        exemplars = collectives.total(sum(len(part.z) for part in parts)) * collectives.share()
        if parts:
            teachers = Teachers.of(strategy, self)
            previous, z_previous = teachers.active[-1], teachers.images(strategy)[-1]
            for part in parts:
                teacher = part.s * part.of(z_previous).to(part.z) @ previous.text(part.task).to(part.z).T
                student = part.s * part.z @ part.t.T
                total = total + distillation(student, teacher, self.temperature).sum() / exemplars
        self.add_loss(strategy, self.term, total, self.weight)

    def after_training_exp(self, strategy: Strategy, **kwargs: Any) -> None:
        self.exemplars.restore(strategy)
        self.exemplars.add(classifier_of(strategy, self), strategy.experience.dataset)

    def state_dict(self) -> dict[str, Any]:
        return self.exemplars.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.exemplars.load_state_dict(state)
