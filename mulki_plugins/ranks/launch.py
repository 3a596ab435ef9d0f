"""What torchrun says of this process: its rank, and how many there are. Knows no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping

from attrs import frozen

from mulki_plugins.errors import MulkiError

_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@frozen
class Launch:
    """The place of this process among those that torchrun has started."""

    rank: int
    world: int
    """The number of ranks, on all machines."""
    local_rank: int
    """The rank among those of this machine."""
    local_world: int


def launched(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """The place that the environment gives this process; None for a process of its own. MulkiError if it makes no sense."""
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return None
    values = {}
    for name in _NUMBERS:
        text = environment.get(name, environment["RANK" if "RANK" in name else "WORLD_SIZE"])
        if not text.isdecimal():
            raise MulkiError(f"the environment variable {name} is {text!r}, expected a number", "start with torchrun")
        values[name] = int(text)
    launch = Launch(*(values[name] for name in _NUMBERS))
    if not (launch.rank < launch.world and launch.local_rank < launch.local_world <= launch.world):
        given = ", ".join(f"{name}={values[name]}" for name in _NUMBERS)
        raise MulkiError(f"the environment gives no place among the ranks: {given}", "start with torchrun")
    if launch.world > 1 and (missing := [n for n in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(n)]):
        raise MulkiError(f"the environment lacks {missing[0]}, which says where the ranks meet", "start with torchrun")
    return launch if launch.world > 1 else None
