"""What the hooks of a run are told, and how they are called."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from attrs import frozen

from mulki_plugins.registry.discovery import catalog
from mulki_plugins.registry.guard import guarded

Event = Literal["mulki_run_started", "mulki_run_finished"]


@frozen(kw_only=True)
class Run:
    """One recipe with one seed, as plain data of the hook's own: whatever it does to them changes nothing."""

    folder: Path
    """Where the run's files are."""
    recipe: Mapping[str, Any]
    """The resolved recipe, as `recipe.yaml` holds it."""
    seed: int
    """The seed of this run."""
    result: Mapping[str, Any] | None = None
    """What `result.json` holds; None when the run begins."""


def tell(event: Event, run: Run, say: Callable[[str, BaseException | None], None]) -> None:
    """Call that hook of every package; `say` is given a line for each that raised or printed, and the error."""
    for package in catalog().packages:
        hook = package.hooks.get(event)
        if hook is None:
            continue
        outcome = guarded(hook, run=copy.deepcopy(run))
        if outcome.cause:
            say(
                f"the hook {event} of {package.provenance} failed, which changes nothing: {outcome.cause}",
                outcome.error,
            )
        if outcome.printed:
            say(f"the hook {event} of {package.provenance} printed: {outcome.printed}", None)
