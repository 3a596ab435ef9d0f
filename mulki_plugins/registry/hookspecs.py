"""The hooks by which a package adds to MulKI. Marker and entry-point group are both named `mulki`.

A package declares, in its pyproject.toml, `[project.entry-points.mulki] my-name = "my_package.hooks"`, and in that module
functions of these names, marked with `mulki_plugins.hookimpl`. Built-in parts register in the same way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from mulki_plugins.registry.events import Run
    from mulki_plugins.registry.register import Register

PROJECT = "mulki"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def mulki_register(register: Register) -> None:
    """Register parts: `register.plugin("my-stage", "my_package.stage:MyStage", summary="...")`.

    Called once, before anything else, for every command. Name a part by a text `module:attribute`, which is imported when
    the part is used, and import no torch in the module that holds the hook, so that `mulki list` stays fast.
    """


@hookspec
def mulki_run_started(run: Run) -> None:
    """Be told that a run begins: its folder is there and holds `recipe.yaml`; model and data are ready, nothing is trained.

    Called once for each seed. An error in it is reported with the package's name and does not end the run.
    """


@hookspec
def mulki_run_finished(run: Run) -> None:
    """Be told that a run is over: `run.result` is what `result.json` holds, `run.result["status"]` complete or failed.

    Called once for each seed, also where the run ended in an error or was interrupted. An error in it is reported with the
    package's name and changes nothing.
    """
