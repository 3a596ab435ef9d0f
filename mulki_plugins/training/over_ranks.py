"""What several ranks have as one: the values of a step for the loggers, and the weights after a task."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mulki_plugins.errors import MulkiError
from mulki_plugins.ranks import collectives
from mulki_plugins.registry.discovery import catalog

if TYPE_CHECKING:
    from mulki_plugins.training.contents import StackEntry

SHARE = "\0share"
"""The tag under which a step notes the rank's share of the batch; the loggers do not get it."""

APART = 1e-3
"""How far the weights of two ranks may be apart after a task: computations that each makes by itself may round differently."""

_Values = list[tuple[str, int, Any]]
_LOSS = "train/loss/"


def over_ranks(values: _Values) -> _Values:
    """The values of some steps (tag, iteration, value), each over all ranks; those that are no numbers stay this rank's.

    Every rank must call it after the same steps.
    """
    if not collectives.several() or not values:
        return values
    numbers = {(tag, at): float(value) for tag, at, value in values if _is_number(value)}
    every = collectives.of_all(numbers)
    shares = [{at: value for (tag, at), value in each.items() if tag == SHARE} for each in every]
    keys = dict.fromkeys(key for each in every for key in each if key[0] != SHARE)
    merged = {key: _merge(key, every, shares) for key in keys}
    others = [(tag, at, value) for tag, at, value in values if (tag, at) not in numbers]
    return [*((tag, at, value) for (tag, at), value in merged.items()), *others]


def _merge(
    key: tuple[str, int], every: Sequence[dict[tuple[str, int], float]], shares: Sequence[dict[int, float]]
) -> float:
    """The sum of w_r·value for a term of the loss, else the mean by w_r over the ranks that have a value."""
    known = [(each[key], share.get(key[1], 1.0)) for each, share in zip(every, shares, strict=True) if key in each]
    if len(known) == len(every) and len({value for value, _ in known}) == 1:
        return known[0][0]
    total = sum(value * share for value, share in known)
    if key[0] == f"{_LOSS}total" or not key[0].startswith(_LOSS):
        weight = sum(share for _, share in known)
        return total / weight if weight else 0.0
    return total


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)


def check_weights(model: nn.Module, task: str) -> None:
    """Give all ranks the first one's weights. MulkiError if another rank has trained quite different ones."""
    if (far := collectives.make_equal(list(model.state_dict().values()))) > APART:
        raise MulkiError(
            f"task {task}: the ranks have trained different weights, {far:.0e} of their size apart: a plugin draws or "
            "computes something of its own on each rank",
            "run it in one process, without torchrun; see docs/distributed.md",
        )


def unknown_on_ranks(stack: Iterable[StackEntry]) -> Iterator[str]:
    """A warning for each plugin of another package that does not say whether its loss may be shared out over the ranks."""
    for entry in stack if collectives.several() else ():
        part = catalog().parts.get(("plugin", entry.name))
        if (
            part is not None
            and not part.is_ours
            and not part.per_sample
            and not getattr(entry.plugin, "joins_ranks", False)
        ):
            yield f"each rank computes the {part} on its share of the batch; it does not declare `per_sample = True`"
