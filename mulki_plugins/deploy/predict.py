"""Classifies images: decodes them in threads, encodes them in batches, and answers in their order."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from attrs import frozen
from torch import Tensor

from mulki_plugins.deploy.candidates import Candidates
from mulki_plugins.deploy.inputs import Input
from mulki_plugins.deploy.model import DeployedClip
from mulki_plugins.errors import UnreadableImage, describe_error

_THREADS = 8


@frozen
class Prediction:
    """A class and the probability of the softmax over all candidates."""

    class_name: str
    task: str | None
    probability: float


@frozen
class Answer:
    """The likeliest classes of an image, the likeliest first; or why it cannot be read."""

    name: str
    predictions: tuple[Prediction, ...] = ()
    problem: str = ""


def classify(
    model: DeployedClip, candidates: Candidates, inputs: Sequence[Input], *, batch_size: int = 64, top: int = 5
) -> Iterator[Answer]:
    """An answer for each input, in order. The first batches are small, so that the first answers come soon."""
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        chunks = _chunks(len(inputs), batch_size)
        ahead: list[tuple[Sequence[Input], list[Future[Tensor | str]]]] = []
        for start, end in chunks:
            part = inputs[start:end]
            ahead.append((part, [pool.submit(_prepare, model, each) for each in part]))
            if len(ahead) > 1:  # the next batch is decoded while this one is encoded
                yield from _answer(model, candidates, *ahead.pop(0), top)
        for part, futures in ahead:
            yield from _answer(model, candidates, part, futures, top)


def _chunks(count: int, batch_size: int) -> Iterator[tuple[int, int]]:
    """Bounds of batches of 1, 2, 4, ... images, up to the batch size."""
    start, size = 0, 1
    while start < count:
        yield start, min(start + size, count)
        start, size = start + size, min(2 * size, batch_size)


def _prepare(model: DeployedClip, image: Input) -> Tensor | str:
    """The prepared image, [3, H, W], or why it cannot be read or prepared."""
    if image.problem:
        return image.problem
    try:
        picture = image.open()
    except UnreadableImage as error:
        return error.message.removeprefix(f"{image.name}: ")
    try:
        return model.transform(picture)
    except Exception as error:  # such as of a line of pixels, whose short side would vanish
        size = "×".join(map(str, picture.size))
        return f"this image, {size} pixels, cannot be prepared for the model: {describe_error(error)}"


def _answer(
    model: DeployedClip, candidates: Candidates, part: Sequence[Input], futures: list[Future[Tensor | str]], top: int
) -> Iterator[Answer]:
    prepared = [future.result() for future in futures]
    images = [each for each in prepared if isinstance(each, Tensor)]
    if images:
        logits = model.answer_images(torch.stack(images), candidates)
        values, indices = logits.softmax(1).topk(min(top, logits.shape[1]))
        rows = iter(zip(values.tolist(), indices.tolist(), strict=True))
    for image, content in zip(part, prepared, strict=True):
        if isinstance(content, str):
            yield Answer(image.name, problem=content)
            continue
        best = [
            Prediction(candidates.names[i], candidates.tasks[i], value) for value, i in zip(*next(rows), strict=True)
        ]
        yield Answer(image.name, tuple(best))
