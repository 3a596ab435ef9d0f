"""The hooks by which a package extends MulKI. Marker and entry-point group are both named `mulki`.

A package declares `[project.entry-points.mulki] my-name = "my_package.hooks"` in its pyproject.toml. That module defines
functions of the names below, marked with `mulki_plugins.hookimpl`. The built-in parts register in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pluggy
from attrs import frozen

if TYPE_CHECKING:
    from mulki_plugins.registry.register import Register

PROJECT = "mulki"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

Event = Literal["mulki_run_started", "mulki_run_finished"]


@frozen(kw_only=True)
class Run:
    """One recipe with one seed. The data are copies: a hook may change them without any effect on the run."""

    folder: Path
    """The folder with the run's files."""
    recipe: Mapping[str, Any]
    """The resolved recipe, as in `recipe.yaml`."""
    seed: int
    """The seed of this run."""
    result: Mapping[str, Any] | None = None
    """The content of `result.json`; None when the run starts."""


@hookspec
def mulki_register(register: Register) -> None:
    """Register parts: `register.plugin("my-stage", "my_package.stage:MyStage")`.

    Every command calls this hook once, before anything else. Name a target by a text `module:attribute`, which is imported
    when the part is used, and do not import torch in the module of the hook, so that `mulki list` stays fast.
    """


@hookspec
def mulki_run_started(run: Run) -> None:
    """React to the start of a run: its folder contains `recipe.yaml`, the model and the data are ready, nothing is trained yet.

    Called once per seed. An error in the hook is reported with the package's name and does not end the run.
    """


@hookspec
def mulki_run_finished(run: Run) -> None:
    """React to the end of a run; `run.result` is the content of `result.json`.

    Its `status` is `complete`, `stopped` or `failed`. Called once per seed, also if the run failed or was interrupted. An error
    in the hook is reported with the package's name and does not change the run.
    """


def specs() -> dict[str, Callable[..., Any]]:
    """The hooks by name."""
    return {name: hook for name, hook in globals().items() if name.startswith("mulki_")}
