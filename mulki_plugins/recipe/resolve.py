"""From a recipe's name to a checked experiment: find, load, merge, check. All mistakes are collected, then raised.

Layers, each over the one before: the strategy's defaults, the recipe, the command line (`--strategy`, `--with`,
`--without`, then `--set` in the order given). Anything else has the default of the schema or of the part's signature.
"""

from __future__ import annotations

import copy
import re
from typing import Any

from attrs import define, field, frozen

from mulki_plugins.errors import Location, Mistakes, did_you_mean, format_value
from mulki_plugins.recipe.check import check_recipe
from mulki_plugins.recipe.files import (
    YamlFile,
    find,
    list_registered,
    read_strategy,
    refuse_other_kind,
    registered_name,
    suggest_file,
    warn_of_borrowed_name,
)
from mulki_plugins.recipe.layers import get, overlay, parse_setting, put, remove, set_value, write_out_short_forms
from mulki_plugins.recipe.schema import Recipe, as_data
from mulki_plugins.recipe.suggest import report
from mulki_plugins.recipe.yaml import Origin, Tree, locate, read_yaml, sort_by_line
from mulki_plugins.registry.builtin import twin
from mulki_plugins.registry.discovery import catalog

_STRATEGY: Location = ("strategy",)
_STACK: Location = ("strategy", "plugins")
_SETS_STRATEGY = re.compile(r"\s*(?:\$\.?)?strategy(?:\.name)?\s*=(.*)", re.DOTALL)
"""`--set strategy=...` or `--set strategy.name=...`, which decides what is loaded."""
_SETS_IN_STRATEGY = re.compile(r"\s*(?:\$\.?)?strategy\b")
_WEIGHT_FACTS = ("quickgelu", "mean", "std", "interpolation", "resize_mode")
"""The options of a model that describe its weights."""


@frozen(kw_only=True)
class Changes:
    """What the command line changes in a recipe."""

    strategy: str | None = None
    with_plugins: tuple[str, ...] = ()
    without_plugins: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()


@frozen(kw_only=True)
class Resolution:
    """A checked recipe, the same as plain data with the origin of every value, and notices for the user."""

    recipe: Recipe
    tree: Tree
    notices: list[str] = field(factory=list)


@define
class _Draft:
    """A recipe on its way through the layers."""

    tree: Tree
    defaults: Tree = field(factory=lambda: Tree({}))
    """The strategy's layer below the recipe."""
    notices: list[str] = field(factory=list)
    wrong: list[str] = field(factory=list)


def resolve(name: str, changes: Changes | None = None) -> Resolution:
    """The recipe of that path or name as an experiment that can be built. Raises Mistakes."""
    changes = changes or Changes()
    file = find("recipes", name)
    draft = _Draft(read_yaml(file.path, file.shown), notices=[file.notice] if file.notice else [])
    refuse_other_kind(draft.tree, file, "recipes")
    _check_name_is_free(draft, file)
    write_out_short_forms(draft.tree)
    strategy_settings = [setting for setting in changes.settings if chooses_strategy(setting)]
    settings = [setting for setting in changes.settings if setting not in strategy_settings]
    written_out = get(draft.tree.value, _STACK) is not None
    try:
        _choose_strategy(draft.tree, changes.strategy, strategy_settings)
        _load_strategy(draft)
        _edit_stack(draft, changes)
    except Mistakes as mistakes:  # still check the rest of the recipe
        draft.wrong += mistakes.lines()
        put(draft.tree, _STRATEGY, {"name": "unknown", "plugins": []}, draft.tree.origin(_STRATEGY))
        settings = [setting for setting in settings if not _SETS_IN_STRATEGY.match(setting)]
    if written_out and (changes.strategy or strategy_settings):
        draft.notices += _list_parts_of_another_strategy(draft)
    model = get(draft.tree.value, ("model", "name"))
    for setting in settings:
        try:
            set_value(draft.tree, setting)
        except Mistakes as mistakes:
            draft.wrong += mistakes.lines()
        write_out_short_forms(draft.tree)  # the next setting may be an option of this part
    _drop_contradicted_order(draft)
    _drop_weights_of_another_model(draft, model)
    _keep_default_towers(draft)
    if changes.seeds:
        put(draft.tree, ("seeds",), list(changes.seeds), Origin("--seed"))
    recipe, mistakes_in_values = check_recipe(draft.tree.value)
    draft.wrong += sort_by_line(report(draft.tree, mistakes_in_values))
    if draft.wrong or recipe is None:
        raise Mistakes(dict.fromkeys(draft.wrong))
    draft.notices += [*_list_short_warmups(recipe), *_list_unfrozen_weights(recipe, draft.tree)]
    if notice := warn_of_borrowed_name(recipe.strategy.name, [entry.name for entry in recipe.strategy.plugins]):
        draft.notices.append(notice)
    return Resolution(recipe=recipe, tree=Tree(as_data(recipe), dict(draft.tree.origins)), notices=draft.notices)


def chooses_strategy(setting: str) -> bool:
    """Whether a `--set` names the strategy itself."""
    return bool(_SETS_STRATEGY.match(setting))


def _check_name_is_free(draft: _Draft, file: YamlFile) -> None:
    """A registered recipe must not have the name of another one: results are stored under it."""
    registered, name = registered_name("recipes", file.path), draft.tree.value.get("name")
    if registered is not None and name != registered and isinstance(name, str) and name in list_registered("recipes"):
        owner = list_registered("recipes")[name][1]
        message = f"the recipe {name!r} of {owner} has this name, and results are stored under it"
        expected = f"expected {registered!r}, the name of the file"
        draft.wrong.append(locate(draft.tree.origin(("name",)), ("name",), f"{message}; {expected}"))


def _choose_strategy(tree: Tree, name: str | None, settings: list[str]) -> None:
    """Apply `--strategy` and `--set strategy=...`. Raises Mistakes."""
    if name is not None:
        put(tree, _STRATEGY, name, Origin("--strategy"))
    for setting in settings:
        origin, text = Origin(f"--set {setting}"), setting.partition("=")[2]
        put(tree, _STRATEGY, parse_setting(text, origin, _STRATEGY), origin)


def _load_strategy(draft: _Draft) -> None:
    """Write the strategy out as `{name, base, plugins}`, over the defaults of its file. Raises Mistakes."""
    if "strategy" not in draft.tree.value:
        return  # reported by the schema
    strategy, origin = draft.tree.value["strategy"], draft.tree.origin(_STRATEGY)
    if isinstance(strategy, str):
        strategy = {"name": strategy}
        put(draft.tree, _STRATEGY, strategy, origin)
    elif not isinstance(strategy, dict):
        message = f"expected a strategy's name or a mapping, got {format_value(strategy)}"
        raise Mistakes([locate(origin, _STRATEGY, message)])
    if "plugins" in strategy:
        strategy.setdefault("name", "custom")
    elif isinstance(strategy.get("name"), str):
        _lay_over_strategy_file(draft, strategy["name"])
    write_out_short_forms(draft.tree)


def _lay_over_strategy_file(draft: _Draft, name: str) -> None:
    """The recipe over the strategy file's stack and defaults. Raises Mistakes."""
    try:
        file = find("strategies", name)
    except Mistakes:
        path = ("strategy", "name") if ("strategy", "name") in draft.tree.origins else _STRATEGY
        hint = suggest_file("strategies", name)
        message = f"no strategy is named {format_value(name)} ({hint}); `mulki list strategies` shows all"
        raise Mistakes([locate(draft.tree.origin(path), path, message)]) from None
    if file.notice and "/" in name:
        draft.notices.append(file.notice)
    strategy, source = read_strategy(file)
    lower = Tree({})
    for key, value in strategy.defaults.items():
        put(lower, (key,), copy.deepcopy(value), source.origin(("defaults", key)))
        lower.origins.update({p[1:]: o for p, o in source.origins.items() if p[:2] == ("defaults", key)})
    stack: dict[str, Any] = {"name": strategy.name, "base": strategy.base, "plugins": source.value.get("plugins", [])}
    put(lower, _STRATEGY, stack, source.origin(()))
    lower.origins.update({("strategy", *p): o for p, o in source.origins.items() if p[:1] == ("plugins",)})
    lower.origins["strategy", "base"] = source.origin(("base",))
    write_out_short_forms(lower)
    draft.tree, draft.defaults = overlay(lower, draft.tree), lower
    draft.tree.value["strategy"]["name"] = strategy.name


def _edit_stack(draft: _Draft, changes: Changes) -> None:
    """Apply --without and --with, and name the changed stack accordingly, so that no two stacks share a folder.

    Whether the plugins exist at all is checked with the rest of the stack.
    """
    tree, plugins = draft.tree, get(draft.tree.value, _STACK)
    if not isinstance(plugins, list) or not (changes.with_plugins or changes.without_plugins):
        return
    names = [next(iter(entry)) if isinstance(entry, dict) and entry else None for entry in plugins]
    label = "".join(f"-without-{name}" for name in dict.fromkeys(changes.without_plugins))
    for name in dict.fromkeys(changes.without_plugins):
        if name not in names:
            hint = did_you_mean(name, [n for n in names if n]) or "it is empty"
            if "," in name:
                hint = f"type {_one_flag_each('--without', name)}"
            message = f"the stack has no plugin {name!r} ({hint})"
            draft.wrong.append(locate(Origin(f"--without {name}"), _STACK, message))
    kept = [i for i, name in enumerate(names) if name not in changes.without_plugins]
    origins = {p: o for p, o in tree.origins.items() if p[:2] == _STACK and len(p) > 2}
    put(tree, _STACK, [plugins[i] for i in kept], tree.origin(_STACK))
    for new, old in enumerate(kept):
        tree.origins.update({(*_STACK, new, *p[3:]): o for p, o in origins.items() if p[2] == old})
    stack = get(tree.value, _STACK)
    for name in changes.with_plugins:
        problem = _explain_no_plugin(name)
        if not problem:
            label += f"-with-{name}"
            if name in [next(iter(entry)) for entry in stack if isinstance(entry, dict) and entry]:
                problem = f"the stack has the plugin {name!r} already"
        if problem:
            draft.wrong.append(locate(Origin(f"--with {name}"), _STACK, problem))
        else:
            _insert(tree, _place_of(name, stack), {name: {}}, Origin(f"--with {name}"))
    if isinstance(strategy := tree.value["strategy"]["name"], str):
        tree.value["strategy"]["name"] = strategy + label


def _place_of(name: str, stack: list[Any]) -> int:
    """Where a plugin joins a stack: before the first one that must come after it, else at the end."""
    for i, entry in enumerate(stack):
        part = catalog().parts.get(("plugin", next(iter(entry), ""))) if isinstance(entry, dict) else None
        if part is not None and name in (*part.requires, *part.after):
            return i
    return len(stack)


def _insert(tree: Tree, place: int, entry: dict[str, Any], origin: Origin) -> None:
    """Insert a plugin into the stack; what was written of the later ones keeps its origin."""
    after = {p: o for p, o in tree.origins.items() if p[:2] == _STACK and len(p) > 2 and int(p[2]) >= place}
    for path in after:
        del tree.origins[path]
    tree.origins.update({(*_STACK, int(p[2]) + 1, *p[3:]): o for p, o in after.items()})
    here: Location = (*_STACK, place)
    tree.origins[here] = origin
    get(tree.value, _STACK).insert(place, entry)


def _one_flag_each(flag: str, names: str) -> str:
    return " ".join(f"{flag} {name.strip()}" for name in names.split(",") if name.strip())


def _explain_no_plugin(name: str) -> str:
    """What to type if `--with` names several plugins, or a strategy; else empty."""
    flags = _one_flag_each("--with", name)
    if flags.count("--with ") > 1:
        return f"expected one plugin; type {flags}"
    if name in list_registered("strategies") and ("plugin", name) not in catalog().parts:
        plugins = [part.name for part in catalog().of_kind("plugin") if part.name.rpartition(".")[2] == name]
        also = f", or --with {plugins[0]} for the plugin" if plugins else ""
        return f"{name!r} is a strategy; type --strategy {name}{also}"
    return ""


def _list_parts_of_another_strategy(draft: _Draft) -> list[str]:
    """A notice if another strategy takes the place of the one that the recipe writes out, as `mulki show` does, and the
    recipe's model keeps what that one had set."""
    kept = {}
    for key, default in (("train", "all"), ("adapters", {}), ("head", {"text": {}})):
        value, own = get(draft.tree.value, ("model", key)), get(draft.defaults.value, ("model", key))
        if value is not None and value != (default if own is None else own):
            kept[key] = value
    if not kept:
        return []
    name = get(draft.tree.value, ("strategy", "name"))
    shown = {key: ", ".join(value) if isinstance(value, dict) else str(value) for key, value in kept.items()}
    values = " and ".join(f"`{key}: {value}`" for key, value in shown.items())
    return [
        f"the recipe's model keeps {values} with the strategy {name}; take out what belongs to the recipe's own strategy,"
        " or start from a recipe that names its strategy"
    ]


def _drop_contradicted_order(draft: _Draft) -> None:
    """Drop the recipe's order of tasks if `--set stream.tasks=...` lists them in another one."""
    tree = draft.tree
    tasks, order = (get(tree.value, ("stream", key)) for key in ("tasks", "order"))
    tasks_origin, order_origin = (tree.origin(("stream", key)) for key in ("tasks", "order"))
    if not isinstance(tasks, list) or order is None or tasks_origin.line is not None or order_origin.line is None:
        return
    stream = catalog().parts.get(("stream", str(get(tree.value, ("stream", "name")))))
    names = order if isinstance(order, list) else stream.tasks if stream and order == "I" else ()
    if tasks != [name for name in names if name in tasks]:
        remove(tree, ("stream", "order"))
        draft.notices.append(
            f"the tasks come in the order of {tasks_origin}, not in the recipe's order {format_value(order)}"
        )


def _drop_weights_of_another_model(draft: _Draft, model: Any) -> None:
    """Drop what the recipe says about weights if `--set model.name=...` names another model than the recipe's (`model`)."""
    tree, name = draft.tree, get(draft.tree.value, ("model", "name"))
    if name == model or (isinstance(model, str) and name == twin(model)):  # which has the same weights
        return
    pretrained, dropped = get(tree.value, ("model", "pretrained")), []
    for key in ("pretrained", *_WEIGHT_FACTS):
        path = ("model", key)
        if path in tree.origins and tree.origin(path).line is not None and get(tree.value, path) != "random":
            remove(tree, path)
            dropped.append(key)
    if "pretrained" in dropped and pretrained is not None:
        what = f"ignoring the recipe's `pretrained: {pretrained}`, which is for {model}"
        draft.notices.append(f"model {name}: {what}; set others with --set model.pretrained=...")


def _keep_default_towers(draft: _Draft) -> None:
    """Apply the strategy's defaults for the model also to one from `--set model=...`."""
    model = draft.tree.value.get("model")
    for key in ("train", "adapters", "head"):
        path: Location = ("model", key)
        default = get(draft.defaults.value, path)
        if default is not None and isinstance(model, dict) and key not in model:
            put(draft.tree, path, copy.deepcopy(default), draft.defaults.origin(path))


def _list_short_warmups(recipe: Recipe) -> list[str]:
    """A notice for each task whose iterations leave no room for the warm-up. For epochs the number of steps is not known."""
    if recipe.strategy.base in ("none", "joint"):
        return []
    train = recipe.train
    budgets = {"$.train": train.iterations}
    budgets |= {f"$.train.per_task.{name}": budget.iterations for name, budget in train.per_task.items()}
    notices = {where: train.schedule.shortened(steps) for where, steps in budgets.items() if steps}
    return [f"{where}: {notice}" for where, notice in notices.items() if notice]


def _list_unfrozen_weights(recipe: Recipe, tree: Tree) -> list[str]:
    """A notice if the model's own weights learn beside its adapters only because `model.train` was not written."""
    model, path = recipe.model.options, ("model", "train")
    if (
        not model.get("adapters")
        or model.get("train") != "all"
        or path in tree.origins
        or recipe.strategy.base == "none"
    ):
        return []
    message = (
        "all weights of the model learn beside its adapters; `--set model.train=adapters` trains the adapters alone"
    )
    return [locate(tree.origin(path), path, message)]
