"""The settings that decide a run's numbers: their fingerprint, how two recipes differ, and short names for differences."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from attrs import evolve

from mulki_plugins.errors import MulkiError
from mulki_plugins.recipe.resolve import Changes, chooses_strategy, resolve
from mulki_plugins.recipe.schema import Checkpointing, Recipe, as_data
from mulki_plugins.registry.discovery import catalog

LONGEST = 80
"""Characters of a folder's name that differences may take."""


def needs_reference(recipe: Recipe) -> bool:
    """Whether a plugin of the recipe's stack needs reference data."""
    return any(catalog().find("plugin", entry.name).needs_reference for entry in recipe.strategy.plugins)


def moving(recipe: Recipe) -> dict[str, Any]:
    """The recipe without what moves no number: seeds, device, workers and checkpoints, loggers, words."""
    train = evolve(recipe.train, workers=0, unreadable="stop", checkpoint=Checkpointing())
    reference = recipe.reference if needs_reference(recipe) else None
    said = as_data(evolve(recipe, summary="", train=train, reference=reference, seeds=[0], loggers=[], device="auto"))
    del said["train"]["checkpoint"], said["train"]["unreadable"]
    return said


def fingerprint(recipe: Recipe) -> str:
    """Of everything that moves the numbers but the seed, so that only repetitions of one experiment are averaged."""
    return hashlib.sha256(json.dumps(moving(recipe), sort_keys=True).encode()).hexdigest()[:12]


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested data, each with its dotted path."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from flat(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for i, item in enumerate(value):
            yield from flat(item, f"{path}[{i}]")
    else:
        yield path, value


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """Everything that moves the numbers but names and seed, by dotted path; plugins by name and place."""
    said = moving(recipe)
    del said["name"], said["strategy"]["name"]
    stack = said["strategy"].pop("plugins")
    said["strategy"] |= {name: options for entry in stack for name, options in entry.items()}
    return {**dict(flat(said)), "plugins": [name for entry in stack for name in entry]}


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that differ, as they are now; None where one is gone."""
    paths = [*now, *(path for path in before if path not in now)]
    found = {path: now.get(path) for path in paths if before.get(path) != now.get(path)}
    told = {path: value for path, value in found.items() if value is not None}
    return told or found


def in_words(differences: Mapping[str, Any]) -> list[str]:
    """`lr=0.001` for each difference, by the shortest end of its path that no other shares."""
    return [
        f"{key}={_written(value)}" for key, value in zip(_short(list(differences)), differences.values(), strict=True)
    ]


def _short(paths: list[str]) -> list[str]:
    parts = [path.removesuffix(".name").split(".") for path in paths]
    found = []
    for own in parts:
        least = 2 if own[0] == "strategy" and len(own) > 2 else 1  # a plugin's option says whose it is
        lengths = range(least, len(own) + 1)
        alone = (n for n in lengths if sum(other[-n:] == own[-n:] for other in parts) == 1)
        found.append(".".join(own[-next(alone, len(own)) :]))
    return found


def _written(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(_written, value)) or "none"
    if value is None or value == {}:
        return "none"
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def folder_label(differences: Mapping[str, Any]) -> str:
    """Differences as part of a folder's name: safe characters, bounded, with a hash where something had to go."""
    whole = "+".join(in_words(differences))
    safe = re.sub(r"[^\w.,=+-]+", "-", whole, flags=re.ASCII)
    if safe == whole and len(safe) <= LONGEST:
        return safe
    exact = hashlib.sha256(json.dumps(dict(differences), sort_keys=True).encode()).hexdigest()[:6]
    return f"{safe[: LONGEST - 7]}-{exact}"


def variant(name: str, changes: Changes, recipe: Recipe) -> str:
    """What `--set` makes of a recipe, as part of its folder's name; empty where it changes nothing that moves numbers."""
    if not changes.settings:
        return ""
    chosen = tuple(setting for setting in changes.settings if chooses_strategy(setting))
    try:
        plain = resolve(name, evolve(changes, settings=chosen)).recipe
    except MulkiError:  # it is whole only with what is set
        pairs = (setting.partition("=")[::2] for setting in changes.settings if setting not in chosen)
        return folder_label({key.strip().removeprefix("$."): value.strip() for key, value in pairs})
    differences = changed(settings_of(plain), settings_of(recipe))
    return folder_label(_without_defaults(differences, changes)) if differences else ""


def _without_defaults(differences: dict[str, Any], changes: Changes) -> dict[str, Any]:
    """Of a stream or model that took another's place only the options that the command line names."""
    others = tuple(path.removesuffix("name") for path in differences if path.endswith(".name"))
    said = " ".join(changes.settings)
    return {
        path: value
        for path, value in differences.items()
        if path.endswith(".name")
        or not path.startswith(others)
        or re.search(rf"\b{re.escape(path.rpartition('.')[2])}\b", said)
    }
