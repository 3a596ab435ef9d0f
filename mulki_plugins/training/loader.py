"""A data loader that yields an exact number of batches, beginning anew as often as it must."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any


class CountedLoader:
    """`count` batches of a loader, epoch after epoch; whatever loader Avalanche or a plugin has made."""

    def __init__(self, loader: Iterable[Any], count: int) -> None:
        self.loader = loader
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        given = 0
        while given < self.count:
            before = given
            for batch in self.loader:
                yield batch
                given += 1
                if given == self.count:
                    return
            if given == before:
                raise ValueError("the task has no training images")
