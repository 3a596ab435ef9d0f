"""The batches of one task: counted, and in an order that nothing else's random numbers can move."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mulki_plugins.training.seeding import random_state, set_random_state


class TaskBatches:
    """The batches of whatever loader Avalanche or a plugin has made, drawn from a random stream of their own.

    count: exactly so many batches, pass after pass, whenever it is iterated; None for one pass.
    The stream begins at torch's, numpy's and Python's state of the first iteration and moves on only while a batch is
    fetched. So the batches follow from that state alone, whatever the training draws between them, and one may `skip`
    to any of them: the skipped ones are fetched and dropped, since what a fetch draws (of an augmentation, of a worker)
    only the fetch itself knows. When the last is dropped, `then` is called.
    """

    def __init__(self, loader: Iterable[Any], count: int | None = None) -> None:
        self.loader = loader
        self.count = count
        self._stream: tuple[Any, ...] = ()
        self._skip = 0
        self._then: Callable[[], None] | None = None

    def __len__(self) -> int:
        return len(self.loader) if self.count is None else self.count  # type: ignore[arg-type]

    def skip(self, batches: int, then: Callable[[], None]) -> None:
        """Drop the first batches, over as many iterations as they take."""
        self._skip, self._then = batches, then

    def __iter__(self) -> Iterator[Any]:
        if not self._stream:
            self._stream = random_state()
            torch.manual_seed(int(torch.randint(2**62, ())))  # the training's own stream goes on elsewhere
        for batch in self._counted():
            if self._skip == 0:
                yield batch
                continue
            self._skip -= 1
            if self._skip == 0 and self._then is not None:
                self._then()

    def _counted(self) -> Iterator[Any]:
        given = 0
        while self.count is None or given < self.count:
            before = given
            for batch in self._one_pass():
                yield batch
                given += 1
                if given == self.count:
                    return
            if self.count is None:
                return
            if given == before:
                raise ValueError("the task has no training images")

    def _one_pass(self) -> Iterator[Any]:
        """One iteration of the loader, each fetch within the batches' own random stream."""
        with self._own_stream():
            batches = iter(self.loader)
        while True:
            with self._own_stream():
                batch = next(batches, _END)
            if batch is _END:
                return
            yield batch

    @contextmanager
    def _own_stream(self) -> Iterator[None]:
        outside = random_state()
        set_random_state(self._stream)
        try:
            yield
        finally:
            self._stream = random_state()
            set_random_state(outside)


_END = object()
