"""Tells other packages that a run starts or ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from attrs import asdict

from mulki_plugins.recipe.schema import Recipe, as_data
from mulki_plugins.registry.events import Event, Run, tell
from mulki_plugins.report.result import Result


def tell_packages(
    event: Event, recipe: Recipe, result: Result, folder: Path, warn: Callable[[str, BaseException | None], None]
) -> None:
    """Call the hook of that name of every package; a failure in one is reported and changes nothing."""
    found = None
    if event == "mulki_run_finished":
        found = asdict(result)
        del found["folder"]
    tell(event, Run(folder=folder.absolute(), recipe=as_data(recipe), seed=result.seed, result=found), warn)
