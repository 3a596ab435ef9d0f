"""The checks of a plugin. Each raises Fault; each is a function of the laboratory, which keeps what several look at."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from avalanche.core import BasePlugin
from avalanche.training.plugins import ReplayPlugin

from mulki_plugins.registry.callbacks import methods_of, wrong_callbacks
from mulki_plugins.stages.teachers import Teachers
from mulki_plugins.testing.growth import Held, held_by, hooks_on
from mulki_plugins.testing.laboratory import TASKS, Laboratory, same
from mulki_plugins.testing.names import PLUGIN_CHECKS
from mulki_plugins.testing.resuming import resume  # noqa: F401 (one of the checks)
from mulki_plugins.testing.subject import Fault
from mulki_plugins.testing.trial import EvaluateWithin, Place, kept_random_state
from mulki_plugins.testing.world import LARGEST, WIDTH


def made(lab: Laboratory) -> None:
    plugin = lab.subject.made()
    if not isinstance(plugin, BasePlugin):
        raise Fault(
            f"it is a {type(plugin).__name__}, which Avalanche does not call",
            "derive it from avalanche.training.plugins.SupervisedPlugin, or from mulki_plugins.stages.stage.Stage",
        )
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
        if same(trial.before[task], trial.after[task]):
            raise Fault(
                f"no weight is another after task {task + 1} than before it",
                "add to `strategy.loss` and never replace it; undo no training",
            )
    if trial.strategy.model is not trial.model:
        raise Fault(
            "it puts another model in the strategy's place", "change the model's weights in place, under no_grad"
        )


def quiet(lab: Laboratory) -> None:
    if printed := lab.ordinary.printed.strip():
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


def optimizer(lab: Laboratory) -> None:
    trial, mine = (
        lab.ordinary,
        "the strategy makes a new optimizer of the weights that learn for each task; leave it so",
    )
    for step in trial.steps:
        if not step.same_optimizer:
            raise Fault("it puts another optimizer in the strategy's place", mine)
        if step.missing:
            raise Fault(f"{step.missing} weights that learn are not in the optimizer, and so do not learn", mine)
        if step.foreign:
            mend = "if it is to add weights, make them parameters of the model before the task, and declare adds_parameters"
            raise Fault(f"{step.foreign} weights in the optimizer are not weights of the model that learn", mend)
        if any(abs(rate - step.expected_rate) > 1e-9 for rate in step.rates):
            what = f"it changes the learning rate, {max(step.rates):g} in place of {step.expected_rate:g}"
            raise Fault(what, "the rate is set by the recipe's train.schedule before each step; leave it so")
        if not step.settings_kept:
            raise Fault("it changes settings of the optimizer's groups, such as weight_decay or betas", mine)
    for task, counted in enumerate(trial.counted):
        if counted != trial.iterations:
            what = f"the optimizer stepped {counted} times in the {trial.iterations} steps of task {task + 1}"
            raise Fault(what, "call neither `optimizer.step` nor keep it from being called")
    for task, known in enumerate(trial.remembered):
        if known != trial.iterations:
            what = f"after the {trial.iterations} steps of task {task + 1} the optimizer's state knows of {known}"
            raise Fault(what, "do not clear `optimizer.state`")


def gradients(lab: Laboratory) -> None:
    fresh = Place(train="image").trial([]).model
    learning = {name for name, p in fresh.named_parameters() if p.requires_grad}
    trial = lab.trained(train="image", iterations=3)
    mend = "multiply features only; under no_grad, touch only weights with `requires_grad`, and do not set it"
    for name, p in trial.model.named_parameters():
        if name not in trial.before[0]:
            continue  # one that it adds, see `growth`
        if p.requires_grad != (name in learning):
            raise Fault(f"with the text tower frozen it changes `requires_grad` of {name}", mend)
        if name not in learning and (p.grad is not None or not torch.equal(p.detach(), trial.before[0][name])):
            how = "has a gradient" if p.grad is not None else "is changed"
            raise Fault(f"{name}, which is frozen, {how}", mend)


def teachers(lab: Laboratory) -> None:
    if "teachers" in lab.subject.declared("conflicts"):
        return  # declared: they never stand in one stack
    with kept_random_state():
        place = Place()
        benchmark, stack = place.benchmark(), lab.subject.stack(teachers=True)
        trial = place.trial(stack.plugins)
        lab.train(trial, benchmark, TASKS)
    holder = next(plugin for plugin in stack.plugins if isinstance(plugin, Teachers))
    mend = "call teachers under no_grad by `Teachers.of(strategy, self)`, and keep no module of theirs on the model"
    inside = {id(p) for group in trial.strategy.optimizer.param_groups for p in group["params"]}
    own = {id(p) for p in trial.model.parameters()}
    for what, teacher, task in (("pre-trained", holder.initial, 0), ("previous", holder.previous, 1)):
        if teacher is None:
            raise Fault(f"the {what} teacher is gone", mend)
        weights = dict(teacher.model.named_parameters())
        for name, p in weights.items():
            if not torch.equal(p.detach().float(), trial.before[task][name].float()):
                raise Fault(f"the {what} teacher is no longer the model before task {task + 1}: {name} differs", mend)
            if p.requires_grad or p.grad is not None:
                raise Fault(f"the {what} teacher learns: {name} has a gradient or may have one", mend)
            if id(p) in inside or id(p) in own:
                raise Fault(f"the {what} teacher's {name} is a weight of the model or of its optimizer", mend)
        if teacher.model.training:
            raise Fault(f"the {what} teacher is in training mode", "call `.train()` on the strategy's model only")


def repeatable(lab: Laboratory) -> None:
    again = lab.trained()
    if lab.ordinary.losses != again.losses or not same(lab.ordinary.after[1], again.after[1]):
        pairs = enumerate(zip(lab.ordinary.losses, again.losses, strict=False), 1)
        at = next((f"from step {i} on" for i, (a, b) in pairs if a != b), "in the weights after a task")
        raise Fault(
            f"the same seed gives another result, {at}",
            "draw random numbers by torch, numpy or random, which every task seeds; keep no state on the class",
        )


def nested_evaluation(lab: Laboratory) -> None:
    within = lab.trained(more=lambda benchmark: [EvaluateWithin(benchmark)])
    if not same(lab.ordinary.after[1], within.after[1]):
        raise Fault(
            "an evaluation in the middle of a task changes what is learned",
            "touch nothing of a training in before_eval... and after_eval..., and ask `strategy.is_training` elsewhere",
        )


def growth(lab: Laboratory) -> None:
    """Four tasks; what is held after the third and the fourth more than before."""
    with kept_random_state():
        place = Place(iterations=10)
        benchmark, stack = place.benchmark(), lab.subject.stack()
        trial = place.trial(stack.plugins)
        beside = [
            trial.strategy, trial.model, benchmark, benchmark.train_stream, benchmark.test_stream,
            *(plugin for plugin in stack.plugins if plugin is not stack.subject),
        ]  # fmt: skip
        parameters = len(trial.before) or len(list(trial.model.parameters()))
        held, hooks = [], []
        for task in range(4):
            lab.train(trial, benchmark, [task])
            trial.before.clear()
            trial.after.clear()
            held.append(held_by(stack.subject, beside))
            hooks.append(hooks_on(trial.model))
    more = [after - before for before, after in itertools.pairwise(held[1:])]
    data, items = min(each.data for each in more), min(each.items for each in more)
    allowed = Held(data=4 * LARGEST * WIDTH * 4, items=8)
    mend = (
        "keep a fixed amount, or at most a few numbers for each class; a plugin that keeps images declares keeps_images"
    )
    if not lab.subject.declared("keeps_images"):
        if data > allowed.data:
            raise Fault(f"it holds about {data:,} bytes more after each task", mend)
        if items > allowed.items:
            raise Fault(f"its lists, mappings or sets have about {items} entries more after each task", mend)
    if len(list(trial.model.parameters())) != parameters and not lab.subject.declared("adds_parameters"):
        raise Fault("it adds weights to the model", "register it with adds_parameters=True")
    if hooks[3] > hooks[2] > hooks[1]:
        raise Fault("it hangs a hook on the model in every task and takes none away", "remove it in after_training_exp")


def replay(lab: Laboratory) -> None:
    if lab.subject.part and (
        lab.subject.part.name == "avalanche.replay" or "avalanche.replay" in lab.subject.declared("conflicts")
    ):
        return  # declared: they never stand in one stack
    trial = lab.trained(more=lambda benchmark: [ReplayPlugin(mem_size=8, batch_size_mem=4)])
    if not all(torch.tensor(loss).isfinite() for loss in trial.losses):
        raise Fault(
            "beside replay the loss is not finite",
            "a batch then holds several tasks: go through it with `by_task(features_of(strategy, self))`",
        )


CHECKS: dict[str, Callable[[Laboratory], None]] = {name: globals()[name] for name in PLUGIN_CHECKS}
