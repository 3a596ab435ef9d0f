"""What MulKI uses of an Avalanche strategy: the types, and access to its model and to the features of its last forward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from mulki_plugins.models.classifier import ClipClassifier
from mulki_plugins.models.features import Features

if TYPE_CHECKING:
    from typing_extensions import Self


class Dataset(Protocol):
    """An Avalanche data set of (image, class, task label), or of (image, class)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...

    def eval(self) -> Self:
        """The same images through the evaluation transform."""

    def subset(self, indices: Sequence[int]) -> Self: ...


class Experience(Protocol):
    """One step of an Avalanche stream: a task's training set."""

    dataset: Dataset
    task_labels: Sequence[int]
    origin_stream: Iterable[Experience]


class Clock(Protocol):
    """Counters of Avalanche's training loop."""

    train_iterations: int
    """Steps since training began."""
    train_exp_iterations: int
    """Steps of the current experience."""
    train_exp_counter: int
    """Experiences whose training is over."""


class Strategy(Protocol):
    """An Avalanche strategy during training; `mb_x`, `mb_y` and `loss` are those of the current step."""

    model: nn.Module
    plugins: Sequence[object]
    evaluator: Any
    clock: Clock
    device: torch.device
    train_mb_size: int
    experience: Experience
    adapted_dataset: Dataset
    mbatch: Any
    loss: Tensor

    @property
    def mb_x(self) -> Tensor: ...

    @property
    def mb_y(self) -> Tensor: ...


def classifier_of(strategy: Strategy, plugin: object) -> ClipClassifier:
    """The strategy's model without DistributedDataParallel's wrapper. TypeError unless it is a ClipClassifier."""
    model = unwrapped(strategy.model)
    if not isinstance(model, ClipClassifier):
        raise TypeError(
            f"{type(plugin).__name__} works on the features of a mulki_plugins.models.ClipClassifier, "
            f"the strategy's model is a {type(model).__name__}"
        )
    return model


def features_of(strategy: Strategy, plugin: object) -> Features:
    """The features that the model computed in this step's forward. TypeError unless it is a ClipClassifier."""
    features = classifier_of(strategy, plugin).features
    if features is None:
        raise RuntimeError(f"{type(plugin).__name__}: no training forward has been made yet")
    return features


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel's wrapper, or the model itself."""
    inner = getattr(model, "module", model)
    return inner if isinstance(inner, nn.Module) else model


def learning_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def autocast_of(strategy: Strategy) -> AbstractContextManager[Any]:
    """The precision of the strategy's own forward; a strategy that does not say computes in single precision."""
    autocast = getattr(strategy, "autocast", nullcontext)
    context: AbstractContextManager[Any] = autocast()
    return context


def by_task(features: Features) -> Iterator[tuple[int, Tensor]]:
    """Each task in the batch with the rows of its samples: one task in general, several with replay."""
    yield from features.rows.items()


def tasks_of(dataset: Dataset) -> set[int]:
    """The task labels in an Avalanche data set; {0} if it has none."""
    labels = getattr(dataset, "targets_task_labels", None)
    return {0} if labels is None else {int(task) for task in labels.uniques}
