"""What a model asks of its adapters: weights that are added inside it before anything else looks at it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from mulki_plugins.errors import MulkiError

NO_ROUTE = -1
"""What `RoutedAdapter.route` answers for an image that no learned task claims."""
_PARAMETRIZED = re.compile(r"parametrizations\.(\w+)\.original$")


class Adapter:
    """Weights added inside an open_clip model, such as LoRA, expert layers or prompts.

    A run applies its adapters to the loaded weights before the teachers, the optimizer and the zero-shot row exist; with
    fresh adapters the model should answer as before. All that an adapter keeps must be parameters or buffers inside the
    model, so that checkpoints hold it, or stand in `state_dict`.
    """

    def apply(self, clip: nn.Module) -> None:
        """Add the weights to the model. They learn unless they are frozen here. ValueError if the model has no place for them."""
        raise NotImplementedError

    def before_task(self, clip: nn.Module, task: int) -> None:
        """Grow, or prepare, for a task that is about to begin. A resumed run calls it again for each task that had begun."""

    def after_task(self, clip: nn.Module, task: int) -> None:
        """React to the end of a task, after all plugins: merge, or freeze. A resumed run calls it again as well."""

    def join_ranks(self, clip: nn.Module) -> None:
        """Add up what each rank has counted of its share of the batch; called in each step if there are several ranks."""

    def merge(self, clip: nn.Module) -> None:
        """Fold the added weights into the plain ones: the answers stay, and without the adapter they are the same.

        MulkiError if that is impossible, as by default.
        """
        raise MulkiError(f"the adapter {type(self).__name__} cannot be merged into plain weights")

    def state_dict(self) -> Mapping[str, Any]:
        """What it keeps outside the model: numbers, texts, tensors, and lists and dicts of them."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, after `before_task` of the tasks that had begun."""


class RoutedAdapter(Adapter):
    """An adapter with routes through the model, such as the experts or the prompts of each task.

    A route is a number of its own choice, at least 0; without a route the adapter is switched off. In training a task's
    images and sentences take its own route. Elsewhere each image takes the route that its features choose; it is compared
    with sentences that took the same route. So the answer depends neither on the image's task nor on the other images of
    the batch, and an image without a route gets exactly the logits of the model as it was loaded.

    A model has at most one such adapter, and nothing else in it may learn (`model.train: adapters`): the features by which
    images choose must stay what they were.
    """

    def use(self, clip: nn.Module, route: int | None) -> None:
        """Let both towers take this route from now on; None switches the adapter off."""
        raise NotImplementedError

    def route(self, clip: nn.Module, features: Tensor) -> Tensor:
        """The route of each image, or NO_ROUTE: [B], int64, each from its own row alone.

        features: [B, d], unit norm, of the images with the adapter switched off.
        """
        raise NotImplementedError

    def own_route(self, task: int) -> int:
        """The route that a task takes in training: by default the task's number."""
        return task

    def learn_route(self, clip: nn.Module, task: int, features: Iterable[Tensor]) -> None:
        """Learn to recognise the images of a task that has begun, after its `before_task`.

        features: batches [B, d], unit norm, of all its training images in their order, through the evaluation transform and
        with the adapter switched off. A resumed run reads them again if it goes on within the task.
        """
        raise NotImplementedError


def plain_name(name: str) -> str:
    """The name of a weight without its parametrization: `attn.parametrizations.w.original` is the plain weight `attn.w`."""
    return _PARAMETRIZED.sub(r"\1", name)


def can_merge(adapter: Adapter) -> bool:
    """Whether an adapter can be merged into plain weights: whether it defines `merge`."""
    return type(adapter).merge is not Adapter.merge


def apply_adapters(clip: nn.Module, adapters: Iterable[Adapter]) -> set[str]:
    """Apply adapters to a model in their order; returns the names of the weights and buffers that it had.

    MulkiError if an adapter takes a weight away: strict loading needs every weight of the model.
    """
    before = set(clip.state_dict())
    for adapter in adapters:
        try:
            adapter.apply(clip)
        except ValueError as error:
            raise MulkiError(f"the adapter {type(adapter).__name__} cannot be applied: {error}") from error
        if missing := before - set(map(plain_name, clip.state_dict())):
            raise MulkiError(
                f"the adapter {type(adapter).__name__} renames the model's own weights, such as {min(missing)!r}",
                "add weights beside a layer, or with torch.nn.utils.parametrize; do not replace the layer",
            )
    return before


def merge_adapters(clip: nn.Module, adapters: Sequence[Adapter], own: set[str]) -> dict[str, Tensor]:
    """Merge the adapters of a model; returns its own weights and buffers, by open_clip's names.

    own: the names of these, as `apply_adapters` returned them. MulkiError if an adapter cannot be merged.
    """
    for adapter in reversed(adapters):
        adapter.merge(clip)
    weights = {plain_name(name): value for name, value in clip.state_dict().items()}
    return {name: value for name, value in weights.items() if name in own}


def is_parametrized(clip: nn.Module) -> bool:
    """Whether a weight of the model is computed from others in each forward."""
    return any(parametrize.is_parametrized(module) for module in clip.modules())
