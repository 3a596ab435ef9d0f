"""Which rows of a batch, and which batches of a data set, are this rank's."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, Dataset, Sampler

from mulki_plugins.ranks import collectives
from mulki_plugins.ranks.draws import rows, set_rows

T = TypeVar("T")


def own_part(batch: Sequence[Tensor]) -> list[Tensor]:
    """This rank's rows of a training batch, every world-th one, so that each rank has its share of all that is in it.

    A batch with fewer images than ranks is left whole: every rank computes all of it.
    """
    return [each[own_places(len(each))] for each in batch]


def own_places(size: int) -> slice:
    """The rows of a training batch of this size that are this rank's."""
    ranks = collectives.count()
    return slice(None) if size < ranks else slice(collectives.rank(), None, ranks)


def note_share(size: int) -> None:
    """The step's batch has this size, and this rank computes its part of it."""
    ranks = collectives.count()
    whole = size < ranks
    collectives.set_share(1 / ranks if whole else len(range(size)[own_places(size)]) / size, alone=whole)
    set_rows(size, new_step=True)


def part_sizes(size: int, count: int) -> list[tuple[int, int]]:
    """The images of each of at most `count` parts of a batch, on this rank and on all; the rank has `size` of the batch.

    Every rank has as many parts, in each of which all meet. One more image is in the first parts, as `Tensor.tensor_split`
    has it.
    """
    ranks, whole = collectives.world(), rows()
    if ranks == 1 or size != len(range(whole)[own_places(whole)]):  # a plugin may have put another batch in its place
        sizes = [size] * ranks
    else:
        sizes = [len(range(rank, whole, ranks)) for rank in range(ranks)]
    count = max(1, min(count, *sizes))
    parts = [[each // count + (number < each % count) for number in range(count)] for each in sizes]
    return [
        (own, sum(part)) for own, part in zip(parts[collectives.rank() % ranks], zip(*parts, strict=True), strict=True)
    ]


def own_batches(batches: Iterable[T]) -> Iterator[tuple[int, T]]:
    """This rank's batches with their numbers, of those that every rank reads: with what they draw, such as augmentations."""
    ranks = collectives.world()
    for number, batch in enumerate(batches):
        if number % ranks == collectives.rank() % ranks:
            yield number, batch


class OwnSamples(Sampler[list[tuple[int, tuple[int, int]]]]):
    """This rank's samples of each batch of another sampler, each with a seed of its own for what is drawn for it.

    The seeds depend on the sample's place in the order alone. So an image is the same in whichever worker of whichever rank
    it is prepared, and no other rank prepares it.
    """

    def __init__(self, batches: Iterable[list[int]]) -> None:
        self.batches: Any = batches
        self.sizes: deque[int] = deque()
        """The sizes of the whole batches, of those that have not been fetched yet."""

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, tuple[int, int]]]]:
        self.sizes.clear()
        drawn, place = int(torch.randint(2**62, ())), 0
        for batch in self.batches:
            self.sizes.append(len(batch))
            seeded = [(index, (drawn, place + i)) for i, index in enumerate(batch)]
            place += len(batch)
            yield seeded[own_places(len(batch))]


class SeededSamples(Dataset[Any]):
    """A data set whose samples are asked for as OwnSamples gives them. Only a loader's worker may use it: it sets the seeds."""

    def __init__(self, images: Any) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, sample: tuple[int, tuple[int, int]]) -> Any:
        index, seeds = sample
        words = np.random.SeedSequence(seeds).generate_state(3)
        random.seed(int(words[0]))
        np.random.seed(int(words[1]))
        torch.default_generator.manual_seed(int(words[2]))
        return self.images[index]


class OwnRows(Sampler[list[int]]):
    """This rank's rows of each batch of another sampler, every world-th one; the first of all if it has none.

    So the others' samples are not read, and no batch is empty.
    """

    def __init__(self, batches: BatchSampler) -> None:
        self.batches = batches
        self.ranks, self.rank = collectives.count(), collectives.rank()
        self.batches_read: deque[list[int]] = deque()
        """The whole batches, of those that have not been fetched yet."""

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            self.batches_read.append(batch)
            yield self.of(batch) or batch[:1]

    def of(self, batch: list[int]) -> list[int]:
        """This rank's rows of a batch; there may be none."""
        return batch[self.rank :: self.ranks]


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
