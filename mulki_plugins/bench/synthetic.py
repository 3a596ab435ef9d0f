"""Pictures in place of a data set that is not on this machine: as many, in as many classes, about as large to decode."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
from attrs import evolve
from PIL import Image

from mulki_plugins.errors import MulkiError
from mulki_plugins.recipe.schema import Choice, Recipe
from mulki_plugins.streams.images import FileImages
from mulki_plugins.streams.mtil.contents import PixelImages
from mulki_plugins.streams.mtil.declaration import ORDERS, declaration
from mulki_plugins.streams.names import select_tasks
from mulki_plugins.streams.split import few
from mulki_plugins.streams.task import LabelledImages, Task, TaskStream

SIZES = {
    "Aircraft": (1000, 700), "Caltech101": (300, 250), "DTD": (500, 450), "EuroSAT": (64, 64), "Flowers": (660, 520),
    "Food": (512, 512), "OxfordPet": (450, 390), "StanfordCars": (700, 480), "SUN397": (900, 700),
}  # fmt: skip
"""A typical width and height of each data set's photographs."""
PIXELS = {"CIFAR100": (32, 32, 3), "MNIST": (28, 28)}
"""Data sets that lie in one file of pixels."""
FILES = 12
"""Different photographs of each part; the others are the same files again."""


def synthetic(choice: Choice, folder: Path) -> TaskStream:
    """The stream `mtil` with drawn pictures, which are written into the folder. MulkiError for any other stream."""
    if choice.name != "mtil":
        raise MulkiError(
            f"--synthetic: the stream {choice.name!r} does not say how many images of what size it has",
            "`--synthetic` measures recipes with the stream mtil",
        )
    options = choice.options
    split, shots = options.get("split", "zscl"), options.get("shots")
    names = select_tasks("mtil", ORDERS, options.get("order"), options.get("tasks"))
    return TaskStream(name="mtil", tasks=tuple(_task(name, split, shots, folder) for name in names))


def without_weights(recipe: Recipe) -> tuple[Recipe, bool]:
    """The recipe with random weights in place of those that a tag of open_clip names, which might have to be downloaded.

    Returns also whether that is another recipe. The weights' values take no time.
    """
    from mulki_plugins.models.check import RANDOM
    from mulki_plugins.registry.builtin import open_clip_models, open_clip_tags

    name, pretrained = recipe.model.name, recipe.model.options.get("pretrained")
    if name not in open_clip_models() or pretrained not in open_clip_tags(name):
        return recipe, False
    return evolve(recipe, model=Choice(name, {**recipe.model.options, "pretrained": RANDOM})), True


def _task(name: str, split: str, shots: int | None, folder: Path) -> Task:
    declared = declaration(name)
    sizes = declared.expected("coop" if split == "coop" else "zscl")
    classes = list(declared.classes.values())[: sizes["classes"]]
    labels = {part: np.arange(sizes[part], dtype=np.int64) % len(classes) for part in ("train", "test")}
    if shots is not None:
        labels["train"] = labels["train"][few(labels["train"], shots)]
    parts = {part: _images(name, part, each, folder) for part, each in labels.items()}
    templates = declared.templates[:1] if split == "coop" else declared.templates
    return Task(name=name, class_names=tuple(classes), templates=templates, train=parts["train"], test=parts["test"])


def _images(name: str, part: str, labels: np.ndarray, folder: Path) -> LabelledImages:
    if name in PIXELS:
        return PixelImages(np.zeros((len(labels), *PIXELS[name]), dtype=np.uint8), labels)
    below = folder / name / part
    below.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(zlib.crc32(f"{name}/{part}".encode()))
    for i in range(min(FILES, len(labels))):
        photograph(generator, SIZES[name]).save(below / f"{i:02d}.jpg", quality=88)
    return FileImages.of(below, [f"{i % FILES:02d}.jpg" for i in range(len(labels))], labels.tolist())


def photograph(generator: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """Smooth colours with some noise: as JPEG about as large as a photograph of that width and height."""
    coarse = Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
    noisy = smooth + generator.normal(0, 6, smooth.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
