"""What the stages share: how a loss joins the step's loss, and how a value is logged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from avalanche.evaluation.metric_results import MetricValue
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor

from mulki_plugins.models.classifier import ClipClassifier, Features


class Stage(SupervisedPlugin):
    """An Avalanche plugin that adds a loss of its own in `after_forward`."""

    def add_loss(self, strategy: Any, term: str, loss: Tensor, weight: float = 1.0) -> None:
        """Add weight·loss to the loss of this step and log it as `train/loss/<term>` (with its weight)."""
        strategy.loss = strategy.loss + weight * loss
        self.log(strategy, f"train/loss/{term}", weight * loss)

    def log(self, strategy: Any, tag: str, value: Tensor | float, weight: float = 1.0) -> None:
        """Hand a value to whatever loggers the strategy has, at the number of training iterations so far.

        In MulKI's own training a tag is logged once per step: of several values the sum, for terms of the loss, or else
        their mean by `weight`.
        """
        number = value.detach() if isinstance(value, Tensor) else value
        if hasattr(strategy, "publish"):
            strategy.publish(tag, number, "sum" if tag.startswith("train/loss/") else "mean", weight)
            return
        at = strategy.clock.train_iterations
        strategy.evaluator.publish_metric_value(MetricValue(self, tag, number, at))  # type: ignore[arg-type]


def features_of(strategy: Any, plugin: object) -> Features:
    """What the model computed in this step's forward. TypeError where the model is not a ClipClassifier."""
    features = classifier_of(strategy, plugin).features
    if features is None:
        raise RuntimeError(f"{type(plugin).__name__}: no training forward has been made yet")
    return features


def classifier_of(strategy: Any, plugin: object) -> ClipClassifier:
    """The strategy's model, unwrapped from DistributedDataParallel."""
    model = getattr(strategy.model, "module", strategy.model)
    if not isinstance(model, ClipClassifier):
        raise TypeError(
            f"{type(plugin).__name__} works on the features of a mulki_plugins.models.ClipClassifier, "
            f"the strategy's model is a {type(model).__name__}"
        )
    return model


def autocast_of(strategy: Any) -> AbstractContextManager[Any]:
    """The precision in which the strategy forwards the model, where it says one."""
    return strategy.autocast() if hasattr(strategy, "autocast") else nullcontext()


def by_task(features: Features) -> Iterator[tuple[int, Tensor]]:
    """Each task of the batch with the rows of its samples; one task in the ordinary case, several with replay."""
    if len(features.text) == 1:
        [task] = features.text
        yield task, torch.arange(len(features.image), device=features.image.device)
        return
    for task in features.text:
        yield task, (features.task_labels == task).nonzero()[:, 0]
