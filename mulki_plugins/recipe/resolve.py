"""From a recipe's name to a checked experiment: find, load, merge, validate. All mistakes are collected, then raised.

Layers, each over the one before: the strategy's defaults, the recipe, the command line (`--strategy`, `--with`,
`--without`, then `--set` in the order given). What nobody says has the default of the schema or of the part's signature.
"""

from __future__ import annotations

import re
from typing import Any

from attrs import field, frozen

from mulki_plugins.errors import Mistakes, did_you_mean, format_value
from mulki_plugins.recipe.check import check_recipe
from mulki_plugins.recipe.files import (
    find,
    list_registered,
    read_strategy,
    registered_name,
    suggest_file,
    warn_of_borrowed_name,
)
from mulki_plugins.recipe.layers import get, overlay, parse_setting, put, remove, set_value, write_out_plugins
from mulki_plugins.recipe.schema import Recipe, as_data
from mulki_plugins.recipe.suggest import check_is_recipe, report
from mulki_plugins.recipe.yaml import Origin, Tree, locate, read_yaml, sort_by_line
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.registry.open_clip_names import twin
from mulki_plugins.types import Path


@frozen(kw_only=True)
class Changes:
    """What the command line changes of a recipe."""

    strategy: str | None = None
    with_plugins: tuple[str, ...] = ()
    without_plugins: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()


@frozen(kw_only=True)
class Resolved:
    """A checked recipe, the same as plain data with the origin of every value, and what to tell the user."""

    recipe: Recipe
    tree: Tree
    notices: list[str] = field(factory=list)


def resolve(name: str, changes: Changes | None = None) -> Resolved:
    """The recipe of that path or name as an experiment that can be built. Raises Mistakes."""
    changes = changes or Changes()
    found = find("recipes", name)
    tree = read_yaml(found.path, found.shown)
    check_is_recipe(tree, found)
    notices = [found.notice] if found.notice else []
    wrong: list[str] = []
    own, name = registered_name("recipes", found.path), tree.value.get("name")
    if own is not None and name != own and name in list_registered("recipes"):
        whose = (
            f"the recipe {name!r} of {list_registered('recipes')[name][1]} has this name, and results are kept under it"
        )
        wrong.append(locate(tree.origin(("name",)), ("name",), f"{whose}; expected {own!r}, as the file is called"))
    _normalise(tree)
    defaults = Tree({}, {})
    choices = {assignment: match[1] for assignment in changes.settings if (match := _CHOOSES.match(assignment))}
    settings = [assignment for assignment in changes.settings if assignment not in choices]
    try:
        tree, defaults = _with_strategy(tree, changes, choices, notices)
        wrong += _edit_stack(tree, changes)
    except Mistakes as mistakes:  # the rest of the recipe is checked all the same
        wrong += mistakes.lines()
        put(tree, ("strategy",), {"name": "unknown", "plugins": []}, tree.origin(("strategy",)))
        settings = [assignment for assignment in settings if not _OF_STRATEGY.match(assignment)]
    written = get(tree.value, ("model", "name"))
    for assignment in settings:
        try:
            set_value(tree, assignment)
        except Mistakes as mistakes:
            wrong += mistakes.lines()
    _normalise(tree)
    notices += _tasks_as_written(tree)
    notices += _weights_of_another_model(tree, written)
    _which_towers(tree, defaults)
    if changes.seeds:
        put(tree, ("seeds",), list(changes.seeds), Origin("--seed"))
    recipe, problems = check_recipe(tree.value)
    wrong += sort_by_line(report(tree, problems))
    if wrong or recipe is None:
        raise Mistakes(dict.fromkeys(wrong))
    notices += _warmups(recipe)
    if notice := warn_of_borrowed_name(recipe.strategy.name, [entry.name for entry in recipe.strategy.plugins]):
        notices.append(notice)
    return Resolved(recipe=recipe, tree=_with_defaults(tree, recipe), notices=notices)


_CHOOSES = re.compile(r"\s*(?:\$\.?)?strategy(?:\.name)?\s*=(.*)", re.DOTALL)
"""`--set strategy=...` or `--set strategy.name=...`, which decides what is loaded."""


def chooses_strategy(assignment: str) -> bool:
    """Whether a `--set` names the strategy itself."""
    return bool(_CHOOSES.match(assignment))


_OF_STRATEGY = re.compile(r"\s*(?:\$\.?)?strategy\b")


def _with_strategy(tree: Tree, changes: Changes, choices: dict[str, str], notices: list[str]) -> tuple[Tree, Tree]:
    """The tree with its strategy written out as `{name, base, plugins}`, over the strategy's defaults; and these."""
    defaults = Tree({}, {})
    if changes.strategy is not None:
        put(tree, ("strategy",), changes.strategy, Origin("--strategy"))
    for assignment, text in choices.items():
        origin = Origin(f"--set {assignment}")
        put(tree, ("strategy",), parse_setting(text, origin, ("strategy",)), origin)
    said = tree.value.get("strategy")
    if isinstance(said, str):
        put(tree, ("strategy",), {"name": said}, tree.origin(("strategy",)))
    elif "strategy" not in tree.value:
        return tree, defaults  # reported by the schema
    elif not isinstance(said, dict):
        path = ("strategy",)
        message = f"expected a strategy's name or a mapping, got {format_value(said)}"
        raise Mistakes([locate(tree.origin(path), path, message)])
    said = tree.value["strategy"]
    if "plugins" not in said and isinstance(said.get("name"), str):
        tree, defaults = _loaded(tree, said["name"], notices)
    elif "plugins" in said:
        said.setdefault("name", "custom")
    _normalise(tree)
    return tree, defaults


def _tasks_as_written(tree: Tree) -> list[str]:
    """Where `--set stream.tasks=...` contradicts the recipe's order, the order gives way."""
    tasks, order = (get(tree.value, ("stream", key)) for key in ("tasks", "order"))
    said, written = (tree.origin(("stream", key)) for key in ("tasks", "order"))
    if not isinstance(tasks, list) or order is None or said.line is not None or written.line is None:
        return []
    known = catalog().parts.get(("stream", str(get(tree.value, ("stream", "name")))))
    names = order if isinstance(order, list) else known.tasks if known and order == "I" else ()
    if tasks == [name for name in names if name in tasks]:
        return []
    remove(tree, ("stream", "order"))
    return [f"the tasks come in the sequence of {said}; the recipe's order {format_value(order)} gives way"]


def _weights_of_another_model(tree: Tree, written: Any) -> list[str]:
    """Where `--set model.name=...` names another model than the recipe, what the recipe says of weights is left out."""
    name = get(tree.value, ("model", "name"))
    if name == written or (isinstance(written, str) and name == twin(written)):  # which has the same weights
        return []
    pretrained = get(tree.value, ("model", "pretrained"))
    left_out = []
    for key in ("pretrained", *_OF_WEIGHTS):
        path = ("model", key)
        if path in tree.origins and tree.origin(path).line is not None and get(tree.value, path) != "random":
            remove(tree, path)
            left_out.append(key)
    if "pretrained" not in left_out or pretrained is None:
        return []
    said = f"the recipe's `pretrained: {pretrained}` is for {written} and is left out"
    return [f"model {name}: {said}; --set model.pretrained=... names others"]


def _warmups(recipe: Recipe) -> list[str]:
    """Where the iterations of a task leave no room for the warm-up. How many steps epochs make shows only in the run."""
    if recipe.strategy.base in ("none", "joint"):
        return []
    train = recipe.train
    said = [f"$.train: {text}"] if train.iterations and (text := train.schedule.shortened(train.iterations)) else []
    for name, budget in train.per_task.items():
        if budget.iterations and (text := train.schedule.shortened(budget.iterations)):
            said.append(f"$.train.per_task.{name}: {text}")
    return said


_OF_WEIGHTS = ("quickgelu", "mean", "std", "interpolation", "resize_mode")


def _which_towers(tree: Tree, defaults: Tree) -> None:
    """The strategy's default, also under a model that `--set model=...` put in the recipe's place."""
    path = ("model", "train")
    towers = get(defaults.value, path)
    if towers is not None and isinstance(model := tree.value.get("model"), dict) and "train" not in model:
        put(tree, path, towers, defaults.origin(path))


def _loaded(tree: Tree, name: str, notices: list[str]) -> tuple[Tree, Tree]:
    """The strategy file's stack under the recipe's own words on it, and its defaults under the recipe; and these."""
    path = ("strategy", "name") if ("strategy", "name") in tree.origins else ("strategy",)
    try:
        found = find("strategies", name)
    except Mistakes:
        message = f"no strategy is named {format_value(name)} ({suggest_file('strategies', name)}); `mulki list strategies` shows all"
        raise Mistakes([locate(tree.origin(path), path, message)]) from None
    if found.notice and "/" in name:
        notices.append(found.notice)
    strategy, source = read_strategy(found)
    lower = Tree({}, {})
    for key, value in strategy.defaults.items():
        put(lower, (key,), value, source.origin(("defaults", key)))
        lower.origins.update({p[1:]: o for p, o in source.origins.items() if p[:2] == ("defaults", key)})
    stack: dict[str, Any] = {"name": strategy.name, "base": strategy.base, "plugins": source.value.get("plugins", [])}
    put(lower, ("strategy",), stack, source.origin(()))
    lower.origins.update({("strategy", *p): o for p, o in source.origins.items() if p[:1] == ("plugins",)})
    lower.origins["strategy", "base"] = source.origin(("base",))
    result = overlay(lower, tree)
    result.value["strategy"]["name"] = strategy.name
    return result, lower


def _normalise(tree: Tree) -> None:
    """Short forms written out: `stream: name`, `model: name`, `- plugin`."""
    for key in ("stream", "reference", "model"):
        if isinstance(value := tree.value.get(key), str):
            _put_name(tree, (key,), value)
    for key in ("optimizer", "schedule"):
        if isinstance(value := get(tree.value, ("train", key)), str):
            _put_name(tree, ("train", key), value)
    write_out_plugins(tree, ("strategy", "plugins"))


def _put_name(tree: Tree, path: Path, name: str) -> None:
    """`name` written out as `{name: ...}`, where it stood."""
    origin = tree.origin(path)
    put(tree, path, {}, origin)
    put(tree, (*path, "name"), name, origin)


def _edit_stack(tree: Tree, changes: Changes) -> list[str]:
    """Apply --without and --with, and give the changed stack a name of its own, so that no two share a folder.

    Returns what cannot be applied; whether the plugins are known at all is not asked here.
    """
    plugins = get(tree.value, ("strategy", "plugins"))
    if not isinstance(plugins, list) or not (changes.with_plugins or changes.without_plugins):
        return []
    names = [next(iter(entry)) if isinstance(entry, dict) and entry else None for entry in plugins]
    wrong: list[str] = []
    added: list[str] = []
    label = ""
    path = ("strategy", "plugins")
    for name in dict.fromkeys(changes.without_plugins):
        if name not in names:
            there = did_you_mean(name, [n for n in names if n]) or "it is empty"
            if "," in name:
                there = f"type {' '.join(f'--without {part.strip()}' for part in name.split(',') if part.strip())}"
            wrong.append(locate(Origin(f"--without {name}"), path, f"the stack has no plugin {name!r} ({there})"))
        label += f"-without-{name}"
    for name in changes.with_plugins:
        if problem := _no_single_plugin(name):
            wrong.append(locate(Origin(f"--with {name}"), path, problem))
            continue
        if name in names or name in added:
            wrong.append(locate(Origin(f"--with {name}"), path, f"the stack has the plugin {name!r} already"))
        else:
            added.append(name)
        label += f"-with-{name}"
    kept = [i for i, name in enumerate(names) if name not in changes.without_plugins]
    origins = {p: o for p, o in tree.origins.items() if p[:2] == path and len(p) > 2}
    put(tree, path, [plugins[i] for i in kept], tree.origin(path))
    for new, old in enumerate(kept):
        tree.origins.update({(*path, new, *p[3:]): o for p, o in origins.items() if p[2] == old})
    for name in added:
        place = len(tree.value["strategy"]["plugins"])
        tree.value["strategy"]["plugins"].append({name: {}})
        tree.origins[path + (place,)] = Origin(f"--with {name}")
    if isinstance(named := tree.value["strategy"]["name"], str):
        tree.value["strategy"]["name"] = named + label
    return wrong


def _no_single_plugin(name: str) -> str:
    """What to type where `--with` names several plugins, or a strategy."""
    names = [part.strip() for part in name.split(",") if part.strip()]
    if len(names) > 1:
        return f"expected one plugin; type {' '.join(f'--with {name}' for name in names)}"
    if name in list_registered("strategies") and ("plugin", name) not in catalog().parts:
        plugins = [part.name for part in catalog().of_kind("plugin") if part.name.rpartition(".")[2] == name]
        also = f", or --with {plugins[0]} for the plugin" if plugins else ""
        return f"{name!r} is a strategy; type --strategy {name}{also}"
    return ""


def _with_defaults(tree: Tree, recipe: Recipe) -> Tree:
    """The whole recipe as data; values that nobody wrote have the origin `default`."""
    return Tree(as_data(recipe), dict(tree.origins))
