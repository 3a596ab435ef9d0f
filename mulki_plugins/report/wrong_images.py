"""A contact sheet of images that were classified wrong, each above its class, the predicted class and the confidence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from mulki_plugins.report.plots import font_for, shorten_label
from mulki_plugins.report.predictions import SURE, UNREAD, Answers

MOST = 8
"""Images on a sheet."""
_COLUMNS, _SIDE, _MARGIN, _LINE = 4, 144, 8, 15


def choose_wrong(answers: Answers, labels: NDArray[np.int64]) -> list[int]:
    """The wrong answers in which the model was most confident, MOST at most. labels: over all classes of the stream."""
    wrong = np.flatnonzero((answers.predicted != labels) & (answers.predicted != UNREAD))
    order = np.argsort(-answers.confidence[wrong].astype(int), kind="stable")
    return [int(i) for i in wrong[order][:MOST]]


def captions(
    answers: Answers, chosen: Iterable[int], labels: NDArray[np.int64], names: Sequence[str]
) -> list[list[str]]:
    """Three lines for each image: its class, the predicted one, and the confidence in percent."""
    return [
        [
            names[labels[i]], f"not {names[answers.predicted[i]]}", f"sure to {100 * int(answers.confidence[i]) / SURE:.0f} %",
        ]
        for i in chosen
    ]  # fmt: skip


def draw_sheet(images: Sequence[Image.Image], texts: Sequence[Sequence[str]]) -> NDArray[np.uint8]:
    """The images in rows of four, each above its lines of text: uint8 [H, W, 3]. ValueError without an image."""
    if not images:
        raise ValueError("expected at least one image")
    lines = max(map(len, texts))
    width, height = _SIDE + _MARGIN, _SIDE + _MARGIN + lines * _LINE + _MARGIN
    rows = -(-len(images) // _COLUMNS)
    sheet = Image.new("RGB", (min(len(images), _COLUMNS) * width + _MARGIN, rows * height + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, text) in enumerate(zip(images, texts, strict=True)):
        x, y = _MARGIN + i % _COLUMNS * width, _MARGIN + i // _COLUMNS * height
        sheet.paste(_fit(image), (x, y))
        for j, line in enumerate(text):
            _write(draw, (x, y + _SIDE + 2 + j * _LINE), line)
    return np.asarray(sheet)


def _fit(image: Image.Image) -> Image.Image:
    """The whole image in the middle of a grey square."""
    image = image.convert("RGB")
    scale = _SIDE / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    square = Image.new("RGB", (_SIDE, _SIDE), (230, 230, 230))
    resized = image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BILINEAR)
    square.paste(resized, ((_SIDE - size[0]) // 2, (_SIDE - size[1]) // 2))
    return square


def _write(draw: Any, place: tuple[int, int], text: str) -> None:
    """The text, cut to the width of an image."""
    path, text = font_for(shorten_label(text))
    font = ImageFont.truetype(path, 11)
    while text and draw.textlength(text, font=font) > _SIDE:
        text = f"{text[:-2]}…" if len(text) > 2 else ""
    draw.text(place, text, fill="black", font=font)
