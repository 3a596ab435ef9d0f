"""One training of a small model on small tasks, as `mulki run` trains, with everything that happens written down."""

from __future__ import annotations

import contextlib
import io
import random
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from attrs import define, field
from avalanche.benchmarks.scenarios import CLScenario
from avalanche.logging import BaseLogger
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from torch import Tensor

from mulki_plugins.models.classifier import ClipClassifier, Towers
from mulki_plugins.models.load import LoadedClip
from mulki_plugins.recipe.schema import Evaluate, Optimizer, Schedule, Train
from mulki_plugins.streams.benchmark import as_benchmark
from mulki_plugins.streams.task import TaskStream
from mulki_plugins.testing.world import small_model, small_stream
from mulki_plugins.training.schedule import factor
from mulki_plugins.training.seeding import seed_everything
from mulki_plugins.training.template import ContinualTemplate

BATCH = 4
RATE = 2e-3
WARMUP = 2

Weights = dict[str, Tensor]


@define(eq=False)
class Step:
    """One training step, as the last plugin of the stack sees it."""

    task: int
    loss: float = float("nan")
    shape: tuple[int, ...] = ()
    bad_gradients: list[str] = field(factory=list)
    """Names of weights whose gradient is not finite."""
    bad_weights: list[str] = field(factory=list)
    """Names of weights that are not finite after the step."""
    same_optimizer: bool = True
    missing: int = 0
    """Weights that learn and are not in the optimizer."""
    foreign: int = 0
    """Weights in the optimizer that are not weights of the model that learn."""
    settings_kept: bool = True
    rates: tuple[float, ...] = ()
    expected_rate: float = 0.0


@define(eq=False)
class Trial:
    """What a training did. Lists have an entry for each task that was trained."""

    model: ClipClassifier
    strategy: ContinualTemplate
    plugins: list[Any]
    iterations: int
    steps: list[Step] = field(factory=list)
    before: list[Weights] = field(factory=list)
    """The weights with which a task began."""
    after: list[Weights] = field(factory=list)
    """The weights after a task, as all plugins left them."""
    texts_before: list[Tensor] = field(factory=list)
    """The text features [C, d] of a task's own classes before it was trained."""
    texts_after: list[Tensor] = field(factory=list)
    counted: list[int] = field(factory=list)
    """How often the optimizer stepped."""
    remembered: list[int] = field(factory=list)
    """How many steps the optimizer's state knows of."""
    printed: str = ""
    given: tuple[Any, list[dict[str, Any]]] = (None, [])
    """The optimizer that the strategy made for the current task, and the settings of its groups."""

    @property
    def losses(self) -> list[float]:
        return [step.loss for step in self.steps]


@define(eq=False, kw_only=True)
class Place:
    """A model, its tasks as a benchmark, and the stack that is to be tried there."""

    loaded: LoadedClip = field(factory=small_model)
    stream: TaskStream = field(factory=small_stream)
    train: Towers = "all"
    iterations: int = 4

    def trial(self, plugins: Sequence[Any], more: Sequence[Any] = ()) -> Trial:
        """The model under a strategy with these plugins between two that look on, and `more` after them."""
        model = ClipClassifier(self.loaded.clip, self.loaded.tokenizer, self.stream.tasks, train=self.train)
        settings = Train(
            iterations=self.iterations,
            batch_size=BATCH,
            optimizer=Optimizer(lr=RATE, weight_decay=0.01),
            schedule=Schedule(warmup=WARMUP),
        )
        first, last = First(), Last()
        strategy = _Tried(
            model=model,
            train=settings,
            evaluate=Evaluate(batch_size=16),
            device=torch.device("cpu"),
            plugins=[first, *plugins, last, *more],
            evaluator=EvaluationPlugin(loggers=[BaseLogger()]),
        )
        trial = Trial(model=model, strategy=strategy, plugins=list(plugins), iterations=self.iterations)
        first.trial = last.trial = trial
        return trial

    def benchmark(self) -> CLScenario:
        return as_benchmark(self.stream, self.loaded.transform(train=True), self.loaded.transform(train=False))


class _Tried(ContinualTemplate):
    """Goes on after a loss that is no number, so that the check of the loss can say so."""

    def check_loss(self) -> None:
        return


def train(trial: Trial, benchmark: CLScenario, tasks: Sequence[int] = (0, 1), seed: int = 0) -> Trial:
    """Train these tasks, one after another, each from the seed; then evaluate them."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), _without_avalanches_warnings():
        try:
            for task in tasks:
                seed_everything(seed, task + 1)
                trial.texts_before.append(_texts(trial.model, task))
                trial.strategy.train(benchmark.train_stream[task], eval_streams=[])
                trial.after.append(_weights(trial.model))
                trial.texts_after.append(_texts(trial.model, task))
            trial.strategy.eval([benchmark.test_stream[task] for task in tasks])
        finally:
            trial.printed = text.getvalue()
    return trial


@contextlib.contextmanager
def _without_avalanches_warnings() -> Iterator[None]:
    """Avalanche warns of itself; the warnings of others are shown."""
    with warnings.catch_warnings(record=True) as caught:
        yield
    for each in caught:
        if "avalanche" not in each.filename:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)


def train_two_tasks(plugins: Sequence[Any], *, seed: int = 0, iterations: int = 4) -> Trial:
    """Train the kit's small model on two small tasks with these plugins: for tests of what a plugin is for.

    iterations: steps a task. Takes about half a second; returns what happened.
    """
    with kept_random_state():
        place = Place(iterations=iterations)
        return train(place.trial(plugins), place.benchmark(), seed=seed)


def _weights(model: torch.nn.Module) -> Weights:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@torch.no_grad()
def _texts(model: ClipClassifier, task: int) -> Tensor:
    return model.encode_text(task, all_templates=False)


class First(SupervisedPlugin):
    """Stands before all others: what a task begins with."""

    trial: Trial

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self.trial.before.append(_weights(strategy.model))
        self.trial.counted.append(0)
        trial, task = self.trial, len(self.trial.counted) - 1

        def count(*_: Any) -> None:
            trial.counted[task] += 1

        optimizer = strategy.optimizer
        optimizer.register_step_post_hook(count)
        trial.given = optimizer, [_settings(group) for group in optimizer.param_groups]


class Last(SupervisedPlugin):
    """Stands after all others: what they have made of a step."""

    trial: Trial

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        step = Step(task=len(self.trial.before) - 1)
        self.trial.steps.append(step)
        loss = strategy.loss
        if isinstance(loss, Tensor):  # the backward that follows refuses anything else
            step.shape = tuple(loss.shape)
            step.loss = float(loss.detach()) if loss.numel() == 1 else float("nan")

    def before_update(self, strategy: Any, **kwargs: Any) -> None:
        step = self.trial.steps[-1]
        named = list(strategy.model.named_parameters())
        learning = {id(p) for _, p in named if p.requires_grad}
        step.bad_gradients = [n for n, p in named if p.grad is not None and not p.grad.isfinite().all()]
        groups = strategy.optimizer.param_groups
        inside = {id(p) for group in groups for p in group["params"]}
        optimizer, given = self.trial.given
        step.same_optimizer = strategy.optimizer is optimizer
        step.missing, step.foreign = len(learning - inside), len(inside - learning)
        step.settings_kept = [_settings(group) for group in groups][: len(given)] == given
        step.rates = tuple(float(group["lr"]) for group in groups)
        settings = strategy.settings
        step.expected_rate = RATE * factor(settings.schedule, strategy.clock.train_exp_iterations, strategy.steps)

    def after_update(self, strategy: Any, **kwargs: Any) -> None:
        named = strategy.model.named_parameters()
        self.trial.steps[-1].bad_weights = [n for n, p in named if not p.detach().isfinite().all()]

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        known = [int(state["step"]) for state in strategy.optimizer.state.values() if "step" in state]
        self.trial.remembered.append(max(known, default=0))


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "lr")}


class EvaluateWithin(SupervisedPlugin):
    """Evaluates in the middle of every task, as a user who watches a training does."""

    def __init__(self, benchmark: CLScenario, at: int = 2) -> None:
        super().__init__()
        self.benchmark, self.at = benchmark, at

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        if strategy.clock.train_exp_iterations == self.at:
            with kept_random_state():  # shuffling draws numbers, which is no plugin's fault
                strategy.eval(self.benchmark.test_stream[:2])


@contextlib.contextmanager
def kept_random_state() -> Iterator[None]:
    """Python's, numpy's and torch's random numbers go on afterwards as if nothing had been drawn."""
    python, arrays, threads = random.getstate(), np.random.get_state(), torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)
            torch.set_num_threads(threads)
