"""What a run consists of, when it is saved, and how it is restored into new objects.

At a task's end: the weights, and what the plugins keep from task to task. Within a task also the optimizer, the gradient
scaler, the random generators and what the plugins keep from step to step; the place among the batches is the number of
steps, see TaskBatches. Whatever a plugin makes in `before_training_exp` (teachers, prototypes, starting weights) is made
again, from the same weights, data and random numbers.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import asdict, frozen
from avalanche.benchmarks.utils import concat_datasets
from torch import Tensor

from mulki_plugins.errors import MulkiError
from mulki_plugins.recipe.schema import Recipe
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.report.result import Result
from mulki_plugins.training.checkpoint import Checkpoint, Moment, amend, prune, write_checkpoint
from mulki_plugins.training.rng import random_state, set_random_state
from mulki_plugins.training.signals import Stopped, StopRequest
from mulki_plugins.training.strategy import ContinualTemplate

_CLIP = "clip."
"""Prefix of the model's weights; without it their names are open_clip's own."""


@frozen(eq=False)
class StackEntry:
    """A plugin of the stack and its registered name."""

    name: str
    plugin: Any

    def state(self) -> dict[str, Any]:
        """The plugin's `state_dict()`, or {} if it has none. MulkiError if a checkpoint cannot hold it."""
        if not hasattr(self.plugin, "state_dict"):
            return {}
        kept = self.plugin.state_dict()
        part = catalog().parts.get(("plugin", self.name))
        what = f"the {part or f'plugin {self.name!r}'} in its state_dict"
        if not isinstance(kept, Mapping):
            raise MulkiError(f"{what}: expected a dict, got a {type(kept).__name__}")
        try:
            state: dict[str, Any] = storable(kept)
        except (TypeError, ValueError, RecursionError) as error:
            reason = "it contains itself" if isinstance(error, RecursionError) else str(error).removeprefix("/")
            hint = "keep numbers, texts, tensors, and lists and dicts of them"
            raise MulkiError(f"{what}: {reason}", hint) from error
        return state

    def restore(self, state: dict[str, Any]) -> None:
        if state and not hasattr(self.plugin, "load_state_dict"):
            raise MulkiError(f"the plugin {self.name!r} has a state_dict and no load_state_dict")
        if hasattr(self.plugin, "load_state_dict"):
            self.plugin.load_state_dict(state)


def weights_of(strategy: ContinualTemplate) -> dict[str, Tensor]:
    """The model's current weights and buffers by open_clip's names."""
    model = strategy.model.state_dict()
    return {name.removeprefix(_CLIP): value for name, value in model.items() if name.startswith(_CLIP)}


def state_between_tasks(strategy: ContinualTemplate, plugins: Sequence[StackEntry]) -> dict[str, Any]:
    """Everything but the weights between two tasks."""
    model = strategy.model.state_dict()
    buffers = {name: value for name, value in model.items() if not name.startswith(_CLIP)}
    adapters = [dict(adapter.state_dict()) for adapter in strategy.model.adapters]
    kept = {"model": buffers, "plugins": [[entry.name, entry.state()] for entry in plugins], "adapters": adapters}
    state: dict[str, Any] = storable(kept)
    return state


def state_within_task(strategy: ContinualTemplate, plugins: Sequence[StackEntry]) -> dict[str, Any]:
    """Everything but the weights after a step."""
    python, numpy, cpu = random_state()
    state: dict[str, Any] = storable(
        {
            **state_between_tasks(strategy, plugins),
            "optimizer": strategy.optimizer.state_dict(),
            "scaler": strategy.scaler.state_dict(),
            "random": {
                "python": python, "numpy": (numpy[0], numpy[1].tolist(), *numpy[2:]), "torch": cpu,
                "cuda": torch.cuda.get_rng_state_all() if strategy.device.type == "cuda" else [],
            },
        }
    )  # fmt: skip
    return state


def restore_plugins(plugins: Sequence[StackEntry], state: dict[str, Any]) -> None:
    """Give each plugin the state it kept."""
    names = [name for name, _ in state["plugins"]]
    if names != [entry.name for entry in plugins]:
        raise MulkiError(f"the checkpoint is of another stack of plugins: {', '.join(names)}")
    for entry, (_, kept) in zip(plugins, state["plugins"], strict=True):
        entry.restore(kept)


def restore_weights(strategy: ContinualTemplate, checkpoint: Checkpoint, state: dict[str, Any]) -> None:
    """Load a checkpoint's weights into the model, unless they are the pre-trained ones.

    MulkiError if the model has other weights. A plugin that adds weights must add them again in `before_training` or
    `load_state_dict`, which are called before.
    """
    weights = {_CLIP + name: value for name, value in checkpoint.weights().items()} | state["model"]
    if not weights:
        return
    model = strategy.model.state_dict()
    if missing := [name for name in model if name not in weights]:
        raise MulkiError(f"{checkpoint.path}: holds no {missing[0]!r}", "it is of another model")
    if unknown := [name for name in weights if name not in model]:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise MulkiError(
            f"{checkpoint.path}: holds weights that the model does not have: {unknown[0]!r}{more}",
            "a plugin that adds weights must add them again in its before_training or load_state_dict; start the run again",
        )
    for name, value in weights.items():
        if value.shape != model[name].shape:
            shapes = f"{tuple(value.shape)}, and {tuple(model[name].shape)} in the model"
            raise MulkiError(f"{checkpoint.path}: {name!r} has the shape {shapes}", "it is of another model")
    strategy.model.load_state_dict(weights)
    for adapter, kept in zip(strategy.model.adapters, state.get("adapters", ()), strict=False):
        adapter.load_state_dict(kept)


def restore_within_task(strategy: ContinualTemplate, plugins: Sequence[StackEntry], checkpoint: Checkpoint) -> None:
    """Restore everything that a step changes. Called when the task has begun again and earlier batches are skipped."""
    state = checkpoint.state()
    restore_plugins(plugins, state)
    restore_weights(strategy, checkpoint, state)
    _restore_optimizer(strategy, checkpoint, state["optimizer"])
    strategy.scaler.load_state_dict(state["scaler"])
    restore_clock(strategy, checkpoint.run["clock"])
    random = state["random"]
    kind, keys, *rest = random["numpy"]
    set_random_state((random["python"], (kind, np.array(keys, dtype=np.uint32), *rest), random["torch"]))
    if random["cuda"]:
        torch.cuda.set_rng_state_all(random["cuda"])


def _restore_optimizer(strategy: ContinualTemplate, checkpoint: Checkpoint, state: dict[str, Any]) -> None:
    """MulkiError if the optimizer trains other weights than the one whose state was kept."""
    groups = strategy.optimizer.param_groups
    sizes, kept = ([len(group["params"]) for group in each] for each in (groups, state["param_groups"]))
    weights = {id(p) for p in strategy.model.parameters()}
    foreign = any(id(p) not in weights for group in groups for p in group["params"])
    if sizes != kept or foreign:
        what = "weights that the model no longer has" if foreign else f"{sizes} weights, the checkpoint's {kept}"
        hint = (
            "a plugin that adds weights must have added the same ones when the task begins again; start the run again"
        )
        raise MulkiError(f"{checkpoint.path}: the optimizer trains {what}", hint)
    strategy.optimizer.load_state_dict(state)


def clock_of(strategy: ContinualTemplate) -> dict[str, int]:
    """Avalanche's counters of tasks, epochs and iterations."""
    return {name: value for name, value in vars(strategy.clock).items() if isinstance(value, int)}


def restore_clock(strategy: ContinualTemplate, counters: dict[str, int]) -> None:
    for name, value in counters.items():
        setattr(strategy.clock, name, value)


def storable(value: Any) -> Any:
    """A copy of nested state in the types a checkpoint can hold; tensors that own their memory are shared.

    These are dicts, lists, tuples, sets, numbers, texts and dense tensors. Equal states are written as equal bytes.
    TypeError, with the path, for anything else.
    """
    return _storable(value, "", set())


def _storable(value: Any, path: str, storages: set[int]) -> Any:
    where = path or "the state"
    if value is None or isinstance(value, (bool, float)):
        return value
    if isinstance(value, int) and value.bit_length() < 2000:  # weights_only=True reads no longer ones
        return int(value)
    if isinstance(value, str):
        return sys.intern(str(value))  # pickle writes the same object only once
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.is_quantized or value.is_meta:
            kind = f"{value.dtype}, {value.layout}, on {value.device}"
            raise TypeError(f"{where}: a tensor of this kind cannot be kept in a checkpoint: {kind}")
        tensor = value.detach().as_subclass(Tensor)
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in storages:
            tensor = tensor.clone()  # a view: torch.save would write all of what it shares
        storages.add(tensor.untyped_storage().data_ptr())
        return tensor
    if isinstance(value, Mapping):
        return {
            _storable(key, f"{path}/{key}", storages): _storable(item, f"{path}/{key}", storages)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple, set, frozenset)):
        items = [_storable(item, f"{path}/{i}", storages) for i, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items) if isinstance(value, tuple) else set(items)
    raise TypeError(f"{where}: a {type(value).__name__} cannot be kept in a checkpoint")


class Checkpointing:
    """Saves a run at its start, every so many steps, after each task, and when a signal stops it; restores it, too."""

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
        self.folder, self.strategy, self.plugins = folder, strategy, plugins
        self.loggers = dict(zip(recipe.loggers, loggers, strict=True))
        self.result, self.identity, self.stop = result, identity, stop
        self.tasks = 0
        """The number of tasks learned."""
        self._earlier = self._earlier_in_task = 0.0
        """Seconds before the run was resumed: in all, and in the task it was stopped in."""
        self._began = self._task_began = time.monotonic()
        self._end: Checkpoint | None = None
        """The checkpoint of the last task's end, which those within the next task build on."""
        strategy.after_step, strategy.between_batches = self.after_step, self.stop_if_asked

    def started(self) -> None:
        """The zero-shot row is measured. No weights are saved: they are the pre-trained ones that the recipe names."""
        self._save_end("start", {}, {"model": {}, "plugins": []})

    def task_begins(self) -> None:
        self._task_began = time.monotonic()

    def learned(self, tasks: int, name: str) -> None:
        """The training of a task is over; its evaluation is still to come."""
        self.tasks, self._earlier_in_task = tasks, 0.0
        safe = "".join(c if c.isalnum() or c in "-_" else "-" for c in name)[:80]
        if self.settings.keep:
            state = state_between_tasks(self.strategy, self.plugins)
            self._save_end(f"task-{tasks:02d}-{safe}", weights_of(self.strategy), state)

    def evaluated(self) -> None:
        """The evaluation after a task is over."""
        if self._end is not None:
            self._end = amend(self._end, self._progress())

    def after_step(self) -> None:
        """Save the run if a checkpoint is due, or if a signal stops it."""
        steps = self.strategy.clock.train_exp_iterations
        due = self.settings.every and steps % self.settings.every == 0 and steps < self.strategy.steps
        if self.settings.keep and self._end is not None and (due or self.stop.number):
            prune(self.folder, self._save_step(steps), self.settings.keep)
        self.stop_if_asked()

    def stop_if_asked(self) -> None:
        if self.stop.number:
            resume = f"resume it with `mulki resume {shlex.quote(str(self.folder))}`"
            hint = resume if self.settings.keep else "no checkpoint was kept"
            raise Stopped(f"stopped by {self.stop.name}", hint, self.stop.number)

    def seconds(self) -> float:
        """Duration of the run, with the time before it was resumed."""
        return self._earlier + time.monotonic() - self._began

    def task_seconds(self) -> float:
        """Duration of the current task's training, with the time before the run was resumed."""
        return self._earlier_in_task + time.monotonic() - self._task_began

    def _save_end(self, name: str, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
        if self.settings.keep:
            self._end = self._save(name, Moment(self.tasks), None, weights, state)
            prune(self.folder, self._end, self.settings.keep)

    def _save_step(self, steps: int) -> Checkpoint:
        assert self._end is not None
        self.strategy.settle()
        name, moment = f"task-{self.tasks + 1:02d}-step-{steps:06d}", Moment(self.tasks, steps)
        weights, state = weights_of(self.strategy), state_within_task(self.strategy, self.plugins)
        return self._save(name, moment, self._end.path.name, weights, state, task_seconds=self.task_seconds())

    def _save(self, name: str, moment: Moment, base: str | None, weights: Any, state: Any, **more: Any) -> Checkpoint:
        progress, metadata = self._progress() | more, getattr(self.strategy.model, "weights_metadata", {})
        return write_checkpoint(
            self.folder, name, moment, base=base, weights=weights, state=state, progress=progress, metadata=metadata
        )

    def _progress(self) -> dict[str, Any]:
        """The rows so far, the counters, and how far the loggers' files reach."""
        rows = asdict(self.result, filter=lambda key, _: key.name in ("zero_shot", "matrix", "seconds", "left_out"))
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
        strategy._before_training()  # as before the first task, where some plugins note the pre-trained model
        for task in range(end.moment.tasks):  # adapters grow again as they did
            strategy.model.before_task(task)
            strategy.model.after_task(task)
        state = end.state()
        if end.moment.tasks:
            restore_plugins(self.plugins, state)
        restore_weights(strategy, end, state)
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
        self.tasks, self._end = end.moment.tasks, end
        if checkpoint.moment.steps:
            loggers = strategy.evaluator.loggers
            strategy.evaluator.loggers = [each for each in loggers if each not in self.loggers.values()]

            def then() -> None:
                restore_within_task(strategy, self.plugins, checkpoint)
                strategy.evaluator.loggers = loggers  # those that write have the skipped steps already

            strategy.resume_at(checkpoint.moment.steps, then)
