"""The check that a plugin survives a checkpoint and a resume, by the very functions that a run is kept and restored with."""

from __future__ import annotations

import inspect
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from mulki_plugins.errors import MulkiError
from mulki_plugins.registry.guard import cause_of
from mulki_plugins.testing.conduct_checks import alike
from mulki_plugins.testing.laboratory import TASKS, Laboratory, same
from mulki_plugins.testing.subject import Fault
from mulki_plugins.testing.surroundings import kept_random_state
from mulki_plugins.testing.trial import Place, Trial
from mulki_plugins.training.checkpoint import Checkpoint, write_checkpoint
from mulki_plugins.training.checkpoint import Moment as Moment
from mulki_plugins.training.state import (
    StackEntry,
    clock_of,
    restore_clock,
    restore_weights,
    restore_within_task,
    state_between_tasks,
    state_within_task,
    storable,
    weights_of,
)


def resume(lab: Laboratory) -> None:
    """New objects with what a checkpoint kept go on as the old ones did: after task 1, and from within task 2."""
    if lab.subject.declared("no_resume"):
        return  # declared: a run with it is not resumed
    with kept_random_state(), TemporaryDirectory() as folder:
        benchmark, stack = Place().benchmark(), lab.stack()
        one = Place().trial(stack.plugins)
        found: dict[int, Checkpoint] = {}

        def learned() -> None:
            found.setdefault(0, _written(Path(folder), one, stack, 0))

        lab.train(one, benchmark, TASKS[:1], learned=learned)
        evaluated, end = one.outputs, found[0]
        changed = _changed(lab.subject.made(), stack.subject, lab.subject.factory)

        def after_step() -> None:
            if one.strategy.clock.train_exp_iterations == WITHIN:
                found[WITHIN] = _written(Path(folder), one, stack, WITHIN)

        one.strategy.after_step = after_step
        lab.train(one, benchmark, TASKS[1:])
        if not same(lab.ordinary.after[1], one.after[1]):
            what = "task 2 is another where state_dict has been called"
            raise Fault(what, "let state_dict change nothing, and draw no random number")
        state = _state_of(stack.subject)
        for steps, checkpoint in found.items():
            fresh = lab.stack()
            two = _restored(fresh, end, checkpoint)
            if not steps and not alike(evaluated, lab.evaluated(two, benchmark)):
                raise _lost(stack, changed, "task 1's evaluation", "before it")
            lab.train(two, benchmark, TASKS[1:], evaluated=True)
            if not same(lab.ordinary.after[1], two.after[0]):
                raise _lost(stack, changed, "task 2", f"after {steps} of its steps" if steps else "from its beginning")
            if _state_of(fresh.subject) != state:
                raise _lost(stack, changed, "the state after task 2", "before")


WITHIN = 2
"""Steps into task 2."""


def _written(folder: Path, trial: Trial, stack: Any, steps: int) -> Checkpoint:
    for plugin in stack.plugins:
        _check_state(plugin)
    strategy, named = trial.strategy, _named(stack)
    return write_checkpoint(
        folder,
        f"task-2-step-{steps}",
        Moment(1, steps),
        base=None,
        weights=weights_of(strategy),
        state=state_within_task(strategy, named) if steps else state_between_tasks(strategy, named),
        progress={"clock": clock_of(strategy), "learned": sorted(strategy.learned)},
    )


def _restored(stack: Any, end: Checkpoint, checkpoint: Checkpoint) -> Trial:
    """A new trial where the checkpoint has it, as a run is restored."""
    trial, named, state = Place().trial(stack.plugins), _named(stack), end.state()
    strategy = trial.strategy
    strategy._before_training()
    for each, (_, kept) in zip(named, state["plugins"], strict=True):
        if hasattr(each.plugin, "load_state_dict"):
            _asked(each.plugin, "load_state_dict", kept)
    _restore_weights(strategy, end, state)
    restore_clock(strategy, end.run["clock"])
    strategy.learned = set(end.run["learned"])
    if steps := checkpoint.moment.steps:
        strategy.resume_at(steps, lambda: restore_within_task(strategy, named, checkpoint))
    return trial


def _restore_weights(strategy: Any, end: Checkpoint, state: Any) -> None:
    try:
        restore_weights(strategy, end, state)
    except (MulkiError, RuntimeError) as error:
        what = f"the weights of a checkpoint do not fit the model of a resume: {cause_of(error)}"
        raise Fault(what, ADD_AGAIN) from error
    missing = [name for name in end.weights() if f"clip.{name}" not in strategy.model.state_dict()]
    missing += [name for name in state["model"] if name not in strategy.model.state_dict()]
    if missing:
        raise Fault(f"a resume loses the weight {missing[0]}, which it added", ADD_AGAIN)


ADD_AGAIN = "add weights in before_training or load_state_dict, which a resume calls before it loads weights"


def _state_of(plugin: Any) -> Any:
    """What it keeps, in a form that can be compared."""
    if not hasattr(plugin, "state_dict"):
        return None
    file = io.BytesIO()
    torch.save(storable(_asked(plugin, "state_dict")), file)
    return file.getvalue()


def _named(stack: Any) -> list[StackEntry]:
    return [StackEntry(type(plugin).__name__, plugin) for plugin in stack.plugins]


def _lost(stack: Any, changed: Sequence[str], what: str, where: str) -> Fault:
    has = hasattr(stack.subject, "state_dict")
    kept = f" (it keeps {', '.join(changed)} between tasks)" if changed else ""
    return Fault(
        f"{what} after a resume {where} is not as without one{kept}",
        "let state_dict return all that is kept, and load_state_dict bring it back"
        if has
        else "give it `state_dict(self) -> dict` and `load_state_dict(self, state)` with all that it keeps from step to step",
    )


def _check_state(plugin: Any) -> None:
    """Fault where what a plugin keeps cannot be kept in a checkpoint."""
    if not hasattr(plugin, "state_dict"):
        return
    name = type(plugin).__name__
    if not hasattr(plugin, "load_state_dict"):
        raise Fault(f"{name} has state_dict and no load_state_dict", "write both")
    state = _asked(plugin, "state_dict")
    mend = "return a dict of tensors, numbers, texts, true, false, None, and of dicts, lists, tuples and sets of these"
    if not isinstance(state, dict):
        what = f"it is a {type(state).__name__}, expected a dict"
        raise Fault(f"the state of {name} cannot be written to a checkpoint: {what}", mend)
    try:
        storable(state)
    except TypeError as error:
        raise Fault(f"the state of {name} cannot be written to a checkpoint: {error}", mend) from error


def _asked(plugin: Any, method: str, *arguments: Any) -> Any:
    try:
        return getattr(plugin, method)(*arguments)
    except Exception as error:
        what = f"{method} of {type(plugin).__name__} raises {cause_of(error)}"
        raise Fault(what, "it is called on a new plugin, and after each task") from error


def _changed(new: Any, used: Any, factory: Callable[..., Any]) -> list[str]:
    """The attributes of a plugin that are others than when it was made, but for its options, as far as they compare."""
    found, options = [], inspect.signature(factory).parameters
    for name, value in vars(used).items():
        if name in options:
            continue
        before = vars(new).get(name)
        try:
            same = bool(type(before) is type(value) and (before == value))
        except Exception:  # tensors within
            same = False
        if not same and not callable(value):
            found.append(name)
    return found
