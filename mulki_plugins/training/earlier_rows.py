"""Restores a run from a checkpoint and, in a run that extends another one, fills in the rows of the tasks learned before.

Their accuracies on the further tasks need the weights after each of those tasks: the pre-trained ones for the zero-shot
row, for the others those that the run has kept. A cell without its weights stays empty.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from mulki_plugins.models.classifier import ClipClassifier
from mulki_plugins.training.checkpoint import Checkpoint, Damaged
from mulki_plugins.training.finite import overrides
from mulki_plugins.training.groups import CLIP
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


def restore(run: Run, checkpoint: Checkpoint) -> None:
    """Restore the run; at a task's end also measure the accuracies that are still missing before that moment."""
    gaps = [i for i, row in enumerate(_rows(run)) if any(map(math.isnan, row))]
    fill = bool(gaps) and not checkpoint.moment.steps
    earlier = copy.deepcopy(run.strategy.model) if fill else None  # pre-trained, its adapters not grown yet
    run.checkpointing.restore(checkpoint, [e.dataset for e in run.built.benchmark.train_stream])
    run.progress.say(f"resuming from {checkpoint.path.name}")
    if earlier is not None:
        _fill(run, checkpoint, earlier)


def _rows(run: Run) -> list[list[float]]:
    """The zero-shot row and the matrix: each row's index is the number of tasks learned."""
    return [run.result.zero_shot, *run.result.matrix]


def _fill(run: Run, checkpoint: Checkpoint, earlier: ClipClassifier) -> None:
    """Test the models of the rows with empty cells. earlier: becomes the model after one task after the other."""
    strategy, kept, reasons = run.strategy, kept_weights(run.folder), dict[str, str]()
    pretrained = {name: weight.detach().clone() for name, weight in earlier.own_weights().items()}
    now = strategy.model, strategy.learned
    for learned, row in enumerate(_rows(run)):
        if 0 < learned < checkpoint.moment.tasks:  # adapters grow as they did
            earlier.before_task(learned - 1)
            earlier.after_task(learned - 1)
        columns = [j for j, value in enumerate(row) if math.isnan(value)]
        if not columns:
            continue
        name = run.result.tasks[learned - 1] if learned else "zero-shot"
        if learned == checkpoint.moment.tasks:
            strategy.model, strategy.learned = now
        elif reason := _took_part(run):
            reasons[name] = reason
            continue
        elif learned == 0:
            strategy.model, strategy.learned = earlier, set()
        else:
            try:
                strategy.learned = _load(earlier, kept.get(learned), pretrained)
            except Unknown as error:
                reasons[name] = str(error)
                continue
            strategy.model = earlier
        held_out = {task: c for task, c in run.result.held_out.items() if learned < len(c) and math.isnan(c[learned])}
        tested = [each for each in run.built.benchmark.held_out_stream if each.task_name in held_out]
        values = run.evaluate([*(run.built.benchmark.test_stream[j] for j in columns), *tested])
        for j, value in zip(columns, values, strict=False):
            row[j] = value
        for task, column in held_out.items():
            column[learned] = run.recorder.accuracies[task]
        run.records.add_predictions(run.recorder.answers, learned)
        run.progress.say(f"    {name}: tested on {', '.join(run.result.tasks[j] for j in columns)}")
    strategy.model, strategy.learned = now
    for reason in dict.fromkeys(reasons.values()):
        names = ", ".join(name for name, each in reasons.items() if each == reason)
        run.warn(
            f"not tested on the further tasks: the model after {names}: {reason}; "
            "metrics that need these accuracies have no value"
        )
    run.save_result()
    run.checkpointing.evaluated()


class Unknown(Exception):
    """Why the model after a task cannot be had."""


def _load(model: ClipClassifier, kept: Checkpoint | None, pretrained: Mapping[str, Tensor]) -> set[int]:
    """Load all weights of the model after a task; returns the labels of the tasks learned by then."""
    if kept is None:
        raise Unknown("the weights were not kept (train.checkpoint.weights), or are damaged")
    try:
        state = kept.state()
        stored = completed(kept.weights(), kept.left_out, pretrained, kept.path)
        weights = {CLIP + name: value for name, value in stored.items()} | state["model"]
    except Damaged as error:
        raise Unknown("the weights are damaged") from error
    model.make_room(weights)
    expected = model.state_dict()
    if {n: w.shape for n, w in weights.items()} != {n: w.shape for n, w in expected.items()}:
        raise Unknown("a plugin has added or removed weights since, so the kept weights no longer fit the model")
    model.load_state_dict(weights)
    for adapter, own in zip(model.adapters, state.get("adapters", ()), strict=False):
        adapter.load_state_dict(own)
    return set(kept.run["learned"])


def _took_part(run: Run) -> str:
    """Why only the last row can be measured: a plugin takes part in evaluations, and its earlier state is not kept."""
    names = [e.name for e in run.plugins if any(overrides(e.plugin, event) for event in _EVENTS)]
    return (
        f"the plugin {names[0]!r} takes part in evaluations, and its state after these tasks is gone" if names else ""
    )
