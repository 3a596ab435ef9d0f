"""The accuracy matrix of a run: counts correct answers task by task, and computes the metrics from the matrix."""

from __future__ import annotations

import math
import numbers
from typing import TYPE_CHECKING, Any

import torch
from avalanche.evaluation.metric_results import MetricValue

from mulki_plugins.characters import printable
from mulki_plugins.errors import MulkiError
from mulki_plugins.recipe.schema import Recipe
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.registry.guard import cause_of, try_call
from mulki_plugins.report.result import Result
from mulki_plugins.streams.benchmark import LEFT_OUT
from mulki_plugins.training.logbook import Warn

if TYPE_CHECKING:
    from mulki_plugins.training.strategy import ContinualTemplate


class AccuracyRecorder:
    """A metric for Avalanche's EvaluationPlugin: the accuracy in percent on each test set of an evaluation.

    It is logged as `eval/accuracy/<task>` over the number of tasks learned.
    """

    def __init__(self) -> None:
        self.accuracies: dict[str, float] = {}
        """By task name, in the last evaluation."""
        self._correct: torch.Tensor | int = 0
        self._count: torch.Tensor | int = 0

    def before_eval(self, strategy: ContinualTemplate) -> None:
        self.accuracies = {}

    def before_eval_exp(self, strategy: ContinualTemplate) -> None:
        self._correct, self._count = 0, 0

    def after_eval_iteration(self, strategy: ContinualTemplate) -> None:
        readable = strategy.mb_y != LEFT_OUT
        self._correct = self._correct + ((strategy.mb_output.argmax(1) == strategy.targets) & readable).sum()
        self._count = self._count + readable.sum()

    def after_eval_exp(self, strategy: ContinualTemplate) -> MetricValue:
        name = strategy.experience.task_name
        if not int(self._count):
            raise MulkiError(f"{name}: none of its test images can be read")
        self.accuracies[name] = 100 * int(self._correct) / int(self._count)
        return MetricValue(self, f"eval/accuracy/{name}", self.accuracies[name], len(strategy.learned))


def compute_metrics(recipe: Recipe, result: Result, warn: Warn) -> dict[str, float | None]:
    """Each metric's value, from its own copy of the matrix; None, after a warning, if it fails or is not a finite number."""
    values: dict[str, float | None] = {}
    for name in recipe.evaluate.metrics:
        part = catalog().find("metric", name)
        if part.sequential and recipe.strategy.base == "joint":
            continue
        matrix = [list(row) for row in result.matrix]
        outcome = try_call(lambda part=part, matrix=matrix: _number(part.load()(matrix)))
        if outcome.printed:
            warn(f"the {part} printed: {outcome.printed}", None)
        if outcome.error is not None:
            cause = cause_of(outcome.error, "" if part.is_ours else part.package)
            warn(f"the {part} failed and is left out of the result: {cause}", outcome.error)
        values[name] = outcome.value
    return values


def _number(value: Any) -> float:
    """A finite float; scalars of numpy and torch count as numbers. TypeError or ValueError for anything else."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        shown = printable(repr(value))
        raise TypeError(f"expected a number, got {shown if len(shown) < 60 else f'a {type(value).__name__}'}")
    if not math.isfinite(number := float(value)):
        raise ValueError(f"expected a finite number, got {number}")
    return number
