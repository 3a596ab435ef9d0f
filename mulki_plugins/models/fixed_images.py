"""An image tower that does not change: what it makes of an image then needs to be computed only once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from mulki_plugins.ranks.draws import draws_for_samples

if TYPE_CHECKING:
    from mulki_plugins.models.classifier import ClipClassifier


def learns_nothing_of_images(model: ClipClassifier) -> bool:
    """Whether the image tower has no weight that learns, and nothing but its weights decides about its features.

    Adapters, and hooks and forwards that were not there when the classifier was made, may depend on anything.
    """
    visual = model.clip.visual
    if model.adapters or any(p.requires_grad for p in visual.parameters()):
        return False
    return not any(module.training for module in visual.modules()) and hooked_into(model.clip) == model.hooked_into


def hooked_into(clip: nn.Module) -> frozenset[tuple[str, object]]:
    """The hooks on the modules of the image tower, and the functions that somebody has put in the place of theirs."""
    replaced = {(name, "") for name in ("encode_image", "forward") if name in vars(clip)}
    modules = (each for each in clip.named_modules() if each[0] == "visual" or each[0].startswith("visual."))
    return frozenset(replaced | {(name, key) for name, module in modules for key in _hooks(module)})


def _hooks(module: nn.Module) -> Iterator[object]:
    yield from module._forward_hooks
    yield from module._forward_pre_hooks
    if "forward" in vars(module) and not draws_for_samples(module):
        yield "forward"


def same_image_tower(model: ClipClassifier, other: ClipClassifier) -> bool:
    """Whether two models have the same weights and buffers in their image towers, in the precision of the other one."""
    mine, others = model.clip.visual.state_dict(), other.clip.visual.state_dict()
    return mine.keys() == others.keys() and all(
        torch.equal(mine[name].to(weight.dtype), weight) for name, weight in others.items()
    )
