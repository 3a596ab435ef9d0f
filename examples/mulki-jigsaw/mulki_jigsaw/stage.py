"""The stage, and the shuffling of tiles as a pure function."""

from __future__ import annotations

import torch
from torch import Tensor

from mulki_plugins.errors import MulkiError
from mulki_plugins.stages.stage import Part, Stage, autocast_of, classifier_of
from mulki_plugins.types import Count, Weight, checked


class Jigsaw(Stage):
    """Distils the pre-trained model on the batch's images, cut into tiles and shuffled.

    L = mean_b ‖z(x̃_b) − z⁰(x̃_b)‖², where x̃ are the batch's images with their tiles shuffled, z the model's unit-norm image
    features and z⁰ those of the pre-trained model. Each image gets a new random order at each step.

    Args:
        weight: Factor of the loss.
        tiles: Tiles along each side of an image; they must divide the image's size.
    """

    requires = ("teachers",)

    @checked
    def __init__(self, *, weight: Weight = 1.0, tiles: Count = 2) -> None:
        super().__init__()
        self.weight = weight
        self.tiles = tiles

    def loss(self, part: Part) -> Tensor:
        x = shuffle_tiles(part.of(part.strategy.mb_x), self.tiles)
        with autocast_of(part.strategy):
            z = classifier_of(part.strategy, self).encode_image(x)
        z0 = part.teachers.initial.images(x).to(z)
        return (z - z0).square().sum(1).mean()


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
