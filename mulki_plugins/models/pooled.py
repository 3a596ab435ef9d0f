"""The pooled features of an image tower: what its last projection reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mulki_plugins.errors import MulkiError


def encode_with_pooled(visual: nn.Module, encode: Callable[[], Tensor]) -> Tensor:
    """Image features with the pooled ones behind them, [B, d + p], both of unit norm.

    encode: encodes one batch through the image tower, and returns z [B, d]. MulkiError if the tower has no pooled features.
    """
    with _recorded(visual) as pooled:
        z = encode()
    if len(pooled) != 1 or pooled[0].ndim != 2 or len(pooled[0]) != len(z):
        raise no_pooled_features(visual)
    return torch.cat([z, F.normalize(pooled[0].to(z.dtype), dim=-1)], dim=1)


@contextmanager
def _recorded(visual: Any) -> Iterator[list[Tensor]]:
    """Within the block, what the last projection of the tower reads is added to a list at each of its forwards."""
    recorded: list[Tensor] = []
    if hasattr(visual, "trunk") and isinstance(getattr(visual, "head", None), nn.Module):  # a model of timm
        hook = visual.head.register_forward_pre_hook(lambda module, given: recorded.append(given[0]))
        try:
            yield recorded
        finally:
            hook.remove()
    elif hasattr(visual, "_pool") and getattr(visual, "proj", None) is not None:  # open_clip's transformer
        pool = visual._pool

        def record(x: Tensor) -> Any:
            pooled = pool(x)
            recorded.append(pooled[0])
            return pooled

        visual._pool = record
        try:
            yield recorded
        finally:
            del visual._pool
    else:
        raise no_pooled_features(visual)


def no_pooled_features(visual: nn.Module) -> MulkiError:
    """The error of an image tower without them."""
    what = f"an image tower of the type {type(visual).__name__} has no pooled features that a head could read"
    return MulkiError(what, "let the head read the projected ones: `features: projected`")
