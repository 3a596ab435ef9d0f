"""What does not go together in a recipe, though each part of it is right: a stack and its base, and what a method needs."""

from __future__ import annotations

from typing import Any

from mulki_plugins.errors import OptionError
from mulki_plugins.recipe.layers import get
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.registry.parts import Part
from mulki_plugins.types import Path

_ALL_IMAGES = {
    "cumulative": "trains on the images of all tasks so far",
    "joint": "trains on the images of all tasks at once",
}


def check_composition(recipe: dict[str, Any]) -> list[OptionError]:
    """Every refusal with its reason. recipe: plain data, in which anything may be wrong."""
    said = get(recipe, ("strategy", "base"))
    base = said if isinstance(said, str) else "naive"
    wrong: list[OptionError] = []
    for part, path in _stack(recipe):
        if base == "none":
            wrong.append(OptionError("the base 'none' trains nothing, so that no plugin is ever called", path))
        if part.keeps_images and base in _ALL_IMAGES:
            reason = f"keeps images of earlier tasks, and the base {base!r} {_ALL_IMAGES[base]} already"
            wrong.append(OptionError(reason, path))
        if part.sequential and base == "joint":
            reason = "works from one task to the next, and the base 'joint' trains once on all of them"
            wrong.append(OptionError(reason, path))
        if part.needs_reference and recipe.get("reference") is None:
            streams = [p.name for p in catalog().of_kind("stream") if p.name.endswith("-reference")]
            example = f", such as `reference: {streams[0]}`" if streams else ""
            wrong.append(OptionError(f"needs reference images; declare a stream of them in the recipe{example}", path))
    per_task = get(recipe, ("train", "per_task"))
    if base == "joint" and isinstance(per_task, dict) and per_task:
        wrong.append(OptionError("the base 'joint' trains all tasks at once, in one budget", ("train", "per_task")))
    return wrong + _overlap(recipe)


def _overlap(recipe: dict[str, Any]) -> list[OptionError]:
    """Reference data that are the tasks' own would tell a method what it is to learn later."""
    stream, reference = (get(recipe, (key, "name")) for key in ("stream", "reference"))
    if stream is None or stream != reference:
        return []
    tasks = [get(recipe, (key, "tasks")) for key in ("stream", "reference")]
    if all(isinstance(names, list) for names in tasks) and not {str(n) for n in tasks[0]} & {str(n) for n in tasks[1]}:
        return []
    return [OptionError("expected a stream that shares no task with the one that is learned", ("reference", "name"))]


def _stack(recipe: dict[str, Any]) -> list[tuple[Part, Path]]:
    """The known plugins of a recipe's stack, with their paths."""
    plugins = get(recipe, ("strategy", "plugins"))
    named: list[tuple[str, int]] = [
        (next(iter(entry)), i)
        for i, entry in enumerate(plugins if isinstance(plugins, list) else ())
        if isinstance(entry, dict) and len(entry) == 1
    ]
    parts = catalog().parts
    return [(parts["plugin", name], ("strategy", "plugins", i, name)) for name, i in named if ("plugin", name) in parts]
