"""The checks of a plugin. Each raises Fault; each is a function of the laboratory, which keeps what several look at."""

from __future__ import annotations

import functools
import inspect
import io
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from avalanche.core import BasePlugin
from avalanche.training.plugins import ReplayPlugin
from torch import Tensor

from mulki_plugins.registry.callbacks import methods_of, wrong_callbacks
from mulki_plugins.registry.guard import cause_of
from mulki_plugins.stages.teachers import Teachers
from mulki_plugins.testing.growth import Held, held_by, hooks_on
from mulki_plugins.testing.subject import Fault, Subject
from mulki_plugins.testing.trial import EvaluateWithin, Place, Trial, Weights, kept_random_state, train
from mulki_plugins.testing.world import LARGEST, WIDTH

TASKS = (0, 1)


class Laboratory:
    """Trainings of a subject, the ordinary one made once for all checks that look at it."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject

    @functools.cached_property
    def ordinary(self) -> Trial:
        """Two tasks, as in a run."""
        return self.trained()

    def trained(self, *, more: Callable[[Any], Sequence[Any]] = lambda benchmark: (), **options: Any) -> Trial:
        """Two tasks with a new stack in a new place. Fault where the plugin raises."""
        with kept_random_state():
            place = Place(**options)
            benchmark = place.benchmark()
            trial = place.trial(self.subject.stack().plugins, more(benchmark))
            self.train(trial, benchmark, TASKS)
        return trial

    def train(self, trial: Trial, benchmark: Any, tasks: Sequence[int]) -> None:
        try:
            train(trial, benchmark, tasks)
        except Exception as error:
            step = f"step {len(trial.steps)}" if trial.steps else "the start"
            if "needs the plugin" in str(error):
                mend = "register it with requires=[...] and check it by its class or its registered name"
            elif "model" in str(error) and isinstance(error, TypeError):
                mend = "take features by `features_of(strategy, self)` of mulki_plugins.stages.stage"
            else:
                mend = "mend the error at the line named; a callback is called with the strategy and **kwargs"
            raise Fault(
                f"training ended in an error at {step} of task {len(trial.before)}: {cause_of(error)}{_line(error)}",
                mend,
            ) from error


def _line(error: BaseException) -> str:
    """The place in the plugin's own code, where `cause_of` names none."""
    return "" if cause_of(error).endswith(")") else f" ({type(error).__module__}.{type(error).__qualname__})"


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
        if _same(trial.before[task], trial.after[task]):
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
    if lab.ordinary.losses != again.losses or not _same(lab.ordinary.after[1], again.after[1]):
        pairs = enumerate(zip(lab.ordinary.losses, again.losses, strict=False), 1)
        at = next((f"from step {i} on" for i, (a, b) in pairs if a != b), "in the weights after a task")
        raise Fault(
            f"the same seed gives another result, {at}",
            "draw random numbers by torch, numpy or random, which every task seeds; keep no state on the class",
        )


def nested_evaluation(lab: Laboratory) -> None:
    within = lab.trained(more=lambda benchmark: [EvaluateWithin(benchmark)])
    if not _same(lab.ordinary.after[1], within.after[1]):
        raise Fault(
            "an evaluation in the middle of a task changes what is learned",
            "touch nothing of a training in before_eval... and after_eval..., and ask `strategy.is_training` elsewhere",
        )


def resume(lab: Laboratory) -> None:
    """Task 1, then new objects with the old ones' state, then task 2: as in one go."""
    with kept_random_state():
        place = Place()
        benchmark, stack = place.benchmark(), lab.subject.stack()
        one = place.trial(stack.plugins)
        lab.train(one, benchmark, TASKS[:1])
        fresh, states = lab.subject.stack(), [_saved(plugin) for plugin in stack.plugins]
        changed = _changed(lab.subject.made(), stack.subject, lab.subject.factory)
        for plugin, state in zip(fresh.plugins, states, strict=True):
            if state is not None:
                _asked(plugin, "load_state_dict", state)
        two = Place(weights=one.after[0]).trial(fresh.plugins)
        clock, before = two.strategy.clock, one.strategy.clock
        for name in ("train_iterations", "train_exp_counter", "total_iterations"):
            setattr(clock, name, getattr(before, name))
        two.strategy.learned = set(one.strategy.learned)
        lab.train(two, benchmark, TASKS[1:])
    if not _same(lab.ordinary.after[1], two.after[0]):
        has = hasattr(stack.subject, "state_dict")
        kept = f" (it keeps {', '.join(changed)} between tasks)" if changed else ""
        others = [type(p).__name__ for p in stack.plugins if p is not stack.subject and not hasattr(p, "state_dict")]
        also = f"; {', '.join(others)}, which it requires, has no state_dict" if others else ""
        raise Fault(
            f"task 2 after a resume is not as without one{kept}{also}",
            "let state_dict return all that is kept, and load_state_dict bring it back"
            if has
            else "give it `state_dict(self) -> dict` and `load_state_dict(self, state)` with all that it keeps between tasks",
        )


def _saved(plugin: Any) -> Any:
    """A plugin's state after it has been written to a file and read again; None where it has none."""
    if not hasattr(plugin, "state_dict"):
        return None
    name = type(plugin).__name__
    if not hasattr(plugin, "load_state_dict"):
        raise Fault(f"{name} has state_dict and no load_state_dict", "write both")
    state = _asked(plugin, "state_dict")
    if (problem := _not_plain(state, "state")) or not isinstance(state, dict):
        what = problem or f"it is a {type(state).__name__}, expected a dict"
        mend = "return a dict with texts as keys, of tensors, numbers, texts, true, false, None, and lists and dicts of these"
        raise Fault(f"the state of {name} cannot be written to a checkpoint: {what}", mend)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def _asked(plugin: Any, method: str, *arguments: Any) -> Any:
    try:
        return getattr(plugin, method)(*arguments)
    except Exception as error:
        what = f"{method} of {type(plugin).__name__} raises {cause_of(error)}"
        raise Fault(what, "it is called on a new plugin, and after each task") from error


def _not_plain(value: Any, path: str) -> str:
    """The first thing in a state that a checkpoint cannot hold; empty where there is none."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                return f"{path} has the key {key!r}, which is no text"
            if problem := _not_plain(item, f"{path}[{key!r}]"):
                return problem
        return ""
    if isinstance(value, list):
        return next((p for i, item in enumerate(value) if (p := _not_plain(item, f"{path}[{i}]"))), "")
    if value is None or type(value) in (bool, int, float, str) or isinstance(value, Tensor):
        return ""
    return f"{path} is a {type(value).__name__}"


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


def _same(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


CHECKS: dict[str, Callable[[Laboratory], None]] = {
    name: function
    for name, function in list(globals().items())
    if inspect.isfunction(function) and list(inspect.signature(function).parameters) == ["lab"]
}
