"""A world small enough for a test of seconds: a CLIP of a few thousand random weights, and four tasks of coloured images."""

from __future__ import annotations

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
"""The most classes that a task has."""
CONTEXT = 12


def small_model() -> LoadedClip:
    """A CLIP of open_clip's class with random weights, always the same, for images of 16 x 16 pixels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip = CLIP(
            embed_dim=WIDTH,
            vision_cfg={"image_size": SIZE, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},  # type: ignore[arg-type]
            text_cfg={"context_length": CONTEXT, "vocab_size": 300, "width": 32, "heads": 2, "layers": 1},  # type: ignore[arg-type]
        )
    half = (0.5, 0.5, 0.5)
    return LoadedClip(clip=clip, tokenizer=SmallTokenizer(), image_size=SIZE, mean=half, std=half)


class SmallTokenizer:
    """Bytes as tokens, with what open_clip's own tokenizer says of itself."""

    sot_token_id, eot_token_id, vocab_size, context_length = 1, 299, 300, CONTEXT
    all_special_ids = (1, 299)

    def __call__(self, texts: list[str] | str) -> Tensor:
        rows = []
        for text in [texts] if isinstance(texts, str) else texts:
            tokens = [self.sot_token_id, *(b % 250 + 2 for b in text.encode()[-10:]), self.eot_token_id]
            rows.append(tokens + [0] * (CONTEXT - len(tokens)))
        return torch.tensor(rows)


def small_stream() -> TaskStream:
    """Four tasks of two or three classes, eight training and four test images each: noise around a colour."""
    tasks = tuple(_task(name, colours, seed) for seed, (name, colours) in enumerate(_TASKS.items()))
    return TaskStream(name="small", tasks=tasks)


def uneven_stream() -> TaskStream:
    """A task of one class, and one of three."""
    tasks = (_task("single", ("red",), 0), *small_stream().tasks[1:])
    return TaskStream(name="uneven", tasks=tasks)


def small_reference(loaded: LoadedClip) -> Reference:
    """Reference images and texts that are no task's."""
    stream = TaskStream(name="small-reference", tasks=(_task("reference", ("pink", "white", "black"), 99),))
    return as_reference(stream, loaded.transform(train=False))


def _task(name: str, colours: tuple[str, ...], seed: int) -> Task:
    return Task(
        name=name,
        class_names=colours,
        templates=("a {} one.", "it is {}."),
        train=_images(colours, 8, seed),
        test=_images(colours, 4, seed + 1000),
    )


def _images(colours: tuple[str, ...], each: int, seed: int) -> ArrayImages:
    rng = np.random.default_rng(seed)
    labels = np.arange(each * len(colours)) % len(colours)
    base = np.array([_COLOURS[colours[label]] for label in labels])[:, None, None, :]
    noise = rng.normal(0, 25, (len(labels), SIZE, SIZE, 3))
    return ArrayImages(np.clip(base + noise, 0, 255).astype(np.uint8), labels.astype(np.int64))
