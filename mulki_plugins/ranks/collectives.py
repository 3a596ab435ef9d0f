"""What the ranks of a run compute together: sums and rows with their gradient, numbers of the host, and the gradients.

The loss of a step is Σ_r w_r·L_r over the ranks r, w_r being the rank's share of the batch and L_r what its plugins compute.
A mean over the samples of a rank is right as it is, and so is a term that does not depend on the samples. A term in which
samples meet is computed by every rank from the sums or rows of all of them (`summed`, `gathered`): the gradient of each copy
counts w_r, and those of all copies add up to the term's.

On one process every function returns what it was given. Every rank must call the same ones in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from attrs import define
from torch import Tensor

_BUCKET = 2**24
"""Numbers that are summed over the ranks in one message."""

T = TypeVar("T")


@define(eq=False)
class Ranks:
    """The ranks of this run, as this process sees them."""

    rank: int
    world: int
    host: Any
    """The group of the ranks for numbers in host memory; None for the default one."""
    broken: Callable[[RuntimeError], BaseException]
    """What to raise if the ranks cannot be reached."""
    heard: Callable[[], BaseException | None] = lambda: None
    """The error of another rank, if one has failed or does so within moments."""
    share: float = 1.0
    """w: this rank's share of the step's batch."""
    alone: bool = False
    """Whether this process computes something by itself, as if it were the only one."""


_ranks: Ranks | None = None


def use(ranks: Ranks | None) -> None:
    """Compute with these ranks from here on; None for this process alone."""
    global _ranks
    _ranks = ranks


def world() -> int:
    """The number of ranks that compute together: 1 on one process, and within `by_itself`."""
    return 1 if _ranks is None or _ranks.alone else _ranks.world


def count() -> int:
    """The number of ranks of the run, also within `by_itself`."""
    return 1 if _ranks is None else _ranks.world


def rank() -> int:
    """This process's rank, from 0."""
    return 0 if _ranks is None else _ranks.rank


def is_first() -> bool:
    """Whether this process makes folders, writes, logs and prints."""
    return rank() == 0


def share() -> float:
    """w, in 0..1: this rank's share of the step's batch.

    A sum over some of the samples, divided by their number on all ranks and by w, is the rank's part of their mean.
    """
    return 1.0 if world() == 1 or _ranks is None else _ranks.share


def set_share(value: float, *, alone: bool = False) -> None:
    """Called for each batch. alone: every rank has the whole of it, and its loss counts 1/world."""
    if _ranks is not None:
        _ranks.share, _ranks.alone = value, alone


def end_step() -> None:
    """The batch is done with. The next random numbers are the same on all ranks, whatever each has drawn for its samples."""
    if _ranks is not None:
        set_share(1.0)
        torch.set_rng_state(from_first(torch.get_rng_state()))
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch has no type for it
            torch.cuda.set_rng_state(from_first(torch.cuda.get_rng_state()))


def several() -> bool:
    """Whether the run has several ranks, also if this process computes something by itself."""
    return _ranks is not None


def error_elsewhere() -> BaseException | None:
    """The error of another rank, which explains what this one cannot; None if there is none."""
    return None if _ranks is None else _ranks.heard()


def factor() -> float:
    """The factor of this rank's loss in the step's."""
    return 1.0 if _ranks is None else _ranks.share


@contextmanager
def by_itself() -> Iterator[None]:
    """Within this block the process computes as if it were the only one, such as to explain an error."""
    if _ranks is None:
        yield
        return
    before, _ranks.alone = _ranks.alone, True
    try:
        yield
    finally:
        _ranks.alone = before


# with gradient


def summed(x: Tensor) -> Tensor:
    """The sum of a tensor over the ranks, with its gradient; of one shape on all of them."""
    if world() == 1:
        return x
    result: Tensor = _together(lambda: _Summed.apply(x))
    return result


def gathered(x: Tensor) -> Tensor:
    """The rows of all ranks [ΣN, ...] from those of each [N, ...], rank after rank, with their gradient. N may differ."""
    if world() == 1:
        return x
    sizes = gather_numbers([len(x)])
    result: Tensor = _together(lambda: _Gathered.apply(x, [int(n) for [n] in sizes]))
    return result


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        _together(lambda: dist.all_reduce(total))
        return total


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int]) -> Tensor:
        me = rank()
        ctx.begin, ctx.end = sum(sizes[:me]), sum(sizes[: me + 1])
        rows = x.new_zeros(sum(sizes), *x.shape[1:])  # a sum with zeros is exact, and needs no rows of equal number
        rows[ctx.begin : ctx.end] = x
        dist.all_reduce(rows)
        return rows

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].contiguous().clone()
        _together(lambda: dist.all_reduce(total))
        return total[ctx.begin : ctx.end], None


# without gradient


@torch.no_grad()
def add_up(*tensors: Tensor) -> None:
    """Replace each tensor by its sum over the ranks."""
    if world() > 1:
        _together(lambda: [dist.all_reduce(tensor) for tensor in tensors])


def add_up_by_name(tensors: dict[str, Tensor]) -> None:
    """Replace each tensor by its sum over the ranks. A rank that lacks one, since it had no batch, counts as 0."""
    if world() == 1:
        return
    for kinds in of_all({name: (tuple(t.shape), t.dtype, t.device.type) for name, t in tensors.items()}):
        for name, (shape, dtype, device) in kinds.items():
            if name not in tensors:
                tensors[name] = torch.zeros(shape, dtype=dtype, device=device)
    add_up(*(tensors[name] for name in sorted(tensors)))


def total(count: int) -> int:
    """The sum of a number of the host over the ranks."""
    return count if world() == 1 else int(sum(n for [n] in gather_numbers([count])))


def gather_numbers(numbers: Sequence[float]) -> list[list[float]]:
    """The numbers of each rank, as many on all of them."""
    if world() == 1 or _ranks is None:
        return [list(numbers)]
    mine = torch.tensor(list(numbers), dtype=torch.float64)
    every = [torch.empty_like(mine) for _ in range(_ranks.world)]
    host = _ranks.host
    _together(lambda: dist.all_gather(every, mine, group=host))
    return [each.tolist() for each in every]


def of_all(value: T) -> list[T]:
    """A plain value of each rank, also if each of them has the whole batch."""
    if _ranks is None:
        return [value]
    every: list[Any] = [None] * _ranks.world
    host = _ranks.host
    _together(lambda: dist.all_gather_object(every, value, group=host))
    return every


def largest_of_all(numbers: Sequence[int]) -> list[int]:
    """For each number of the host the largest over all ranks, also if each of them has the whole batch."""
    if _ranks is None:
        return list(numbers)
    values = torch.tensor(list(numbers), dtype=torch.int64)
    host = _ranks.host
    _together(lambda: dist.all_reduce(values, op=dist.ReduceOp.MAX, group=host))
    result: list[int] = values.tolist()
    return result


def from_first(x: Tensor) -> Tensor:
    """The first rank's value of a tensor in host memory."""
    if _ranks is None or _ranks.world == 1:
        return x
    copied, host = x.clone(), _ranks.host
    _together(lambda: dist.broadcast(copied, 0, group=host))
    return copied


@torch.no_grad()
def sum_gradients(weights: Sequence[Tensor]) -> None:
    """Sum the gradients of these weights over the ranks. One that no rank has stays None; on some ranks missing, it is 0 there.

    The weights are the same, in the same order, on all ranks. The sums are the same to the last bit.
    """
    if _ranks is None:
        return
    with _all_ranks():
        known = largest_of_all([weight.grad is not None for weight in weights])
        kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for weight in (weight for weight, has in zip(weights, known, strict=True) if has):
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            kinds.setdefault((weight.grad.dtype, weight.grad.device), []).append(weight.grad)
        for gradients in kinds.values():
            for bucket in _buckets(gradients):
                flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
                add_up(flat)
                parts = torch.split(flat, [gradient.numel() for gradient in bucket])
                torch._foreach_copy_(bucket, [p.view_as(g) for p, g in zip(parts, bucket, strict=True)])


@torch.no_grad()
def make_equal(tensors: Sequence[Tensor]) -> float:
    """Give all ranks the first one's tensors. Returns how far the sums of another rank's were from it, relative to their size."""
    if _ranks is None:
        return 0.0
    numbers = [t for t in tensors if t.is_floating_point() and t.numel()]
    sums = torch.stack([torch.stack([t.double().sum(), t.double().abs().sum()]).cpu() for t in numbers])
    every = torch.tensor(gather_numbers(sums.flatten().tolist())).view(_ranks.world, -1, 2)
    far = (every[:, :, 0] - every[0, :, 0]).abs() / every[0, :, 1].clamp(min=torch.finfo(torch.float32).tiny)
    worst = float(far.nan_to_num(0.0).max()) if len(numbers) else 0.0
    if worst > 0:
        for tensor in numbers:
            _together(lambda tensor=tensor: dist.broadcast(tensor, 0))  # type: ignore[misc]  # the tensor of this turn
    return worst


def weighted_sum(x: Tensor) -> Tensor:
    """Σ_r w_r·x_r over the ranks, of a tensor without gradient: the step's loss from those of the ranks."""
    if _ranks is None:
        return x
    with _all_ranks():
        result = (_ranks.share * x).clone()
        add_up(result)
    return result


@contextmanager
def _all_ranks() -> Iterator[None]:
    """All ranks together, also if each of them has the whole batch."""
    assert _ranks is not None
    before, _ranks.alone = _ranks.alone, False
    try:
        yield
    finally:
        _ranks.alone = before


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for gradient in gradients:
        if bucket and size + gradient.numel() > _BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.numel()
    if bucket:
        yield bucket


def _together(action: Callable[[], Any]) -> Any:
    """What an action of all ranks returns. The error of the rank that is missing, if one is."""
    try:
        return action()
    except RuntimeError as error:
        if _ranks is None:
            raise
        raise _ranks.broken(error) from error
