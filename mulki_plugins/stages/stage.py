"""The base of the stages: splits the batch by task, weighs each part by its share, adds the term and logs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from attrs import frozen
from avalanche.evaluation.metric_results import MetricValue
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor

from mulki_plugins.stages.protocols import (
    Strategy,
    autocast_of,
    by_task,
    classifier_of,
    features_of,
    learning_weights,
    tasks_of,
)
from mulki_plugins.stages.teachers import Teacher, Teachers

__all__ = [
    "Part", "Stage", "Strategy", "autocast_of", "by_task", "classifier_of", "features_of", "learning_weights", "tasks_of",
]  # fmt: skip


@frozen(eq=False)
class Part:
    """The samples of one task in the batch, and the student's features of them."""

    task: int
    z: Tensor
    """Image features [B, d], unit norm, B being the number of samples of this task."""
    t: Tensor
    """Text features [C, d] of the task's classes, unit norm."""
    y: Tensor
    """Classes [B]."""
    s: Tensor
    """The logit scale, a scalar."""
    rows: Tensor
    """The samples' rows in the batch [B]."""
    share: float
    """The part's share of the batch, in 0..1."""
    strategy: Strategy
    stage: object

    def of(self, values: Tensor) -> Tensor:
        """The part's rows of a tensor [B, ...] with a row for each sample of the batch."""
        return values if self.share == 1.0 else values[self.rows]

    @property
    def teachers(self) -> Teachers:
        """The strategy's teachers. RuntimeError if it has none."""
        return Teachers.of(self.strategy, self.stage)


class Stage(SupervisedPlugin):
    """An Avalanche plugin that adds a term to the loss of each step.

    A subclass defines `loss(part)`, the mean over the samples of one task. A term that is not a mean over the samples of
    the batch overrides `after_forward` instead and calls `add_loss`.
    """

    term = ""
    """The term's name in the logs; by default the class's name in lower case."""
    weight: float = 1.0
    """Factor of the term."""
    per_sample: ClassVar[bool] = False
    """Whether the term is a mean over the samples of the batch, or does not depend on them. Then the gradients of parts of a
    batch, each times its share, add up to the batch's, so that a step may be split (`train.accumulate`). Not so where samples
    meet: in a softmax over the batch, a running mean, a ratio of counts, or a draw made for each part."""

    joins_ranks: ClassVar[bool] = False
    """Whether `loss` computes something with the other ranks. It is then called for each task that any rank's samples have,
    also where this rank has none of them: then with `share` 0 and no rows."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.term = cls.term or cls.__name__.lower()

    def loss(self, part: Part) -> Tensor:
        """The term for the samples of one task, a scalar."""
        raise NotImplementedError

    def after_forward(self, strategy: Strategy, **kwargs: Any) -> None:
        """loss ← loss + weight·Σ over the tasks k in the batch of (B_k / B)·loss(part k)."""
        if type(self).loss is Stage.loss:  # a stage without a term
            return
        parts = self.parts(strategy)
        losses = [self.loss(part) if part.share == 1.0 else part.share * self.loss(part) for part in parts]
        self.add_loss(strategy, self.term, sum(losses[1:], losses[0]), self.weight)

    def parts(self, strategy: Strategy) -> list[Part]:
        """The batch, split by task."""
        features = features_of(strategy, self)
        whole = len(features.text) == 1  # then nothing is selected, which would copy the batch
        return [
            Part(
                task=task,
                z=features.image if whole else features.image[rows],
                t=features.text[task],
                y=strategy.mb_y if whole else strategy.mb_y[rows],
                s=features.scale,
                rows=rows,
                share=1.0 if whole else len(rows) / len(features.image),
                strategy=strategy,
                stage=self,
            )
            for task, rows in by_task(features)
            if len(rows) or self.joins_ranks
        ]

    def reads_prototypes(self, teachers: Teachers) -> Sequence[Teacher]:
        """The teachers whose visual prototypes this stage asks for; those of all stages then come from one reading of images."""
        return ()

    def add_loss(self, strategy: Strategy, term: str, loss: Tensor, weight: float = 1.0) -> None:
        """Add weight·loss to the loss of this step and log it as `train/loss/<term>`, including its weight."""
        weighted = weight * loss
        strategy.loss = strategy.loss + weighted
        self.log(strategy, f"train/loss/{term}", weighted)

    def log(self, strategy: Strategy, tag: str, value: Tensor | float, weight: float = 1.0) -> None:
        """Hand a value to the strategy's loggers, at the current number of training iterations.

        MulKI's own training logs each tag once per step: the sum of its values if they are terms of the loss, else their
        mean by `weight`.
        """
        number = value.detach() if isinstance(value, Tensor) else value
        publish = getattr(strategy, "publish", None)
        if publish is not None:
            publish(tag, number, "sum" if tag.startswith("train/loss/") else "mean", weight)
            return
        strategy.evaluator.publish_metric_value(MetricValue(self, tag, number, strategy.clock.train_iterations))
