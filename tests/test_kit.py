"""The kit: our own plugins pass it, and each fault of behaviour is caught by the check that is named for it."""

import gc
import itertools
import random
import re
import time

import numpy as np
import pytest
import torch
from avalanche.training.plugins import SupervisedPlugin
from PIL import Image
from torch import nn

from mulki_plugins.registry.discovery import catalog
from mulki_plugins.stages import Teachers
from mulki_plugins.stages.stage import Stage, features_of
from mulki_plugins.streams import ArrayImages, Task, TaskStream
from mulki_plugins.testing import (
    ADAPTER_CHECKS,
    HEAD_CHECKS,
    OPTIMIZER_CHECKS,
    PLUGIN_CHECKS,
    STREAM_CHECKS,
    CheckFailed,
    check_plugin,
    check_stream,
    small_stream,
    train_two_tasks,
)
from mulki_plugins.testing.kit import CHECKS, check_one
from tests.test_kit_conduct import FAULTS as CONDUCT

pytest_plugins = ["mulki_plugins.testing.fixtures"]

OWN = [p.name for p in catalog().of_kind("plugin") if not p.name.startswith("avalanche.")]


@pytest.mark.parametrize("name", OWN)
def test_our_own_plugins_pass(name):
    check_plugin(name)


@pytest.mark.parametrize("options", [{"importance": True, "every": 2}, {"every": None, "start": True, "inter": 0.5}])
def test_connecting_passes_with_other_options(options):
    check_plugin("connecting", **options)


class Fine(Stage):
    def __init__(self, *, weight: float = 1.0):
        super().__init__()
        self.weight = weight

    def after_forward(self, strategy, **kwargs):
        self.add_loss(strategy, "fine", features_of(strategy, self).image.square().mean(), self.weight)


def test_a_good_one_passes_and_nothing_is_left_behind():
    state, python, threads = torch.get_rng_state(), random.getstate(), torch.get_num_threads()
    check_plugin(Fine, weight=2.0)
    check_plugin(lambda: Fine(weight=0.1))
    assert torch.equal(state, torch.get_rng_state())
    assert python == random.getstate()
    assert threads == torch.get_num_threads()


class Plain(SupervisedPlugin):
    """Something that does nothing, for faults to be derived from."""


class NoPlugin:
    pass


class CannotBeMade(Plain):
    def __init__(self):
        raise OSError("no disk")


class UnknownCallback(Plain):
    def after_forwards(self, strategy, **kwargs): ...


class WithoutKeywords(Plain):
    def after_forward(self, strategy): ...


class Raises(Plain):
    def after_update(self, strategy, **kwargs):
        raise KeyError("nothing there")


class NeedsTeachers(Plain):
    def after_forward(self, strategy, **kwargs):
        Teachers.of(strategy, self)


class StopsEarly(Plain):
    def after_training_iteration(self, strategy, **kwargs):
        if strategy.clock.train_exp_iterations == 2:
            strategy.stop_training()


class Undoes(Plain):
    def before_training_exp(self, strategy, **kwargs):
        self.kept = {n: v.clone() for n, v in strategy.model.state_dict().items()}

    def after_training_exp(self, strategy, **kwargs):
        strategy.model.load_state_dict(self.kept)


class Prints(Plain):
    def before_training_exp(self, strategy, **kwargs):
        print("here I am")  # noqa: T201


class NotANumber(Plain):
    def after_forward(self, strategy, **kwargs):
        strategy.loss = strategy.loss + torch.tensor(0.0) / 0


class Vector(Plain):
    def before_backward(self, strategy, **kwargs):
        strategy.loss = strategy.loss.repeat(3)
        strategy.backward = lambda: strategy.loss.sum().backward()


class BadGradient(Plain):
    def after_forward(self, strategy, **kwargs):
        z = strategy.model.features.image
        strategy.loss = strategy.loss + (z - z.detach()).norm() * 0 + torch.sqrt((z - z.detach()).sum())


class OtherOptimizer(Plain):
    def before_training_exp(self, strategy, **kwargs):
        strategy.optimizer = torch.optim.SGD(strategy.model.parameters(), lr=0.1)


class LaterOptimizer(Plain):
    def before_training_iteration(self, strategy, **kwargs):
        strategy.optimizer = torch.optim.SGD(strategy.model.parameters(), lr=0.1)


class EmptiesGroups(Plain):
    def before_training_exp(self, strategy, **kwargs):
        strategy.optimizer.param_groups[0]["params"] = strategy.optimizer.param_groups[0]["params"][:1]


class AddsToOptimizer(Plain):
    def before_training_exp(self, strategy, **kwargs):
        strategy.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})


class StepsItself(Plain):
    def after_backward(self, strategy, **kwargs):
        strategy.optimizer.step()


class ChangesRate(Plain):
    def before_forward(self, strategy, **kwargs):
        for group in strategy.optimizer.param_groups:
            group["lr"] *= 0.5


class ChangesDecay(Plain):
    def before_training_exp(self, strategy, **kwargs):
        strategy.optimizer.param_groups[0]["weight_decay"] = 0.5


class ClearsState(Plain):
    def after_update(self, strategy, **kwargs):
        strategy.optimizer.state.clear()


class Unfreezes(Plain):
    def before_training_exp(self, strategy, **kwargs):
        strategy.model.requires_grad_(True)


class WritesFrozen(Plain):
    def after_training_exp(self, strategy, **kwargs):
        with torch.no_grad():
            for p in strategy.model.parameters():
                p.mul_(0.99)


class MovesTeachers(Plain):
    def after_training_exp(self, strategy, **kwargs):
        for plugin in strategy.plugins:
            if isinstance(plugin, Teachers):
                with torch.no_grad():
                    next(plugin.initial.model.parameters()).add_(1)


class WakesTeachers(Plain):
    def before_training_epoch(self, strategy, **kwargs):
        for plugin in strategy.plugins:
            if isinstance(plugin, Teachers):
                plugin.previous.model.train()


class TeachesTeachers(Plain):
    def before_training_exp(self, strategy, **kwargs):
        for plugin in strategy.plugins:
            if isinstance(plugin, Teachers):
                plugin.initial.model.requires_grad_(True)


class Clock(Plain):
    def before_backward(self, strategy, **kwargs):
        strategy.loss = strategy.loss * (1 + time.perf_counter() % 1)


class OfTheClass(Plain):
    runs = itertools.count()

    def before_training_exp(self, strategy, **kwargs):
        self.factor = 1 + next(self.runs)

    def after_forward(self, strategy, **kwargs):
        image = strategy.model.features.image
        strategy.loss = strategy.loss + self.factor * (image @ torch.ones(image.shape[1])).mean()


class ForgetsItself(Plain):
    factor = 1.0

    def before_eval(self, strategy, **kwargs):
        self.factor = 3.0

    def before_training_exp(self, strategy, **kwargs):
        self.factor = 1.0

    def after_forward(self, strategy, **kwargs):
        image = strategy.model.features.image
        strategy.loss = strategy.loss + self.factor * (image @ torch.ones(image.shape[1])).mean()


class KeepsState(Plain):
    """Without state_dict: what it knows of the first task is lost in a resume."""

    def __init__(self):
        super().__init__()
        self.mean = None

    def after_training_exp(self, strategy, **kwargs):
        self.mean = torch.ones(16)

    def after_forward(self, strategy, **kwargs):
        if self.mean is not None:
            strategy.loss = strategy.loss + (strategy.model.features.image @ self.mean).mean()


class KeepsStateWell(KeepsState):
    def state_dict(self):
        return {"mean": self.mean}

    def load_state_dict(self, state):
        self.mean = state["mean"]


class CountsSteps(Plain):
    """Begins anew with each task, and is lost within one."""

    def before_training_exp(self, strategy, **kwargs):
        self.steps = 0

    def after_forward(self, strategy, **kwargs):
        self.steps += 1
        image = strategy.model.features.image
        strategy.loss = strategy.loss + self.steps * (image @ torch.ones(image.shape[1])).mean()


class KeepsHalf(KeepsStateWell):
    def load_state_dict(self, state): ...


class OddState(KeepsStateWell):
    def state_dict(self):
        return {"mean": {"a": [object()]}}


class ResumesFromTaskTwo(Plain):
    """Keeps what a task leaves, and knows of none within the first."""

    def __init__(self):
        super().__init__()
        self.last = None

    def after_training_exp(self, strategy, **kwargs):
        self.last = {"image": strategy.model.features.image.detach().clone()}

    def state_dict(self):
        return {"last": self.last}

    def load_state_dict(self, state):
        self.last = {name: tensor.clone() for name, tensor in state["last"].items()}


class CountsFirstSteps(Plain):
    """Keeps what a task leaves, and loses what the first one has counted so far."""

    def __init__(self):
        super().__init__()
        self.steps, self.end = 0, None

    def after_forward(self, strategy, **kwargs):
        self.steps += 1
        image = strategy.model.features.image
        strategy.loss = strategy.loss + self.steps * (image @ torch.ones(image.shape[1])).mean()

    def after_training_exp(self, strategy, **kwargs):
        self.end = self.steps

    def state_dict(self):
        return {"end": self.end, "steps": self.steps if self.end else 0}

    def load_state_dict(self, state):
        self.steps, self.end = state["steps"], state["end"]


class Grows(Plain):
    def __init__(self):
        super().__init__()
        self.seen = []

    def after_training_iteration(self, strategy, **kwargs):
        self.seen.append(strategy.mb_x)


class Diary(Plain):
    def __init__(self):
        super().__init__()
        self.losses = []

    def after_training_iteration(self, strategy, **kwargs):
        self.losses.append(float(strategy.loss.detach()))


class KeepsTasks(Plain):
    def __init__(self):
        super().__init__()
        self.tasks = []

    def after_training_exp(self, strategy, **kwargs):
        self.tasks.append(strategy.experience)


class HangsHooks(Plain):
    def before_training_exp(self, strategy, **kwargs):
        strategy.model.register_forward_hook(lambda *_: None)


class AddsWeights(Plain):
    def before_training_exp(self, strategy, **kwargs):
        strategy.model.extra = nn.Parameter(torch.zeros(2), requires_grad=False)


class OneTask(Plain):
    def after_forward(self, strategy, **kwargs):
        [task] = strategy.model.features.text
        strategy.loss = strategy.loss + strategy.model.features.text[task].mean()


FAULTS = {
    "made": [(NoPlugin, "derive it from"), (CannotBeMade, "OSError: no disk")],
    "callbacks": [(UnknownCallback, "did you mean 'after_forward'"), (WithoutKeywords, r"\*\*kwargs")],
    "trains": [
        (Raises, r"step 1 of task 1: KeyError: 'nothing there' \(tests/test_kit.py:\d+\)"),
        (NeedsTeachers, r"register it with requires="),
        (StopsEarly, "ended after 3 of 4 steps"),
        (Undoes, "task 1 changes no weight"),
    ],
    "quiet": [(Prints, "'here I am'")],
    "finite_loss": [
        (NotANumber, "the loss is nan at step 1"),
        (Vector, r"shape \(3,\)"),
        (BadGradient, "the gradient of .* is not finite"),
    ],
    "optimizer": [
        (OtherOptimizer, ""),
        (LaterOptimizer, "replaces the strategy's optimizer"),
        (EmptiesGroups, "are not in the optimizer"),
        (AddsToOptimizer, "1 weights in the optimizer are not"),
        (StepsItself, "stepped 8 times in the 4 steps"),
        (ChangesRate, "changes the learning rate"),
        (ChangesDecay, "weight_decay"),
        (ClearsState, "state counts"),
    ],
    "gradients": [(Unfreezes, "changes `requires_grad`"), (WritesFrozen, "is changed")],
    "teachers": [
        (MovesTeachers, "pre-trained teacher is no longer"),
        (WakesTeachers, "teacher is in training mode"),
        (TeachesTeachers, "learns"),
    ],
    "repeatable": [(Clock, "from step"), (OfTheClass, "from step 1 on")],
    "nested_evaluation": [(ForgetsItself, "an evaluation in the middle")],
    "resume": [
        (KeepsState, r"it keeps mean between tasks"),
        (KeepsHalf, "from state_dict, and restore it"),
        (CountsSteps, "after 2 of its steps"),
        (ResumesFromTaskTwo, "2 steps of task 1 ends in an error: AttributeError.* also of the first task's"),
        (CountsFirstSteps, "task 1 differs after a resume after 2 of its steps"),
        (OddState, r"/mean/a/0: a object cannot be kept"),
    ],
    "growth": [
        (Grows, "bytes more after each task"),
        (Diary, "entries more after each task"),
        (KeepsTasks, "bytes more"),
        (HangsHooks, "adds a hook to the model"),
        (AddsWeights, "adds_parameters=True"),
    ],
    "replay": [(OneTask, "ended in an error")],
}


@pytest.mark.parametrize(
    ("check", "plugin", "said"), [(check, *fault) for check, faults in FAULTS.items() for fault in faults]
)
def test_each_fault_is_caught_by_its_check(check, plugin, said):
    with pytest.raises(CheckFailed) as caught:
        check_one("plugin", check, plugin, {})
    fault = caught.value.faults.get(check)
    assert fault, caught.value
    assert re.search(said, f"{fault.problem} {fault.fix}"), caught.value
    assert f"  {check}: {fault.problem}\n    fix: {fault.fix}" in str(caught.value)
    gc.collect()


def test_a_report_names_all_that_is_wrong_and_what_was_not_looked_at():
    with pytest.raises(CheckFailed) as caught:
        check_plugin(Prints)
    assert list(caught.value.faults) == ["quiet"]
    with pytest.raises(CheckFailed, match=r"(?s)1 check fails\n  trains: .*skipped until the above is fixed: quiet, "):
        check_plugin(Raises)


def test_every_check_has_a_function_and_a_fault_that_it_catches():
    assert {kind: list(checks) for kind, checks in CHECKS.items()} == {
        "plugin": list(PLUGIN_CHECKS), "adapter": list(ADAPTER_CHECKS), "optimizer": list(OPTIMIZER_CHECKS),
        "head": list(HEAD_CHECKS), "stream": list(STREAM_CHECKS),
    }  # fmt: skip
    assert FAULTS.keys() | CONDUCT.keys() == PLUGIN_CHECKS.keys()
    assert STREAM_FAULTS.keys() == STREAM_CHECKS.keys()


def test_state_that_is_kept_well_passes():
    check_plugin(KeepsStateWell)


def test_what_is_declared_counts():
    """Replay keeps images, and says so."""
    check_plugin("avalanche.replay", mem_size=4)


def test_a_training_of_two_tasks_tells_what_happened():
    trial = train_two_tasks([Fine()], iterations=4)
    assert len(trial.losses) == 8
    assert [len(t) for t in trial.texts_after] == [2, 3]
    assert trial.losses == train_two_tasks([Fine()], iterations=4).losses
    assert trial.losses != train_two_tasks([Fine()], iterations=4, seed=1).losses


def test_an_object_in_the_place_of_its_class_is_refused():
    with pytest.raises(TypeError, match="give Fine itself"):
        check_plugin(Fine())


def test_the_fixture_runs_each_check(mulki_plugin_check):
    mulki_plugin_check(Fine, weight=0.5)


def test_the_fixture_of_streams_runs_each_check(mulki_stream_check):
    mulki_stream_check(small_stream)


def picture(value, size=8):
    return np.full((size, size, 3), value, dtype=np.uint8)


def images(values, labels):
    return ArrayImages(np.stack([picture(v) for v in values]), np.array(labels))


def stream(train=None, test=None, classes=("dark", "bright"), templates=("a {} one.",), name="shades"):
    train = images([10, 200, 20, 210], [0, 1, 0, 1]) if train is None else train
    test = images([30, 220], [0, 1]) if test is None else test
    task = Task(name=name, class_names=classes, templates=templates, train=train, test=test)
    return TaskStream(name="shades", tasks=(task,))


class Locked(ArrayImages):
    def __reduce__(self):
        raise TypeError("cannot pickle a lock")


class Shifted(ArrayImages):
    def __getitem__(self, index):
        return Image.fromarray(self.images[index]), 1 - int(self.labels[index])


class Tensors(ArrayImages):
    def __getitem__(self, index):
        return torch.zeros(3, 8, 8), int(self.labels[index])


class Fades(ArrayImages):
    """Cannot be read for long."""

    looks = 0

    def __getitem__(self, index):
        Fades.looks += 1
        if Fades.looks > 2:
            raise OSError("the file is gone")
        return super().__getitem__(index)


def loud():
    print("drawing")  # noqa: T201
    return stream()


def unsteady():
    value = random.SystemRandom().randrange(100)
    return stream(train=images([value, 200, value + 1, 210], [0, 1, 0, 1]))


def like(kind, values=(10, 200, 20, 210), labels=(0, 1, 0, 1)):
    plain = images(values, labels)
    return lambda: stream(train=kind(plain.images, plain.labels))


STREAM_FAULTS = {
    "made": [(lambda: "a stream", "returns a str"), (lambda: 1 / 0, "ZeroDivisionError")],
    "names": [
        (lambda: stream(classes=("dark", "dark")), "two classes are called 'dark'"),
        (lambda: stream(templates=("a picture",)), "a template has no {}"),
        (lambda: stream(name=" "), "a task is called"),
    ],
    "labels": [
        (lambda: stream(train=images([1, 2], [1, 2])), "target 1 is 2, expected a number from 0 to 1"),
        (lambda: stream(train=images([1, 2], [0, 0])), "no image of 'bright'"),
        (like(Shifted), "comes with class 1, its target is 0"),
    ],
    "images": [(like(Tensors), "")],
    "separate": [(lambda: stream(test=images([10, 220], [0, 1])), "1 test image is among the training images too")],
    "repeatable": [(unsteady, "created twice")],
    "workers": [(like(Locked), "cannot pickle a lock")],
    "quiet": [(loud, "'drawing'")],
    "trains": [(like(Fades), "the file is gone")],
    "declared": [],
}


@pytest.mark.parametrize(
    ("check", "factory", "said"), [(check, *fault) for check, faults in STREAM_FAULTS.items() for fault in faults]
)
def test_each_fault_of_a_stream_is_caught_by_its_check(check, factory, said):
    Fades.looks = 0
    with pytest.raises(CheckFailed) as caught:
        check_one("stream", check, factory, {})
    assert check in caught.value.faults, caught.value
    assert said in caught.value.faults[check].problem


def test_a_stream_that_is_registered_with_other_tasks(monkeypatch):
    from attrs import evolve

    part = catalog().find("stream", "mtil-mini")
    wrong = evolve(part, tasks=("digits", "fish"), target=lambda: stream(name="shades"))
    monkeypatch.setitem(catalog().parts, ("stream", "mtil-mini"), wrong)
    with pytest.raises(CheckFailed) as caught:
        check_stream("mtil-mini")
    assert "it has the task 'shades', but is registered with digits, fish" in caught.value.faults["declared"].problem


def test_our_own_streams_pass():
    check_stream("mtil-mini", tasks=["scans", "digits"])
