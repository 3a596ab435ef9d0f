"""The check `resume`: a plugin survives a checkpoint and a resume. It uses the functions that save and restore a run."""

from __future__ import annotations

import inspect
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from mulki_plugins.registry.guard import cause_of
from mulki_plugins.testing.laboratory import TASKS, Laboratory
from mulki_plugins.testing.process import preserved_state
from mulki_plugins.testing.subject import Fault, Stack
from mulki_plugins.testing.training_checks import same_logits
from mulki_plugins.testing.trial import Trial, same_weights
from mulki_plugins.training.checkpoint import Checkpoint, Moment, write_checkpoint
from mulki_plugins.training.contents import (
    StackEntry,
    clock_of,
    restore_clock,
    restore_weights,
    restore_within_task,
    state_between_tasks,
    state_within_task,
    weights_of,
)
from mulki_plugins.training.pretrained import Pretrained
from mulki_plugins.training.snapshot import storable
from mulki_plugins.training.strategy import ContinualTemplate

WITHIN = 2
"""The step of each task at which a further checkpoint is written."""
ADD_AGAIN = "add weights in before_training or load_state_dict, which a resume calls before it loads weights"


GROW_AGAIN = "add all weights in apply and before_task, which a resume calls before it loads weights"


def resume(lab: Laboratory) -> None:
    """A new plugin with a checkpoint's state must continue like the old one: after task 1, and from within each task."""
    if lab.subject.declared("no_resume"):
        return  # a run with it is never resumed
    with preserved_state(), TemporaryDirectory() as folder:
        benchmark, stack = lab.setup().benchmark(), lab.stack()
        one = lab.setup().trial(stack.plugins, adapters=stack.adapters)
        pretrained = Pretrained(one.model.own_weights())
        written: dict[tuple[int, int], Checkpoint] = {}

        def write(tasks: int, steps: int) -> None:
            written[tasks, steps] = _write(Path(folder), one, stack, Moment(tasks, steps), pretrained)

        def after_step() -> None:
            if one.strategy.clock.train_exp_iterations == WITHIN:
                write(one.task - 1, WITHIN)

        one.strategy.after_step = after_step
        lab.train(one, benchmark, TASKS[:1], learned=lambda: write(1, 0))
        evaluated, states = one.logits, [_state_of(stack.subject)]
        new = lab.subject.create() if stack.subject is not None else None
        changed = _changed(new, stack.subject, lab.subject.factory) if new is not None else []
        lab.train(one, benchmark, TASKS[1:])
        states.append(_state_of(stack.subject))
        for task in TASKS:
            if not same_weights(lab.ordinary.after[task], one.after[task]):
                what = f"calling state_dict changes task {task + 1}"
                raise Fault(what, "change nothing in state_dict, and draw no random numbers")
        for task, steps in ((1, 0), (1, WITHIN), (0, WITHIN)):
            fresh = lab.stack()
            two = _restore(lab, fresh, written[1, 0] if task else None, written[task, steps])
            if not steps and not same_logits(evaluated, lab.evaluate(two, benchmark)):
                raise _lost(stack, changed, "task 1's evaluation", "before it")
            lab.train(two, benchmark, [task], evaluated=True)
            if not same_weights(lab.ordinary.after[task], two.after[0]):
                where = f"after {steps} of its steps" if steps else "from its beginning"
                raise _lost(stack, changed, f"task {task + 1}", where)
            if _state_of(fresh.subject) != states[task]:
                raise _lost(stack, changed, f"the state after task {task + 1}", "before")


def _write(folder: Path, trial: Trial, stack: Stack, moment: Moment, pretrained: Pretrained) -> Checkpoint:
    for part in (*stack.plugins, *stack.adapters):
        _check_state(part)
    strategy, named = trial.strategy, _named(stack)
    weights, left_out = pretrained.without({name: w.clone() for name, w in weights_of(strategy).items()})
    return write_checkpoint(
        folder,
        f"task-{moment.tasks + 1}-step-{moment.steps}",
        moment,
        base=None,
        weights=weights,
        left_out=left_out,
        state=state_within_task(strategy, named) if moment.steps else state_between_tasks(strategy, named),
        progress={"clock": clock_of(strategy), "learned": sorted(strategy.learned)},
    )


def _restore(lab: Laboratory, stack: Stack, end: Checkpoint | None, checkpoint: Checkpoint) -> Trial:
    """A new trial at the checkpoint's step, restored like a run. end: the checkpoint after task 1; None within task 1."""
    trial, named = lab.setup().trial(stack.plugins, adapters=stack.adapters), _named(stack)
    strategy = trial.strategy
    pretrained = {name: weight.clone() for name, weight in trial.model.own_weights().items()}
    if end is not None:
        state = end.state()
        strategy._before_training()
        trial.model.before_task(0)  # adapters grow again as they did
        trial.model.after_task(0)
        for each, (_, kept) in zip(named, state["plugins"], strict=True):
            if hasattr(each.plugin, "load_state_dict"):
                _call(each.plugin, "load_state_dict", kept)
        _restore_weights(strategy, end, state, pretrained, ADD_AGAIN if stack.plugins else GROW_AGAIN)
        restore_clock(strategy, end.run["clock"])
        strategy.learned = set(end.run["learned"])
    if checkpoint.moment.steps:
        strategy.resume_at(checkpoint.moment.steps, lambda: _restore_within(strategy, named, checkpoint, pretrained))
    return trial


def _restore_within(
    strategy: ContinualTemplate, named: list[StackEntry], checkpoint: Checkpoint, pretrained: dict[str, torch.Tensor]
) -> None:
    try:
        restore_within_task(strategy, named, checkpoint, pretrained)
    except Exception as error:  # such as a plugin's load_state_dict that expects what only a whole task leaves
        moment = checkpoint.moment
        what = f"a resume after {moment.steps} steps of task {moment.tasks + 1} ends in an error: {cause_of(error)}"
        raise Fault(what, "restore the state of any step, also of the first task's") from error


def _restore_weights(
    strategy: ContinualTemplate, end: Checkpoint, state: dict[str, Any], pretrained: dict[str, torch.Tensor], fix: str
) -> None:
    try:
        restore_weights(strategy, end, state, pretrained)
    except Fault:
        raise
    except Exception as error:  # such as an adapter that cannot restore its own state
        what = f"a checkpoint's weights do not fit the resumed model: {cause_of(error)}"
        raise Fault(what, fix) from error
    missing = [name for name in end.weights() if f"clip.{name}" not in strategy.model.state_dict()]
    missing += [name for name in state["model"] if name not in strategy.model.state_dict()]
    if missing:
        raise Fault(f"a resume loses the weight {missing[0]}, which the plugin adds", fix)


def _state_of(plugin: object) -> bytes | None:
    """A plugin's state in a comparable form."""
    if not hasattr(plugin, "state_dict"):
        return None
    file = io.BytesIO()
    torch.save(storable(_call(plugin, "state_dict")), file)
    return file.getvalue()


def _named(stack: Stack) -> list[StackEntry]:
    return [StackEntry(type(plugin).__name__, plugin) for plugin in stack.plugins]


def _lost(stack: Stack, changed: Sequence[str], what: str, where: str) -> Fault:
    has = hasattr(stack.subject, "state_dict")
    kept = f" (it keeps {', '.join(changed)} between tasks)" if changed else ""
    return Fault(
        f"{what} differs after a resume {where}{kept}",
        "return everything it keeps from state_dict, and restore it in load_state_dict"
        if has
        else "give it `state_dict(self) -> dict` and `load_state_dict(self, state)` for everything it keeps from step to step",
    )


def _check_state(plugin: object) -> None:
    """Fault if a checkpoint cannot hold a plugin's state."""
    if not hasattr(plugin, "state_dict"):
        return
    name = type(plugin).__name__
    if not hasattr(plugin, "load_state_dict"):
        raise Fault(f"{name} has state_dict but no load_state_dict", "write both")
    state = _call(plugin, "state_dict")
    fix = "return a dict of tensors, numbers, texts, true, false, None, and of dicts, lists, tuples and sets of these"
    if not isinstance(state, dict):
        what = f"it is a {type(state).__name__}, expected a dict"
        raise Fault(f"the state of {name} cannot be written to a checkpoint: {what}", fix)
    try:
        storable(state)
    except TypeError as error:
        raise Fault(f"the state of {name} cannot be written to a checkpoint: {error}", fix) from error


def _call(plugin: object, method: str, *arguments: Any) -> Any:
    try:
        return getattr(plugin, method)(*arguments)
    except Exception as error:
        what = f"{method} of {type(plugin).__name__} raises {cause_of(error)}"
        raise Fault(what, "MulKI calls it on a new plugin, and after each task") from error


def _changed(new: object, used: object, factory: Callable[..., Any]) -> list[str]:
    """Names of attributes that differ from a new plugin's, without its options."""
    names, options = [], inspect.signature(factory).parameters
    for name, value in vars(used).items():
        if name in options:
            continue
        before = vars(new).get(name)
        try:
            equal = bool(type(before) is type(value) and (before == value))
        except Exception:  # it holds tensors
            equal = False
        if not equal and not callable(value):
            names.append(name)
    return names
