"""The metrics of a run, each computed from its own copy of the accuracy matrix."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any

from mulki_plugins.characters import printable
from mulki_plugins.recipe.schema import Recipe
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.registry.guard import cause_of, guarded
from mulki_plugins.report.result import Result


def scores(
    recipe: Recipe, result: Result, warn: Callable[[str, BaseException | None], None]
) -> dict[str, float | None]:
    """Each metric's value; None, after a warning, for one that fails or returns no finite number."""
    found: dict[str, float | None] = {}
    for name in recipe.evaluate.metrics:
        part = catalog().find("metric", name)
        if part.sequential and recipe.strategy.base == "joint":
            continue
        matrix = [list(row) for row in result.matrix]
        outcome = guarded(lambda part=part, matrix=matrix: _number(part.load()(matrix)))
        if outcome.printed:
            warn(f"the {part} printed: {outcome.printed}", None)
        if outcome.error is not None:
            cause = cause_of(outcome.error, "" if part.is_ours else part.package)
            warn(f"the {part} failed and is left out of the result: {cause}", outcome.error)
        found[name] = outcome.value
    return found


def _number(value: Any) -> float:
    """A finite float. TypeError or ValueError for anything else; a scalar of numpy or torch is a number too."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        shown = printable(repr(value))
        raise TypeError(f"expected a number, got {shown if len(shown) < 60 else f'a {type(value).__name__}'}")
    if not math.isfinite(number := float(value)):
        raise ValueError(f"expected a finite number, got {number}")
    return number
