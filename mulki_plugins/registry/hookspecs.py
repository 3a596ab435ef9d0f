"""The hooks by which a package adds to MulKI. Marker and entry-point group are both named `mulki`.

A package declares, in its pyproject.toml, `[project.entry-points.mulki] my-name = "my_package.mulki_hooks"`, and in that
module a function `mulki_register` marked with `mulki_plugins.hookimpl`. Built-in parts register in the same way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from mulki_plugins.registry.parts import Register

PROJECT = "mulki"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def mulki_register(register: Register) -> None:
    """Register parts: `register.plugin("my-stage", "my_package.stage:MyStage", summary="...")`.

    Called once, before anything else. Name the part by a text `module:attribute`, which is imported when the part is
    used, and import no torch in the module that holds the hook, so that `mulki list` stays fast.
    """
