"""Where a plugin is tried: trainings of a subject, made once for all checks that look at them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mulki_plugins.registry.guard import cause_of
from mulki_plugins.testing.subject import Fault, Subject
from mulki_plugins.testing.trial import Place, Trial, Weights, kept_random_state, train

TASKS = (0, 1)


class Laboratory:
    """Trainings of a subject, the ordinary one made once for all checks that look at it."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject

    @functools.cached_property
    def ordinary(self) -> Trial:
        """Two tasks, as in a run."""
        return self.trained()

    def trained(self, *, more: Callable[[Any], Sequence[Any]] = lambda benchmark: (), **options: Any) -> Trial:
        """Two tasks with a new stack in a new place. Fault where the plugin raises."""
        with kept_random_state():
            place = Place(**options)
            benchmark = place.benchmark()
            trial = place.trial(self.subject.stack().plugins, more(benchmark))
            self.train(trial, benchmark, TASKS)
        return trial

    def train(self, trial: Trial, benchmark: Any, tasks: Sequence[int]) -> None:
        try:
            train(trial, benchmark, tasks)
        except Exception as error:
            step = f"step {len(trial.steps)}" if trial.steps else "the start"
            if "needs the plugin" in str(error):
                mend = "register it with requires=[...] and check it by its class or its registered name"
            elif "model" in str(error) and isinstance(error, TypeError):
                mend = "take features by `features_of(strategy, self)` of mulki_plugins.stages.stage"
            else:
                mend = "mend the error at the line named; a callback is called with the strategy and **kwargs"
            raise Fault(
                f"training ended in an error at {step} of task {len(trial.before)}: {cause_of(error)}{_line(error)}",
                mend,
            ) from error


def _line(error: BaseException) -> str:
    """The place in the plugin's own code, where `cause_of` names none."""
    return "" if cause_of(error).endswith(")") else f" ({type(error).__module__}.{type(error).__qualname__})"


def same(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
