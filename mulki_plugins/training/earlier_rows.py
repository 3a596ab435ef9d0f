"""Restores a run from a checkpoint and, in a run that extends another one, fills in the rows of the tasks learned before.

Their accuracies on the further tasks need the weights after each of those tasks: the pre-trained ones for the zero-shot
row, for the others those that the run has kept. A cell without its weights stays empty.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mulki_plugins.models.classifier import ClipClassifier
from mulki_plugins.training.checkpoint import Checkpoint, Damaged
from mulki_plugins.training.contents import CLIP
from mulki_plugins.training.finite import overrides
from mulki_plugins.training.kept_weights import kept_weights

if TYPE_CHECKING:
    from mulki_plugins.training.run import Run

_EVENTS = tuple(
    f"{when}_eval{what}"
    for when in ("before", "after")
    for what in ("", "_dataset_adaptation", "_exp", "_iteration", "_forward")
)
"""The events of an evaluation, in which a plugin may change the answers."""

Weights = dict[str, Tensor]


def restore(run: Run, checkpoint: Checkpoint) -> None:
    """Restore the run; at a task's end also measure the accuracies that are still missing before that moment."""
    gaps = [i for i, row in enumerate(_rows(run)) if any(map(math.isnan, row))]
    fill = bool(gaps) and not checkpoint.moment.steps
    initial = copy.deepcopy(run.strategy.model) if fill else None
    run.checkpointing.restore(checkpoint, [e.dataset for e in run.built.benchmark.train_stream])
    run.progress.say(f"resuming from {checkpoint.path.name}")
    if initial is not None:
        _fill(run, checkpoint, initial)


def _rows(run: Run) -> list[list[float]]:
    """The zero-shot row and the matrix: each row's index is the number of tasks learned."""
    return [run.result.zero_shot, *run.result.matrix]


def _fill(run: Run, checkpoint: Checkpoint, initial: ClipClassifier) -> None:
    strategy, now = run.strategy, run.strategy.model
    learned_now, kept = strategy.learned, kept_weights(run.folder)
    unknown = []
    for learned, row in enumerate(_rows(run)):
        columns = [j for j, value in enumerate(row) if math.isnan(value)]
        if not columns:
            continue
        name = run.result.tasks[learned - 1] if learned else "zero-shot"
        if learned == checkpoint.moment.tasks:
            weights, strategy.learned = now.state_dict(), learned_now
        elif _took_part(run):
            weights = {}
        elif learned == 0:
            weights, strategy.learned = initial.state_dict(), set()
        else:
            weights, strategy.learned = _read(kept.get(learned))
        model = now if learned == checkpoint.moment.tasks else _as_after(initial, learned, kept.get(learned))
        if _shapes(weights) != _shapes(model.state_dict()):
            unknown.append(name)
            continue
        model.load_state_dict(weights)
        strategy.model = model
        values = run.evaluate([run.built.benchmark.test_stream[j] for j in columns])
        for j, value in zip(columns, values, strict=True):
            row[j] = value
        run.records.add_predictions(run.recorder.answers, learned)
        run.progress.say(f"    {name}: tested on {', '.join(run.result.tasks[j] for j in columns)}")
    strategy.model = now
    strategy.learned = learned_now
    if unknown:
        reason = _took_part(run) or "the weights were not kept (train.checkpoint.weights), or are damaged"
        run.warn(
            f"not tested on the further tasks: the model after {', '.join(unknown)}: {reason}; "
            "metrics that need these accuracies have no value"
        )
    run.result.write(run.folder)
    run.checkpointing.evaluated()


def _as_after(initial: ClipClassifier, learned: int, kept: Checkpoint | None) -> ClipClassifier:
    """A copy of the model whose adapters have grown for so many tasks and no more, with room for the weights it had then."""
    model = copy.deepcopy(initial)
    for task in range(learned):
        model.before_task(task)
        model.after_task(task)
    with suppress(Damaged):
        for adapter, state in zip(model.adapters, kept.state().get("adapters", ()) if kept else (), strict=False):
            adapter.load_state_dict(state)
    return model


def _read(kept: Checkpoint | None) -> tuple[Weights, set[int]]:
    """All weights of the model after a task, and the labels of the tasks learned by then; none if they are damaged."""
    if kept is None:
        return {}, set()
    try:
        weights = {CLIP + name: value for name, value in kept.weights().items()} | kept.state()["model"]
    except Damaged:
        return {}, set()
    return weights, set(kept.run["learned"])


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: weight.shape for name, weight in weights.items()}


def _took_part(run: Run) -> str:
    """Why only the last row can be measured: a plugin takes part in evaluations, and its earlier state is not kept."""
    names = [e.name for e in run.plugins if any(overrides(e.plugin, event) for event in _EVENTS)]
    return (
        f"the plugin {names[0]!r} takes part in evaluations, and its state after these tasks is gone" if names else ""
    )
