"""Random numbers of a step's samples, such as noise or dropout: each rank takes its samples' rows of what one process draws."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mulki_plugins.ranks import collectives

_rows, _draws = 0, 0


def set_rows(count: int, *, new_step: bool = False) -> None:
    """The step's batch, or the part of it that is computed next, has so many images on all ranks."""
    global _rows, _draws
    _rows = count
    if new_step:
        _draws = 0


def rows() -> int:
    """The images, on all ranks, of the step's batch, or of the part of it that is being computed; 0 outside of a step."""
    return _rows


@contextmanager
def computing(count: int) -> Iterator[None]:
    """Within this block another batch is computed than the step's, with so many images on all ranks."""
    before = _rows
    set_rows(count)
    try:
        yield
    finally:
        set_rows(before)


Draw = Callable[[Tensor], Tensor]
"""Random numbers in the shape, the type and on the device of a tensor whose values do not count, as `torch.randn_like`."""


def draw_for_samples(x: Tensor, draw: Draw) -> Tensor:
    """What `draw` returns for samples x [B, ...], of which each rank has others; on one process `draw(x)`.

    For the samples of the step's batch, or of the part of it that is being computed, every rank draws what one process
    would and takes its own rows, so that the step is the same. For other samples each rank draws from a stream of its own,
    without a change of torch's generators, which stay the same on all ranks.
    """
    ranks = collectives.world()
    if ranks == 1:
        return draw(x)
    own = slice(collectives.rank(), _rows, ranks)
    if len(range(_rows)[own]) == len(x):
        strides = x.stride()
        order = sorted(range(x.ndim), key=lambda dim: -strides[dim])  # numbers are drawn in the order of the memory
        return draw(torch.empty_permuted((_rows, *x.shape[1:]), order, dtype=x.dtype, device=x.device))[own]
    with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []):
        torch.manual_seed(_own_seed())
        return draw(x)


def _own_seed() -> int:
    """A seed that no other rank has, and no other call of this step."""
    global _draws
    _draws += 1
    state, place = torch.get_rng_state().numpy().tobytes(), f"{collectives.rank()} {_draws}".encode()
    return int.from_bytes(hashlib.sha256(state + place).digest()[:7], "big")


def dropout_of_samples(x: Tensor, share: float, training: bool) -> Tensor:
    """torch's dropout of samples x [B, ...], of which each rank has others. share: what is left out, in 0..1."""
    if collectives.world() == 1 or not training or share == 0:
        return F.dropout(x, share, training)
    return x * draw_for_samples(x, lambda like: F.dropout(torch.ones_like(like), share))


def draw_dropout_for_samples(tower: nn.Module) -> None:
    """Let the dropout modules of an image tower draw as `draw_for_samples` does, if there are several ranks."""
    if not collectives.several():
        return
    from timm.layers.drop import DropPath  # slow to import, and one process does not need it

    for module in tower.modules():
        if isinstance(module, (nn.Dropout, DropPath)) and "forward" not in vars(module):
            module.forward = functools.partial(_drop, module)  # type: ignore[method-assign]


def draws_for_samples(module: nn.Module) -> bool:
    """Whether `draw_dropout_for_samples` has replaced the forward of this module, which draws nothing in evaluation mode."""
    return getattr(vars(module).get("forward"), "func", None) is _drop


def _drop(module: nn.Module, x: Tensor) -> Tensor:
    if collectives.world() == 1 or not module.training:
        dropped: Tensor = type(module).forward(module, x)
        return dropped
    return x * draw_for_samples(x, lambda like: type(module).forward(module, torch.ones_like(like)))
