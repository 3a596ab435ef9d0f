"""Strategy files: one method each, read and checked on their own."""

from __future__ import annotations

from mulki_plugins.errors import Mistakes
from mulki_plugins.options import CONVERTER, Path, mistakes_of
from mulki_plugins.recipe.find import Found
from mulki_plugins.recipe.layers import get, put
from mulki_plugins.recipe.schema import StrategyFile
from mulki_plugins.recipe.source import Tree, in_order, located, read_yaml
from mulki_plugins.recipe.stack import check_plugins

DEFAULTABLE = ("train", "evaluate")
"""The parts of a recipe for which a strategy may bring defaults."""


def read_strategy(found: Found) -> tuple[StrategyFile, Tree]:
    """The strategy in a file, and its values with their lines. Raises Mistakes; the stack is not checked yet."""
    tree = read_yaml(found.path, found.shown)
    write_out_plugins(tree, ("plugins",))
    try:
        strategy: StrategyFile = CONVERTER.structure(tree.value, StrategyFile)
    except Exception as error:
        raise Mistakes(in_order(located(tree.origin(e.path), e.path, e.message) for e in mistakes_of(error))) from error
    wrong = [
        located(tree.origin(("defaults", key)), ("defaults", key), f"expected one of {', '.join(DEFAULTABLE)}")
        for key in strategy.defaults
        if key not in DEFAULTABLE
    ]
    if wrong:
        raise Mistakes(wrong)
    return strategy, tree


def check_strategy(found: Found) -> StrategyFile:
    """The strategy in a file, with its stack checked too. Raises Mistakes."""
    strategy, tree = read_strategy(found)
    _, wrong = check_plugins(tree.value.get("plugins", []), ("plugins",))
    if wrong:
        raise Mistakes(in_order(located(tree.origin(e.path), e.path, e.message) for e in wrong))
    return strategy


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
