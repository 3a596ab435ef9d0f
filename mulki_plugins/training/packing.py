"""Nested state as JSON beside tensors: what a checkpoint can hold, and nothing that could run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def packed(value: Any) -> tuple[Any, dict[str, Tensor]]:
    """A nest of dicts, lists, tuples, sets, numbers, texts and tensors, as plain JSON and the tensors by their path.

    Devices and the order in memory are kept.

    TypeError, with the path, for anything else.
    """
    tensors: dict[str, Tensor] = {}
    return _packed(value, "", tensors), tensors


def _packed(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, float)):
        return {"$float": repr(float(value))} if isinstance(value, float) and not math.isfinite(value) else value
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.is_quantized or value.is_meta or value.dtype is torch.complex128:
            sort = f"{value.dtype}, {value.layout}, on {value.device}"
            raise TypeError(f"{path or 'the state'}: a tensor of this kind cannot be kept in a checkpoint: {sort}")
        tensors[path] = value.detach()
        plain: dict[str, Any] = {"$tensor": path}
        if value.device.type != "cpu":
            plain["device"] = str(value.device)
        if not value.is_contiguous():  # such as channels last: sums over another order of memory round otherwise
            plain["stride"] = list(value.stride())
        return plain
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: _packed(item, f"{path}/{key}", tensors) for key, item in value.items()}
        pairs = enumerate(value.items())
        return {
            "$items": [[_packed(k, f"{path}/{i}k", tensors), _packed(v, f"{path}/{i}", tensors)] for i, (k, v) in pairs]
        }
    if isinstance(value, (list, tuple, set, frozenset)):
        items = [_packed(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]
        kind = next((name for name, of in _SEQUENCES.items() if isinstance(value, of)), None)
        return {kind: items} if kind else items
    raise TypeError(f"{path or 'the state'}: a {type(value).__name__} cannot be kept in a checkpoint")


_SEQUENCES: dict[str, Any] = {"$tuple": tuple, "$set": (set, frozenset)}


def unpacked(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What was packed, each tensor on its device, or on the CPU where that is not there.

    ValueError where the two do not belong together.
    """
    if isinstance(plain, list):
        return [unpacked(item, tensors) for item in plain]
    if not isinstance(plain, dict):
        return plain
    if "$tensor" in plain:
        if (path := plain["$tensor"]) not in tensors:
            raise ValueError(f"the tensor {path!r} is missing")
        tensor, device = tensors[path], torch.device(plain.get("device", "cpu"))
        stride = plain.get("stride", tensor.stride())
        # a copy, as torch aligns it: sums over memory of another alignment round otherwise too
        tensor = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype).copy_(tensor)
        return tensor.to(device) if device.type != "cuda" or torch.cuda.is_available() else tensor
    if len(plain) == 1:
        [(key, value)] = plain.items()
        if key == "$float":
            return float(value)
        if key == "$items":
            return {unpacked(k, tensors): unpacked(v, tensors) for k, v in value}
        if key in ("$tuple", "$set"):
            return (tuple if key == "$tuple" else set)(unpacked(item, tensors) for item in value)
    return {key: unpacked(item, tensors) for key, item in plain.items()}
