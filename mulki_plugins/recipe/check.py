"""Everything that is wrong with a recipe's values: types, names, options, the stack, and what only shows together."""

from __future__ import annotations

import re
from typing import Any

from mulki_plugins.errors import MulkiError, OptionError, did_you_mean, format_value
from mulki_plugins.recipe.check import check_composition, check_options, check_plugins, repeated
from mulki_plugins.recipe.layers import get
from mulki_plugins.recipe.schema import Recipe, as_data, as_recipe
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.registry.open_clip_names import open_clip_models, open_clip_part
from mulki_plugins.registry.parts import Kind, Part
from mulki_plugins.types import MOST, Path, collect_mistakes

_CHOICES: dict[str, Kind] = {"stream": "stream", "reference": "stream", "model": "model"}
"""The parts of a recipe that a registered part stands in, and of which kind."""


def checked_recipe(data: dict[str, Any]) -> tuple[Recipe | None, list[OptionError]]:
    """The recipe with every option filled in, or None, and everything that is wrong with it."""
    wrong: list[OptionError] = []
    recipe: Recipe | None = None
    try:
        recipe = as_recipe(data)
    except Exception as error:
        wrong += collect_mistakes(error)
    filled: dict[str, Any] = {}
    for key, kind in _CHOICES.items():
        value = data.get(key)
        if isinstance(value, dict) and isinstance(value.get("name"), str):
            options = {k: v for k, v in value.items() if k != "name"}
            filled[key], problems = _checked_choice(kind, value["name"], options, (key,))
            wrong += problems
    plugins = get(data, ("strategy", "plugins"))
    stack: list[Any] = []
    if isinstance(plugins, list):
        stack, problems = check_plugins(plugins, ("strategy", "plugins"))
        wrong += problems
    for kind, path in (("metric", ("evaluate", "metrics")), ("logger", ("loggers",))):
        wrong += _known_names(kind, get(data, path), path)  # type: ignore[arg-type]
    wrong += _crosswise(data)
    wrong += check_composition(data)
    if recipe is None or wrong:
        return None, wrong
    whole = as_data(recipe)
    for key, options in filled.items():
        whole[key] = {"name": whole[key]["name"], **options}
    whole["strategy"]["plugins"] = stack
    return as_recipe(whole), []


def _checked_choice(
    kind: Kind, name: str, options: dict[str, Any], path: Path
) -> tuple[dict[str, Any], list[OptionError]]:
    """A stream or model by name; a model may also be an architecture of open_clip."""
    part: Part | None = catalog().parts.get((kind, name))
    if kind == "model":
        train = options.pop("train", "all")
        part = part or (open_clip_part(name) if name in open_clip_models() else None)
    if part is None and (reason := catalog().refused.get((kind, name))):
        return options, [OptionError(f"the {kind} {name!r} cannot be used: {reason}", (*path, "name"))]
    if part is None:
        known = [p.name for p in catalog().of_kind(kind)] + (open_clip_models() if kind == "model" else [])
        said = f"no {kind} is named {name!r} ({did_you_mean(name, known)}); `mulki list {kind}s` shows all"
        return options, [OptionError(said, (*path, "name"))]
    result, wrong = check_options(part, options, path)
    if kind == "model":
        result = {"train": train, **result}
        if train not in ("all", "image", "text"):
            wrong.append(
                OptionError(f"expected 'all' or 'image' or 'text', got {format_value(train)}", (*path, "train"))
            )
    return result, wrong


def _known_names(kind: Kind, names: Any, path: Path) -> list[OptionError]:
    wrong = []
    texts = [(i, name) for i, name in enumerate(names if isinstance(names, list) else ()) if isinstance(name, str)]
    for i, name in texts[:MOST]:
        try:
            catalog().find(kind, name)
        except MulkiError as error:
            wrong.append(OptionError(error.message, (*path, i)))
    return wrong + [OptionError(f"{name!r} is named twice", (*path, i)) for i, name in repeated(texts)]


def _crosswise(value: dict[str, Any]) -> list[OptionError]:
    """What no single value shows: two budgets, tasks that the stream has not."""
    wrong: list[OptionError] = []
    train = value.get("train")
    if isinstance(train, dict):
        budgets = [key for key in ("iterations", "epochs") if train.get(key) is not None]
        if len(budgets) != 1:
            what = "both iterations and epochs are given" if budgets else "neither iterations nor epochs is given"
            said = budgets or [key for key in ("iterations", "epochs") if key in train]
            wrong.append(OptionError(f"{what}, expected one of the two", ("train", *said[-1:])))
        wrong += _optimizer(train.get("optimizer"))
        wrong += _budgets(train)
    wrong += _names_of_tasks(value)
    name = value.get("name")
    named: list[tuple[Any, Path]] = [(name, ("name",)), (get(value, ("strategy", "name")), ("strategy", "name"))]
    for at, path in named:
        if isinstance(at, str) and (problem := name_problem(at)):
            wrong.append(OptionError(problem, path))
    seeds = value.get("seeds")
    if isinstance(seeds, list):
        if not seeds:
            wrong.append(OptionError("expected at least one seed", ("seeds",)))
        whole = [(i, s) for i, s in enumerate(seeds) if type(s) is int]
        wrong += [OptionError(f"the seed {s} is given twice", ("seeds", i)) for i, s in repeated(whole)]
    device = value.get("device", "auto")
    if isinstance(device, str) and not re.fullmatch(r"auto|cpu|mps|cuda(:(0|[1-9]\d?))?", device):
        wrong.append(OptionError(f"expected auto, cpu, cuda, cuda:N or mps, got {device!r}", ("device",)))
    return wrong


def name_problem(name: str) -> str:
    """What keeps the name of a recipe or a strategy from being a folder's; nothing where it is fine."""
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", name):
        return ""
    what = "expected up to 200 letters, digits, '.', '_' and '-', the first a letter or digit"
    return f"{format_value(name)} names a folder: {what}"


def _optimizer(optimizer: Any) -> list[OptionError]:
    if not isinstance(optimizer, dict):
        return []
    name = optimizer.get("name", "adamw")
    unfit = "momentum" if name in ("adam", "adamw") else "betas"
    if optimizer.get(unfit) is not None and name in ("adam", "adamw", "sgd"):
        return [OptionError(f"the optimizer {name!r} takes no {unfit}", ("train", "optimizer", unfit))]
    return []


def _budgets(train: dict[str, Any]) -> list[OptionError]:
    """Both kinds of budget for one task."""
    per_task = train.get("per_task")
    return [
        OptionError(
            "both iterations and epochs are given, expected one of the two", ("train", "per_task", name, "epochs")
        )
        for name, budget in (per_task.items() if isinstance(per_task, dict) else ())
        if isinstance(budget, dict) and budget.get("iterations") is not None and budget.get("epochs") is not None
    ]


def _names_of_tasks(value: dict[str, Any]) -> list[OptionError]:
    """Names of tasks are checked where the stream's are known before it is built: its own, or those that it is given."""
    part = catalog().parts.get(("stream", str(get(value, ("stream", "name")))))
    if part is None:
        return []
    wrong: list[OptionError] = []
    per_task = get(value, ("train", "per_task"))
    said: list[tuple[Any, Path]] = [
        (name, ("train", "per_task", name)) for name in (per_task if isinstance(per_task, dict) else ())
    ]
    if part.tasks:
        known = part.tasks
        order, problems = _order_of_tasks(value)
        said = order + said
        wrong += problems
    else:
        declared = get(value, ("stream", "tasks"))
        entries = [entry for entry in (declared if isinstance(declared, list) else ()) if isinstance(entry, dict)]
        known = tuple(entry["name"] for entry in entries if isinstance(entry.get("name"), str))
    return wrong + [
        OptionError(f"the stream {part.name} has no task {name!r} ({did_you_mean(name, known)})", path)
        for name, path in said
        if isinstance(name, str) and known and name not in known
    ]


def _order_of_tasks(value: dict[str, Any]) -> tuple[list[tuple[Any, Path]], list[OptionError]]:
    """The names in a stream's `order` and `tasks`, and what is wrong with these lists."""
    said: list[tuple[Any, Path]] = []
    wrong: list[OptionError] = []
    for key in ("order", "tasks"):
        names = get(value, ("stream", key))
        if isinstance(names, list):
            said += [(name, ("stream", key, i)) for i, name in enumerate(names)]
            wrong += [
                OptionError(f"the task {n!r} is named twice", ("stream", key, i)) for i, n in repeated(enumerate(names))
            ]
            if not names:
                wrong.append(OptionError("expected at least one task, got an empty list", ("stream", key)))
    order, tasks = (get(value, ("stream", key)) for key in ("order", "tasks"))
    left = [task for task in tasks if task in order] if isinstance(order, list) and isinstance(tasks, list) else None
    if order and tasks and left == []:
        wrong.append(OptionError("none of these tasks is in stream.order, so that none is left", ("stream", "tasks")))
    return said, wrong
