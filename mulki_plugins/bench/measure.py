"""Measures a recipe with the run's own machinery, in a temporary folder: its steps, an evaluation and a checkpoint."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from attrs import field, frozen
from avalanche.training.plugins import EvaluationPlugin

from mulki_plugins.bench.hardware import peak_product, waiter
from mulki_plugins.bench.passes import Pass, Passes
from mulki_plugins.bench.steps import FIXED, StepObserver, Steps
from mulki_plugins.bench.stopwatch import Part, Stopwatch, replaced
from mulki_plugins.bench.thin import Thinned, sentences_of, shortened, steady_after, with_own_cache
from mulki_plugins.models.classifier import ClipClassifier
from mulki_plugins.recipe.schema import Recipe
from mulki_plugins.report.progress import ProgressLogger
from mulki_plugins.streams.task import TaskStream
from mulki_plugins.training.batches import TaskBatches
from mulki_plugins.training.build import Built, build
from mulki_plugins.training.checkpoint import FOLDER
from mulki_plugins.training.checkpointing import Checkpointing
from mulki_plugins.training.provenance import peak_memory
from mulki_plugins.training.rng import seed_everything
from mulki_plugins.training.run import Run
from mulki_plugins.training.strategy import ContinualTemplate

Say = Callable[[str], None]

WARMUP = 3
"""Steps of a task that are not timed: the first ones compile, and fill caches."""


@frozen(kw_only=True)
class Learned:
    """What was measured while one task was learned; times in seconds."""

    name: str
    images: int
    """Training images of the task."""
    steps: Steps
    overhead: float
    """All but the steps and what follows: the teachers' copies, the first batches, compilation, the task's end."""
    passes: list[Pass]
    """Passes over the task's images before its steps or after them."""
    checkpoint: float
    """What the run waits for its checkpoint at the task's end."""
    peak_memory_mib: float


@frozen(kw_only=True)
class Evaluation:
    """One evaluation of some test images of each task; times in seconds."""

    read: dict[str, int]
    """The number of images by task."""
    sentences: dict[str, int]
    """The number of sentences by task."""
    seconds: float
    loading: float
    encoding: float
    rates: dict[str, float]
    """Seconds per image by task, once an evaluation of it is under way."""

    @property
    def count(self) -> int:
        """The number of images of all tasks."""
        return sum(self.read.values())


@frozen(kw_only=True)
class Measured:
    """Everything that was measured of one recipe on this machine."""

    recipe: Recipe
    """As it was measured, with the whole budget."""
    device: str
    threads: int
    peak_flops: float
    """Operations per second of the largest matrix product measured here."""
    build: float
    """Seconds until stream, model and plugins are there."""
    tasks: list[Learned]
    evaluations: list[Evaluation]
    """The first one is that of the zero-shot row."""
    batch_size: int
    """Of the steps that were measured: smaller than the recipe's on a slow machine."""
    eval_batch_size: int
    checkpoint_mib: float
    train_images: dict[str, int]
    """Of every task of the stream."""
    test_images: dict[str, int]
    sentences: dict[str, int]
    """Of every task, that an evaluation encodes."""
    sentence_seconds: float
    notices: list[str] = field(factory=list)


def measure(
    recipe: Recipe, seed: int, *, stream: TaskStream | None = None, steps: int = 12, limit: float = 40.0,
    evaluate: bool = True, count: bool = True, say: Say = lambda text: None,
) -> Measured:  # fmt: skip
    """Train the first two tasks for a few steps each, and evaluate. Leaves no file behind.

    stream: in place of the recipe's own. limit: seconds for the steps of a task. evaluate: False leaves evaluations out.
    count: count operations and calls of a step.
    """
    with tempfile.TemporaryDirectory(prefix="mulki-bench-") as folder:
        session = _Session(recipe, seed, Path(folder), stream, steps, limit, count, say)
        return session.measure(evaluate)


class _Session:
    """One measurement: a run in a temporary folder that is stopped early."""

    def __init__(
        self, recipe: Recipe, seed: int, folder: Path, stream: TaskStream | None, steps: int, limit: float, count: bool,
        say: Say,
    ) -> None:  # fmt: skip
        self.whole, self.seed, self.folder, self.say = recipe, seed, folder, say
        self.steps, self.limit, self.count = steps, limit, count
        say("building the stream, the model and the plugins")
        began = time.perf_counter()
        seed_everything(seed)
        recipe = with_own_cache(recipe, folder / "cache")
        thinned = Thinned(recipe)
        self.built: Built = build(recipe, stream=stream, thin=thinned)
        self.build = time.perf_counter() - began
        self.stream, self.sentence_seconds = thinned.whole, thinned.sentence
        self.recipe = shortened(recipe, WARMUP + steps, thinned)
        self.times = recipe.train.batch_size / self.recipe.train.batch_size
        """How many times as large a batch is as those that are measured; 1 except on a slow machine."""
        self.device = self.built.device
        self.wait = waiter(self.device)
        self.watch = Stopwatch(self.wait)
        self.passes = Passes(self.watch, rows=self.recipe.train.batch_size if self.times > 1 else None)
        self.evaluations: list[Evaluation] = []
        self.checkpoint_seconds = 0.0
        self.last = 0
        """The position of the last task to learn, whose step is also counted."""

    def measure(self, evaluate: bool) -> Measured:
        runs = self.folder / "run"
        runs.mkdir()
        notices: list[str] = []
        progress = ProgressLogger(len(self.stream.tasks), verbosity=-1, heard=notices.append)
        self.run = Run(self.recipe, self.built, runs, self.seed, progress)
        learned: list[Learned] = []
        with self._observed():
            self.run.set_up({})
            self.run.flops.of_task = contextlib.nullcontext  # type: ignore[method-assign,assignment]  # it takes time
            nothing = [0.0] * len(self.built.stream.tasks)
            self.run.evaluate = self.evaluate if evaluate else lambda *_: nothing  # type: ignore[method-assign,assignment]  # for this run
            if evaluate:
                self.say("evaluating the pre-trained model")
            self.run.result.zero_shot = self.run.evaluate()
            if self.recipe.strategy.base != "none":
                self.run.checkpointing.started()
                count = 1 if self.recipe.strategy.base == "joint" else min(2, len(self.stream.tasks))
                self.last = count - 1
                learned = [self._learn(i) for i in range(count)]
            self.run.close()
        return Measured(
            recipe=self.whole,
            device=self.run.result.device["name"],
            threads=torch.get_num_threads(),
            peak_flops=peak_product(self.device, self.recipe.train.precision),
            build=self.build,
            tasks=learned,
            evaluations=self.evaluations,
            batch_size=self.recipe.train.batch_size,
            eval_batch_size=self.recipe.evaluate.batch_size,
            checkpoint_mib=_largest(runs / FOLDER),
            train_images={task.name: len(task.train) for task in self.stream.tasks},
            test_images={task.name: len(task.test) for task in self.stream.tasks},
            sentences=sentences_of(self.stream),
            sentence_seconds=self.sentence_seconds,
            notices=[*self.built.notices, *(line for line in notices if line.startswith(("warning", "note")))],
        )

    def _learn(self, i: int) -> Learned:
        """Learn a task for a few steps, with its checkpoint and its evaluation."""
        run, strategy, task = self.run, self.run.strategy, self.stream.tasks[i]
        self.say(f"training a few steps of {task.name}" + (", with both teachers" if i else ""))
        _reset_peak(self.device)
        observer = StepObserver(
            strategy=strategy, watch=self.watch, wait=self.wait, warmup=WARMUP if self.times == 1 else 1, steps=self.steps,
            limit=self.limit,
            asynchronous=self.device.type != "cpu", count=self.count and i == self.last and self.times == 1,
        )  # fmt: skip
        after_step, evaluated = strategy.after_step, len(self.evaluations)
        self.passes.take()
        self.checkpoint_seconds = 0.0

        def step_ends() -> None:
            after_step()
            observer()

        strategy.after_step = step_ends
        began = time.perf_counter()
        if self.recipe.strategy.base == "joint":
            run.train_jointly()
        else:
            run.train_task(i, self.built.benchmark.train_stream[i])
        self.wait()
        seconds = time.perf_counter() - began
        strategy.after_step = after_step
        steps, passes = observer.result(), self.passes.take()
        elsewhere = self.checkpoint_seconds + sum(each.seconds for each in passes)
        elsewhere += sum(each.seconds for each in self.evaluations[evaluated:])
        joint = self.recipe.strategy.base == "joint"
        return Learned(
            name=task.name,
            images=sum(len(each.train) for each in self.built.stream.tasks) if joint else len(task.train),
            steps=steps if self.times == 1 else self._of_whole_batches(steps, len(task.class_names)),
            overhead=max(0.0, seconds - elsewhere - steps.span - steps.mean),
            passes=passes,
            checkpoint=self.checkpoint_seconds,
            peak_memory_mib=peak_memory(self.device),
        )

    def _of_whole_batches(self, steps: Steps, sentences: int) -> Steps:
        """What steps of the recipe's batch size would take. The text tower and the optimizer take as long as before."""
        texts = 3 * sentences * self.sentence_seconds  # with their gradients
        return steps.of_batches(self.times, texts + sum(steps.parts[part] for part in FIXED))

    def evaluate(self, *experiences: Any) -> list[float]:
        """In the place of the run's own: it calls that and keeps the seconds of its parts."""
        strategy, ends = self.run.strategy, list[tuple[int, float]]()
        between = strategy.between_batches

        def batch_ends() -> None:
            between()
            ends.append((int(strategy.experience.task_label), time.perf_counter()))

        strategy.between_batches = batch_ends
        self.passes.evaluating = True
        self.watch.waits = len(self.evaluations) != 1  # the second one shows how long it takes without waits
        self.watch.take()
        began = time.perf_counter()
        try:
            row = Run.evaluate(self.run, *experiences)
            self.wait()
        finally:
            strategy.between_batches, self.passes.evaluating, self.watch.waits = between, False, False
        seconds, parts = time.perf_counter() - began, self.watch.take()
        read = {task.name: len(task.test) for task in self.built.stream.tasks}
        self.evaluations.append(
            Evaluation(
                read=read,
                sentences=sentences_of(self.built.stream),
                seconds=seconds,
                loading=parts["loading"],
                encoding=parts["student"],
                rates=_rates(ends, read, self.recipe.evaluate.batch_size, steady_after(self.built.workers)),
            )
        )
        return row

    @contextlib.contextmanager
    def _observed(self) -> Iterator[None]:
        """Watch the methods whose seconds are the parts of a step."""
        watch, student = self.watch, self.built.model

        def tower(model: Any) -> Part:
            return "student" if model is student else "teachers"

        with contextlib.ExitStack() as stack:
            calls: tuple[tuple[type, str, Part], ...] = (
                (ContinualTemplate, "forward", "student"),
                (ContinualTemplate, "_call", "losses and plugins"),
                (ContinualTemplate, "criterion", "losses and plugins"),
                (ContinualTemplate, "backward", "backward"),
                (ContinualTemplate, "optimizer_step", "optimizer"),
                (ContinualTemplate, "_end_step", "logging"),
                (EvaluationPlugin, "_update_metrics_and_loggers", "logging"),
                (Checkpointing, "after_step", "checkpoint"),
            )
            for owner, name, part in calls:
                stack.enter_context(watch.watch(owner, name, part))
            for name in [name for name in vars(ClipClassifier) if name.startswith("encode_")]:
                stack.enter_context(watch.watch(ClipClassifier, name, tower))
            stack.enter_context(self._watch_batches())
            stack.enter_context(self._watch_checkpoints("learned"))
            stack.enter_context(self._watch_checkpoints("evaluated"))
            stack.enter_context(self.passes.watching())
            yield

    def _watch_batches(self) -> contextlib.AbstractContextManager[None]:
        def around(iterate: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
            return lambda batches: self.watch.watch_items(iterate(batches), "loading")

        return replaced(TaskBatches, "__iter__", around)

    def _watch_checkpoints(self, name: str) -> contextlib.AbstractContextManager[None]:
        def around(save: Callable[..., None]) -> Callable[..., None]:
            def timed(*args: Any) -> None:
                began = time.perf_counter()
                save(*args)
                self.checkpoint_seconds += time.perf_counter() - began

            return timed

        return replaced(Checkpointing, name, around)


def _rates(ends: list[tuple[int, float]], read: dict[str, int], batch_size: int, skip: int) -> dict[str, float]:
    """Seconds per image of each task once its loader is at its own pace, after `skip` batches.

    ends: task and time of the end of each batch. A task with too few batches gets the mean of the others.
    """
    rates: dict[str, float] = {}
    for task, (name, images) in enumerate(read.items()):
        times = [end for label, end in ends if label == task]
        later = images - skip * batch_size
        if len(times) > skip and later > 0:
            rates[name] = (times[-1] - times[skip - 1]) / later
    if not rates:  # one batch for each task
        rates[""] = (ends[-1][1] - ends[0][1]) / max(1, sum(list(read.values())[1:]))
    mean = sum(rates.values()) / len(rates)
    return {name: rates.get(name, mean) for name in read}


def _largest(folder: Path) -> float:
    """MiB of the largest checkpoint in the folder."""
    sizes = [sum(file.stat().st_size for file in path.iterdir()) for path in folder.glob("*") if path.is_dir()]
    return max(sizes, default=0) / 2**20


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
