"""One training of a small model on small tasks, as `mulki run` trains, with everything that happens written down."""

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

from mulki_plugins.models.classifier import ClipClassifier, Towers
from mulki_plugins.models.load import LoadedClip
from mulki_plugins.recipe.schema import Evaluate, Optimizer, Schedule, Train
from mulki_plugins.streams.benchmark import as_benchmark
from mulki_plugins.streams.task import TaskStream
from mulki_plugins.testing import surroundings
from mulki_plugins.testing.surroundings import kept_random_state
from mulki_plugins.testing.witnesses import (
    LEAVE_EVALUATION,
    LEAVE_SETTINGS,
    RATE,
    First,
    Last,
    Step,
    learning_of,
    replaced_methods,
    settings_of,
    weights_of,
)
from mulki_plugins.testing.world import small_model, small_stream
from mulki_plugins.training.rng import seed_everything
from mulki_plugins.training.strategy import ContinualTemplate

BATCH = 4
WARMUP = 2
LOADER = {"num_workers": 0, "persistent_workers": False}
"""What a run hands to `train` and `eval`, and so to every callback."""

Weights = dict[str, Tensor]


@define(eq=False)
class Trial:
    """What a training did. Lists have an entry for each task that was trained."""

    model: ClipClassifier
    strategy: ContinualTemplate
    plugins: list[Any]
    iterations: int
    task: int = 0
    """The task that is or was last trained, from 1."""
    steps: list[Step] = field(factory=list)
    before: list[Weights] = field(factory=list)
    """The weights with which a task began, before any plugin's before_training_exp."""
    began: list[Weights] = field(factory=list)
    """The weights at a task's first step."""
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
    original: dict[str, tuple[Tensor, Tensor]] = field(factory=dict)
    """The weights and buffers of the model before any plugin saw it, by name: each itself, and a copy."""
    notes: list[tuple[str, str, str]] = field(factory=list)
    """What the two that look on have found: a check, what is wrong, and how to fix it."""
    evaluations: int = 0
    outputs: list[tuple[int, Tensor]] = field(factory=list)
    """Of each batch of the last evaluation its task and the model's logits."""
    generators: dict[tuple[Any, ...], tuple[int, ...]] = field(factory=dict)
    """Where the random generators stood, by the moment."""
    probe: Tensor | None = None
    """Images on which the model is compared with the teachers."""
    outputs_before: list[list[Tensor]] = field(factory=list)
    """What the model made of them before each task."""
    learning: frozenset[tuple[str, int]] = frozenset()
    """The weights that learn since the current task's first step."""
    taught: set[int] = field(factory=set)
    """The identities of all weights that had a gradient."""
    settings: dict[str, Any] = field(factory=dict)
    parts: dict[str, Any] = field(factory=dict)
    """The strategy's attributes that stay the same objects."""
    replaced: set[str] = field(factory=set)
    stack: int = 0
    batch: Any = None
    output: Any = None
    features: list[tuple[Tensor, Tensor]] = field(factory=list)
    sentinel: Any = None
    """0 in the loss: it has the gradient 1 as long as the loss is only added to."""
    eval_batch: Any = None
    eval_output: Any = None
    after_step: Callable[[Any], None] = lambda strategy: None

    @property
    def losses(self) -> list[float]:
        return [step.loss for step in self.steps]

    @property
    def in_task(self) -> int:
        """Steps of the current task so far."""
        return sum(step.task == self.task - 1 for step in self.steps)

    def note(self, check: str, wrong: str, mend: str) -> None:
        if not any(noted == check for noted, _, _ in self.notes):
            self.notes.append((check, wrong, mend))

    def clear(self) -> None:
        """Forget the weights of the tasks so far."""
        for each in (self.before, self.began, self.after):
            each.clear()

    def look_at_strategy(self) -> None:
        """Note what must stay."""
        model, strategy = self.model, self.strategy
        named = [*model.named_parameters(), *model.named_buffers()]
        self.settings = surroundings.settings()
        self.original = {name: (value, value.detach().clone()) for name, value in named}
        names = ("model", "_criterion", "evaluator", "settings", "train_mb_size", "eval_mb_size", "device")
        self.parts = {name: getattr(strategy, name) for name in names}
        self.replaced, self.stack = replaced_methods(strategy), len(strategy.plugins)


@define(eq=False, kw_only=True)
class Place:
    """A model, its tasks as a benchmark, and the stack that is to be tried there."""

    loaded: LoadedClip = field(factory=small_model)
    stream: TaskStream = field(factory=small_stream)
    train: Towers = "all"
    iterations: int = 4
    batch: int = BATCH
    precision: Any = "fp32"

    def trial(self, plugins: Sequence[Any], more: Sequence[Any] = ()) -> Trial:
        """The model under a strategy with these plugins between two that look on, and `more` after them."""
        model = ClipClassifier(self.loaded.clip, self.loaded.tokenizer, self.stream.tasks, train=self.train)
        settings = Train(
            iterations=self.iterations,
            batch_size=self.batch,
            optimizer=Optimizer(lr=RATE, weight_decay=0.01),
            schedule=Schedule(warmup=min(WARMUP, self.iterations)),
            precision=self.precision,
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
        first.trial = last.trial = strategy.trial = trial
        trial.look_at_strategy()
        return trial

    def benchmark(self) -> CLScenario:
        return as_benchmark(self.stream, self.loaded.transform(train=True), self.loaded.transform(train=False))


class _Tried(ContinualTemplate):
    """Notes its optimizers, and goes on after a loss that is no number, so that the check of the loss can say so."""

    trial: Trial | None = None

    def check_loss(self) -> None:
        return

    def check_weights(self) -> None:
        """Nothing, so that the check of the optimizer can name what does not learn."""

    def make_optimizer(self, **kwargs: Any) -> None:
        super().make_optimizer(**kwargs)
        trial = self.trial
        if trial is None:
            return
        trial.given = self.optimizer, [settings_of(group) for group in self.optimizer.param_groups]

        def count(*_: Any) -> None:
            trial.counted += [0] * (trial.task - len(trial.counted))
            trial.counted[trial.task - 1] += 1

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
    """Train these tasks as a run does: evaluate; then train each from the seed, and evaluate after it.

    evaluated: the first evaluation has been made already, by a run that is resumed. tested: the tasks to evaluate
    on; those that are trained where none are given. learned: called after each training,
    before the evaluation, where a run writes a checkpoint.
    """
    text = io.StringIO()
    with contextlib.redirect_stdout(text), _without_avalanches_warnings():
        try:
            if trial.task == 0:
                seed_everything(seed)  # which sets deterministic kernels, too
                trial.settings = surroundings.settings()
                if not evaluated:
                    evaluate(trial, benchmark, tasks if tested is None else tested)
            for task in tasks:
                seed_everything(seed, task + 1)
                trial.texts_before.append(_texts(trial.model, task))
                trial.strategy.train(benchmark.train_stream[task], eval_streams=[], **LOADER)
                trial.after.append(weights_of(trial.model))
                trial.texts_after.append(_texts(trial.model, task))
                _look_around(trial, "after_training")
                learned()
                evaluate(trial, benchmark, tasks if tested is None else tested)
        finally:
            trial.printed += text.getvalue()
    return trial


def evaluate(trial: Trial, benchmark: CLScenario, order: Sequence[int] = (0, 1)) -> list[tuple[int, Tensor]]:
    """Evaluate two tasks; notes what an evaluation must not change. Returns the logits of each batch with its task."""
    trial.outputs = []
    model, strategy = trial.model, trial.strategy
    weights, learning = weights_of(model), learning_of(model)
    strategy.eval([benchmark.test_stream[task] for task in order], **LOADER)
    after = weights_of(model)
    if weights.keys() != after.keys() or any(not torch.equal(after[name], w) for name, w in weights.items()):
        trial.note("evaluation", "an evaluation changes weights of the model", LEAVE_EVALUATION)
    if learning != learning_of(model):
        trial.note("evaluation", "an evaluation changes which weights learn", LEAVE_EVALUATION)
    _look_around(trial, "after_eval")
    return trial.outputs


def _look_around(trial: Trial, where: str) -> None:
    for name in surroundings.changed(trial.settings):
        trial.note("surroundings", f"it changes {name}, in {where} or before", LEAVE_SETTINGS)


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


@torch.no_grad()
def _texts(model: ClipClassifier, task: int) -> Tensor:
    return model.encode_text(task, all_templates=False)


__all__ = ["Place", "Step", "Trial", "evaluate", "kept_random_state", "train", "train_two_tasks"]
