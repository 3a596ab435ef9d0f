"""What a run consists of: taken from it for a checkpoint, and put back into new objects.

At a task's end: the weights, and what the plugins keep from task to task. Within a task also the optimizer, the gradient
scaler, the random generators and what the plugins keep from step to step; the place among the batches is the number of
steps, see TaskBatches. Whatever a plugin makes in `before_training_exp` (teachers, prototypes, starting weights) is made
again, from the same weights, data and random numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from attrs import frozen
from torch import Tensor

from mulki_plugins.errors import MulkiError
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.training.checkpoint import Checkpoint
from mulki_plugins.training.groups import CLIP
from mulki_plugins.training.pretrained import completed, resolved
from mulki_plugins.training.rng import random_state, set_random_state
from mulki_plugins.training.snapshot import storable
from mulki_plugins.training.strategy import ContinualTemplate


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
    return {name.removeprefix(CLIP): value for name, value in model.items() if name.startswith(CLIP)}


def state_between_tasks(strategy: ContinualTemplate, plugins: Sequence[StackEntry]) -> dict[str, Any]:
    """Everything but the weights between two tasks."""
    model = strategy.model.state_dict()
    buffers = {name: value for name, value in model.items() if not name.startswith(CLIP)}
    adapters = [dict(adapter.state_dict()) for adapter in strategy.model.adapters]
    kept = {
        "model": buffers,
        "plugins": [[entry.name, entry.state()] for entry in plugins],
        "adapters": adapters,
        "scaler": strategy.scaler.state_dict(),
    }
    state: dict[str, Any] = storable(kept)
    return state


def state_within_task(strategy: ContinualTemplate, plugins: Sequence[StackEntry]) -> dict[str, Any]:
    """Everything but the weights after a step."""
    python, numpy, cpu = random_state()
    state: dict[str, Any] = storable(
        {
            **state_between_tasks(strategy, plugins),
            "optimizer": strategy.optimizer.state_dict(),
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


def restore_scaler(strategy: ContinualTemplate, state: dict[str, Any]) -> None:
    """The loss's scale in half precision goes on from task to task."""
    if kept := state.get("scaler"):
        strategy.scaler.load_state_dict(kept)


def restore_weights(
    strategy: ContinualTemplate, checkpoint: Checkpoint, state: dict[str, Any], pretrained: Mapping[str, Tensor]
) -> None:
    """Load a checkpoint's weights into the model, unless they are the pre-trained ones.

    pretrained: the model's own weights before any training, for a checkpoint that leaves out what stayed so.
    MulkiError if the model has other weights. A plugin that adds weights must add them again in `before_training` or
    `load_state_dict`, which are called before.
    """
    stored = completed(checkpoint.weights(), checkpoint.left_out, pretrained, checkpoint.path)
    weights = {CLIP + name: value for name, value in stored.items()} | state["model"]
    if not weights:
        return
    strategy.model.make_room(weights)
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


def restore_within_task(
    strategy: ContinualTemplate,
    plugins: Sequence[StackEntry],
    checkpoint: Checkpoint,
    pretrained: Mapping[str, Tensor],
) -> None:
    """Restore everything that a step changes. Called when the task has begun again and earlier batches are skipped."""
    state = checkpoint.state()
    restore_plugins(plugins, resolved(state, pretrained, checkpoint.path))
    restore_weights(strategy, checkpoint, state, pretrained)
    _restore_optimizer(strategy, checkpoint, state["optimizer"])
    restore_scaler(strategy, state)
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
    weights = {id(p) for p in strategy.all_weights().values()}
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
