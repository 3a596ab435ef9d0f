"""Checks of an optimizer on a few weights of its own."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import torch
from attrs import evolve
from torch import Tensor, nn

from mulki_plugins.errors import MulkiError
from mulki_plugins.recipe.schema import Optimizer
from mulki_plugins.registry.catalog import Catalog, Kind, Provenance
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.registry.guard import cause_of
from mulki_plugins.registry.register import Register
from mulki_plugins.testing.laboratory import Laboratory, optimizer_of
from mulki_plugins.testing.process import preserved_state
from mulki_plugins.testing.subject import Fault, Subject
from mulki_plugins.training.groups import Grouping, make_optimizer
from mulki_plugins.training.snapshot import storable

UNDER_TEST = "the-optimizer-under-test"
GROUPS = "read lr and weight_decay from the group in each step, not from an attribute"
_SHAPES = {"matrix": (6, 4), "table": (3, 5, 2), "bias": (4,), "other": (6, 4)}


def registered(subject: Subject) -> Subject:
    """The subject with a registration; a function or class that has none gets one for the kit."""
    if subject.part is not None:
        return subject
    mine = Catalog()
    register = Register(mine, Provenance(distribution="the package under test", version=""))
    register.optimizer(UNDER_TEST, subject.factory, summary="the optimizer under test")
    return evolve(subject, part=mine.parts["optimizer", UNDER_TEST])


@contextlib.contextmanager
def findable(subject: Subject) -> Iterator[None]:
    """Let strategies find the subject by its registration, within the block."""
    key: tuple[Kind, str] = ("optimizer", UNDER_TEST)
    if subject.part is not None and (subject.kind, subject.part.name) == key:
        catalog().parts[key] = subject.part
    try:
        yield
    finally:
        catalog().parts.pop(key, None)


def made(lab: Laboratory) -> None:
    with preserved_state():
        _optimizer(lab, _weights(), lr=0.1)


def rates(lab: Laboratory) -> None:
    """A group of rate 0 stays, with a group of another rate beside it; and follows the rate when it is set."""
    with preserved_state():
        weights = _weights()
        optimizer = _optimizer(lab, weights, lr=0.05)
        quiet = _group_of(optimizer, weights["other"])
        quiet["lr"] = 0.0
        before = _copies(weights)
        _step(optimizer, weights)
        same_group = {id(p) for p in quiet["params"]}
        for name, weight in weights.items():
            moved = not torch.equal(weight, before[name])
            if id(weight) in same_group and moved:
                raise Fault("a group whose learning rate is 0 moves", GROUPS)
            if id(weight) not in same_group and not moved:
                raise Fault(f"a weight of shape {tuple(weight.shape)} does not move", "make a step for every weight")
        quiet["lr"] = 0.05
        _step(optimizer, weights)
        if torch.equal(weights["other"], before["other"]):
            raise Fault("a learning rate that is set later has no effect", GROUPS)


def frozen(lab: Laboratory) -> None:
    with preserved_state():
        weights = _weights()
        optimizer = _optimizer(lab, weights, lr=0.05)
        before = _copies(weights)
        for step in range(2):
            _step(optimizer, weights, without=("other",) if not step else ("other", "bias"))
        if not torch.equal(weights["other"], before["other"]):
            raise Fault("a weight without a gradient changes", "leave out weights whose `grad` is None")


def later(lab: Laboratory) -> None:
    with preserved_state():
        weights = _weights()
        optimizer = _optimizer(lab, {n: w for n, w in weights.items() if n != "other"}, lr=0.05)
        _step(optimizer, weights)
        before = _copies(weights)
        optimizer.add_param_group({"params": [weights["other"]], "lr": 0.05, "initial_lr": 0.05, "weight_decay": 0.0})
        _step(optimizer, weights)
        if torch.equal(weights["other"], before["other"]):
            raise Fault(
                "weights that join by add_param_group do not learn", "go through `self.param_groups` in each step"
            )


def state(lab: Laboratory) -> None:
    with preserved_state():
        one = _weights()
        optimizer = _optimizer(lab, one, lr=0.05)
        for seed in range(3):
            _step(optimizer, one, seed)
        other = {name: nn.Parameter(weight.detach().clone()) for name, weight in one.items()}
        kept = optimizer.state_dict()
        try:
            file = io.BytesIO()
            torch.save(storable(kept), file)
            file.seek(0)
            kept = torch.load(file, weights_only=True)
        except Exception as error:  # whatever torch or storable raise
            fix = "keep tensors, numbers and texts in `self.state` and in the groups"
            raise Fault(f"a checkpoint cannot hold its state: {cause_of(error)}", fix) from error
        again = _optimizer(lab, other, lr=0.01)
        again.load_state_dict(copy.deepcopy(kept))
        for seed in range(3, 6):
            _step(optimizer, one, seed)
            _step(again, other, seed)
        if not all(torch.equal(one[name], other[name]) for name in one):
            fix = "keep everything that a step needs in `self.state[p]` or in the groups, not in attributes"
            raise Fault("steps differ after load_state_dict of its own state_dict", fix)


def _weights() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in _SHAPES.items()}


def _copies(weights: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in weights.items()}


def _optimizer(lab: Laboratory, weights: dict[str, nn.Parameter], *, lr: float) -> torch.optim.Optimizer:
    """As a strategy makes it, with each weight in a group of its own. Fault if that fails."""
    settings = optimizer_of(lab.subject)
    settings = Optimizer(name=settings.name, lr=lr, weight_decay=0.0, options=settings.options)

    class Apart(Grouping):
        def groups_of(self, weights: Any, settings: Optimizer) -> list[dict[str, Any]]:
            rates = {"lr": settings.lr, "initial_lr": settings.lr, "weight_decay": 0.0}
            return [{"params": [weight], **rates} for weight in weights.values()]

    fix = "take parameter groups first, then lr and its options as keywords, and return a torch.optim.Optimizer"
    return _attempt(lambda: make_optimizer(weights, settings, Apart([], nn.Module())), fix)


def _attempt(make: Callable[[], torch.optim.Optimizer], fix: str) -> torch.optim.Optimizer:
    try:
        return make()
    except MulkiError as error:
        raise Fault(error.lines()[0], fix) from error
    except Exception as error:  # of one of ours
        raise Fault(f"it cannot be made: {cause_of(error)}", fix) from error


def _group_of(optimizer: torch.optim.Optimizer, weight: Tensor) -> dict[str, Any]:
    for group in optimizer.param_groups:
        if any(p is weight for p in group["params"]):
            return group
    raise Fault("it drops a weight that it was given", "keep every weight in `self.param_groups`")


def _step(
    optimizer: torch.optim.Optimizer, weights: dict[str, nn.Parameter], seed: int = 0, without: tuple[str, ...] = ()
) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, weight in weights.items():
        gradient = torch.randn(weight.shape, generator=generator)
        weight.grad = None if name in without else gradient
    optimizer.step()
