"""The accuracy matrix of a run: collects the answers task by task, and computes the metrics from the matrix."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from avalanche.evaluation.metric_results import MetricValue
from numpy.typing import NDArray
from torch import Tensor

from mulki_plugins.characters import printable
from mulki_plugins.errors import MulkiError
from mulki_plugins.models.classifier import ClipClassifier
from mulki_plugins.ranks.batches import in_order
from mulki_plugins.recipe.schema import Recipe
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.registry.guard import cause_of, try_call
from mulki_plugins.report.predictions import SURE, UNREAD, Answers, accuracy_of
from mulki_plugins.report.result import Result
from mulki_plugins.streams.benchmark import UNREADABLE_LABEL
from mulki_plugins.training.logbook import Warn

if TYPE_CHECKING:
    from mulki_plugins.training.strategy import ContinualTemplate


class AccuracyRecorder:
    """A metric for Avalanche's EvaluationPlugin: the accuracy in percent on each test set of an evaluation.

    It is logged as `eval/accuracy/<task>` over the number of tasks learned. The answers behind the accuracies are kept until
    the next evaluation.
    """

    def __init__(self) -> None:
        self.accuracies: dict[str, float] = {}
        """By task name, in the last evaluation."""
        self.answers: dict[str, Answers] = {}
        """By task name, in the last evaluation."""
        self._chosen: list[Tensor] = []
        self._sure: list[Tensor] = []

    def before_eval(self, strategy: ContinualTemplate) -> None:
        self.accuracies, self.answers = {}, {}

    def before_eval_exp(self, strategy: ContinualTemplate) -> None:
        self._chosen, self._sure = [], []

    def after_eval_iteration(self, strategy: ContinualTemplate) -> None:
        logits = strategy.mb_output.detach()
        chosen = logits.argmax(1)
        sure = logits.float().log_softmax(1).gather(1, chosen[:, None])[:, 0].exp()
        self._chosen.append(torch.where(strategy.mb_y == UNREADABLE_LABEL, UNREAD, chosen))
        self._sure.append((sure * SURE).round().to(torch.uint8))

    def after_eval_exp(self, strategy: ContinualTemplate) -> MetricValue:
        name, task = strategy.experience.task_name, int(strategy.experience.task_label)
        candidates = index_candidates(strategy.model, task, strategy.scope)
        every, sure = (torch.cat(in_order([b.cpu() for b in each])) for each in (self._chosen, self._sure))
        chosen = every.numpy()
        predicted = np.where(chosen == UNREAD, UNREAD, candidates[chosen])
        self.answers[name] = Answers(predicted=predicted, confidence=sure.numpy())
        if (predicted == UNREAD).all():
            raise MulkiError(f"{name}: none of its test images can be read")
        labels = np.asarray(strategy.experience.images.targets) + first_class(strategy.model, task)
        self.accuracies[name] = accuracy_of(predicted, labels)
        return MetricValue(self, f"eval/accuracy/{name}", self.accuracies[name], len(strategy.learned))


def first_class(model: ClipClassifier, task: int) -> int:
    """The index of a task's first class among all classes of the stream."""
    return sum(len(prompts.class_names) for prompts in model.prompts[:task])


def index_candidates(model: ClipClassifier, task: int, scope: Sequence[int] | None) -> NDArray[np.int64]:
    """For each logit of an image of this task, the index of its class among all classes of the stream [C].

    scope: the tasks whose classes are the candidates; None for the image's own. A class that the image's own task shares
    with another one is its own task's, so that an answer is right exactly if it is the image's class.
    """
    if scope is None:
        return np.arange(len(model.prompts[task].class_names)) + first_class(model, task)
    union = model.union(scope)
    classes = [first_class(model, each) + c for each in scope for c in range(len(model.prompts[each].class_names))]
    indices = np.array(classes)[union.first]
    if task in scope:
        own = union.places[list(scope).index(task)]
        indices[own] = np.arange(len(own)) + first_class(model, task)
    return indices


def compute_metrics(recipe: Recipe, result: Result, warn: Warn) -> dict[str, float | None]:
    """Each metric's value, from its own copy of the matrix; None, after a warning, if it fails or is not a finite number.

    Empty cells of an extended run have had their warning: none follows for each of MulKI's own metrics that needs them.
    """
    values: dict[str, float | None] = {}
    gaps = any(math.isnan(value) for row in result.matrix for value in row)
    for name in recipe.evaluate.metrics:
        part = catalog().find("metric", name)
        if part.sequential and recipe.strategy.base == "joint":
            continue
        arguments: list[Any] = [[list(row) for row in result.matrix]]
        if part.counts_images:
            arguments.append(result.counted_images)
        outcome = try_call(lambda part=part, arguments=arguments: _number(part.load()(*arguments)))
        if outcome.printed:
            warn(f"the {part} printed: {outcome.printed}", None)
        if outcome.error is not None and not (gaps and part.is_ours):
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
