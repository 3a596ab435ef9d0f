"""A CLIP of a few thousand random weights and four tasks of coloured images, for tests that take seconds."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from open_clip.model import CLIP
from torch import Tensor

from mulki_plugins.models.load import LoadedClip
from mulki_plugins.streams.benchmark import Reference, as_reference
from mulki_plugins.streams.task import ArrayImages, Task, TaskStream

SIZE = 16
WIDTH = 16
"""d, the width of the features."""
_COLOURS = {
    "red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 60, 220), "yellow": (230, 220, 60), "grey": (128, 128, 128),
    "white": (245, 245, 245), "black": (15, 15, 15), "pink": (250, 130, 190),
}  # fmt: skip
_TASKS = {
    "first": ("red", "green"),
    "second": ("blue", "yellow", "grey"),
    "third": ("white", "black"),
    "fourth": ("pink", "green"),
}
LARGEST = max(map(len, _TASKS.values()))
"""The number of classes of the largest task."""
CONTEXT = 12


def small_clip(seed: int = 0) -> CLIP:
    """A CLIP of open_clip's class for 16 x 16 images, with random weights from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIP(
            embed_dim=WIDTH,
            vision_cfg={"image_size": SIZE, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
            text_cfg={"context_length": CONTEXT, "vocab_size": 300, "width": 32, "heads": 2, "layers": 1},
        )


def small_model() -> LoadedClip:
    """A small CLIP, always with the same weights."""
    half = (0.5, 0.5, 0.5)
    return LoadedClip(clip=small_clip(), tokenizer=SmallTokenizer(), image_size=SIZE, mean=half, std=half)


class SmallTokenizer:
    """Bytes as tokens, with the attributes of open_clip's own tokenizer."""

    sot_token_id, eot_token_id, vocab_size, context_length = 1, 299, 300, CONTEXT
    all_special_ids = (1, 299)
    encoder: ClassVar = dict.fromkeys(("bridge</w>", "ladder</w>", "lantern</w>", "river</w>", "tower</w>"), 2)
    """Entries of words, as the vocabulary of an open_clip tokenizer has them."""

    def __call__(self, texts: list[str] | str) -> Tensor:
        return torch.tensor([_tokens_of(text) for text in ([texts] if isinstance(texts, str) else texts)])


@functools.lru_cache(maxsize=4096)
def _tokens_of(text: str) -> list[int]:
    tokens = [SmallTokenizer.sot_token_id, *(b % 250 + 2 for b in text.encode()[-10:]), SmallTokenizer.eot_token_id]
    return tokens + [0] * (CONTEXT - len(tokens))


def small_stream() -> TaskStream:
    """Four tasks of two or three classes. Each class has eight training and four test images: noise around a colour."""
    tasks = tuple(small_task(name, colours, seed) for seed, (name, colours) in enumerate(_TASKS.items()))
    return TaskStream(name="small", tasks=tasks)


def uneven_stream() -> TaskStream:
    """The small stream with a first task of one class."""
    tasks = (small_task("single", ("red",), 0), *small_stream().tasks[1:])
    return TaskStream(name="uneven", tasks=tasks)


def small_reference(loaded: LoadedClip) -> Reference:
    """Reference images and texts that belong to no task."""
    stream = TaskStream(name="small-reference", tasks=(small_task("reference", ("pink", "white", "black"), 99),))
    return as_reference(stream, loaded.transform(train=False))


def small_task(
    name: str, colours: tuple[str, ...], seed: int = 0, each: int = 8, class_names: tuple[str, ...] = ()
) -> Task:
    """A task that tells colours apart, each with `each` training and four test images. class_names: by default the colours."""
    return Task(
        name=name,
        class_names=class_names or colours,
        templates=("a {} one.", "it is {}."),
        train=coloured_images(colours, each, seed),
        test=coloured_images(colours, 4, seed + 1000),
    )


def coloured_images(colours: Sequence[str], each: int, seed: int) -> ArrayImages:
    """Noise around each colour, `each` images per colour."""
    rng = np.random.default_rng(seed)
    labels = np.arange(each * len(colours)) % len(colours)
    base = np.array([_COLOURS[colours[int(label)]] for label in labels])[:, None, None, :]
    noise = rng.normal(0, 25, (len(labels), SIZE, SIZE, 3))
    return ArrayImages(np.clip(base + noise, 0, 255).astype(np.uint8), labels.astype(np.int64))
