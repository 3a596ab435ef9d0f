"""How much a plugin holds: everything that can be reached from it."""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from attrs import frozen
from PIL import Image
from torch import Tensor, nn

_LEAVES = (type, types.ModuleType, types.BuiltinFunctionType, int, float, complex, bool, type(None))


@frozen
class Held:
    """data: bytes of tensors, arrays, images and texts. items: entries of lists, mappings and sets."""

    data: int = 0
    items: int = 0

    def __sub__(self, other: Held) -> Held:
        return Held(self.data - other.data, self.items - other.items)


def held_by(root: Any, beside: Iterable[Any]) -> Held:
    """What an object holds, each thing once, but for `beside` and what is only reached through it."""
    seen = {id(each) for each in beside}
    kept: list[Any] = []  # so that no id is given out twice
    storages: set[int] = set()
    data = items = 0
    waiting = [root]
    while waiting:
        each = waiting.pop()
        if isinstance(each, _LEAVES) or id(each) in seen:
            continue
        seen.add(id(each))
        kept.append(each)
        if isinstance(each, Tensor):
            storage = each.untyped_storage()
            if storage.data_ptr() not in storages:
                storages.add(storage.data_ptr())
                data += storage.nbytes()
        elif isinstance(each, np.ndarray):
            base = each if each.base is None else each.base
            if id(base) not in storages:
                storages.add(id(base))
                data += each.nbytes
        elif isinstance(each, Image.Image):
            data += each.width * each.height * len(each.getbands())
        elif isinstance(each, (str, bytes, bytearray)):
            data += len(each)
        elif isinstance(each, Mapping):
            items += len(each)
            waiting += [*each.keys(), *each.values()]
        elif isinstance(each, (list, tuple, set, frozenset, deque)):
            items += len(each)
            waiting += each
        waiting += _parts(each)
    return Held(data, items)


def _parts(each: Any) -> list[Any]:
    """What an object refers to by its attributes, a function by what it closes over."""
    if isinstance(each, types.MethodType):
        return [each.__self__]
    if isinstance(each, types.FunctionType):
        return [cell.cell_contents for cell in each.__closure__ or () if _full(cell)]
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


def hooks_on(model: nn.Module) -> int:
    """How many hooks hang on a model's modules."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    modules = sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)
    return modules + sum(len(p._backward_hooks or ()) for p in model.parameters())
