"""The stage, and the shuffling of tiles as a pure function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mulki_plugins.errors import MulkiError
from mulki_plugins.stages import Teachers
from mulki_plugins.stages.stage import Stage, autocast_of, classifier_of
from mulki_plugins.types import Count, Weight, checked


class Jigsaw(Stage):
    """Distils the pre-trained model on the batch's images, cut into tiles and shuffled.

    Adds weight·mean_b ‖z(x̃_b) − z⁰(x̃_b)‖², where x̃ are the batch's images with their tiles shuffled, z the model's unit-norm
    image features and z⁰ those of the pre-trained model. Each image gets a new random order at each step.
    """

    @checked
    def __init__(self, *, weight: Weight = 1.0, tiles: Count = 2) -> None:
        super().__init__()
        self.weight = weight
        self.tiles = tiles

    def after_forward(self, strategy: Any, **kwargs: Any) -> None:
        x = shuffle_tiles(strategy.mb_x, self.tiles)
        with autocast_of(strategy):
            z = classifier_of(strategy, self).encode_image(x)
        z0 = Teachers.of(strategy, self).initial.images(x).to(z)
        self.add_loss(strategy, "jigsaw", (z - z0).square().sum(1).mean(), self.weight)


def shuffle_tiles(x: Tensor, tiles: int) -> Tensor:
    """The images [B, C, H, W], each cut into tiles x tiles pieces and put together in its own random order.

    Raises MulkiError if `tiles` does not divide H and W.
    """
    b, c, h, w = x.shape
    if h % tiles or w % tiles:
        raise MulkiError(f"jigsaw: {tiles} tiles do not divide images of {h} x {w} pixels", "set `tiles` to a divisor")
    pieces = x.reshape(b, c, tiles, h // tiles, tiles, w // tiles).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    order = torch.rand(b, tiles * tiles).argsort(1).to(x.device)
    pieces = pieces[torch.arange(b, device=x.device)[:, None], order]
    return pieces.unflatten(1, (tiles, tiles)).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)
