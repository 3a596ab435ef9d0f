"""Four tasks of drawn pictures. Task, class and seed determine each picture."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from mulki_plugins.errors import MulkiError, did_you_mean
from mulki_plugins.streams import ArrayImages, Task, TaskStream
from mulki_plugins.types import Count, Natural

SIZE = 48
_SCALE = 4
"""Pictures are drawn four times as large and scaled down, which smooths the lines."""
MIDDLE = SIZE * _SCALE / 2

Pencil = ImageDraw.ImageDraw
Colour = tuple[int, int, int]


def _needle(pencil: Pencil, turn: float, length: float, width: float, ink: Colour) -> None:
    """Draw a line from the middle. turn: 0 points up; clockwise to 1."""
    x, y = (MIDDLE + length * MIDDLE * f(2 * math.pi * turn) for f in (math.sin, lambda angle: -math.cos(angle)))
    pencil.line((MIDDLE, MIDDLE, x, y), fill=ink, width=round(width * _SCALE))


def _face(pencil: Pencil, ink: Colour, radius: float = 0.85) -> None:
    box = [MIDDLE * (1 - radius)] * 2 + [MIDDLE * (1 + radius)] * 2
    pencil.ellipse(box, outline=ink, width=2 * _SCALE)


def _clock(pencil: Pencil, hour: int, ink: Colour, rng: np.random.Generator) -> None:
    _face(pencil, ink)
    _needle(pencil, (hour + 1) / 12, 0.45, 3, ink)
    _needle(pencil, 0, 0.7, 1.5, ink)


def _compass(pencil: Pencil, direction: int, ink: Colour, rng: np.random.Generator) -> None:
    _face(pencil, ink)
    turn = direction / 8 + rng.uniform(-0.02, 0.02)
    _needle(pencil, turn, 0.7, 3, (200, 40, 40))
    _needle(pencil, turn + 0.5, 0.7, 3, ink)


def _gauge(pencil: Pencil, level: int, ink: Colour, rng: np.random.Generator) -> None:
    box = [MIDDLE * 0.2, MIDDLE * 0.4, MIDDLE * 1.8, MIDDLE * 2.0]
    pencil.arc(box, 180, 360, fill=ink, width=2 * _SCALE)
    turn = -0.25 + (level + 0.5) / 10 + rng.uniform(-0.03, 0.03)
    _needle(pencil, turn, 0.7, 2, ink)


_PIPS = {1: "e", 2: "ai", 3: "aei", 4: "acgi", 5: "acegi", 6: "abcghi"}


def _die(pencil: Pencil, face: int, ink: Colour, rng: np.random.Generator) -> None:
    pencil.rounded_rectangle(
        [MIDDLE * 0.25] * 2 + [MIDDLE * 1.75] * 2, radius=MIDDLE / 5, outline=ink, width=2 * _SCALE
    )
    for letter in _PIPS[face + 1]:
        row, column = divmod("abcdefghi".index(letter), 3)
        x, y = (MIDDLE * (1 + 0.45 * (step - 1)) for step in (column, row))
        r = MIDDLE / 9
        pencil.ellipse((x - r, y - r, x + r, y + r), fill=ink)


Draw = Callable[[Pencil, int, Colour, np.random.Generator], None]
_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
TASKS: dict[str, tuple[tuple[str, ...], tuple[str, ...], Draw]] = {
    "clocks": (_NUMBERS, ("a clock that shows {} o'clock.", "it is {} o'clock."), _clock),
    "compasses": (
        ("north", "north-east", "east", "south-east", "south", "south-west", "west", "north-west"),
        ("a compass pointing {}.",),
        _compass,
    ),
    "gauges": (("empty", "low", "half full", "high", "full"), ("a gauge that reads {}.",), _gauge),
    "dice": (_NUMBERS[:6], ("a die that shows {}.", "a die with {} pips."), _die),
}


def instruments(*, tasks: list[str] | None = None, each: Count = 40, seed: Natural = 0) -> TaskStream:
    """Clocks, compasses, gauges and dice, drawn by code.

    Four tasks of five to twelve classes, 48 x 48 pixels. Raises MulkiError for an unknown task.

    Args:
        tasks: Only these tasks, in this order.
        each: Training images per class; a quarter as many test images.
        seed: Seed of the drawings.
    """
    names = list(TASKS) if tasks is None else tasks
    for name in names:
        if name not in TASKS:
            raise MulkiError(f"instruments has no task {name!r} ({did_you_mean(name, TASKS)})")
    if not names:
        raise MulkiError("instruments: expected at least one task")
    return TaskStream(name="instruments", tasks=tuple(_task(name, each, seed) for name in names))


def _task(name: str, each: int, seed: int) -> Task:
    classes, templates, draw = TASKS[name]
    index = list(TASKS).index(name)
    train = _pictures(draw, len(classes), each, np.random.default_rng([seed, index, 0]))
    test = _pictures(draw, len(classes), max(1, each // 4), np.random.default_rng([seed, index, 1]))
    return Task(name=name, class_names=classes, templates=templates, train=train, test=test)


def _pictures(draw: Draw, classes: int, each: int, rng: np.random.Generator) -> ArrayImages:
    labels = np.arange(classes * each) % classes
    return ArrayImages(np.stack([_picture(draw, int(label), rng) for label in labels]), labels.astype(np.int64))


def _picture(draw: Draw, label: int, rng: np.random.Generator) -> np.ndarray:
    paper, ink = (tuple(int(v) for v in rng.integers(*span, 3)) for span in ((180, 256), (0, 90)))
    image = Image.new("RGB", (SIZE * _SCALE, SIZE * _SCALE), paper)
    draw(ImageDraw.Draw(image), label, ink, rng)
    shift = tuple(int(v) for v in rng.integers(-4, 5, 2) * _SCALE)
    image = image.transform(image.size, Image.Transform.AFFINE, (1, 0, shift[0], 0, 1, shift[1]), fillcolor=paper)
    small = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX), dtype=float)
    return np.clip(small + rng.normal(0, 6, small.shape), 0, 255).astype(np.uint8)
