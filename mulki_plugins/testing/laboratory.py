"""Where a plugin is tried: trainings of a subject, made once for all checks that look at them."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from mulki_plugins.registry.guard import cause_of
from mulki_plugins.testing.own_code import own_modules
from mulki_plugins.testing.subject import Fault, Stack, Subject
from mulki_plugins.testing.surroundings import kept_random_state
from mulki_plugins.testing.trial import Place, Trial, Weights, evaluate, train
from mulki_plugins.testing.writes import watched
from mulki_plugins.training.rng import seed_everything

TASKS = (0, 1)


@contextlib.contextmanager
def descriptor_captured() -> Iterator[Callable[[], str]]:
    """Captures what is written to file descriptor 1 past `sys.stdout`, such as by a child process; yields a reader of it."""
    text = ""
    try:
        saved = os.dup(1)
    except OSError:  # stdout is closed
        yield lambda: ""
        return
    with tempfile.TemporaryFile() as sink:
        sys.stdout.flush()
        os.dup2(sink.fileno(), 1)
        try:
            yield lambda: text
        finally:
            sys.stdout.flush()
            os.dup2(saved, 1)
            os.close(saved)
            sink.seek(0)
            text = sink.read(4096).decode(errors="replace")


class Laboratory:
    """Trainings of a subject, the ordinary one made once for all checks that look at it."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.written: list[str] = []
        """What the plugin wrote and connected to in the ordinary training."""

    @functools.cached_property
    def ordinary(self) -> Trial:
        """Two tasks, as in a run."""
        with watched(self.modules) as self.written, descriptor_captured() as printed:
            trial = self.trained(place=self.place_of_ordinary)
        trial.printed += printed()
        return trial

    @functools.cached_property
    def place_of_ordinary(self) -> Place:
        return Place()

    @functools.cached_property
    def frozen(self) -> Trial:
        """Two tasks with the text tower frozen, from another seed."""
        return self.trained(seed=1, train="image", iterations=3)

    @functools.cached_property
    def modules(self) -> set[str]:
        """The modules of the plugin's author."""
        return own_modules(self.subject.made(), self.subject.factory)

    def stack(self, *, seed: int = 0, teachers: bool = False) -> Stack:
        """A new stack, made from the seed as a run makes it."""
        seed_everything(seed)
        return self.subject.stack(teachers)

    def trained(
        self,
        *,
        seed: int = 0,
        more: Callable[[Any], Sequence[Any]] = lambda benchmark: (),
        place: Place | None = None,
        tested: Sequence[int] = TASKS,
        **options: Any,
    ) -> Trial:
        """Two tasks with a new stack in a new place. Fault where the plugin raises."""
        with kept_random_state():
            place = place or Place(**options)
            benchmark = place.benchmark()
            trial = place.trial(self.stack(seed=seed).plugins, more(benchmark))
            self.train(trial, benchmark, TASKS, seed=seed, tested=tested)
        return trial

    def noted(self, check: str, *trials: Trial) -> None:
        """Fault where those that look on have noted something for this check."""
        for trial in trials:
            for name, wrong, mend in trial.notes:
                if name == check:
                    raise Fault(wrong, mend)

    def train(self, trial: Trial, benchmark: Any, tasks: Sequence[int], **options: Any) -> None:
        """Train tasks. Fault where the plugin raises."""
        self._attempt(trial, lambda: train(trial, benchmark, tasks, **({"tested": TASKS} | options)))

    def evaluated(self, trial: Trial, benchmark: Any, order: Sequence[int] = TASKS) -> list[tuple[int, torch.Tensor]]:
        """The logits of an evaluation. Fault where the plugin raises."""
        found: list[tuple[int, torch.Tensor]] = self._attempt(trial, lambda: evaluate(trial, benchmark, order))
        return found

    def _attempt(self, trial: Trial, work: Callable[[], Any]) -> Any:
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # what a training prints it has noted
                return work()
        except Fault:
            raise
        except (Exception, SystemExit) as error:
            before = next((f"; before, {wrong}" for _, wrong, _ in trial.notes), "")
            what = f"{_ended(trial)}: {cause_of(error)}{_line(error)}{before}"
            raise Fault(what, _mend(error, trial)) from error


def _ended(trial: Trial) -> str:
    if not trial.strategy.is_training:
        when = f"after task {trial.task}" if trial.task else "before the first task"
        return f"the evaluation {when} ended in an error"
    step = f"step {trial.in_task}" if trial.in_task else "the start"
    return f"training ended in an error at {step} of task {trial.task}"


def _mend(error: BaseException, trial: Trial) -> str:
    if trial.notes:
        return trial.notes[0][2]
    if "needs the plugin" in str(error):
        return "register it with requires=[...] and check it by its class or its registered name"
    if "model" in str(error) and isinstance(error, TypeError):
        return "take features by `features_of(strategy, self)` of mulki_plugins.stages.stage"
    if not trial.strategy.is_training:
        return "an evaluation has no features and no teachers of a training; a run evaluates before it trains"
    return "fix the error at the line named; a callback is called with the strategy and **kwargs"


def _line(error: BaseException) -> str:
    """The place in the plugin's own code, where `cause_of` names none."""
    return "" if cause_of(error).endswith(")") else f" ({type(error).__module__}.{type(error).__qualname__})"


def same(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
