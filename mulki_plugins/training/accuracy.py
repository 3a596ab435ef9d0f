"""Counts right answers, task by task, exactly."""

from __future__ import annotations

from typing import Any

import torch
from avalanche.evaluation.metric_results import MetricValue

from mulki_plugins.errors import MulkiError
from mulki_plugins.streams.readable import LEFT_OUT


class AccuracyRecorder:
    """A metric for Avalanche's EvaluationPlugin: the accuracy in percent on each test set of an evaluation.

    It is logged as `eval/accuracy/<task>` over the number of tasks learned, and as `train/accuracy` while training.
    """

    def __init__(self) -> None:
        self.accuracies: dict[str, float] = {}
        """Of the last evaluation, by task name."""
        self._right: torch.Tensor | int = 0
        self._seen: torch.Tensor | int = 0

    def before_eval(self, strategy: Any) -> None:
        self.accuracies = {}

    def before_eval_exp(self, strategy: Any) -> None:
        self._right, self._seen = 0, 0

    def after_eval_iteration(self, strategy: Any) -> None:
        there = strategy.mb_y != LEFT_OUT
        self._right = self._right + ((strategy.mb_output.argmax(1) == strategy.targets) & there).sum()
        self._seen = self._seen + there.sum()

    def after_eval_exp(self, strategy: Any) -> MetricValue:
        name = strategy.experience.task_name
        if not int(self._seen):
            raise MulkiError(f"{name}: none of its test images can be read")
        self.accuracies[name] = 100 * int(self._right) / int(self._seen)
        at = len(strategy.learned)
        return MetricValue(self, f"eval/accuracy/{name}", self.accuracies[name], at)  # type: ignore[arg-type]

    def after_training_iteration(self, strategy: Any) -> list[MetricValue]:
        right = (strategy.mb_output.detach().argmax(1) == strategy.mb_y).float().mean()
        at = strategy.clock.train_iterations
        return [
            MetricValue(self, "train/accuracy", 100 * right, at),  # type: ignore[arg-type]
            MetricValue(self, "train/loss/total", strategy.loss.detach(), at),  # type: ignore[arg-type]
        ]
