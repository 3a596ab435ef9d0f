"""Everything that is wrong with a recipe: types, names, options, the stack, and what only shows across values.

Data is plain, as read from YAML, and anything in it may be wrong: each check looks only at what it understands and leaves
the rest to the conversion to the schema's types.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mulki_plugins.errors import MAX_REPORTED, Location, MulkiError, OptionError, did_you_mean, format_value
from mulki_plugins.recipe.layers import get
from mulki_plugins.recipe.schema import Recipe, as_data, as_recipe, is_yaml_value
from mulki_plugins.registry.builtin import open_clip_models, open_clip_part
from mulki_plugins.registry.callbacks import callback_mistakes
from mulki_plugins.registry.catalog import Kind, Part, signature_of
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.registry.static import REQUIRED, UNKNOWN
from mulki_plugins.types import collect_mistakes, convert

_PARTS: dict[str, Kind] = {"stream": "stream", "reference": "stream", "model": "model"}
"""The keys of a recipe that name one registered part, and its kind."""
_LISTS: tuple[tuple[Kind, Location], ...] = (("metric", ("evaluate", "metrics")), ("logger", ("loggers",)))
"""The lists of a recipe that name registered parts."""
_STACK = ("strategy", "plugins")
TRAIN = ("all", "image", "text", "adapters", "none")
"""What of a model learns: both towers, one of them, only what adapters add, or nothing."""
_ONE_BUDGET = "both iterations and epochs are given, expected one of the two"


def check_recipe(data: dict[str, Any]) -> tuple[Recipe | None, list[OptionError]]:
    """The recipe with every option filled in, or None, and everything that is wrong with it."""
    recipe: Recipe | None = None
    wrong: list[OptionError] = []
    try:
        recipe = as_recipe(data)
    except Exception as error:
        wrong += collect_mistakes(error)
    filled: dict[str, Any] = {}
    for key, kind in _PARTS.items():
        value = data.get(key)
        if isinstance(value, dict) and isinstance(value.get("name"), str):
            filled[key], problems = _check_part(kind, value, (key,))
            wrong += problems
    stack, problems = check_plugins(_list_at(data, _STACK), _STACK)
    wrong += problems
    for kind, path in _LISTS:
        wrong += _check_names(kind, _list_at(data, path), path)
    for check in (
        _check_train,
        _check_tasks,
        _check_folder_names,
        _check_seeds,
        _check_device,
        _check_cache,
        _check_base,
        _check_accumulate,
        _check_reference,
    ):
        wrong += check(data)
    if recipe is None or wrong:
        return None, wrong
    whole = {**as_data(recipe), **filled}
    whole["strategy"]["plugins"] = stack
    return as_recipe(whole), []


def _list_at(data: dict[str, Any], path: Location) -> list[Any]:
    value = get(data, path)
    return value if isinstance(value, list) else []


def _mapping_at(data: dict[str, Any], path: Location) -> dict[Any, Any]:
    value = get(data, path)
    return value if isinstance(value, dict) else {}


def _repeated(items: Iterable[tuple[int, Any]]) -> list[tuple[int, Any]]:
    """The numbered items whose value occurred before."""
    seen: set[str] = set()
    again = []
    for i, item in items:
        if repr(item) in seen:
            again.append((i, item))
        seen.add(repr(item))
    return again


def _check_part(kind: Kind, value: dict[str, Any], path: Location) -> tuple[dict[str, Any], list[OptionError]]:
    """A stream or model by name, with its options filled in; a model may also be an architecture of open_clip."""
    name = value["name"]
    options = {key: option for key, option in value.items() if key != "name"}
    part: Part | None = catalog().parts.get((kind, name))
    if kind == "model":
        towers, adapters = options.pop("train", "all"), options.pop("adapters", [])
        part = part or (open_clip_part(name) if name in open_clip_models() else None)
    if part is None:
        if reason := catalog().refused.get((kind, name)):
            message = f"the {kind} {name!r} cannot be used: {reason}"
        else:
            known = [p.name for p in catalog().of_kind(kind)] + (open_clip_models() if kind == "model" else [])
            message = f"no {kind} is named {name!r} ({did_you_mean(name, known)}); `mulki list {kind}s` shows all"
        return value, [OptionError(message, (*path, "name"))]
    result, wrong = check_options(part, options, path)
    if kind == "model":
        filled, problems = _check_adapters(adapters, (*path, "adapters"))
        result = {"train": towers, **({"adapters": filled} if filled else {}), **result}
        wrong += problems
        if not isinstance(towers, str) or towers not in TRAIN:
            expected = " or ".join(map(repr, TRAIN))
            wrong.append(OptionError(f"expected {expected}, got {format_value(towers)}", (*path, "train")))
        elif towers == "adapters" and not adapters:
            message = "the model has no adapters; add some, such as model.adapters=[lora]"
            wrong.append(OptionError(message, (*path, "train")))
    return {"name": name, **result}, wrong


def _check_adapters(value: Any, path: Location) -> tuple[list[dict[str, Any]], list[OptionError]]:
    """A model's adapters, each as {name: options} with all options filled in, and everything that is wrong with them."""
    if not isinstance(value, list):
        return [], [OptionError(f"expected a list of adapters, such as [lora], got {format_value(value)}", path)]
    filled: list[dict[str, Any]] = []
    wrong: list[OptionError] = []
    for i, item in enumerate(value):
        [(name, options)] = item.items() if isinstance(item, dict) and len(item) == 1 else [(item, None)]
        if not isinstance(name, str) or not isinstance(options or {}, dict):
            message = f"expected an adapter as `name` or `name: {{options}}`, got {format_value(item)}"
            wrong.append(OptionError(message, (*path, i)))
            continue
        here = (*path, i, name) if isinstance(item, dict) else (*path, i)
        try:
            part = catalog().find("adapter", name)
        except MulkiError as error:
            wrong.append(OptionError(error.message, here))
            continue
        result, problems = check_options(part, options or {}, here)
        filled.append({name: result})
        wrong += problems
    return filled, wrong


def check_options(part: Part, options: dict[str, Any], path: Location) -> tuple[dict[str, Any], list[OptionError]]:
    """The options of a part, converted and with defaults filled in, and everything that is wrong with them."""
    try:
        signature = signature_of(part)
    except MulkiError as error:
        return options, [OptionError(f"the {part.kind} of {part.provenance}: {error.lines()[0]}", path)]
    wrong: list[OptionError] = []
    result: dict[str, Any] = {}
    for name, option in signature.options.items():
        if name in part.defaults:
            result[name] = part.defaults[name]
        elif option.default not in (REQUIRED, UNKNOWN) and is_yaml_value(option.default):
            result[name] = option.default
        elif option.default is REQUIRED and name not in options:
            wrong.append(OptionError("missing; it has no default", (*path, name)))
    for name, value in options.items():
        if name in signature.options:
            try:
                converted = convert(value, signature.options[name].kind)
                result[name] = list(converted) if isinstance(converted, tuple) else converted
            except Exception as error:
                wrong += collect_mistakes(error, (*path, name))
            continue
        result[name] = value
        if not signature.open:
            hint = did_you_mean(name, signature.options)
            message = f"unknown option ({hint})" if hint else f"unknown option; this {part.kind} has none"
            wrong.append(OptionError(message, (*path, name)))
    if not wrong:
        try:
            wrong += [error.below(path) for error in part.problems(result)]
        except MulkiError as error:
            wrong.append(OptionError(error.lines()[0], path))
    return result, wrong


def _check_names(kind: Kind, names: list[Any], path: Location) -> Iterator[OptionError]:
    texts = [(i, name) for i, name in enumerate(names) if isinstance(name, str)]
    for i, name in texts[:MAX_REPORTED]:
        try:
            catalog().find(kind, name)
        except MulkiError as error:
            yield OptionError(error.message, (*path, i))
    for i, name in _repeated(texts):
        yield OptionError(f"{name!r} is named twice", (*path, i))


def check_plugins(plugins: list[Any], path: Location) -> tuple[list[Any], list[OptionError]]:
    """A stack as plain data with all options filled in, and everything that is wrong with it."""
    wrong: list[OptionError] = []
    stack, names = [], []
    for i, entry in enumerate(plugins):
        if not (isinstance(entry, dict) and len(entry) == 1 and isinstance(next(iter(entry.values())), dict)):
            names.append("")
            continue  # reported by the schema
        [(name, options)] = entry.items()
        names.append(name)
        here = (*path, i, name)
        try:
            part = catalog().find("plugin", name)
        except MulkiError as error:
            wrong.append(OptionError(error.message, here))
            continue
        result, problems = check_options(part, options, here)
        stack.append({name: result})
        wrong += problems
        wrong += [OptionError(f"the plugin of {part.provenance}: {text}", here) for text in callback_mistakes(part)]
    return stack, [*wrong, *_check_order(names, path)]


def _check_order(names: list[str], path: Location) -> Iterator[OptionError]:
    """What keeps these plugins, in this order, from working together. Unknown names are reported elsewhere."""
    first = {name: i for i, name in reversed(list(enumerate(names)))}
    for i, name in _repeated(enumerate(names)):
        if name:
            yield OptionError("is in the stack twice", (*path, i, name))
    for name, i in sorted(first.items(), key=lambda item: item[1]):
        here, part = (*path, i, name), catalog().parts.get(("plugin", name))
        if part is None:
            continue
        for other in part.requires:
            if other not in first:
                yield OptionError(f"needs the plugin {other!r}; add `- {other}` before it", here)
        for other in dict.fromkeys((*part.requires, *part.after)):
            if first.get(other, -1) > i:
                yield OptionError(f"must come after {other!r}", here)
        for other in part.conflicts:
            if other in first:
                yield OptionError(f"does not work together with {other!r}", here)


def _check_train(data: dict[str, Any]) -> Iterator[OptionError]:
    """Two budgets, and options that the optimizer does not take."""
    train = data.get("train")
    if not isinstance(train, dict):
        return
    budgets = [key for key in ("iterations", "epochs") if train.get(key) is not None]
    if len(budgets) == 2:
        yield OptionError(_ONE_BUDGET, ("train", "epochs"))
    elif not budgets:
        written = [key for key in ("iterations", "epochs") if key in train]
        message = "neither iterations nor epochs is given, expected one of the two"
        yield OptionError(message, ("train", *written[-1:]))
    for task, budget in _mapping_at(train, ("per_task",)).items():
        if get(budget, ("iterations",)) is not None and get(budget, ("epochs",)) is not None:
            yield OptionError(_ONE_BUDGET, ("train", "per_task", task, "epochs"))
    optimizer = _mapping_at(train, ("optimizer",))
    name = optimizer.get("name", "adamw")
    wrong_option = "betas" if name == "sgd" else "momentum"
    if name in ("adam", "adamw", "sgd") and optimizer.get(wrong_option) is not None:
        yield OptionError(f"the optimizer {name!r} takes no {wrong_option}", ("train", "optimizer", wrong_option))


def _check_tasks(data: dict[str, Any]) -> Iterator[OptionError]:
    """Names of tasks the stream does not have, if its tasks are known before it is built: fixed, or declared in the recipe."""
    part = catalog().parts.get(("stream", str(get(data, ("stream", "name")))))
    if part is None:
        return
    written: list[tuple[Any, Location]] = []
    if known := part.tasks:
        order, tasks = (get(data, ("stream", key)) for key in ("order", "tasks"))
        for key, names in (("order", order), ("tasks", tasks)):
            if isinstance(names, list):
                written += [(name, ("stream", key, i)) for i, name in enumerate(names)]
                for i, name in _repeated(enumerate(names)):
                    yield OptionError(f"the task {name!r} is named twice", ("stream", key, i))
                if not names:
                    yield OptionError("expected at least one task, got an empty list", ("stream", key))
        both = order and tasks and isinstance(order, list) and isinstance(tasks, list)
        if both and not any(task in order for task in tasks):
            yield OptionError("none of these tasks is in stream.order, so none is left", ("stream", "tasks"))
    else:
        names = [get(entry, ("name",)) for entry in _list_at(data, ("stream", "tasks"))]
        known = tuple(name for name in names if isinstance(name, str))
    written += [(name, ("train", "per_task", name)) for name in _mapping_at(data, ("train", "per_task"))]
    for name, path in written:
        if isinstance(name, str) and known and name not in known:
            yield OptionError(f"the stream {part.name} has no task {name!r} ({did_you_mean(name, known)})", path)


def check_name(name: str) -> str:
    """What keeps the name of a recipe or a strategy from naming a folder; empty if nothing does."""
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", name):
        return ""
    expected = "expected up to 200 letters, digits, '.', '_' and '-', the first a letter or digit"
    return f"{format_value(name)} names a folder: {expected}"


def _check_folder_names(data: dict[str, Any]) -> Iterator[OptionError]:
    for path in (("name",), ("strategy", "name")):
        if isinstance(name := get(data, path), str) and (problem := check_name(name)):
            yield OptionError(problem, path)


def _check_seeds(data: dict[str, Any]) -> Iterator[OptionError]:
    seeds = data.get("seeds")
    if seeds == []:
        yield OptionError("expected at least one seed", ("seeds",))
    for i, seed in _repeated((i, s) for i, s in enumerate(_list_at(data, ("seeds",))) if type(s) is int):
        yield OptionError(f"the seed {seed} is given twice", ("seeds", i))


def _check_device(data: dict[str, Any]) -> Iterator[OptionError]:
    device = data.get("device", "auto")
    if isinstance(device, str) and not re.fullmatch(r"auto|cpu|mps|cuda(:(0|[1-9]\d?))?", device):
        yield OptionError(f"expected auto, cpu, cuda, cuda:N or mps, got {device!r}", ("device",))


def _check_cache(data: dict[str, Any]) -> Iterator[OptionError]:
    """A single word that names no folder is rather a mistyped auto or off."""
    cache = get(data, ("evaluate", "cache"))
    if not isinstance(cache, str) or cache in ("auto", "off") or re.search(r"[/\\]", cache):
        return
    if cache.strip() and Path(cache).is_dir():
        return
    hint = f"; write ./{cache} for a new folder of that name" if re.fullmatch(r"[\w.-]+", cache) else ""
    yield OptionError(f"expected auto, off or a folder, got {cache!r}{hint}", ("evaluate", "cache"))


_ALL_IMAGES = {
    "cumulative": "trains on the images of all tasks so far",
    "joint": "trains on the images of all tasks at once",
}


def _check_base(data: dict[str, Any]) -> Iterator[OptionError]:
    """Plugins that do not go with the strategy's base, or that lack reference data."""
    base = get(data, ("strategy", "base"))
    base = base if isinstance(base, str) else "naive"
    for i, entry in enumerate(_list_at(data, _STACK)):
        name = next(iter(entry)) if isinstance(entry, dict) and len(entry) == 1 else ""
        part, path = catalog().parts.get(("plugin", name)), (*_STACK, i, name)
        if part is None:
            continue
        if base == "none":
            yield OptionError("the base 'none' trains nothing, so no plugin is ever called", path)
        if part.keeps_images and base in _ALL_IMAGES:
            yield OptionError(f"keeps images of earlier tasks, but the base {base!r} {_ALL_IMAGES[base]} already", path)
        if part.sequential and base == "joint":
            yield OptionError("works from one task to the next, but the base 'joint' trains once on all of them", path)
        if part.needs_reference and data.get("reference") is None:
            streams = [p.name for p in catalog().of_kind("stream") if p.name.endswith("-reference")]
            example = f", such as `reference: {streams[0]}`" if streams else ""
            yield OptionError(f"needs reference images; declare a stream of them in the recipe{example}", path)
    if base == "joint" and _mapping_at(data, ("train", "per_task")):
        yield OptionError("the base 'joint' trains all tasks at once, in one budget", ("train", "per_task"))


def _check_accumulate(data: dict[str, Any]) -> Iterator[OptionError]:
    """Plugins that need the whole batch at once, with a batch that passes in parts."""
    parts = get(data, ("train", "accumulate"))
    if type(parts) is not int or parts < 2:
        return
    size = get(data, ("train", "batch_size"))
    if type(size) is int and size < parts:
        message = f"{parts} parts of a batch, expected at most train.batch_size, which is {size}"
        yield OptionError(message, ("train", "accumulate"))
    for i, entry in enumerate(_list_at(data, _STACK)):
        name = next(iter(entry)) if isinstance(entry, dict) and len(entry) == 1 else ""
        part = catalog().parts.get(("plugin", name))
        if part is not None and not part.per_sample:
            why = "its loss is over the whole batch" if part.is_ours else "it does not declare `per_sample = True`"
            message = f"{why}, and train.accumulate passes it in {parts} parts; set train.accumulate to 1"
            yield OptionError(message, (*_STACK, i, name))


def _check_reference(data: dict[str, Any]) -> Iterator[OptionError]:
    """Reference data that shares tasks with the stream would show a method what it is to learn later."""
    stream, reference = (get(data, (key, "name")) for key in ("stream", "reference"))
    if stream is None or stream != reference:
        return
    tasks = [get(data, (key, "tasks")) for key in ("stream", "reference")]
    if all(isinstance(names, list) for names in tasks) and not {str(n) for n in tasks[0]} & {str(n) for n in tasks[1]}:
        return
    yield OptionError("expected a stream that shares no task with the one that is learned", ("reference", "name"))
