"""Checks that a plugin trains: it can be created, takes part in a run, and leaves loss, gradients and optimizer sound."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from avalanche.core import BasePlugin
from avalanche.training.plugins import ReplayPlugin

from mulki_plugins.registry.callbacks import methods_of, wrong_callbacks
from mulki_plugins.testing.laboratory import TASKS, Laboratory
from mulki_plugins.testing.observers import EvaluateMidway, Step
from mulki_plugins.testing.process import GENERATORS, another_process, generators, preserved_state
from mulki_plugins.testing.small import uneven_stream
from mulki_plugins.testing.subject import Fault
from mulki_plugins.testing.trial import Setup, Trial, same_weights
from mulki_plugins.training.rng import seed_everything

UNSEEDED = "seed no global generator: use a torch.Generator of your own, or torch.random.fork_rng"
ADD_EARLY = (
    "register weights that you add as parameters of the model in before_training, before the optimizer is created"
)
LEAVE_OPTIMIZER = "the strategy creates a new optimizer for each task; leave it alone"


def made(lab: Laboratory) -> None:
    plugin = lab.subject.create()
    if not isinstance(plugin, BasePlugin):
        raise Fault(
            f"it is a {type(plugin).__name__}, which Avalanche does not call",
            "derive it from avalanche.training.plugins.SupervisedPlugin, or from mulki_plugins.stages.stage.Stage",
        )
    _check_seeding(lab)
    if lab.subject.create() is plugin:
        raise Fault("every call returns the same object", "create a new one at each call, so that runs share no state")


def _check_seeding(lab: Laboratory) -> None:
    """Fault if creating the plugin seeds a generator."""
    states = []
    with preserved_state():
        for seed in (0, 1):
            seed_everything(seed)
            lab.subject.create()
            states.append(generators())
    for name, one, other in zip(GENERATORS, *states, strict=True):
        if one == other:
            raise Fault(f"it seeds the global generator of `{name}` when it is created", UNSEEDED)


def callbacks(lab: Laboratory) -> None:
    plugin = lab.subject.create()
    if wrong := list(wrong_callbacks(methods_of(type(plugin)))):
        fix = "name and write it as Avalanche does: def after_forward(self, strategy, **kwargs)"
        raise Fault("; ".join(wrong), fix)


def trains(lab: Laboratory) -> None:
    trial = lab.ordinary
    for task in TASKS:
        steps = sum(step.task == task for step in trial.steps)
        if steps != trial.iterations:
            raise Fault(
                f"task {task + 1} ended after {steps} of {trial.iterations} steps",
                "leave the data loader and `strategy.stop_training` alone; the recipe sets a task's length",
            )
        if _nothing_learned(trial, task):
            raise Fault(
                f"task {task + 1} changes no weight",
                "add to `strategy.loss` and never replace it; do not undo the training",
            )
    if trial.strategy.model is not trial.model:
        raise Fault("it replaces the strategy's model", "change the model's weights in place, under no_grad")


def _nothing_learned(trial: Trial, task: int) -> bool:
    """Whether a task ends with the weights of its first step, or with those before it and no new ones."""
    before, after = trial.before[task], trial.after[task]
    added = after.keys() - before.keys()
    undone = all(name not in after or torch.equal(after[name], value) for name, value in before.items())
    return same_weights(trial.began[task], after) or (undone and not added)


def _steps(trial: Trial) -> Iterator[tuple[Step, str]]:
    """Each step, and its place in words."""
    for i, step in enumerate(trial.steps, 1):
        yield step, f"at step {i} of {len(trial.steps)}"


def finite_loss(lab: Laboratory) -> None:
    for step, where in _steps(lab.ordinary):
        if step.shape not in ((), (1,)):
            raise Fault(f"the loss has the shape {step.shape} {where}", "reduce it to one number, by .mean() or .sum()")
        if not torch.tensor(step.loss).isfinite():
            fix = "guard divisions, logarithms and roots at 0, also if a batch lacks a class"
            raise Fault(f"the loss is {step.loss} {where}", fix)
        if step.bad_gradients:
            problem = f"the gradient of {step.bad_gradients[0]} is not finite {where}, though the loss is"
            raise Fault(problem, "roots and norms have no gradient at 0: add a small number inside them")
        if step.bad_weights:
            raise Fault(f"{step.bad_weights[0]} is not finite after the update {where}", "do not divide weights by 0")
    lab.raise_noted("finite_loss", lab.ordinary)


def optimizer(lab: Laboratory) -> None:
    trial = lab.ordinary
    for step in trial.steps:
        if not step.same_optimizer:
            raise Fault("it replaces the strategy's optimizer", LEAVE_OPTIMIZER)
        if step.missing:
            count, name = len(step.missing), step.missing[0]
            problem = f"{count} trainable weights are not in the optimizer and so do not learn: {name}"
            raise Fault(problem, LEAVE_OPTIMIZER if trial.original.keys() & set(step.missing) else ADD_EARLY)
        if step.foreign:
            raise Fault(f"{step.foreign} weights in the optimizer are not weights of the model", ADD_EARLY)
        if any(abs(rate - step.expected_rate) > 1e-9 for rate in step.rates):
            problem = f"it changes the learning rate to {max(step.rates):g}; the schedule sets {step.expected_rate:g}"
            raise Fault(problem, "leave the rate alone: the recipe's train.schedule sets it before each step")
        if not step.settings_kept:
            raise Fault("it changes settings of the optimizer's groups, such as weight_decay or betas", LEAVE_OPTIMIZER)
    for task, count in enumerate([*trial.optimizer_steps, *[0] * len(TASKS)][: len(TASKS)]):
        if count != trial.iterations:
            problem = f"the optimizer stepped {count} times in the {trial.iterations} steps of task {task + 1}"
            raise Fault(problem, "neither call `optimizer.step` nor prevent its call")
    for task, age in enumerate(trial.optimizer_age):
        if age != trial.iterations:
            problem = f"after the {trial.iterations} steps of task {task + 1} the optimizer's state counts {age}"
            raise Fault(problem, "do not clear `optimizer.state`")


def gradients(lab: Laboratory) -> None:
    lab.raise_noted("gradients", lab.ordinary, lab.frozen)
    for step, where in _steps(lab.ordinary):
        if step.early_gradients:
            fix = "add the term to `strategy.loss`, or take its gradient by torch.autograd.grad"
            raise Fault(f"it computes gradients before the strategy's backward pass, {where}", fix)
        if step.dropped:
            fix = "add to `strategy.loss`, and neither replace nor detach it"
            raise Fault(f"it drops from the loss what others added to it, {where}", fix)
        if step.cleared:
            raise Fault(f"it clears the gradients before the update, {where}", "leave `p.grad` to the strategy")
    _check_frozen(lab.frozen)
    _check_added(lab.ordinary)


def _check_frozen(trial: Trial) -> None:
    """Frozen weights and buffers must be unchanged objects, or gone; a wrapper may rename them."""
    fix = "multiply features only; under no_grad, touch only weights with `requires_grad`, and do not set it"
    for name, (value, copy) in trial.original.items():
        is_weight = isinstance(value, torch.nn.Parameter)
        if is_weight and name.startswith("clip.visual."):
            continue
        if is_weight and value.requires_grad:
            raise Fault(f"it changes `requires_grad` of {name} while the text tower is frozen", fix)
        if value.grad is not None or not torch.equal(value.detach(), copy):
            how = "has a gradient" if value.grad is not None else "is changed"
            raise Fault(f"{name}, {'a frozen weight' if is_weight else 'a buffer'}, {how}", fix)
    now = trial.model.state_dict()
    for name, (value, copy) in trial.original.items():
        frozen = isinstance(value, torch.nn.Parameter) and not name.startswith("clip.visual.")
        if frozen and name in now and not torch.equal(now[name], copy):
            raise Fault(f"{name}, a frozen weight, is replaced", fix)


def _check_added(trial: Trial) -> None:
    original = {id(value) for value, _ in trial.original.values()}
    for name, p in trial.model.named_parameters():
        if p.requires_grad and id(p) not in original and id(p) not in trial.had_gradient:
            fix = "use it in the model's forward or in a term of the loss, or set requires_grad=False"
            raise Fault(f"{name}, a weight it adds, never has a gradient and so does not learn", fix)


def repeatable(lab: Laboratory) -> None:
    with another_process(lab.modules):
        again = lab.trained()
    if lab.ordinary.losses != again.losses or not same_weights(lab.ordinary.after[1], again.after[1]):
        pairs = enumerate(zip(lab.ordinary.losses, again.losses, strict=False), 1)
        where = next((f"from step {i} on" for i, (a, b) in pairs if a != b), "in the weights after a task")
        raise Fault(
            f"the same seed gives another result, {where}",
            "draw random numbers by torch, numpy or random, which every task seeds; keep no state on the class, "
            "and use neither the time nor `hash`",
        )


def nested_evaluation(lab: Laboratory) -> None:
    nested = lab.trained(more=lambda benchmark: [EvaluateMidway(benchmark)])
    if not same_weights(lab.ordinary.after[1], nested.after[1]):
        raise Fault(
            "an evaluation in the middle of a task changes what the model learns",
            "leave training state alone in before_eval... and after_eval..., and check `strategy.is_training` elsewhere",
        )


def evaluation(lab: Laboratory) -> None:
    """Evaluates the model of the ordinary training twice more: unchanged, then image by image in another order."""
    trial = lab.ordinary
    lab.raise_noted("evaluation", trial, lab.frozen)
    fix = "compute an answer from the weights and the image alone; keep no state from batch to batch"
    with preserved_state():
        benchmark = lab.ordinary_setup.benchmark()
        first = list(trial.logits)
        if not same_logits(first, lab.evaluate(trial, benchmark)):
            raise Fault("a second evaluation gives other logits than the first", fix)
        trial.strategy.eval_mb_size = 1
        singly = lab.evaluate(trial, benchmark, order=(1, 0))
        trial.strategy.eval_mb_size = trial.parts["eval_mb_size"]
        if not same_logits(first, singly):
            raise Fault("an image's logits depend on the other images of its batch, or on the order of tasks", fix)


def same_logits(a: list[tuple[int, torch.Tensor]], b: list[tuple[int, torch.Tensor]]) -> bool:
    """Whether two evaluations give the same logits for each task, whatever the batches and the order of tasks."""
    for task in TASKS:
        one, other = (torch.cat([logits for t, logits in batches if t == task]) for batches in (a, b))
        if one.shape != other.shape or not torch.allclose(one, other, atol=1e-3, equal_nan=True):
            return False
    return True


def replay(lab: Laboratory) -> None:
    if lab.subject.part and (
        lab.subject.part.name == "avalanche.replay" or "avalanche.replay" in lab.subject.declared("conflicts")
    ):
        return  # the two never share a stack
    trial = lab.trained(more=lambda benchmark: [ReplayPlugin(mem_size=8, batch_size_mem=4)], tested=[0], iterations=2)
    if not all(torch.tensor(loss).isfinite() for loss in trial.losses):
        raise Fault(
            "with replay the loss is not finite",
            "a batch then holds several tasks: go through it with `by_task(features_of(strategy, self))`",
        )


def extremes(lab: Laboratory) -> None:
    _try_setup(
        lab,
        "with batches of one image and a task of one class",
        lab.setup(stream=uneven_stream(), batch=1, iterations=2),
    )
    _try_setup(lab, "in mixed precision (bf16)", lab.setup(precision="bf16", iterations=2))


def _try_setup(lab: Laboratory, where: str, setup: Setup) -> None:
    try:
        trial: Trial = lab.trained(setup=setup, tested=[0])
    except Fault as fault:
        raise Fault(f"{where}: {fault.problem}", fault.fix) from fault
    if not all(torch.tensor(step.loss).isfinite() and not step.bad_gradients for step in trial.steps):
        raise Fault(
            f"{where} the loss or a gradient is not finite", "guard divisions, for example by a count minus one"
        )
