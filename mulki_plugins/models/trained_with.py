"""What weights were trained with, and must be used with: activation, and how images are prepared. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from attrs import evolve, fields_dict, frozen

from mulki_plugins.errors import MulkiError
from mulki_plugins.types import convert

Numbers = tuple[float, float, float]
Interpolation = Literal["bicubic", "bilinear"]
ResizeMode = Literal["shortest", "longest", "squash"]
KEY = "mulki"
"""The entry in a safetensors file's metadata."""
CLIP_MEAN: Numbers = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Numbers = (0.26862954, 0.26130258, 0.27577711)


@frozen(kw_only=True)
class TrainedWith:
    """What is known of weights; None where it is not known."""

    architecture: str | None = None
    quickgelu: bool | None = None
    mean: Numbers | None = None
    std: Numbers | None = None
    interpolation: Interpolation | None = None
    resize_mode: ResizeMode | None = None

    def metadata(self) -> dict[str, str]:
        """As an entry in a safetensors file's metadata."""
        return {KEY: json.dumps({key: value for key, value in _items(self).items() if value is not None})}

    def over(self, other: TrainedWith) -> TrainedWith:
        """This, and what the other knows beyond it."""
        return evolve(other, **{key: value for key, value in _items(self).items() if value is not None})

    def missing(self) -> list[str]:
        """The names of what is not known, without the architecture."""
        return [key for key, value in _items(self).items() if value is None and key != "architecture"]

    def conflicts(self, other: TrainedWith) -> list[str]:
        """The names of what both know and differ in, without the architecture."""
        mine, theirs = _items(self), _items(other)
        return [
            key for key in mine
            if key != "architecture" and None not in (mine[key], theirs[key]) and not _same(mine[key], theirs[key])
        ]  # fmt: skip


def from_metadata(metadata: Mapping[str, str], where: object) -> TrainedWith:
    """What a safetensors file says of itself. MulkiError where its entry cannot be read."""
    if KEY not in metadata:
        return TrainedWith()
    try:
        said = json.loads(metadata[KEY])
        known = {key: value for key, value in said.items() if key in fields_dict(TrainedWith)}
        result: TrainedWith = convert(known, TrainedWith)
    except Exception as error:
        raise MulkiError(f"{where}: its metadata are damaged: `{KEY}` does not describe a model") from error
    return result


def words(key: str, value: Any) -> str:
    """One property in a reader's words."""
    if key == "quickgelu":
        return "QuickGELU" if value else "GELU"
    return f"{key} {list(value)}" if isinstance(value, tuple) else f"{key} {value}"


def _items(known: TrainedWith) -> dict[str, Any]:
    return {key: getattr(known, key) for key in fields_dict(TrainedWith)}


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, (tuple, list)):
        return all(abs(x - y) < 1e-4 for x, y in zip(a, b, strict=True))  # 0.4815 is a rounded 0.48145466
    return bool(a == b)
