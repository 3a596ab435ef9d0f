"""The stage, and the shuffling of tiles as a function of its own."""

from __future__ import annotations

from typing import Any

import torch
from mulki_plugins.types import Count, Weight, checked
from torch import Tensor

from mulki_plugins.errors import MulkiError
from mulki_plugins.stages import Teachers
from mulki_plugins.stages.stage import Stage, autocast_of, classifier_of


class Jigsaw(Stage):
    """Adds weight·mean_b ‖z(x̃_b) − z⁰(x̃_b)‖², x̃ being the batch's images with their tiles shuffled, z⁰ the pre-trained model.

    weight: factor of the loss. tiles: tiles along each side. Each image is shuffled in its own order, anew at each step.
    """

    @checked
    def __init__(self, *, weight: Weight = 1.0, tiles: Count = 2) -> None:
        super().__init__()
        self.weight = weight
        self.tiles = tiles

    def after_forward(self, strategy: Any, **kwargs: Any) -> None:
        x = shuffled(strategy.mb_x, self.tiles)
        with autocast_of(strategy):
            z = classifier_of(strategy, self).encode_image(x)
        taught = Teachers.of(strategy, self).initial.images(x).to(z)
        self.add_loss(strategy, "jigsaw", (z - taught).square().sum(1).mean(), self.weight)


def shuffled(x: Tensor, tiles: int) -> Tensor:
    """Images [B, C, H, W], each cut into tiles x tiles pieces that are put together in a random order of its own."""
    b, c, h, w = x.shape
    if h % tiles or w % tiles:
        raise MulkiError(f"jigsaw: {tiles} tiles do not divide images of {h} x {w} pixels", "set `tiles` to a divisor")
    pieces = x.reshape(b, c, tiles, h // tiles, tiles, w // tiles).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    order = torch.rand(b, tiles * tiles).argsort(1).to(x.device)
    pieces = pieces[torch.arange(b, device=x.device)[:, None], order]
    return pieces.unflatten(1, (tiles, tiles)).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)
