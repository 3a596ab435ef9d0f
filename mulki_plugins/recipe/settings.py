"""The settings that determine a run's numbers: their fingerprint, how two recipes differ, and short names for differences."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attrs import evolve

from mulki_plugins.errors import MulkiError
from mulki_plugins.recipe.layers import leaves
from mulki_plugins.recipe.resolve import Changes, chooses_strategy, resolve
from mulki_plugins.recipe.schema import Checkpointing, Recipe, as_data
from mulki_plugins.recipe.yaml import format_path
from mulki_plugins.registry.catalog import signature_of
from mulki_plugins.registry.discovery import catalog

MAX_LABEL = 80
"""Characters of a folder's name that differences may take."""


def needs_reference(recipe: Recipe) -> bool:
    """Whether a plugin of the recipe's stack needs reference data."""
    return any(catalog().find("plugin", entry.name).needs_reference for entry in recipe.strategy.plugins)


def select_decisive(recipe: Recipe) -> dict[str, Any]:
    """The recipe without what affects no number: seeds, device, workers, checkpoints, the cache, loggers, what is kept."""
    train = evolve(recipe.train, workers=0, unreadable="stop", checkpoint=Checkpointing())
    reference = recipe.reference if needs_reference(recipe) else None
    data = as_data(evolve(recipe, summary="", train=train, reference=reference, seeds=[0], loggers=[], device="auto"))
    del data["train"]["checkpoint"], data["train"]["unreadable"], data["evaluate"]["predictions"]
    del data["evaluate"]["cache"]
    data["train"]["optimizer"] = _as_before(data["train"]["optimizer"])
    later: tuple[tuple[str, str, Any], ...] = (
        ("train", "compile", False), ("train", "accumulate", 1), ("train", "groups", []),
        ("evaluate", "held_out", []), ("evaluate", "template", None),
    )  # fmt: skip
    for part, key, default in later:  # recipes without them keep their fingerprints
        if data[part][key] == default:
            del data[part][key]
    head = data["model"].get("head", {})
    if head.get("rail", {}).get("features") == "projected":  # as it was before there was a choice
        rail = {key: value for key, value in head["rail"].items() if key != "features"}
        data["model"] = {**data["model"], "head": {"rail": rail}}
    if data["stream"]["name"] == "mtil-mini" and data["stream"].get("shots") is None:
        data["stream"].pop("shots", None)
    return data


_ADDED_OPTIONS = {"eps": 1e-8, "nesterov": False}
"""Options of adamw, adam and sgd that joined later, with their defaults."""


def _as_before(optimizer: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's data as earlier versions wrote it, so that recipes that say the same keep their fingerprints."""
    if optimizer["name"] not in ("adamw", "adam", "sgd"):
        return optimizer
    kept = {key: value for key, value in optimizer.items() if _ADDED_OPTIONS.get(key, ...) != value}
    return {"betas": None, "momentum": None, **kept}


def fingerprint(recipe: Recipe) -> str:
    """A hash of everything but the seed that affects the numbers, so that only repetitions of one experiment are averaged."""
    return _hash(select_decisive(recipe), 12)


_LATER_OPTIONS = (
    ("teachers", ("images_per_class",)), ("eliciting", ("start",)), ("adding", ("features",)), ("distinguishing", ("weights",)),
    ("distinguishing", ("slope", "threshold")), ("connecting", ("initial",)),
)  # fmt: skip
"""Options that plugins got when runs had been measured without them. Their defaults change no number."""

_LATER_GROUPS = (
    (("preserving", ("orthogonal",)),),
    (("adding", ("targets",)), ("connecting", ("initial_importance", "towers"))),
)
"""Options that plugins got later still, the newest group first. A run knows all options of a group, or none of them."""


def known_fingerprints(recipe: Recipe) -> set[str]:
    """The fingerprint of a recipe, and those of earlier versions: before plugins got further options."""
    data = select_decisive(recipe)
    found = {_hash(data, 12)}
    for group in _LATER_GROUPS:
        for options, added in _defaulted(data, group):
            for each in added:
                del options[each]
        found.add(_hash(data, 12))
    later = _defaulted(data, _LATER_OPTIONS)
    for length in range(len(later) + 1):
        for chosen in itertools.combinations(later, length):
            removed = [(options, {each: options.pop(each) for each in added}) for options, added in chosen]
            found.add(_hash(data, 12))
            for options, values in removed:
                options.update(values)
    return found


def _defaulted(
    data: dict[str, Any], table: Sequence[tuple[str, tuple[str, ...]]]
) -> list[tuple[dict[str, Any], tuple[str, ...]]]:
    """The options of each plugin in a recipe's data, with those of the table that have their defaults there."""
    return [
        (options, added)
        for entry in data["strategy"]["plugins"]
        for name, options in entry.items()
        for plugin, added in table
        if plugin == name and all(options.get(each) == _default(name, each) for each in added)
    ]


def _default(plugin: str, option: str) -> Any:
    return signature_of(catalog().find("plugin", plugin)).options[option].default


def _hash(data: Any, length: int) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:length]


def flatten(value: Any) -> Iterator[tuple[str, Any]]:
    """The values of nested data, each with its dotted path."""
    for path, leaf in leaves(value):
        yield format_path(path).removeprefix("$").removeprefix("."), leaf


def list_settings(recipe: Recipe) -> dict[str, Any]:
    """Everything but names and seed that affects the numbers, by dotted path; plugins by name and by position."""
    data = select_decisive(recipe)
    del data["name"], data["strategy"]["name"]
    stack = data["strategy"].pop("plugins")
    data["strategy"] |= {name: options for entry in stack for name, options in entry.items()}
    return {**dict(flatten(data)), "plugins": [name for entry in stack for name in entry]}


def compare_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that differ, with their new values; those that are gone, with None, only if nothing else differs."""
    paths = [*now, *(path for path in before if path not in now)]
    differences = {path: now.get(path) for path in paths if before.get(path) != now.get(path)}
    return {path: value for path, value in differences.items() if value is not None} or differences


def describe_settings(differences: Mapping[str, Any]) -> list[str]:
    """`lr=0.001` for each difference, named by the shortest unambiguous end of its path."""
    names = _shorten(list(differences))
    return [f"{name}={_format(value)}" for name, value in zip(names, differences.values(), strict=True)]


def _shorten(paths: list[str]) -> list[str]:
    split = [path.removesuffix(".name").split(".") for path in paths]
    names = []
    for parts in split:
        least = 2 if parts[0] == "strategy" and len(parts) > 2 else 1  # a plugin's option keeps the plugin's name
        unique = (n for n in range(least, len(parts) + 1) if sum(other[-n:] == parts[-n:] for other in split) == 1)
        names.append(".".join(parts[-next(unique, len(parts)) :]))
    return names


def _format(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(_format, value)) or "none"
    if value is None or value == {}:
        return "none"
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def folder_label(differences: Mapping[str, Any]) -> str:
    """Differences as part of a folder's name: safe characters, limited length, and a hash if something was lost."""
    whole = "+".join(describe_settings(differences))
    safe = re.sub(r"[^\w.,=+-]+", "-", whole, flags=re.ASCII)
    if safe == whole and len(safe) <= MAX_LABEL:
        return safe
    return f"{safe[: MAX_LABEL - 7]}-{_hash(dict(differences), 6)}"


def variant(name: str, changes: Changes, recipe: Recipe) -> str:
    """The effect of `--set` on a recipe as part of its folder's name; empty if no number is affected."""
    if not changes.settings:
        return ""
    strategy_settings = tuple(setting for setting in changes.settings if chooses_strategy(setting))
    try:
        original = resolve(name, evolve(changes, settings=strategy_settings)).recipe
    except MulkiError:  # the recipe is complete only with its settings
        pairs = (setting.partition("=")[::2] for setting in changes.settings if setting not in strategy_settings)
        return folder_label({key.strip().removeprefix("$."): value.strip() for key, value in pairs})
    differences = compare_settings(list_settings(original), list_settings(recipe))
    return folder_label(_without_defaults(differences, changes)) if differences else ""


def _without_defaults(differences: dict[str, Any], changes: Changes) -> dict[str, Any]:
    """For a stream or model that replaced another, only the options that the command line names."""
    replaced = tuple(path.removesuffix("name") for path in differences if path.endswith(".name"))
    typed = " ".join(changes.settings)
    return {
        path: value
        for path, value in differences.items()
        if path.endswith(".name")
        or not path.startswith(replaced)
        or re.search(rf"\b{re.escape(path.rpartition('.')[2])}\b", typed)
    }
