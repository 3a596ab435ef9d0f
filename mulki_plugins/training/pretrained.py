"""What a checkpoint leaves out: whatever is still as pre-trained, which the recipe's model gives again.

Weights that have not changed are not written, and a plugin's tensor that equals one of them, such as a part of a previous
teacher, is written as a reference. The checkpoint names them by digest, so that a resume notices other pre-trained weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from mulki_plugins.errors import MulkiError
from mulki_plugins.training.checksums import digest

LEAST = 0.1
"""The share of the weights, in bytes, below which it is not worth leaving any out: the file then is of use by itself."""
_SAMPLE = 64
_MARK = "mulki: a pre-trained weight"
_HINT = "the run began with other weights: model.pretrained must name the same ones as then"


@frozen
class LeftOut:
    """The weights that a checkpoint leaves out, by name, and their digest."""

    names: tuple[str, ...]
    digest: str


class Pretrained:
    """Recognises pre-trained weights by their digests, without keeping them. weights: the model's, before any training."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._digests = {name: _digest(weight) for name, weight in weights.items()}
        self._names: dict[Any, list[str]] = {}
        for name, weight in weights.items():
            self._names.setdefault(_sample(weight), []).append(name)
        self._samples = {name: key for key, names in self._names.items() for name in names}

    def without(self, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], LeftOut | None]:
        """The weights without those that are as pre-trained, unless these are few; and what was left out."""
        same = [name for name, weight in weights.items() if self._is_same(name, weight)]
        if not same or sum(weights[name].nbytes for name in same) < LEAST * sum(w.nbytes for w in weights.values()):
            return weights, None
        left_out = LeftOut(tuple(same), digest(same, weights.__getitem__))
        return {name: weight for name, weight in weights.items() if name not in set(same)}, left_out

    def with_references(self, state: dict[str, Any], devices: list[str]) -> tuple[dict[str, Any], list[str]]:
        """A snapshot's state and devices, with references in the place of the plugins' tensors that equal a weight."""
        places, kept = iter(devices), list[str]()

        def keep(tensor: Tensor, refer: bool) -> Any:
            place = next(places, "")
            names = self._names.get(_sample(tensor), []) if refer and tensor.numel() > _SAMPLE else []
            for name in names:
                if self._digests[name] == _digest(tensor):
                    return _MARK, name, self._digests[name], place
            kept.append(place)
            return tensor

        result = {key: _replaced(value, key == "plugins", keep) for key, value in state.items()}
        return result, kept if devices else []

    def _is_same(self, name: str, weight: Tensor) -> bool:
        return self._samples.get(name) == _sample(weight) and self._digests[name] == _digest(weight)


def completed(
    weights: dict[str, Tensor], left_out: LeftOut | None, pretrained: Mapping[str, Tensor], where: object
) -> Any:
    """A checkpoint's weights with those that it left out, from the model as it is before any training.

    MulkiError if these are others than those that it left out. where: the checkpoint, for the message.
    """
    if left_out is None:
        return weights
    names = left_out.names
    if not pretrained.keys() >= set(names) or digest(names, pretrained.__getitem__) != left_out.digest:
        what = f"leaves out {len(names)} weights that stayed as pre-trained, and the model now has others"
        raise MulkiError(f"{where}: {what}", _HINT)
    return {**{name: pretrained[name] for name in names}, **weights}


def resolved(value: Any, pretrained: Mapping[str, Tensor], where: object) -> Any:
    """Nested state with the pre-trained weights in the place of references. MulkiError if they are others."""
    if isinstance(value, tuple) and len(value) == 4 and value[0] == _MARK:
        _, name, expected, place = value
        if name not in pretrained or _digest(pretrained[name]) != expected:
            raise MulkiError(
                f"{where}: refers to the pre-trained weight {name!r}, and the model now has another", _HINT
            )
        device = torch.device(place or "cpu")
        usable = device.type != "cuda" or torch.cuda.is_available()
        return pretrained[name].detach().to(device if usable else "cpu").clone()
    if isinstance(value, dict):
        return {key: resolved(item, pretrained, where) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return type(value)(resolved(item, pretrained, where) for item in value)
    return value


def has_references(value: Any) -> bool:
    """Whether nested state holds references."""
    return any(isinstance(each, str) and each == _MARK for each in _leaves(value))


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple, set)):
        yield value
        return
    for item in value:
        yield from _leaves(item)


def _replaced(value: Any, refer: bool, keep: Any) -> Any:
    if isinstance(value, Tensor):
        return keep(value, refer)
    if isinstance(value, dict):
        return {key: _replaced(item, refer, keep) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return type(value)(_replaced(item, refer, keep) for item in value)
    return value


def _digest(tensor: Tensor) -> str:
    return digest([""], lambda _: tensor)


def _sample(tensor: Tensor) -> tuple[Any, ...]:
    """Shape, type and a few numbers: what differs here differs."""
    flat = tensor.detach().reshape(-1)
    few = flat[:: max(1, flat.numel() // _SAMPLE)].cpu()
    return (
        tensor.dtype,
        tuple(tensor.shape),
        few.contiguous().view(torch.uint8).numpy().tobytes() if few.numel() else b"",
    )
