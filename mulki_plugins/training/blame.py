"""Finds the part of a recipe whose code raised an error: a plugin, a stream, a model, a metric or a logger."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator, Sequence
from types import FrameType

from mulki_plugins.recipe.schema import Recipe
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.registry.guard import cause_of
from mulki_plugins.registry.parts import Kind, Part
from mulki_plugins.training.snapshot import Named

_CALLBACK = re.compile("before_|after_|load_state_dict|state_dict")


def parts_of(recipe: Recipe) -> list[Part]:
    """Every registered part that a recipe names; a model of open_clip is none."""
    return [catalog().parts[key] for key in dict.fromkeys(_named(recipe)) if key in catalog().parts]


def _named(recipe: Recipe) -> Iterator[tuple[Kind, str]]:
    yield "stream", recipe.stream.name
    if recipe.reference is not None:
        yield "stream", recipe.reference.name
    yield "model", recipe.model.name
    for entry in recipe.strategy.plugins:
        yield "plugin", entry.name
    for name in recipe.evaluate.metrics:
        yield "metric", name
    for name in recipe.loggers:
        yield "logger", name


def blamed(error: BaseException, recipe: Recipe, plugins: Sequence[Named] = ()) -> str | None:
    """`the plugin 'x' of good 1.2 in its after_forward failed: KeyError: 'y' (good/stage.py:14)`.

    That is the part nearest to the error: a plugin of `plugins` in a callback, or another package's code. None if the error
    passed through neither.
    """
    theirs = [part for part in parts_of(recipe) if not part.is_ours]
    found: tuple[Part | None, str] | None = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if (entry := _plugin_called(frame, plugins)) is not None:
            part = catalog().parts.get(("plugin", entry.name))
            found = part, f"{part or f'plugin {entry.name!r}'} in its {frame.f_code.co_name}"
        else:
            module = str(frame.f_globals.get("__name__", ""))
            near = [part for part in theirs if part.package == module.partition(".")[0]]
            known = found is not None and found[0] is not None and found[0].package == module.partition(".")[0]
            if near and not known:
                exact = [part for part in near if isinstance(part.target, str) and part.target.startswith(f"{module}:")]
                part = (exact or near)[0]
                found = part, str(part)
    if found is None:
        return None
    part, who = found
    return f"the {who} failed: {cause_of(error, part.package if part is not None and not part.is_ours else '')}"


def _plugin_called(frame: FrameType, plugins: Sequence[Named]) -> Named | None:
    """The plugin of which this is a callback."""
    code = frame.f_code
    if not _CALLBACK.match(code.co_name) or not code.co_argcount:
        return None
    owner = frame.f_locals.get(code.co_varnames[0])
    return next((entry for entry in plugins if entry.plugin is owner), None)
