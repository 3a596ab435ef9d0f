"""How much a plugin holds: everything that can be reached from it, its classes and the modules that define them."""

from __future__ import annotations

import functools
import gc
import sys
import types
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from attrs import frozen
from PIL import Image
from torch import Tensor, nn

from mulki_plugins.testing.own_code import own_classes

_LEAVES = (type, types.ModuleType, types.BuiltinFunctionType, int, float, complex, bool, type(None))


@frozen
class Held:
    """data: bytes of tensors, arrays, images and texts. items: entries of lists, mappings and sets, and other objects.
    graph: operations of autograd graphs."""

    data: int = 0
    items: int = 0
    graph: int = 0

    def __sub__(self, other: Held) -> Held:
        return Held(self.data - other.data, self.items - other.items, self.graph - other.graph)


@frozen(eq=False)
class Possessions:
    """Where to look for what a plugin holds.

    modules: those of the plugin's author. beside: objects that are not its own, and what is only reached through them.
    hosts: other objects, such as the strategy and the model, on which only new attributes count.
    """

    plugin: Any
    modules: set[str]
    beside: list[Any]
    hosts: list[tuple[Any, set[str]]]

    @classmethod
    def of(cls, plugin: Any, modules: set[str], beside: Iterable[Any], hosts: Iterable[Any]) -> Possessions:
        return cls(plugin, modules, [*beside, *hosts], [(host, set(vars(host))) for host in hosts])

    def roots(self) -> list[Any]:
        classes = [_names_of(kind) for kind in own_classes(self.plugin, self.modules)]
        modules = [_names_of(sys.modules[name]) for name in self.modules]
        hosted = [{n: v for n, v in vars(host).items() if n not in known} for host, known in self.hosts]
        return [self.plugin, *classes, *modules, *hosted]

    def reached(self) -> Iterator[Any]:
        """Every object that it holds, once."""
        seen = {id(each) for each in self.beside}
        kept: list[Any] = []  # so that no id is given out twice
        waiting = self.roots()
        while waiting:
            each = waiting.pop()
            if isinstance(each, type):
                if each.__module__ not in self.modules:
                    continue
                each = _names_of(each)
            if isinstance(each, _LEAVES) or id(each) in seen:
                continue
            seen.add(id(each))
            kept.append(each)
            yield each
            if isinstance(each, Mapping):
                waiting += [*each.keys(), *each.values()]
            elif isinstance(each, (list, tuple, set, frozenset, deque)):
                waiting += each
            waiting += _parts(each, self.modules)


def held_by(possessions: Possessions) -> Held:
    """What a plugin holds, each thing once."""
    storages: set[int] = set()
    nodes: set[Any] = set()
    data = items = 0
    for each in possessions.reached():
        if isinstance(each, Tensor):
            storage = each.untyped_storage()
            if storage.data_ptr() not in storages:
                storages.add(storage.data_ptr())
                data += storage.nbytes()
            _gather_graph(each.grad_fn, nodes)
        elif isinstance(each, np.ndarray):
            base = each if each.base is None else each.base
            if id(base) not in storages:
                storages.add(id(base))
                data += each.nbytes
        elif isinstance(each, Image.Image):
            data += each.width * each.height * len(each.getbands())
        elif isinstance(each, (str, bytes, bytearray)):
            data += len(each)
        elif isinstance(each, (Mapping, list, tuple, set, frozenset, deque)):
            items += len(each)
        elif not isinstance(each, (types.FunctionType, types.MethodType)):
            items += 1
    return Held(data, items, len(nodes))


def images_held(possessions: Possessions, size: int) -> list[Any]:
    """The tensors and arrays among what a plugin holds that look like RGB images of this size, and data sets of images."""
    found: list[Any] = []
    for each in possessions.reached():
        if isinstance(each, (Tensor, np.ndarray)):
            shape = tuple(each.shape)
            if shape[-3:] in ((3, size, size), (size, size, 3)) or (
                len(shape) < 3 and shape[-1:] == (3 * size * size,)
            ):
                found.append(each)
        elif isinstance(each, Image.Image) and each.size == (size, size):
            found.append(each)
    return found


def _names_of(owner: Any) -> dict[str, Any]:
    """The attributes of a class or module that its author wrote."""
    return {name: value for name, value in vars(owner).items() if not (name.startswith("__") and name.endswith("__"))}


def _parts(each: Any, modules: set[str]) -> list[Any]:
    """What an object refers to by its attributes, a function by what it closes over, its defaults and its cache."""
    if isinstance(each, types.MethodType):
        return [each.__self__, each.__func__]
    if isinstance(each, (staticmethod, classmethod)):
        return [each.__func__]
    if isinstance(each, property):
        return [each.fget, each.fset]
    if isinstance(each, functools._lru_cache_wrapper):
        own = getattr(each, "__module__", None) in modules
        return [one for one in gc.get_referents(each) if not callable(one)] if own else []
    if isinstance(each, types.GeneratorType):
        return list(each.gi_frame.f_locals.values()) if each.gi_frame is not None else []
    if isinstance(each, types.FunctionType):
        found = [cell.cell_contents for cell in each.__closure__ or () if _full(cell)]
        if each.__module__ in modules:
            found += [*(each.__defaults__ or ()), *(each.__kwdefaults__ or {}).values(), *vars(each).values()]
        return found
    found = list(vars(each).values()) if hasattr(each, "__dict__") else []
    for kind in type(each).__mro__:
        slots = vars(kind).get("__slots__", ())
        names = (slots,) if isinstance(slots, str) else slots
        found += [
            getattr(each, name) for name in names if name not in ("__dict__", "__weakref__") and hasattr(each, name)
        ]
    return found


def _full(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _gather_graph(node: Any, nodes: set[Any]) -> None:
    waiting = [node]
    while waiting:
        each = waiting.pop()
        if each is not None and each not in nodes:
            nodes.add(each)
            waiting += [following for following, _ in each.next_functions]


def hooks_on(model: nn.Module) -> int:
    """How many hooks hang on a model's modules."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    modules = sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)
    return modules + sum(len(p._backward_hooks or ()) for p in model.parameters())
