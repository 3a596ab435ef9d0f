"""Which rows of a batch, and which batches of a data set, are this rank's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from torch import Tensor
from torch.utils.data import BatchSampler, Sampler

from mulki_plugins.ranks import collectives

T = TypeVar("T")


def own_part(batch: Sequence[Tensor]) -> list[Tensor]:
    """This rank's rows of a training batch, every world-th one, so that each rank has its share of all that is in it.

    A batch with fewer images than ranks is left whole: every rank computes all of it. Sets the rank's share of the batch.
    """
    collectives.set_share(1.0)
    ranks, size = collectives.world(), len(batch[0])
    if ranks == 1:
        return list(batch)
    if size < ranks:
        collectives.set_share(1 / ranks, alone=True)
        return list(batch)
    parts = [each[collectives.rank() :: ranks] for each in batch]
    collectives.set_share(len(parts[0]) / size)
    return parts


def own_rows(x: Tensor) -> Tensor:
    """This rank's rows of a batch that is not the step's own; there may be none."""
    ranks = collectives.world()
    return x if ranks == 1 else x[collectives.rank() :: ranks]


def own_batches(batches: Iterable[T]) -> Iterator[tuple[int, T]]:
    """This rank's batches with their numbers, of those that every rank reads: with what they draw, such as augmentations."""
    ranks = collectives.world()
    for number, batch in enumerate(batches):
        if number % ranks == collectives.rank() % ranks:
            yield number, batch


class OwnBatches(Sampler[list[int]]):
    """This rank's batches of another sampler: every world-th one. The others' images are not read."""

    def __init__(self, batches: Sampler[list[int]] | BatchSampler) -> None:
        self.batches: Any = batches
        self.ranks, self.first = collectives.world(), collectives.rank()

    def __len__(self) -> int:
        return len(range(self.first % self.ranks, len(self.batches), self.ranks))

    def __iter__(self) -> Iterator[list[int]]:
        for number, batch in enumerate(self.batches):
            if number % self.ranks == self.first % self.ranks:
                yield batch


def in_order(results: Sequence[T]) -> list[T]:
    """The results for all batches in their order, from those for this rank's batches: plain values, or tensors on the host."""
    every = collectives.of_all(list(results)) if collectives.world() > 1 else [list(results)]
    count = sum(map(len, every))
    return [every[number % len(every)][number // len(every)] for number in range(count)]
