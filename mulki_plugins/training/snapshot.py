"""A run's state in the types that a checkpoint can hold, and a copy of its tensors in host memory.

A thread writes a checkpoint from the copy while the training changes the tensors themselves.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from attrs import frozen
from torch import Tensor


def storable(value: Any) -> Any:
    """A copy of nested state in the types a checkpoint can hold; tensors that own their memory are shared.

    These are dicts, lists, tuples, sets, numbers, texts and dense tensors. Equal states are written as equal bytes.
    TypeError, with the path, for anything else.
    """
    return _storable(value, "", set())


def _storable(value: Any, path: str, storages: set[int]) -> Any:
    where = path or "the state"
    if value is None or isinstance(value, (bool, float)):
        return value
    if isinstance(value, int) and value.bit_length() < 2000:  # weights_only=True reads no longer ones
        return int(value)
    if isinstance(value, str):
        return sys.intern(str(value))  # pickle writes the same object only once
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.is_quantized or value.is_meta:
            kind = f"{value.dtype}, {value.layout}, on {value.device}"
            raise TypeError(f"{where}: a tensor of this kind cannot be kept in a checkpoint: {kind}")
        tensor = value.detach().as_subclass(Tensor)
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in storages:
            tensor = tensor.clone()  # a view: torch.save would write all of what it shares
        storages.add(tensor.untyped_storage().data_ptr())
        return tensor
    if isinstance(value, Mapping):
        return {
            _storable(key, f"{path}/{key}", storages): _storable(item, f"{path}/{key}", storages)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple, set, frozenset)):
        items = [_storable(item, f"{path}/{i}", storages) for i, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items) if isinstance(value, tuple) else set(items)
    raise TypeError(f"{where}: a {type(value).__name__} cannot be kept in a checkpoint")


@frozen(eq=False)
class Snapshot:
    """Weights and state as they were at one moment, in host memory: one copy of everything that a checkpoint holds."""

    weights: dict[str, Tensor]
    state: dict[str, Any]
    devices: list[str]
    """Where each tensor of the state came from, in the order of `_tensors`; empty if all are on the CPU."""
    _copied: list[torch.cuda.Event]
    """The GPU's copies, which it makes in turn with the training's own work."""

    def wait(self) -> None:
        """Until the copies are there. Before, none of the tensors may be read."""
        for event in self._copied:
            event.synchronize()


def take_snapshot(weights: Mapping[str, Tensor], state: dict[str, Any]) -> Snapshot:
    """Copy weights and storable state. From a GPU the copies go into pinned memory, and the caller does not wait for them."""
    tensors = list(_tensors(state))
    devices = [str(tensor.device) for tensor in tensors] if any(not t.is_cpu for t in tensors) else []
    copies = {name: _on_host(weight) for name, weight in weights.items()}, _map_tensors(state, _on_host)
    events = []
    for device in {tensor.device for tensor in (*weights.values(), *tensors) if tensor.is_cuda}:
        events.append(torch.cuda.Event())  # type: ignore[no-untyped-call]  # torch has no annotation for it
        events[-1].record(torch.cuda.current_stream(device))
    return Snapshot(*copies, devices, events)


def put_back(state: Any, devices: list[str]) -> Any:
    """A snapshot's state with each tensor on the device it came from, or on the CPU if this machine lacks it."""
    places = iter(devices)

    def move(tensor: Tensor) -> Tensor:
        device = torch.device(next(places))
        return tensor.to(device) if device.type != "cuda" or torch.cuda.is_available() else tensor

    return _map_tensors(state, move)


def _on_host(tensor: Tensor) -> Tensor:
    if tensor.is_cpu:
        return tensor.detach().clone()
    if not tensor.is_cuda:
        return tensor.detach().cpu()
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor.detach(), non_blocking=True)


def _map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same nested state with the function's result in the place of each tensor, in the order of `_tensors`."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _map_tensors(item, function) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return type(value)(_map_tensors(item, function) for item in value)
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from _tensors(item)
