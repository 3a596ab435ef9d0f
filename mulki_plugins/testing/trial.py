"""One training of a small model on small tasks, as `mulki run` trains, with a record of everything that happens."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from attrs import define, field
from avalanche.benchmarks.scenarios import CLScenario
from avalanche.logging import BaseLogger
from avalanche.training.plugins import EvaluationPlugin
from torch import Tensor

from mulki_plugins.models.adapter import Adapter
from mulki_plugins.models.classifier import ClipClassifier, Learns
from mulki_plugins.models.load import LoadedClip
from mulki_plugins.recipe.schema import Evaluate, Optimizer, Schedule, TaskBudget, Train
from mulki_plugins.streams.benchmark import as_benchmark
from mulki_plugins.streams.task import TaskStream
from mulki_plugins.testing import process
from mulki_plugins.testing.observers import (
    LEAVE_EVALUATION,
    LEAVE_SETTINGS,
    RATE,
    FirstObserver,
    LastObserver,
    Step,
    group_settings,
    replaced_methods,
    trainable,
    weights_of,
)
from mulki_plugins.testing.process import preserved_state
from mulki_plugins.testing.small import small_model, small_stream
from mulki_plugins.training.rng import seed_everything
from mulki_plugins.training.strategy import ContinualTemplate

BATCH = 4
WARMUP = 2
LOADER = {"num_workers": 0, "persistent_workers": False}
"""Keyword arguments that a run passes to `train` and `eval`, and so to every callback."""

Weights = dict[str, Tensor]


@define(eq=False)
class Trial:
    """What happened in a training. Lists have an entry per trained task."""

    model: ClipClassifier
    strategy: ContinualTemplate
    plugins: list[Any]
    iterations: int
    task: int = 0
    """The current task, or the last one trained, counted from 1."""
    steps: list[Step] = field(factory=list)
    before: list[Weights] = field(factory=list)
    """The weights at a task's start, before any plugin's before_training_exp."""
    began: list[Weights] = field(factory=list)
    """The weights at a task's first step."""
    ended: list[Weights] = field(factory=list)
    """The weights after a task's last step and all plugins, before the adapters react to its end."""
    learned: list[set[str]] = field(factory=list)
    """The names of the weights that required gradients from a task's first step on."""
    after: list[Weights] = field(factory=list)
    """The weights after a task, as all plugins left them."""
    texts_before: list[Tensor] = field(factory=list)
    """The text features [C, d] of a task's classes before it is trained."""
    texts_after: list[Tensor] = field(factory=list)
    """The text features [C, d] of a task's classes after it is trained."""
    printed: str = ""
    after_step: Callable[[Any], None] = lambda strategy: None

    optimizer: tuple[Any, list[dict[str, Any]]] = (None, [])
    """The optimizer that the strategy created for the current task, and the settings of its groups."""
    optimizer_steps: list[int] = field(factory=list)
    """How often the optimizer stepped."""
    optimizer_age: list[int] = field(factory=list)
    """The number of steps in the optimizer's state."""
    original: dict[str, tuple[Tensor, Tensor]] = field(factory=dict)
    """The model's weights and buffers before any plugin saw it, by name: each itself, and a copy."""
    notes: list[tuple[str, str, str]] = field(factory=list)
    """What the observers noticed: the check, the problem, the fix."""
    evaluations: int = 0
    logits: list[tuple[int, Tensor]] = field(factory=list)
    """The task and the logits of each batch of the last evaluation."""
    generators: dict[tuple[Any, ...], tuple[int, ...]] = field(factory=dict)
    """The states of the random generators, by moment."""
    probe: Tensor | None = None
    """Images on which the model is compared with the teachers."""
    probe_features: list[list[Tensor]] = field(factory=list)
    """The model's features of the probe, and of the classes, before each task."""
    trainable: frozenset[tuple[str, int]] = frozenset()
    """The weights that learn, as of the current task's first step."""
    had_gradient: set[int] = field(factory=set)
    """The identities of all weights that ever had a gradient."""
    settings: dict[str, Any] = field(factory=dict)
    parts: dict[str, Any] = field(factory=dict)
    """Attributes of the strategy that must stay the same objects."""
    replaced: set[str] = field(factory=set)
    """Methods that the strategy overrides on itself from the start."""
    stack: int = 0
    """The number of the strategy's plugins."""

    batch: Any = None
    output: Any = None
    features: list[tuple[Tensor, Tensor]] = field(factory=list)
    sentinel: Any = None
    """0 added to the loss. Its gradient is 1 as long as plugins only add to the loss."""
    eval_batch: Any = None
    eval_output: Any = None

    @property
    def losses(self) -> list[float]:
        return [step.loss for step in self.steps]

    @property
    def steps_in_task(self) -> int:
        """The number of steps of the current task so far."""
        return sum(step.task == self.task - 1 for step in self.steps)

    def note(self, check: str, problem: str, fix: str) -> None:
        """Keep the first problem of each check."""
        if not any(noted == check for noted, _, _ in self.notes):
            self.notes.append((check, problem, fix))

    def drop_weights(self) -> None:
        """Free the copies of the weights so far."""
        for weights in (self.before, self.began, self.ended, self.after):
            weights.clear()

    def record_strategy(self) -> None:
        """Record what must stay as it is."""
        model, strategy = self.model, self.strategy
        self.settings = process.settings()
        tensors = [*model.named_parameters(), *model.named_buffers()]
        self.original = {name: (value, value.detach().clone()) for name, value in tensors}
        names = ("model", "_criterion", "evaluator", "settings", "train_mb_size", "eval_mb_size", "device")
        self.parts = {name: getattr(strategy, name) for name in names}
        self.replaced, self.stack = replaced_methods(strategy), len(strategy.plugins)

    def check_settings(self, where: str) -> None:
        for name in process.changed_settings(self.settings):
            self.note("surroundings", f"it changes {name}, {where}", LEAVE_SETTINGS)


@define(eq=False, kw_only=True)
class Setup:
    """A model, a stream and a budget for a trial."""

    loaded: LoadedClip = field(factory=small_model)
    stream: TaskStream = field(factory=small_stream)
    train: Learns = "all"
    iterations: int = 4
    per_task: dict[str, TaskBudget] = field(factory=dict)
    """What differs for a task, by its name."""
    batch: int = BATCH
    precision: Any = "fp32"
    optimizer: Optimizer = field(factory=lambda: Optimizer(lr=RATE, weight_decay=0.01))

    def trial(self, plugins: Sequence[Any], more: Sequence[Any] = (), adapters: Sequence[Adapter] = ()) -> Trial:
        """The model in a strategy with these plugins between the two observers, and `more` after them."""
        model = ClipClassifier(
            self.loaded.clip, self.loaded.tokenizer, self.stream.tasks, train=self.train, adapters=adapters
        )
        settings = Train(
            iterations=self.iterations,
            per_task=self.per_task,
            batch_size=self.batch,
            optimizer=self.optimizer,
            schedule=Schedule(warmup=min(WARMUP, self.iterations)),
            precision=self.precision,
        )
        first, last = FirstObserver(), LastObserver()
        strategy = _ObservedStrategy(
            model=model,
            train=settings,
            evaluate=Evaluate(batch_size=16),
            device=torch.device("cpu"),
            plugins=[first, *plugins, last, *more],
            evaluator=EvaluationPlugin(loggers=[BaseLogger()]),
        )
        trial = Trial(model=model, strategy=strategy, plugins=list(plugins), iterations=self.iterations)
        first.trial = last.trial = strategy.trial = trial
        trial.record_strategy()
        return trial

    def benchmark(self) -> CLScenario:
        return as_benchmark(self.stream, self.loaded.transform(train=True), self.loaded.transform(train=False))


class _ObservedStrategy(ContinualTemplate):
    """Records its optimizers, and continues after a loss that is not finite, so that the kit's checks can report it."""

    trial: Trial | None = None

    def check_loss(self) -> None:
        """Nothing: the check `finite_loss` reports it."""

    def check_weights(self) -> None:
        """Nothing: the check `optimizer` names the weights that do not learn."""

    def make_optimizer(self, **kwargs: Any) -> None:
        super().make_optimizer(**kwargs)
        trial = self.trial
        if trial is None:
            return
        trial.optimizer = self.optimizer, [group_settings(group) for group in self.optimizer.param_groups]

        def count(*_: Any) -> None:
            trial.optimizer_steps += [0] * (trial.task - len(trial.optimizer_steps))
            trial.optimizer_steps[trial.task - 1] += 1

        self.optimizer.register_step_post_hook(count)


def train(
    trial: Trial,
    benchmark: CLScenario,
    tasks: Sequence[int] = (0, 1),
    seed: int = 0,
    *,
    evaluated: bool = False,
    tested: Sequence[int] | None = None,
    learned: Callable[[], None] = lambda: None,
) -> Trial:
    """Train these tasks as a run does: evaluate; then train each one from the seed, and evaluate after it.

    evaluated: skip the first evaluation, as a resumed run does. tested: the tasks to evaluate, by default those trained.
    learned: called after each task's training and before its evaluation, where a run writes a checkpoint.
    """
    tested = tasks if tested is None else tested
    text = io.StringIO()
    with contextlib.redirect_stdout(text), _without_avalanche_warnings():
        try:
            if trial.task == 0:
                seed_everything(seed)  # this also selects deterministic kernels
                trial.settings = process.settings()
                if not evaluated:
                    evaluate(trial, benchmark, tested)
            for task in tasks:
                seed_everything(seed, task + 1)
                trial.texts_before.append(_text_features(trial.model, task))
                trial.strategy.train(benchmark.train_stream[task], eval_streams=[], **LOADER)
                trial.after.append(weights_of(trial.model))
                trial.texts_after.append(_text_features(trial.model, task))
                trial.check_settings("in after_training or before")
                learned()
                evaluate(trial, benchmark, tested)
        finally:
            trial.printed += text.getvalue()
    return trial


def evaluate(trial: Trial, benchmark: CLScenario, order: Sequence[int] = (0, 1)) -> list[tuple[int, Tensor]]:
    """Evaluate the tasks and note forbidden changes. Returns the task and the logits of each batch."""
    trial.logits = []
    model, strategy = trial.model, trial.strategy
    weights, learning = weights_of(model), trainable(model)
    strategy.eval([benchmark.test_stream[task] for task in order], **LOADER)
    if not same_weights(weights, weights_of(model)):
        trial.note("evaluation", "an evaluation changes weights of the model", LEAVE_EVALUATION)
    if learning != trainable(model):
        trial.note("evaluation", "an evaluation changes which weights learn", LEAVE_EVALUATION)
    trial.check_settings("in after_eval or before")
    return trial.logits


def same_weights(a: Weights, b: Weights) -> bool:
    """Whether the names and every number agree."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@contextlib.contextmanager
def _without_avalanche_warnings() -> Iterator[None]:
    """Drop the warnings that Avalanche causes itself and show all others."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")  # the caller's filters apply below
        yield
    for warning in caught:
        if "avalanche" not in warning.filename:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def train_two_tasks(plugins: Sequence[Any], *, seed: int = 0, iterations: int = 4) -> Trial:
    """Train the kit's small model on two small tasks with these plugins, to test what a plugin is meant to do.

    iterations: steps per task. Takes about half a second. Returns what happened.
    """
    with preserved_state():
        setup = Setup(iterations=iterations)
        return train(setup.trial(plugins), setup.benchmark(), seed=seed)


@torch.no_grad()
def _text_features(model: ClipClassifier, task: int) -> Tensor:
    return model.encode_text(task, all_templates=False)
