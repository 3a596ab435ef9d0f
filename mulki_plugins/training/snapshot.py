"""What a run consists of at one moment, taken from the strategy and put back into a new one.

At a task's end: the weights, and what the plugins keep from task to task. Within a task also the optimizer, the scaler, the
random generators and what the plugins keep from step to step; the loader's place is the number of steps, see TaskBatches.
Everything that a plugin makes in `before_training_exp` (teachers, prototypes, starting weights) is made again, from the
same weights, data and random numbers.
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
from mulki_plugins.training.checkpoints import Checkpoint
from mulki_plugins.training.packing import packed
from mulki_plugins.training.seeding import random_state, set_random_state
from mulki_plugins.training.template import ContinualTemplate

_CLIP = "clip."
"""The model's weights with this before their names are open_clip's own."""


@frozen(eq=False)
class Named:
    """A plugin of the stack by its registered name."""

    name: str
    plugin: Any

    def state(self) -> dict[str, Any]:
        """What it keeps: the result of its `state_dict()`, nothing where it has none. MulkiError if it cannot be written."""
        if not hasattr(self.plugin, "state_dict"):
            return {}
        found = self.plugin.state_dict()
        part = catalog().parts.get(("plugin", self.name))
        what = f"the {part or f'plugin {self.name!r}'} in its state_dict"
        if not isinstance(found, Mapping):
            raise MulkiError(f"{what}: expected a dict, got a {type(found).__name__}")
        try:
            packed(found)
        except (TypeError, ValueError, RecursionError) as error:
            reason = "it contains itself" if isinstance(error, RecursionError) else str(error).removeprefix("/")
            keep = "keep numbers, texts, tensors, and lists and dicts of them"
            raise MulkiError(f"{what}: {reason}", keep) from error
        return dict(found)

    def restore(self, state: dict[str, Any]) -> None:
        if state and not hasattr(self.plugin, "load_state_dict"):
            raise MulkiError(f"the plugin {self.name!r} has a state_dict and no load_state_dict")
        if hasattr(self.plugin, "load_state_dict"):
            self.plugin.load_state_dict(state)


def weights_of(strategy: ContinualTemplate) -> dict[str, Tensor]:
    """The model's weights and buffers by open_clip's names, as they stand."""
    model = strategy.model.state_dict()
    return {name.removeprefix(_CLIP): value for name, value in model.items() if name.startswith(_CLIP)}


def state_at_end(strategy: ContinualTemplate, plugins: Sequence[Named]) -> dict[str, Any]:
    """All but the weights between two tasks."""
    model = strategy.model.state_dict()
    return {
        "model": {name: value for name, value in model.items() if not name.startswith(_CLIP)},
        "plugins": [[entry.name, entry.state()] for entry in plugins],
    }


def state_within(strategy: ContinualTemplate, plugins: Sequence[Named]) -> dict[str, Any]:
    """All but the weights after a step."""
    python, numpy, cpu = random_state()
    return {
        **state_at_end(strategy, plugins),
        "optimizer": strategy.optimizer.state_dict(),
        "scaler": strategy.scaler.state_dict(),
        "random": {
            "python": python, "numpy": (numpy[0], numpy[1].tolist(), *numpy[2:]), "torch": cpu,
            "cuda": torch.cuda.get_rng_state_all() if strategy.device.type == "cuda" else [],
        },
    }  # fmt: skip


def restore_weights(strategy: ContinualTemplate, checkpoint: Checkpoint, state: dict[str, Any]) -> None:
    """Put the weights of a checkpoint into the model; nothing where they are the pre-trained ones.

    MulkiError where the model has other weights than the checkpoint: what a plugin adds it adds again in `before_training`
    or `load_state_dict`, which come before.
    """
    weights = {_CLIP + name: value for name, value in checkpoint.weights().items()} | state["model"]
    if not weights:
        return
    model = strategy.model.state_dict()
    if lacking := [name for name in model if name not in weights]:
        raise MulkiError(f"{checkpoint.path}: holds no {lacking[0]!r}", "it is of another model")
    if unknown := [name for name in weights if name not in model]:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise MulkiError(
            f"{checkpoint.path}: holds weights that the model does not have: {unknown[0]!r}{more}",
            "a plugin that adds weights must add them again in its before_training or load_state_dict; run it anew",
        )
    for name, value in weights.items():
        if value.shape != model[name].shape:
            shapes = f"{tuple(value.shape)}, and {tuple(model[name].shape)} in the model"
            raise MulkiError(f"{checkpoint.path}: {name!r} is of the shape {shapes}", "it is of another model")
    strategy.model.load_state_dict(weights)


def restore_plugins(plugins: Sequence[Named], state: dict[str, Any]) -> None:
    """Hand each plugin what it kept."""
    if [name for name, _ in state["plugins"]] != [entry.name for entry in plugins]:
        raise MulkiError(f"the checkpoint is of the plugins {', '.join(name for name, _ in state['plugins'])}")
    for entry, (_, kept) in zip(plugins, state["plugins"], strict=True):
        entry.restore(kept)


def restore_within(strategy: ContinualTemplate, plugins: Sequence[Named], checkpoint: Checkpoint) -> None:
    """Put back all that a step changes; called when the task has begun anew and the batches before have been dropped."""
    state = checkpoint.state()
    restore_plugins(plugins, state)
    restore_weights(strategy, checkpoint, state)
    _restore_optimizer(strategy, checkpoint, state["optimizer"])
    strategy.scaler.load_state_dict(state["scaler"])
    restore_clock(strategy, checkpoint.run["clock"])
    random = state["random"]
    version, words, gauss = random["python"]
    kind, keys, *rest = random["numpy"]
    set_random_state(((version, words, gauss), (kind, np.array(keys, dtype=np.uint32), *rest), random["torch"]))
    if random["cuda"]:
        torch.cuda.set_rng_state_all(random["cuda"])


def _restore_optimizer(strategy: ContinualTemplate, checkpoint: Checkpoint, state: dict[str, Any]) -> None:
    """MulkiError where the optimizer trains other weights than the one whose state was kept."""
    there = [len(group["params"]) for group in strategy.optimizer.param_groups]
    kept = [len(group["params"]) for group in state["param_groups"]]
    own = {id(p) for p in strategy.model.parameters()}
    strangers = any(id(p) not in own for group in strategy.optimizer.param_groups for p in group["params"])
    if there != kept or strangers:
        what = "weights that the model no longer has" if strangers else f"{there} weights, of {kept} that were kept"
        hint = "a plugin that adds weights must have the same ones when the task has begun anew; run it anew"
        raise MulkiError(f"{checkpoint.path}: the optimizer trains {what}", hint)
    strategy.optimizer.load_state_dict(state)


def clock_of(strategy: ContinualTemplate) -> dict[str, int]:
    """Avalanche's counters."""
    return {name: value for name, value in vars(strategy.clock).items() if isinstance(value, int)}


def restore_clock(strategy: ContinualTemplate, counters: dict[str, int]) -> None:
    for name, value in counters.items():
        setattr(strategy.clock, name, value)
