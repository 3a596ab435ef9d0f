"""The bases of a strategy: MulKI's template over Avalanche's own strategies, by what a task's training sees."""

from __future__ import annotations

from typing import Any

from avalanche.training.supervised import Cumulative, JointTraining

from mulki_plugins.recipe.schema import Base
from mulki_plugins.training.template import ContinualTemplate


class CumulativeTemplate(ContinualTemplate, Cumulative):  # type: ignore[misc]
    """Each task's training sees the images of all tasks so far, mixed, in the budget of one task."""


class JointTemplate(ContinualTemplate, JointTraining):  # type: ignore[misc]
    """Trains once, on the whole stream, in the budget of all its tasks."""

    def _before_training_exp(self, **kwargs: Any) -> None:
        self.budgets = len(self._experiences)
        super()._before_training_exp(**kwargs)

    def _after_training_exp(self, **kwargs: Any) -> None:
        super()._after_training_exp(**kwargs)
        self.learned |= {int(task) for experience in self._experiences for task in experience.task_labels}


TEMPLATES: dict[Base, type[ContinualTemplate]] = {
    "naive": ContinualTemplate,
    "cumulative": CumulativeTemplate,
    "joint": JointTemplate,
    "none": ContinualTemplate,
}
