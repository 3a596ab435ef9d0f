"""The classes that a test image is classified among: those of its task, of all learned tasks, or of the whole stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mulki_plugins.models.classifier import ClipClassifier
from mulki_plugins.recipe.schema import Evaluate
from mulki_plugins.training.batches import EvaluationBatches


class ScopedEvaluation(EvaluationBatches):
    """Avalanche's template, evaluated in the scope of classes that the recipe's `evaluate` asks for."""

    model: ClipClassifier
    experience: Any

    def __init__(self, *, evaluate: Evaluate, **arguments: Any) -> None:
        super().__init__(eval_mb_size=evaluate.batch_size, **arguments)
        self.learned: set[int] = set()
        """The labels of the tasks trained so far."""
        self.between_batches: Callable[[], None] = lambda: None
        """Called after each batch outside of training: in an evaluation, or while a plugin looks at images."""
        self.held_out: frozenset[int] = frozenset()
        """The labels of the tasks that are never learned: candidates for their own images only."""
        self._classes = evaluate.classes
        self.scope: list[int] | None = None

    def scope_logits(self) -> Tensor | None:
        """Logits [B, C] over the classes of the scope, in an evaluation; None if they are those of each sample's task."""
        return None if self.is_training or self.scope is None else self.model.union_logits(self.mb_x, self.scope)

    @property
    def targets(self) -> Tensor:
        """Index of each sample's class among the logits [B]; in a scope of several tasks, among their classes together."""
        y: Tensor = self.mb_y
        if self.is_training or self.scope is None:
            return y
        indices = self.model.union(self.scope).places[self.scope.index(int(self.experience.task_label))]
        return torch.tensor(indices, device=y.device)[y]

    def _before_eval_exp(self, **kwargs: Any) -> None:
        super()._before_eval_exp(**kwargs)
        self.scope = self._tasks_in_scope(int(self.experience.task_label))

    def _after_eval_iteration(self, **kwargs: Any) -> None:
        super()._after_eval_iteration(**kwargs)
        self.between_batches()

    def _tasks_in_scope(self, task: int) -> list[int] | None:
        """The tasks among whose classes a test image of this task is classified; None for its own task alone.

        `seen`: for a learned task all learned ones (class-incremental), for another task itself. `all`: the whole stream,
        without held-out tasks but its own.
        """
        if self._classes == "all":
            return [each for each in range(len(self.model.prompts)) if each not in self.held_out or each == task]
        if self._classes == "seen" and task in self.learned:
            return sorted(self.learned)
        return None
