"""When a run is saved: at its start, as time and steps go by, after each task, at a signal; and how it is restored."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from signal import Signals
from typing import Any

from avalanche.benchmarks.utils import concat_datasets
from torch import Tensor

from mulki_plugins.errors import describe_error
from mulki_plugins.models.check import RANDOM
from mulki_plugins.ranks.collectives import is_first
from mulki_plugins.recipe.schema import Recipe
from mulki_plugins.report.result import Result, as_plain_data
from mulki_plugins.training.checkpoint import (
    DEVICES,
    FOLDER,
    Checkpoint,
    Moment,
    amend,
    prune,
    read_checkpoint,
    write_checkpoint,
)
from mulki_plugins.training.contents import (
    StackEntry,
    clock_of,
    restore_clock,
    restore_plugins,
    restore_scaler,
    restore_weights,
    restore_within_task,
    state_between_tasks,
    state_within_task,
    weights_of,
)
from mulki_plugins.training.kept_weights import keep_weights
from mulki_plugins.training.logbook import Warn
from mulki_plugins.training.pretrained import Pretrained, has_references, resolved
from mulki_plugins.training.signals import Stopped, StopRequest
from mulki_plugins.training.snapshot import Snapshot, take_snapshot
from mulki_plugins.training.strategy import ContinualTemplate


class Checkpointing:
    """Saves a run at its start, every so many minutes or steps, after each task, and when a signal stops it; restores it, too.

    A checkpoint is copied, then a thread writes it while the training or the evaluation goes on. One that comes due while
    the one before is still being written waits for it: so the run holds one copy at most, and none that was asked for is
    left out. The end of an evaluation, a signal, and whatever ends the run wait, too. An error of the thread ends the run
    at the next step.
    """

    clock: Callable[[], float] = staticmethod(time.monotonic)

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        strategy: ContinualTemplate,
        plugins: Sequence[StackEntry],
        loggers: Sequence[Any],
        result: Result,
        identity: dict[str, Any],
        stop: StopRequest,
    ) -> None:
        self.settings = recipe.train.checkpoint
        self.keep_weights = self.settings.weights == "all" and recipe.strategy.base != "joint"
        self.folder, self.strategy, self.plugins = folder, strategy, plugins
        self.loggers = dict(zip(recipe.loggers, loggers, strict=False))  # only the first rank has any
        self.result, self.identity, self.stop = result, identity, stop
        random = recipe.model.options.get("pretrained") == RANDOM  # nobody could give such weights again
        keeps = self.settings.keep and not random
        self._pretrained = Pretrained(strategy.model.own_weights()) if keeps else None
        self.tasks = 0
        """The number of tasks learned."""
        self.failed_at = ""
        """The moment of the checkpoint that could not be written, such as `task digits, step 200`."""
        self._earlier = self._earlier_in_task = 0.0
        """Seconds before the run was resumed: in all, and in the task it was stopped in."""
        self._began = self._task_began = self._saved = self.clock()
        self._end = ""
        """The name of the checkpoint of the last task's end, which those within the next task build on."""
        self._writes = is_first()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: tuple[str, Future[None]] | None = None
        """The moment that the thread is writing."""
        strategy.after_step, strategy.between_batches = self.after_step, self.stop_if_asked
        strategy.wishes = self._wishes

    def started(self) -> None:
        """The zero-shot row is measured. No weights are saved: they are the pre-trained ones that the recipe names."""
        self._save_end("start", {}, {"model": {}, "plugins": []}, "the start")
        self.settle()

    def task_begins(self) -> None:
        self._task_began = self.clock()

    def learned(self, tasks: int, name: str) -> None:
        """The training of a task is over; its evaluation is still to come."""
        self.tasks, self._earlier_in_task = tasks, 0.0
        safe = "".join(c if c.isalnum() or c in "-_" else "-" for c in name)[:80]
        if self.settings.keep:
            state = state_between_tasks(self.strategy, self.plugins)
            self._save_end(f"task-{tasks:02d}-{safe}", weights_of(self.strategy), state, f"task {name}, its end")

    def evaluated(self) -> None:
        """The evaluation after a task is over."""
        self.settle()
        if self._end and self._writes:
            amend(read_checkpoint(self.folder / FOLDER / self._end), self._progress())

    def after_step(self) -> None:
        """Save the run if a checkpoint is due, or if a signal stops it. Raises the error of a write that has failed."""
        if self._writing is not None and self._writing[1].done():
            self.settle()
        steps = self.strategy.clock.train_exp_iterations
        signal, due = self.strategy.agreed or [self.stop.number or 0, self._is_due(steps)]
        if self._end and (due or signal):
            self._save_step(steps)
        self._stop(signal)

    def stop_if_asked(self) -> None:
        self._stop(self.stop.number or 0)

    def _stop(self, signal: int) -> None:
        if signal:
            self.settle()
            resume = f"resume it with `mulki resume {shlex.quote(str(self.folder))}`"
            hint = resume if self.settings.keep else "no checkpoint was kept"
            raise Stopped(f"stopped by {Signals(signal).name}", hint, signal)

    def _wishes(self) -> list[int]:
        """What this rank wants at the end of the step that it computes: to stop by a signal, and to save."""
        steps = self.strategy.clock.train_exp_iterations + 1
        return [self.stop.number or 0, int(self._writes and self._is_due(steps))]

    def settle(self) -> None:
        """Wait until the last checkpoint is written. Raises the error if it cannot be."""
        if self._writing is None:
            return
        (moment, future), self._writing = self._writing, None
        try:
            future.result()
        except Exception:
            self.failed_at = moment
            raise

    def close(self, warn: Warn) -> None:
        """Wait for the thread and end it: what it still writes is part of the run, however that ends."""
        self._thread.shutdown(wait=True)
        if self._writing is not None and (error := self._writing[1].exception()) is not None:
            warn(f"the checkpoint of {self._writing[0]} could not be written: {describe_error(error)}", error)
        self._writing = None

    def seconds(self) -> float:
        """Duration of the run, with the time before it was resumed."""
        return self._earlier + self.clock() - self._began

    def task_seconds(self) -> float:
        """Duration of the current task's training, with the time before the run was resumed."""
        return self._earlier_in_task + self.clock() - self._task_began

    def _is_due(self, steps: int) -> bool:
        """Whether a step calls for a checkpoint. The last one of a task does not: the task's end is saved anyway."""
        every, minutes = self.settings.every, self.settings.minutes
        if steps >= self.strategy.steps:
            return False
        by_time = minutes is not None and self.clock() - self._saved >= 60 * minutes
        return by_time or (every is not None and steps % every == 0)

    def _save_end(self, name: str, weights: dict[str, Tensor], state: dict[str, Any], where: str) -> None:
        if self.settings.keep:
            self._save(name, Moment(self.tasks), None, weights, state, where)
            self._end = name

    def _save_step(self, steps: int) -> None:
        self.strategy.settle()
        name, moment = f"task-{self.tasks + 1:02d}-step-{steps:06d}", Moment(self.tasks, steps)
        weights, state = weights_of(self.strategy), state_within_task(self.strategy, self.plugins)
        where = f"{self.strategy.what_learns}, step {steps}"
        self._save(name, moment, self._end, weights, state, where, task_seconds=self.task_seconds())

    def _save(
        self, name: str, moment: Moment, base: str | None, weights: Any, state: Any, where: str, **more: Any
    ) -> None:
        """Copy the run and let the thread write it. where: how far the run is, for an error."""
        self.settle()
        if not self._writes:
            return
        snapshot, progress = take_snapshot(weights, state), self._progress() | more
        self._saved = self.clock()
        self._writing = where, self._thread.submit(self._write, name, moment, base, snapshot, progress)

    def _write(self, name: str, moment: Moment, base: str | None, snapshot: Snapshot, progress: dict[str, Any]) -> None:
        snapshot.wait()
        weights, state, devices, left_out = snapshot.weights, snapshot.state, snapshot.devices, None
        if self._pretrained:
            weights, left_out = self._pretrained.without(weights)
            state, devices = self._pretrained.with_references(state, devices)
        refers = has_references(state["plugins"])
        state = state | ({DEVICES: devices} if devices else {})
        metadata = getattr(self.strategy.model, "weights_metadata", {})
        written = write_checkpoint(
            self.folder, name, moment, base=base, weights=weights, state=state, progress=progress,
            metadata=metadata, left_out=left_out, refers=refers,
        )  # fmt: skip
        if self.keep_weights and base is None and snapshot.weights:
            keep_weights(self.folder, written, snapshot.state)
        prune(self.folder, written, self.settings.keep)

    def _progress(self) -> dict[str, Any]:
        """The rows so far, the counters, and how far the loggers' files reach."""
        result = as_plain_data(self.result)
        keys = ("zero_shot", "matrix", "held_out", "seconds", "flops", "left_out", "parent")
        rows = {name: result[name] for name in keys}
        marks = {name: logger.state_dict() for name, logger in self.loggers.items() if hasattr(logger, "state_dict")}
        return {
            "result": rows, "clock": clock_of(self.strategy), "learned": sorted(self.strategy.learned),
            "loggers": marks, "spent": self.seconds(), "identity": self.identity,
        }  # fmt: skip

    def restore(self, checkpoint: Checkpoint, datasets: Sequence[Any]) -> None:
        """Restore the run from a checkpoint. The model must still hold its pre-trained weights.

        datasets: the training sets of all tasks. What changes within a task is restored when its training begins.
        """
        strategy, run = self.strategy, checkpoint.run
        end = checkpoint.end_of_task()
        strategy.model.to(strategy.device)
        needed = any(each.left_out or each.refers for each in (checkpoint, end))
        pretrained = {n: w.detach().clone() for n, w in strategy.model.own_weights().items()} if needed else {}
        if end.moment.tasks:  # as before the first task, where some plugins note the pre-trained model
            strategy._before_training()
        for task in range(end.moment.tasks):  # adapters grow again as they did
            strategy.model.before_task(task)
            strategy.model.after_task(task)
        state = end.state()
        if end.moment.tasks:
            restore_plugins(self.plugins, resolved(state, pretrained, end.path))
        restore_weights(strategy, end, state, pretrained)
        restore_scaler(strategy, state)
        restore_clock(strategy, end.run["clock"])
        strategy.learned = set(end.run["learned"])
        if hasattr(strategy, "dataset"):  # Avalanche's Cumulative collects what it has seen
            for dataset in datasets[: end.moment.tasks]:
                strategy.dataset = dataset if strategy.dataset is None else concat_datasets([strategy.dataset, dataset])
        for name, value in run["result"].items():
            setattr(self.result, name, value)
        for name, mark in run["loggers"].items():
            if mark and hasattr(self.loggers.get(name), "load_state_dict"):
                self.loggers[name].load_state_dict(mark)
        self._earlier, self._earlier_in_task = run["spent"], run.get("task_seconds", 0.0)
        self.tasks, self._end = end.moment.tasks, end.path.name
        self._saved = self.clock()
        if checkpoint.moment.steps:
            loggers = strategy.evaluator.loggers
            strategy.evaluator.loggers = [each for each in loggers if each not in self.loggers.values()]

            def then() -> None:
                restore_within_task(strategy, self.plugins, checkpoint, pretrained)
                strategy.evaluator.loggers = loggers  # those that write have the skipped steps already

            strategy.resume_at(checkpoint.moment.steps, then)
