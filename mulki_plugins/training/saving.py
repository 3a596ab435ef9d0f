"""When checkpoints of a run are written, and how a run goes on from one."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attrs import asdict
from avalanche.benchmarks.utils import concat_datasets

from mulki_plugins.errors import MulkiError
from mulki_plugins.recipe.schema import Recipe
from mulki_plugins.report.result import Result
from mulki_plugins.training.checkpoints import (
    Checkpoint,
    Damaged,
    Place,
    amend,
    checkpoints,
    prune,
    read_checkpoint,
    write_checkpoint,
)
from mulki_plugins.training.provenance import differences
from mulki_plugins.training.snapshot import (
    Named,
    clock_of,
    restore_clock,
    restore_plugins,
    restore_weights,
    restore_within,
    state_at_end,
    state_within,
    weights_of,
)
from mulki_plugins.training.stopping import Stopped, StopRequest
from mulki_plugins.training.template import ContinualTemplate


class Saving:
    """Writes a run's checkpoints: at its start, every so many steps, after each task; and when it is told to stop."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        strategy: ContinualTemplate,
        plugins: Sequence[Named],
        loggers: Sequence[Any],
        result: Result,
        identity: dict[str, Any],
        stop: StopRequest,
    ) -> None:
        self.settings = recipe.train.checkpoint
        self.folder, self.strategy, self.plugins = folder, strategy, plugins
        self.loggers = dict(zip(recipe.loggers, loggers, strict=True))
        self.result, self.identity, self.stop = result, identity, stop
        self.spent = 0.0
        """Seconds of earlier sittings."""
        self.task_spent = 0.0
        """Seconds of earlier sittings in the task that they left unfinished."""
        self._began = self._task_began = time.monotonic()
        self.tasks = 0
        """How many have been learned."""
        self._end: Checkpoint | None = None
        """The checkpoint of the last task's end, which those within the next task go on from."""
        strategy.after_step, strategy.between_batches = self.after_step, self.stop_if_asked

    def started(self) -> None:
        """The zero-shot row is there. No weights are kept: they are the pre-trained ones, which the recipe names."""
        self._at_end("start", weights=False)

    def task_begins(self) -> None:
        self._task_began = time.monotonic()

    def learned(self, tasks: int, name: str) -> None:
        """A task's training is over; its evaluation is still to come."""
        self.tasks, self.task_spent = tasks, 0.0
        safe = "".join(c if c.isalnum() or c in "-_" else "-" for c in name)[:80]
        self._at_end(f"task-{tasks:02d}-{safe}", weights=True)

    def evaluated(self) -> None:
        """The evaluation after the task is over."""
        if self._end is not None:
            self._end = amend(self._end, self._found())

    def after_step(self) -> None:
        """After each step: a checkpoint where one is due, and the end where it was asked for."""
        steps = self.strategy.clock.train_exp_iterations
        due = self.settings.every and steps % self.settings.every == 0 and steps < self.strategy.steps
        if self.settings.keep and self._end is not None and (due or self.stop.number):
            prune(self.folder, self._within(steps), self.settings.keep)
        self.stop_if_asked()

    def stop_if_asked(self) -> None:
        if self.stop.number:
            hint = (
                f"go on with `mulki resume {shlex.quote(str(self.folder))}`"
                if self.settings.keep
                else "no checkpoint was kept"
            )
            raise Stopped(f"stopped by {self.stop.name}", hint, self.stop.number)

    def seconds(self) -> float:
        """Of all sittings so far."""
        return self.spent + time.monotonic() - self._began

    def task_seconds(self) -> float:
        return self.task_spent + time.monotonic() - self._task_began

    def _at_end(self, name: str, weights: bool) -> None:
        if not self.settings.keep:
            return
        self._end = write_checkpoint(
            self.folder,
            name,
            Place(self.tasks),
            base=None,
            weights=weights_of(self.strategy) if weights else {},
            state=state_at_end(self.strategy, self.plugins) if weights else {"model": {}, "plugins": []},
            found=self._found(),
            metadata=_metadata_of(self.strategy),
        )
        prune(self.folder, self._end, self.settings.keep)

    def _within(self, steps: int) -> Checkpoint:
        assert self._end is not None
        return write_checkpoint(
            self.folder,
            f"task-{self.tasks + 1:02d}-step-{steps:06d}",
            Place(self.tasks, steps),
            base=self._end.path.name,
            weights=weights_of(self.strategy),
            state=state_within(self.strategy, self.plugins),
            found=self._found() | {"task_seconds": self.task_seconds()},
            metadata=_metadata_of(self.strategy),
        )

    def _found(self) -> dict[str, Any]:
        """The rows, the counters, and how far the loggers' files go."""
        result = {
            key: value
            for key, value in asdict(self.result).items()
            if key in ("zero_shot", "matrix", "seconds", "left_out")
        }
        marks = {name: logger.state_dict() for name, logger in self.loggers.items() if hasattr(logger, "state_dict")}
        return {
            "result": result, "clock": clock_of(self.strategy), "learned": sorted(self.strategy.learned),
            "loggers": marks, "spent": self.seconds(), "identity": self.identity,
        }  # fmt: skip

    def go_on_from(self, checkpoint: Checkpoint, datasets: Sequence[Any]) -> None:
        """Put the run where a checkpoint has it, the model still being the pre-trained one.

        datasets: the training sets of all tasks. What lies within a task is put back when that task's training begins.
        """
        strategy, run = self.strategy, checkpoint.run
        end = _base_of(checkpoint)
        strategy.model.to(strategy.device)
        strategy._before_training()  # the first task's, at which some plugins note the pre-trained model
        state = end.state()
        if end.place.tasks:
            restore_plugins(self.plugins, state)
        restore_weights(strategy, end, state)
        restore_clock(strategy, end.run["clock"])
        strategy.learned = set(end.run["learned"])
        if hasattr(strategy, "dataset"):  # Avalanche's Cumulative, which adds up what it has seen
            for dataset in datasets[: end.place.tasks]:
                strategy.dataset = dataset if strategy.dataset is None else concat_datasets([strategy.dataset, dataset])
        for name, value in run["result"].items():
            setattr(self.result, name, value)
        for name, mark in _marks(run["loggers"]).items():
            if mark and hasattr(self.loggers.get(name), "load_state_dict"):
                self.loggers[name].load_state_dict(mark)
        self.spent, self.task_spent = run["spent"], run.get("task_seconds", 0.0)
        self.tasks, self._end = end.place.tasks, end
        if checkpoint.place.steps:
            shown = strategy.evaluator.loggers  # of which those that write have had what comes before
            strategy.evaluator.loggers = [logger for logger in shown if logger not in self.loggers.values()]

            def then() -> None:
                restore_within(strategy, self.plugins, checkpoint)
                strategy.evaluator.loggers = shown

            strategy.resume_at(checkpoint.place.steps, then)


def _marks(noted: dict[str, Any] | list[dict[str, Any]]) -> dict[str, Any]:
    """The loggers' marks by name. Older checkpoints have a list without names, in which ours are known by their form."""
    if isinstance(noted, dict):
        return noted
    found = {}
    for mark in noted:
        if set(mark) == {"bytes"}:
            found["csv"] = mark
        elif mark and all(name.startswith("events.out.tfevents.") for name in mark):
            found["tensorboard"] = mark
    return found


def _base_of(checkpoint: Checkpoint) -> Checkpoint:
    return checkpoint if checkpoint.base is None else read_checkpoint(checkpoint.path.parent / checkpoint.base)


def _metadata_of(strategy: ContinualTemplate) -> dict[str, str]:
    metadata: dict[str, str] = getattr(strategy.model, "weights_metadata", {})
    return metadata


def choose_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The latest checkpoint of a run that is whole, with the one it goes on from; and what is wrong with later ones.

    MulkiError where the folder cannot be read.
    """
    try:
        found, wrong = checkpoints(folder)
    except OSError as error:
        raise MulkiError(f"{error.filename}: cannot be read: {error.strerror}") from error
    for checkpoint in found:
        try:
            checkpoint.verify()
            _base_of(checkpoint).verify()
            return checkpoint, wrong
        except Damaged as error:
            wrong.append(str(error))
    return None, wrong


def refuse_another(checkpoint: Checkpoint, identity: dict[str, Any], force: bool) -> list[str]:
    """What has changed since the checkpoint was written. MulkiError where something has, unless forced."""
    before = checkpoint.run["identity"]
    changed = differences(before, identity)
    if changed and not force:
        raise MulkiError(
            f"{checkpoint.path}: the run cannot go on as it began: {'; '.join(changed)}",
            "undo the change, or go on all the same with --force",
        )
    tasks, now = list(before["data"]), list(identity["data"])
    if tasks != now:
        raise MulkiError(
            f"{checkpoint.path}: the run began with the tasks {', '.join(tasks)}, and the recipe has {', '.join(now)}",
            "its numbers would be mixed up; run it anew, without --resume",
        )
    return changed
