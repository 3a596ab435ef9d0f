"""The checks of a plugin. Each raises Fault; each is a function of the laboratory, which keeps what several look at."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

import torch
from avalanche.core import BasePlugin
from avalanche.training.plugins import ReplayPlugin

from mulki_plugins.registry.callbacks import methods_of, wrong_callbacks
from mulki_plugins.stages.teachers import Teachers
from mulki_plugins.testing.conduct_checks import (  # noqa: F401 (checks)
    batch,
    evaluation,
    extremes,
    files,
    random_at_making,
    random_numbers,
    surroundings,
)
from mulki_plugins.testing.growth_check import growth  # noqa: F401 (a check)
from mulki_plugins.testing.laboratory import TASKS, Laboratory, same
from mulki_plugins.testing.names import PLUGIN_CHECKS
from mulki_plugins.testing.own_code import another_hash
from mulki_plugins.testing.resuming import resume  # noqa: F401 (a check)
from mulki_plugins.testing.subject import Fault
from mulki_plugins.testing.surroundings import another_day, kept_random_state
from mulki_plugins.testing.trial import Place, Trial
from mulki_plugins.testing.witnesses import EvaluateWithin, outputs_of


def made(lab: Laboratory) -> None:
    plugin = lab.subject.made()
    if not isinstance(plugin, BasePlugin):
        raise Fault(
            f"it is a {type(plugin).__name__}, which Avalanche does not call",
            "derive it from avalanche.training.plugins.SupervisedPlugin, or from mulki_plugins.stages.stage.Stage",
        )
    random_at_making(lab)
    if lab.subject.made() is plugin:
        raise Fault(
            "the same object is made every time", "make a new one at each call, so that no run sees another's state"
        )


def callbacks(lab: Laboratory) -> None:
    plugin = lab.subject.made()
    if wrong := list(wrong_callbacks(methods_of(type(plugin)))):
        raise Fault(
            "; ".join(wrong), "name and write it as Avalanche does: def after_forward(self, strategy, **kwargs)"
        )


def trains(lab: Laboratory) -> None:
    trial = lab.ordinary
    for task in TASKS:
        steps = sum(step.task == task for step in trial.steps)
        if steps != trial.iterations:
            raise Fault(
                f"task {task + 1} ended after {steps} of {trial.iterations} steps",
                "leave the data loader and `strategy.stop_training` alone; the recipe says how long a task is",
            )
        if _nothing_moved(trial, task):
            raise Fault(
                f"no weight is another after task {task + 1} than before it",
                "add to `strategy.loss` and never replace it; undo no training",
            )
    if trial.strategy.model is not trial.model:
        raise Fault(
            "it puts another model in the strategy's place", "change the model's weights in place, under no_grad"
        )


def _nothing_moved(trial: Trial, task: int) -> bool:
    """Whether the weights at a task's end are those of its first step, or those before the task with none added."""
    before, after = trial.before[task], trial.after[task]
    added = after.keys() - before.keys()
    undone = all(name not in after or torch.equal(after[name], value) for name, value in before.items())
    return same(trial.began[task], after) or (undone and not added)


def quiet(lab: Laboratory) -> None:
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        lab.subject.made()
    if printed := (text.getvalue() + lab.ordinary.printed).strip():
        raise Fault(
            f"it prints on stdout: {printed.splitlines()[0][:80]!r}",
            "log a value by `self.log(strategy, tag, value)`; stdout is for results, such as those of --json",
        )


def finite_loss(lab: Laboratory) -> None:
    for step in lab.ordinary.steps:
        where = f"at step {lab.ordinary.steps.index(step) + 1} of {len(lab.ordinary.steps)}"
        if step.shape not in ((), (1,)):
            raise Fault(f"the loss has the shape {step.shape} {where}", "reduce it to one number, by .mean() or .sum()")
        if not torch.tensor(step.loss).isfinite():
            mend = "guard divisions, logarithms and roots at 0, also where a batch lacks a class"
            raise Fault(f"the loss is {step.loss} {where}", mend)
        if step.bad_gradients:
            what = f"the gradient of {step.bad_gradients[0]} is not finite {where}, though the loss is"
            raise Fault(what, "roots and norms have no gradient at 0: add a small number inside them")
        if step.bad_weights:
            raise Fault(f"{step.bad_weights[0]} is not finite after the update {where}", "do not divide weights by 0")
    lab.noted("finite_loss", lab.ordinary)


ADD_EARLY = "register weights that you add as parameters of the model in before_training, before the optimizer is made"


def optimizer(lab: Laboratory) -> None:
    trial, mine = (
        lab.ordinary,
        "the strategy makes a new optimizer of the weights that learn for each task; leave it so",
    )
    for step in trial.steps:
        if not step.same_optimizer:
            raise Fault("it puts another optimizer in the strategy's place", mine)
        if step.missing:
            what = f"{len(step.missing)} weights that learn are not in the optimizer, and so do not learn: {step.missing[0]}"
            raise Fault(what, mine if trial.original.keys() & set(step.missing) else ADD_EARLY)
        if step.foreign:
            raise Fault(f"{step.foreign} weights in the optimizer are not weights of the model", ADD_EARLY)
        if any(abs(rate - step.expected_rate) > 1e-9 for rate in step.rates):
            what = f"it changes the learning rate, {max(step.rates):g} in place of {step.expected_rate:g}"
            raise Fault(what, "the rate is set by the recipe's train.schedule before each step; leave it so")
        if not step.settings_kept:
            raise Fault("it changes settings of the optimizer's groups, such as weight_decay or betas", mine)
    for task, counted in enumerate([*trial.counted, *[0] * len(TASKS)][: len(TASKS)]):
        if counted != trial.iterations:
            what = f"the optimizer stepped {counted} times in the {trial.iterations} steps of task {task + 1}"
            raise Fault(what, "call neither `optimizer.step` nor keep it from being called")
    for task, known in enumerate(trial.remembered):
        if known != trial.iterations:
            what = f"after the {trial.iterations} steps of task {task + 1} the optimizer's state knows of {known}"
            raise Fault(what, "do not clear `optimizer.state`")


def gradients(lab: Laboratory) -> None:
    lab.noted("gradients", lab.ordinary, lab.frozen)
    for step in lab.ordinary.steps:
        where = f"at step {lab.ordinary.steps.index(step) + 1} of {len(lab.ordinary.steps)}"
        if step.early_gradients:
            mend = "add the term to `strategy.loss`, or take its gradient by torch.autograd.grad"
            raise Fault(f"it makes gradients before the strategy's backward, {where}", mend)
        if step.dropped:
            mend = "add to `strategy.loss`, and neither replace nor detach it"
            raise Fault(f"it drops from the loss what others added to it, {where}", mend)
        if step.cleared:
            raise Fault(f"it clears the gradients before the update, {where}", "leave `p.grad` to the strategy")
    _check_frozen(lab.frozen)
    _check_added(lab.ordinary)


def _check_frozen(trial: Trial) -> None:
    """Weights that the recipe froze, and buffers, are the same objects as before or not there; a wrapper may rename them."""
    mend = "multiply features only; under no_grad, touch only weights with `requires_grad`, and do not set it"
    for name, (value, copy) in trial.original.items():
        kind, frozen = ("weight", not name.startswith("clip.visual.")) if _is_weight(value) else ("buffer", True)
        if not frozen:
            continue
        if kind == "weight" and value.requires_grad:
            raise Fault(f"with the text tower frozen it changes `requires_grad` of {name}", mend)
        if value.grad is not None or not torch.equal(value.detach(), copy):
            how = "has a gradient" if value.grad is not None else "is changed"
            raise Fault(f"{name}, which is {'frozen' if kind == 'weight' else 'a buffer'}, {how}", mend)
    now = trial.model.state_dict()
    for name, (value, copy) in trial.original.items():
        if (
            _is_weight(value)
            and not name.startswith("clip.visual.")
            and name in now
            and not torch.equal(now[name], copy)
        ):
            raise Fault(f"{name}, which is frozen, is replaced by another", mend)


def _is_weight(value: Any) -> bool:
    return isinstance(value, torch.nn.Parameter)


def _check_added(trial: Trial) -> None:
    original = {id(value) for value, _ in trial.original.values()}
    for name, p in trial.model.named_parameters():
        if p.requires_grad and id(p) not in original and id(p) not in trial.taught:
            mend = "use it in the model's forward or in a term of the loss, or set requires_grad=False"
            raise Fault(f"{name}, which it adds, never has a gradient, and so does not learn", mend)


def teachers(lab: Laboratory) -> None:
    if "teachers" in lab.subject.declared("conflicts"):
        return  # declared: they never stand in one stack
    with kept_random_state():
        place = Place()
        benchmark, stack = place.benchmark(), lab.stack(teachers=True)
        trial = place.trial(stack.plugins)
        trial.probe = torch.stack([benchmark.test_stream[task].dataset[0][0] for task in TASKS])
        pretrained = outputs_of(trial.model, trial.probe)
        lab.train(trial, benchmark, TASKS, tested=[0])
        holder = next(plugin for plugin in stack.plugins if isinstance(plugin, Teachers))
        mend = "call teachers under no_grad by `Teachers.of(strategy, self)`, and keep no module of theirs on the model"
        inside = {id(p) for group in trial.strategy.optimizer.param_groups for p in group["params"]}
        own = {id(p) for p in trial.model.parameters()}
        for what, teacher, task, expected in (
            ("pre-trained", holder.initial, 0, pretrained),
            ("previous", holder.previous, 1, trial.outputs_before[1]),
        ):
            if teacher is None:
                raise Fault(f"the {what} teacher is gone", mend)
            if teacher.model.training:
                raise Fault(f"the {what} teacher is in training mode", "call `.train()` on the strategy's model only")
            for name, p in teacher.model.named_parameters():
                if p.requires_grad or p.grad is not None:
                    raise Fault(f"the {what} teacher learns: {name} has a gradient or may have one", mend)
                if id(p) in inside or id(p) in own:
                    raise Fault(f"the {what} teacher's {name} is a weight of the model or of its optimizer", mend)
                if name in trial.before[task] and not torch.equal(p.float(), trial.before[task][name].float()):
                    what = f"the {what} teacher is no longer the model before task {task + 1}: {name} differs"
                    raise Fault(what, mend)
            if not _close(outputs_of(teacher.model, trial.probe), expected):
                what = f"the {what} teacher is no longer the model before task {task + 1}: it gives other features"
                raise Fault(what, mend)


def _close(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.allclose(x, y, atol=1e-5) for x, y in zip(a, b, strict=True))


def repeatable(lab: Laboratory) -> None:
    with another_day(), another_hash(lab.modules):
        again = lab.trained()
    if lab.ordinary.losses != again.losses or not same(lab.ordinary.after[1], again.after[1]):
        pairs = enumerate(zip(lab.ordinary.losses, again.losses, strict=False), 1)
        at = next((f"from step {i} on" for i, (a, b) in pairs if a != b), "in the weights after a task")
        raise Fault(
            f"the same seed gives another result, {at}",
            "draw random numbers by torch, numpy or random, which every task seeds; keep no state on the class, "
            "and use neither the time nor `hash`",
        )


def nested_evaluation(lab: Laboratory) -> None:
    within = lab.trained(more=lambda benchmark: [EvaluateWithin(benchmark)])
    if not same(lab.ordinary.after[1], within.after[1]):
        raise Fault(
            "an evaluation in the middle of a task changes what is learned",
            "touch nothing of a training in before_eval... and after_eval..., and ask `strategy.is_training` elsewhere",
        )


def replay(lab: Laboratory) -> None:
    if lab.subject.part and (
        lab.subject.part.name == "avalanche.replay" or "avalanche.replay" in lab.subject.declared("conflicts")
    ):
        return  # declared: they never stand in one stack
    trial = lab.trained(more=lambda benchmark: [ReplayPlugin(mem_size=8, batch_size_mem=4)], tested=[0])
    if not all(torch.tensor(loss).isfinite() for loss in trial.losses):
        raise Fault(
            "beside replay the loss is not finite",
            "a batch then holds several tasks: go through it with `by_task(features_of(strategy, self))`",
        )


CHECKS: dict[str, Callable[[Laboratory], None]] = {name: globals()[name] for name in PLUGIN_CHECKS}
