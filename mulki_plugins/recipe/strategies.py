"""Strategy files: one method each, read and checked on their own."""

from __future__ import annotations

import pathlib
from typing import Any

from mulki_plugins.errors import Mistakes, OptionError, format_value
from mulki_plugins.recipe.check import check_name, check_plugins, check_recipe
from mulki_plugins.recipe.files import YamlFile, list_registered, registered_name
from mulki_plugins.recipe.layers import get, overlay, put
from mulki_plugins.recipe.schema import StrategyFile
from mulki_plugins.recipe.yaml import Tree, locate, read_yaml, sort_by_line
from mulki_plugins.registry.parts import Provenance
from mulki_plugins.types import CONVERTER, Path, collect_mistakes

DEFAULTABLE = ("train", "evaluate", "model")
"""The parts of a recipe for which a strategy may bring defaults."""


def read_strategy(found: YamlFile) -> tuple[StrategyFile, Tree]:
    """The strategy in a file, and its values with their lines. Raises Mistakes; stack and defaults are not checked yet."""
    tree = read_yaml(found.path, found.shown)
    strategy, wrong = _structured(tree)
    wrong += _wrong_name(found, tree.value.get("name"))
    if strategy is None or wrong:
        raise Mistakes(_lines(tree, wrong))
    return strategy, tree


def strategy_provenance(name: str) -> Provenance | None:
    """The package of a strategy, also after `--with` and `--without`; None for one that is not registered."""
    registered = list_registered("strategies")
    for known in sorted(registered, key=len, reverse=True):
        if name == known or name.startswith((f"{known}-with-", f"{known}-without-")):
            return registered[known][1]
    return None


def borrowed_name(name: str, plugins: list[str]) -> str:
    """A notice if a stack has the name of a registered strategy and other plugins; empty if not."""
    if name not in (registered := list_registered("strategies")):
        return ""
    try:
        strategy, _ = read_strategy(YamlFile(registered[name][0], name))
    except Mistakes:
        return ""
    if [entry.name for entry in strategy.plugins] == plugins:
        return ""
    whose = f"the strategy {name!r} of {registered[name][1]}"
    return f"strategy.name: this stack is not that of {whose}, and its results stand under that name; choose another"


def _wrong_name(found: YamlFile, name: Any) -> list[OptionError]:
    """A registered strategy's name belongs to its file: results are kept under it."""
    registered = list_registered("strategies")
    if not isinstance(name, str):
        return []
    own = registered_name("strategies", found.path)
    if own is not None and name != own:
        return [OptionError(f"expected {own!r}, the name that its file registers, got {name!r}", ("name",))]
    taken = next((known for known in registered if known.casefold() == name.casefold()), None)
    if own is None and taken is not None and not _same_text(registered[taken][0], found.path):
        whose = f"the strategy {taken!r} of {registered[taken][1]} has this name, and results are kept under it"
        return [OptionError(f"{whose}; choose another", ("name",))]
    return []


def _same_text(one: pathlib.Path, other: pathlib.Path) -> bool:
    """A copy that was not changed is the same strategy."""
    try:
        return one.read_bytes() == other.read_bytes()
    except (OSError, ValueError):
        return False


def check_strategy(found: YamlFile) -> StrategyFile:
    """The strategy in a file, with its stack and its defaults checked too. Raises Mistakes."""
    tree = read_yaml(found.path, found.shown)
    strategy, wrong = _structured(tree)
    wrong += _wrong_name(found, tree.value.get("name"))
    plugins = tree.value.get("plugins")
    if isinstance(plugins, list):
        wrong += check_plugins(plugins, ("plugins",))[1]
    defaults = tree.value.get("defaults")
    if isinstance(defaults, dict):
        wrong += _wrong_defaults({key: value for key, value in defaults.items() if isinstance(value, dict)})
    if strategy is None or wrong:
        raise Mistakes(_lines(tree, wrong))
    return strategy


def _structured(tree: Tree) -> tuple[StrategyFile | None, list[OptionError]]:
    write_out_plugins(tree, ("plugins",))
    wrong: list[OptionError] = []
    strategy: StrategyFile | None = None
    try:
        strategy = CONVERTER.structure(tree.value, StrategyFile)
    except Exception as error:
        wrong += collect_mistakes(error)
    name, defaults = tree.value.get("name"), tree.value.get("defaults")
    if isinstance(name, str) and (problem := check_name(name)):
        wrong.append(OptionError(problem, ("name",)))
    for key, value in defaults.items() if isinstance(defaults, dict) else ():
        if key not in DEFAULTABLE:
            wrong.append(OptionError(f"expected one of {', '.join(DEFAULTABLE)}", ("defaults", key)))
        elif not isinstance(value, dict):
            wrong.append(OptionError(f"expected a mapping, got {format_value(value)}", ("defaults", key)))
        elif key == "model":
            where = "a strategy says only which towers learn; the model is the recipe's"
            wrong += [OptionError(where, ("defaults", key, name)) for name in value if name != "train"]
    return strategy, wrong


def _wrong_defaults(defaults: dict[str, Any]) -> list[OptionError]:
    """What is wrong with defaults over the smallest recipe that they may lie under."""
    smallest = {
        "name": "any", "stream": {"name": "mtil-mini"}, "model": {"name": "mulki-tiny"},
        "strategy": {"name": "any", "plugins": []}, "train": {"iterations": 10**9, "optimizer": {"lr": 1.0}},
    }  # fmt: skip
    towers = {"train": defaults["model"]["train"]} if "train" in defaults.get("model", {}) else {}
    said = {**defaults, "model": towers}
    _, wrong = check_recipe(overlay(Tree(smallest, {}), Tree(said, {})).value)
    return [error.below(("defaults",)) for error in wrong]


def _lines(tree: Tree, wrong: list[OptionError]) -> list[str]:
    return sort_by_line(dict.fromkeys(locate(tree.origin(e.path), e.path, str(e)) for e in wrong))


def write_out_plugins(tree: Tree, path: Path) -> None:
    """The short form of a stack's entries, `- name`, written out as `- name: {}`."""
    plugins = get(tree.value, path)
    if isinstance(plugins, list):
        for i, entry in enumerate(plugins):
            if isinstance(entry, str):
                put(tree, (*path, i), {entry: {}}, tree.origin((*path, i)))
            elif isinstance(entry, dict) and len(entry) == 1 and next(iter(entry.values())) is None:
                [name] = entry
                entry[name] = {}
