"""Trainings of the plugin under test, each run once for all checks that need it."""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from mulki_plugins.models.adapter import RoutedAdapter
from mulki_plugins.recipe.schema import Optimizer
from mulki_plugins.registry.catalog import takes_decay
from mulki_plugins.registry.guard import cause_of
from mulki_plugins.testing.observers import RATE
from mulki_plugins.testing.process import audited, descriptor_captured, preserved_state
from mulki_plugins.testing.subject import Fault, Stack, Subject, author_modules
from mulki_plugins.testing.trial import Setup, Trial, evaluate, train
from mulki_plugins.training.rng import seed_everything

TASKS = (0, 1)


class Laboratory:
    """A plugin under test and its trainings."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.writes: list[str] = []
        """The files and connections that the plugin opened in the ordinary training."""

    @functools.cached_property
    def ordinary(self) -> Trial:
        """Two tasks, as in a run."""
        with audited(self.modules) as self.writes, descriptor_captured() as printed:
            trial = self.trained(setup=self.ordinary_setup)
        trial.printed += printed()
        return trial

    @functools.cached_property
    def ordinary_setup(self) -> Setup:
        return self.setup()

    @functools.cached_property
    def frozen(self) -> Trial:
        """Two tasks with the text tower frozen, from another seed; with both, if an adapter needs the model as it was loaded."""
        routed = self.subject.kind == "adapter" and isinstance(self.subject.create(), RoutedAdapter)
        return self.trained(seed=1, train="adapters" if routed else "image", iterations=3)

    @functools.cached_property
    def modules(self) -> set[str]:
        """The modules that the plugin's author wrote."""
        made = None if self.subject.kind == "optimizer" else self.subject.create()
        return author_modules(made, self.subject.factory)

    def setup(self, **options: Any) -> Setup:
        """A new model, stream and budget in which the subject can take part; an adapter's weights learn alone."""
        if self.subject.kind == "adapter":
            options = {"train": "adapters", **options}
        elif self.subject.kind == "optimizer":
            options = {"optimizer": optimizer_of(self.subject), **options}
        return Setup(**options)

    def stack(self, *, seed: int = 0, teachers: bool = False) -> Stack:
        """A new stack, created after seeding as in a run."""
        seed_everything(seed)
        return self.subject.stack(teachers)

    def trained(
        self,
        *,
        seed: int = 0,
        more: Callable[[Any], Sequence[Any]] = lambda benchmark: (),
        setup: Setup | None = None,
        tested: Sequence[int] = TASKS,
        **options: Any,
    ) -> Trial:
        """Two tasks with a new stack. options: those of a new Setup. more: plugins after the stack. Fault if it raises."""
        with preserved_state():
            setup = setup or self.setup(**options)
            benchmark, stack = setup.benchmark(), self.stack(seed=seed)
            trial = setup.trial(stack.plugins, more(benchmark), stack.adapters)
            self.train(trial, benchmark, TASKS, seed=seed, tested=tested)
        return trial

    def raise_noted(self, check: str, *trials: Trial) -> None:
        """Fault for the first problem that the observers noted for this check."""
        for trial in trials:
            for name, problem, fix in trial.notes:
                if name == check:
                    raise Fault(problem, fix)

    def train(self, trial: Trial, benchmark: Any, tasks: Sequence[int], **options: Any) -> None:
        """Train tasks. Fault if the plugin raises."""
        self._attempt(trial, lambda: train(trial, benchmark, tasks, **({"tested": TASKS} | options)))

    def evaluate(self, trial: Trial, benchmark: Any, order: Sequence[int] = TASKS) -> list[tuple[int, Tensor]]:
        """The logits of an evaluation. Fault if the plugin raises."""
        logits: list[tuple[int, Tensor]] = self._attempt(trial, lambda: evaluate(trial, benchmark, order))
        return logits

    def _attempt(self, trial: Trial, work: Callable[[], Any]) -> Any:
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # `train` has recorded what a training prints
                return work()
        except Fault:
            raise
        except (Exception, SystemExit) as error:
            before = next((f"; before that, {problem}" for _, problem, _ in trial.notes), "")
            raise Fault(f"{_moment(trial)}: {cause_of(error)}{_kind(error)}{before}", _fix(error, trial)) from error


def optimizer_of(subject: Subject) -> Optimizer:
    """The settings of a recipe that names the optimizer under test."""
    assert subject.part is not None
    decay = 0.01 if takes_decay(subject.part) else 0.0
    return Optimizer(name=subject.part.name, lr=RATE, weight_decay=decay, options=subject.options)


def _moment(trial: Trial) -> str:
    if not trial.strategy.is_training:
        when = f"after task {trial.task}" if trial.task else "before the first task"
        return f"the evaluation {when} ended in an error"
    step = f"step {trial.steps_in_task}" if trial.steps_in_task else "the start"
    return f"training ended in an error at {step} of task {trial.task}"


def _fix(error: BaseException, trial: Trial) -> str:
    if trial.notes:
        return trial.notes[0][2]
    if "needs the plugin" in str(error):
        return "register it with requires=[...] and check it by its class or its registered name"
    if "model" in str(error) and isinstance(error, TypeError):
        return "take features by `features_of(strategy, self)` of mulki_plugins.stages.stage"
    if not trial.strategy.is_training:
        return "an evaluation has no training features and no teachers; a run evaluates before it trains"
    return "fix the error at the line named; Avalanche calls a callback with the strategy and **kwargs"


def _kind(error: BaseException) -> str:
    """The error's class, if `cause_of` names no line."""
    return "" if cause_of(error).endswith(")") else f" ({type(error).__module__}.{type(error).__qualname__})"
