"""How much work a run is: its trainings with their steps, and its evaluations."""

from __future__ import annotations

import math
from collections.abc import Mapping

from attrs import frozen

from mulki_plugins.recipe.schema import Recipe


@frozen
class Training:
    """One training of a run: on one task, or on the whole stream (`base: joint`)."""

    name: str
    steps: int
    images: int
    """Images that it trains on."""


def trainings(recipe: Recipe, train_images: Mapping[str, int]) -> list[Training]:
    """The trainings of a recipe in their order. train_images: the number of training images of each task, in order."""
    train, plan, so_far = recipe.train, list[Training](), 0
    for name, own in train_images.items():
        so_far += own
        images = so_far if recipe.strategy.base == "cumulative" else own
        budget = train.per_task.get(name)
        iterations, epochs = (budget.iterations, budget.epochs) if budget else (None, None)
        if not iterations and not epochs:
            iterations, epochs = train.iterations, train.epochs
        steps = iterations or (epochs or 1) * math.ceil(images / train.batch_size)
        plan.append(Training(name, steps, images))
    if recipe.strategy.base == "none":
        return []
    if recipe.strategy.base == "joint":
        steps = (train.epochs or 1) * math.ceil(so_far / train.batch_size)
        return [Training("all tasks", train.iterations * len(plan) if train.iterations else steps, so_far)]
    return plan


def evaluations(recipe: Recipe, tasks: int) -> int:
    """The number of evaluations of a run, with the zero-shot row."""
    if recipe.strategy.base == "joint":
        return 2
    if recipe.strategy.base == "none":
        return 1 + tasks if recipe.evaluate.classes == "seen" else 1
    return 1 + tasks
