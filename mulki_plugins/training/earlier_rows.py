"""Restores a run from a checkpoint and, in a run that extends another one, fills in the rows of the tasks learned before.

Their accuracies on the further tasks need the weights after each of those tasks: the pre-trained ones for the zero-shot
row, for the others those that the run has kept. A cell without its weights stays empty.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mulki_plugins.models.head import HEAD
from mulki_plugins.training.checkpoint import Checkpoint, Damaged
from mulki_plugins.training.contents import CLIP
from mulki_plugins.training.finite import overrides
from mulki_plugins.training.kept_weights import kept_weights
from mulki_plugins.training.pretrained import completed

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
    initial = _copy(run.strategy.model.state_dict()) if fill else {}
    run.checkpointing.restore(checkpoint, [e.dataset for e in run.built.benchmark.train_stream])
    run.progress.say(f"resuming from {checkpoint.path.name}")
    if fill:
        _fill(run, checkpoint, initial)


def _rows(run: Run) -> list[list[float]]:
    """The zero-shot row and the matrix: each row's index is the number of tasks learned."""
    return [run.result.zero_shot, *run.result.matrix]


def _fill(run: Run, checkpoint: Checkpoint, initial: Weights) -> None:
    strategy, now = run.strategy, _copy(run.strategy.model.state_dict())
    learned_now, kept = strategy.learned, kept_weights(run.folder)
    unknown = []
    for learned, row in enumerate(_rows(run)):
        columns = [j for j, value in enumerate(row) if math.isnan(value)]
        if not columns:
            continue
        name = run.result.tasks[learned - 1] if learned else "zero-shot"
        if learned == checkpoint.moment.tasks:
            weights, strategy.learned = now, learned_now
        elif _took_part(run):
            weights = {}
        elif learned == 0:
            weights, strategy.learned = initial, set()
        else:
            weights, strategy.learned = _read(kept.get(learned), initial)
        if _shapes(weights) != _shapes(now):
            unknown.append(name)
            continue
        strategy.model.restart_head(sorted(strategy.learned))
        strategy.model.make_room(weights)
        strategy.model.load_state_dict(weights)
        held_out = {name: c for name, c in run.result.held_out.items() if learned < len(c) and math.isnan(c[learned])}
        tested = [each for each in run.built.benchmark.held_out_stream if each.task_name in held_out]
        values = run.evaluate([*(run.built.benchmark.test_stream[j] for j in columns), *tested])
        for j, value in zip(columns, values, strict=False):
            row[j] = value
        for name, column in held_out.items():
            column[learned] = run.recorder.accuracies[name]
        run.records.add_predictions(run.recorder.answers, learned)
        run.progress.say(f"    {name}: tested on {', '.join(run.result.tasks[j] for j in columns)}")
    strategy.learned = learned_now
    strategy.model.restart_head(sorted(learned_now))
    strategy.model.make_room(now)
    strategy.model.load_state_dict(now)
    if unknown:
        reason = _took_part(run) or "the weights were not kept (train.checkpoint.weights), or are damaged"
        run.warn(
            f"not tested on the further tasks: the model after {', '.join(unknown)}: {reason}; "
            "metrics that need these accuracies have no value"
        )
    run.save_result()
    run.checkpointing.evaluated()


def _read(kept: Checkpoint | None, initial: Weights) -> tuple[Weights, set[int]]:
    """All weights of the model after a task, and the labels of the tasks learned by then; none if they are damaged."""
    if kept is None:
        return {}, set()
    pretrained = {name.removeprefix(CLIP): value for name, value in initial.items() if name.startswith(CLIP)}
    try:
        stored = completed(kept.weights(), kept.left_out, pretrained, kept.path)
        weights = {CLIP + name: value for name, value in stored.items()} | kept.state()["model"]
    except Damaged:
        return {}, set()
    return weights, set(kept.run["learned"])


def _shapes(weights: Weights) -> dict[str, torch.Size]:
    """The shapes of the model's own weights; those of a head change with the tasks that it has learned."""
    return {name: weight.shape for name, weight in weights.items() if not name.startswith(HEAD)}


def _took_part(run: Run) -> str:
    """Why only the last row can be measured: a plugin takes part in evaluations, and its earlier state is not kept."""
    names = [e.name for e in run.plugins if any(overrides(e.plugin, event) for event in _EVENTS)]
    return (
        f"the plugin {names[0]!r} takes part in evaluations, and its state after these tasks is gone" if names else ""
    )


def _copy(weights: Mapping[str, Tensor]) -> Weights:
    return {name: value.detach().clone() for name, value in weights.items()}
