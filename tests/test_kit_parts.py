"""The kit for adapters and optimizers: good ones of every kind pass, and each fault is caught by its check."""

import itertools
import re

import pytest
import torch
from torch import nn

from mulki_plugins.adapters import Adapter, LoRA
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.testing import ADAPTER_CHECKS, OPTIMIZER_CHECKS, CheckFailed, check_adapter, check_optimizer
from mulki_plugins.testing.kit import CHECKS, check_one


class Shift(Adapter):
    """A vector for each task, added to the image features."""

    def apply(self, clip):
        clip.visual.shifts = nn.ParameterDict()
        clip.visual.register_forward_hook(lambda module, inputs, z: z + sum(module.shifts.values()))

    def before_task(self, clip, task):
        clip.visual.shifts[str(task)] = nn.Parameter(torch.zeros(16))

    def after_task(self, clip, task):
        clip.visual.shifts[str(task)].requires_grad_(False)


class Counting(Shift):
    """Keeps a number outside the model, well."""

    def __init__(self):
        self.tasks = 0

    def after_task(self, clip, task):
        super().after_task(clip, task)
        self.tasks += 1

    def state_dict(self):
        return {"tasks": self.tasks}

    def load_state_dict(self, state):
        self.tasks = state["tasks"]


@pytest.mark.parametrize("name", [p.name for p in catalog().of_kind("adapter") if p.is_ours])
def test_our_own_adapters_pass(name):
    check_adapter(name)


@pytest.mark.parametrize("factory", [Shift, Counting, lambda: LoRA(rank=2, merge_each_task=True)])
def test_good_adapters_pass(factory):
    check_adapter(factory)


class NoAdapter:
    pass


class NotAtTheStart(Shift):
    def before_task(self, clip, task):
        clip.visual.shifts[str(task)] = nn.Parameter(torch.ones(16))


class RandomLoRA(LoRA):
    def apply(self, clip):
        super().apply(clip)
        for name, p in clip.named_parameters():
            if name.endswith(".B"):
                nn.init.normal_(p)


class AddsNothing(Adapter):
    def apply(self, clip):
        clip.visual.proj.requires_grad_(True)


class AddsFrozen(Adapter):
    def apply(self, clip):
        clip.visual.shift = nn.Parameter(torch.zeros(16), requires_grad=False)


class Renames(Adapter):
    def apply(self, clip):
        block = clip.visual.transformer.resblocks[0]
        block.mlp.c_fc = nn.Sequential(block.mlp.c_fc)


class ForgetsItsShifts(Shift):
    """Grows where a resume does not call it: at the first forward of a task."""

    def before_task(self, clip, task):
        self.task = str(task)

    def apply(self, clip):
        clip.visual.shifts = nn.ParameterDict()

        def add(module, inputs, z):
            if module.training and str(len(module.shifts)) == "0":
                module.shifts["0"] = nn.Parameter(torch.zeros(16))
            return z + sum(module.shifts.values())

        clip.visual.first = nn.Parameter(torch.zeros(16))
        clip.visual.register_forward_hook(lambda module, inputs, z: add(module, inputs, z) + module.first)

    def after_task(self, clip, task):
        pass


class LosesItsScale(Shift):
    """Keeps a number outside the model and in no state, which the next task's training depends on."""

    def __init__(self):
        self.scale = 1.0

    def apply(self, clip):
        clip.visual.shifts = nn.ParameterDict()
        clip.visual.register_forward_hook(self.add)

    def add(self, module, inputs, z):
        if module.training:
            self.scale += 0.1
        return z + self.scale * sum(module.shifts.values())

    def __deepcopy__(self, memo):
        return self


class MovesTeachers(Shift):
    """Its hook reads the live model, also in a copy of it."""

    def apply(self, clip):
        clip.visual.shifts = nn.ParameterDict()
        visual = clip.visual
        plain = visual.forward
        clip.visual.forward = lambda x: plain(x) + sum(visual.shifts.values())


class MovesTheBase(Shift):
    def apply(self, clip):
        super().apply(clip)

        def drift(module, inputs):
            if module.training:
                module.proj.data *= 0.999

        clip.visual.register_forward_pre_hook(drift)


class MergesWrongly(LoRA):
    def merge(self, clip):
        clip.visual.proj.data[0] += 0.1
        super().merge(clip)


class KeepsFeatures(Shift):
    def __init__(self):
        self.kept = []

    def apply(self, clip):
        super().apply(clip)
        clip.visual.register_forward_hook(
            lambda module, inputs, z: self.kept.append(z.detach()) if module.training else None
        )

    def __deepcopy__(self, memo):
        return self


ADAPTERS = {
    "made": [(NoAdapter, "derive it from mulki_plugins.adapters.Adapter")],
    "start": [
        (NotAtTheStart, "before_task of the first task changes"),
        (RandomLoRA, "answers otherwise than without it"),
        (Renames, "renames the model's own weights"),
    ],
    "trains": [(AddsFrozen, "changes no weight")],
    "resume": [
        (ForgetsItsShifts, "do not fit the resumed model|in apply and before_task"),
        (LosesItsScale, "differs after a resume"),
    ],
    "teachers": [(MovesTeachers, "teacher")],
    "learning": [(MovesTheBase, "visual.proj does not require a gradient and changes"), (AddsNothing, "")],
    "merged": [(MergesWrongly, "merged weights answer otherwise")],
    "growth": [(KeepsFeatures, "more after each")],
}


@pytest.mark.parametrize(
    ("check", "factory", "said"), [(check, *fault) for check, faults in ADAPTERS.items() for fault in faults]
)
def test_each_fault_of_an_adapter_is_caught_by_its_check(check, factory, said):
    caught_by(check, "adapter", factory, said)


def caught_by(check, kind, factory, said):
    with pytest.raises(CheckFailed) as caught:
        check_one(kind, check, factory, {})
    fault = caught.value.faults[check]
    assert re.search(said, f"{fault.problem} {fault.fix}"), caught.value


# optimizers


class Signs(torch.optim.Optimizer):
    """Momentum of the gradient's sign."""

    def __init__(self, params, lr=0.1, beta=0.9):
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - group["beta"])
                p -= group["lr"] * mean.sign()


class OwnRate(Signs):
    def __init__(self, params, lr=0.1):
        super().__init__(params, lr)
        self.lr = lr

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p -= self.lr * p.grad


class OwnState(Signs):
    """Keeps its momentum in an attribute."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr)
        self.means = {}

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    mean = self.means.setdefault(id(p), torch.zeros_like(p))
                    mean.lerp_(p.grad, 0.1)
                    p -= group["lr"] * mean


class OddState(Signs):
    def step(self, closure=None):
        super().step()
        for p in self.param_groups[0]["params"]:
            self.state[p]["how"] = object()


class FixedList(Signs):
    def __init__(self, params, lr=0.1):
        super().__init__(params, lr)
        self.pairs = [(group, p) for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        for group, p in self.pairs:
            if p.grad is not None:
                p -= group["lr"] * p.grad


class MovesAll(Signs):
    @torch.no_grad()
    def step(self, closure=None):
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                p *= 1 - 0.1 * group["lr"]


def no_optimizer(params, lr):
    return list(params)


def noisy(params, lr):
    torch.manual_seed(0)
    return Signs(params, lr)


class Still(Signs):
    def step(self, closure=None):
        pass


class Explodes(Signs):
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.fill_(float("inf"))


OPTIMIZERS = {
    "made": [(no_optimizer, "returned a list, expected a torch.optim.Optimizer")],
    "trains": [(Still, "no weight moved|changes no weight")],
    "rates": [(OwnRate, "learning rate is 0 moves"), (Still, "does not move")],
    "frozen": [(MovesAll, "without a gradient changes")],
    "later": [(FixedList, "do not learn")],
    "state": [(OwnState, "differ after load_state_dict"), (OddState, "a checkpoint cannot hold its state")],
    "random_numbers": [(noisy, "seeds")],
    "finite_loss": [(Explodes, "not finite|ended in an error")],
    "resume": [(OwnState, "task 2 differs after a resume")],
}


@pytest.mark.parametrize("name", [p.name for p in catalog().of_kind("optimizer") if p.is_ours])
def test_our_own_optimizers_pass(name):
    check_optimizer(name)


@pytest.mark.parametrize(
    ("factory", "options"), [(Signs, {"beta": 0.5}), (torch.optim.RAdam, {}), (torch.optim.NAdam, {})]
)
def test_good_optimizers_pass(factory, options):
    check_optimizer(factory, **options)


@pytest.mark.parametrize(
    ("check", "factory", "said"), [(check, *fault) for check, faults in OPTIMIZERS.items() for fault in faults]
)
def test_each_fault_of_an_optimizer_is_caught_by_its_check(check, factory, said):
    caught_by(check, "optimizer", factory, said)


def test_the_descriptions_are_those_of_the_checks():
    assert list(CHECKS["adapter"]) == list(ADAPTER_CHECKS)
    assert list(CHECKS["optimizer"]) == list(OPTIMIZER_CHECKS)
    assert not {*itertools.chain(ADAPTERS, OPTIMIZERS)} - {*ADAPTER_CHECKS, *OPTIMIZER_CHECKS}
