"""An image tower that does not change: what it makes of an image then needs to be computed only once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mulki_plugins.ranks.draws import draws_for_samples

if TYPE_CHECKING:
    from mulki_plugins.models.classifier import ClipClassifier

_COMPILED = "_compiled_call_impl"
"""What torch.compile puts into a module computes the same."""


def image_tower_is_fixed(model: ClipClassifier) -> bool:
    """Whether the image tower has no weight that learns, and nothing but its weights decides about its features.

    Adapters, and hooks, functions and modules that were not there when the classifier was made, may depend on anything.
    """
    visual = model.clip.visual
    if model.adapters or any(p.requires_grad for p in visual.parameters()):
        return False
    return not any(module.training for module in visual.modules()) and way_to_features(model) == model.built_way


def way_to_features(model: ClipClassifier) -> list[tuple[object, ...]]:
    """The modules through which images pass, by name and type, each with its hooks and the methods that somebody has replaced."""
    clip = model.clip
    inner = clip.visual.named_modules(prefix="visual") if hasattr(clip, "visual") else ()
    return [(name, type(module), *_additions(module)) for name, module in (("", model), ("clip", clip), *inner)]


def _additions(module: nn.Module) -> Iterator[object]:
    yield from module._forward_hooks
    yield from module._forward_pre_hooks
    for name, value in vars(module).items():
        replaces = callable(value) and hasattr(type(module), name) and name != _COMPILED
        if replaces and not (name == "forward" and draws_for_samples(module)):
            yield name


def image_weights(model: ClipClassifier) -> dict[str, Tensor]:
    """All tensors that the image tower computes with, by name: also the buffers that are not saved."""
    return {**dict(model.clip.visual.named_parameters()), **dict(model.clip.visual.named_buffers())}


def same_image_tower(model: ClipClassifier, other: ClipClassifier) -> bool:
    """Whether two models' image towers have the same weights, the other one's perhaps rounded to half precision."""
    mine, others = image_weights(model), image_weights(other)
    return mine.keys() == others.keys() and all(
        torch.equal(mine[name].to(weight.dtype), weight) for name, weight in others.items()
    )
