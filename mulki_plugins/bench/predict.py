"""Predicts the time of a whole run from what was measured of a few steps of it."""

from __future__ import annotations

import statistics
from typing import Any

from attrs import frozen

from mulki_plugins.bench.measure import Evaluation, Learned, Measured
from mulki_plugins.recipe.budget import evaluations, trainings
from mulki_plugins.recipe.schema import Recipe


@frozen(kw_only=True)
class Prediction:
    """The time of one run of a recipe in seconds, and its parts."""

    startup: float
    training: float
    preparation: float
    """What a task costs before its first step and after its last one: prototypes, copies of the model, compilation."""
    evaluation: float
    checkpoints: float

    @property
    def total(self) -> float:
        return self.startup + self.training + self.preparation + self.evaluation + self.checkpoints


def predict(measured: Measured, imports: float = 0.0) -> Prediction:
    """Start-up + tasks · (preparation + iterations · step + checkpoints) + (tasks + 1) · evaluation.

    The first task has its own step and preparation, and the later ones those of the second, which has both teachers.
    A pass over a task's images is scaled to the number of images. imports: seconds before the measurement began.
    """
    recipe, first = measured.recipe, measured.tasks[0] if measured.tasks else None
    whole = [whole_evaluation(each, measured) for each in measured.evaluations]
    later = statistics.fmean(whole[1:]) if len(whole) > 1 else sum(whole)
    evaluation = sum(whole[:1]) + (evaluations(recipe, len(measured.test_images)) - 1) * later if whole else 0.0
    training = preparation = checkpoints = 0.0
    if first is not None:
        for i, each in enumerate(trainings(recipe, measured.train_images)):
            learned = first if i == 0 else measured.tasks[-1]
            seconds = each.steps * learned.steps.mean
            training += seconds
            preparation += learned.overhead + sum(passes_for(learned, each.images))
            checkpoints += learned.checkpoint * (1 + _within(recipe, each.steps, seconds))
    return Prediction(
        startup=imports + measured.build, training=training, preparation=preparation, evaluation=evaluation,
        checkpoints=checkpoints,
    )  # fmt: skip


def passes_for(learned: Learned, images: int) -> list[float]:
    """Seconds of each pass for a task with this many images: in proportion if it reads the task's images, else the same."""
    return [
        each.whole + (images - learned.images) * each.rate if each.images == learned.images else each.whole
        for each in learned.passes
    ]


def whole_evaluation(evaluation: Evaluation, measured: Measured) -> float:
    """Seconds with every test image and sentence, also of tasks that were not evaluated."""
    usual = sum(evaluation.rates.values()) / len(evaluation.rates)
    seconds = evaluation.seconds
    for name, images in measured.test_images.items():
        if name in evaluation.read:
            seconds += (images - evaluation.read[name]) * evaluation.rates[name]
        else:
            seconds += images * usual
        seconds += (measured.sentences[name] - evaluation.sentences.get(name, 0)) * measured.sentence_seconds
    return seconds


def _within(recipe: Recipe, iterations: int, seconds: float) -> float:
    """The number of checkpoints within a task."""
    settings: Any = recipe.train.checkpoint
    if not settings.keep:
        return 0.0
    minutes = getattr(settings, "minutes", None)
    return (iterations - 1) // settings.every if settings.every else seconds / 60 / minutes if minutes else 0.0
