"""Everything that is wrong with a recipe: types, the parts it names (`parts.py`), and what only shows across values.

Data is plain, as read from YAML, and anything in it may be wrong: each check looks only at what it understands and leaves
the rest to the conversion to the schema's types.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mulki_plugins.errors import Location, OptionError, format_value
from mulki_plugins.recipe.layers import get
from mulki_plugins.recipe.parts import check_names, check_optimizer, check_part, check_plugins, repeated
from mulki_plugins.recipe.schema import Recipe, as_data, as_recipe
from mulki_plugins.recipe.tasks import check_held_out, check_selection, known_tasks, may_share_images, unknown_task
from mulki_plugins.registry.catalog import Kind
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.types import collect_mistakes

_PARTS: dict[str, Kind] = {"stream": "stream", "reference": "stream", "model": "model"}
"""The keys of a recipe that name one registered part, and its kind."""
_LISTS: tuple[tuple[Kind, Location], ...] = (("metric", ("evaluate", "metrics")), ("logger", ("loggers",)))
"""The lists of a recipe that name registered parts."""
_STACK = ("strategy", "plugins")
_OPTIMIZER = ("train", "optimizer")
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
            filled[key], problems = check_part(kind, value, (key,))
            wrong += problems
    optimizer, problems = check_optimizer(get(data, _OPTIMIZER), _OPTIMIZER)
    wrong += problems
    stack, problems = check_plugins(_list_at(data, _STACK), _STACK)
    wrong += problems
    for kind, path in _LISTS:
        wrong += check_names(kind, _list_at(data, path), path)
    for check in (
        _check_train,
        _check_tasks,
        check_held_out,
        _check_template,
        _check_metrics,
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
    whole["train"]["optimizer"] = optimizer
    _write_out_base(whole)
    return as_recipe(whole), []


def _write_out_base(whole: dict[str, Any]) -> None:
    """The base `none` with plugins or a head: each task passes them in turn, and the model's weights stay as they are."""
    if whole["strategy"]["base"] == "none" and (whole["strategy"]["plugins"] or "head" in whole["model"]):
        whole["strategy"]["base"] = "naive"
        whole["model"]["train"] = "none"


def _list_at(data: dict[str, Any], path: Location) -> list[Any]:
    value = get(data, path)
    return value if isinstance(value, list) else []


def _mapping_at(data: dict[str, Any], path: Location) -> dict[Any, Any]:
    value = get(data, path)
    return value if isinstance(value, dict) else {}


def _check_train(data: dict[str, Any]) -> Iterator[OptionError]:
    """Two budgets, and groups without a pattern."""
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
    for i, group in enumerate(_list_at(train, ("groups",))):
        if get(group, ("match",)) in ("", []):
            yield OptionError("expected a word or a pattern, got none", ("train", "groups", i, "match"))


def _check_tasks(data: dict[str, Any]) -> Iterator[OptionError]:
    """Names of tasks the stream does not have, if its tasks are known before it is built: fixed, or declared in the recipe."""
    stream = data.get("stream")
    part = catalog().parts.get(("stream", str(get(stream, ("name",)))))
    if part is None:
        return
    yield from check_selection(stream, ("stream",))
    known = part.tasks or known_tasks(stream)
    for name in _mapping_at(data, ("train", "per_task")):
        if isinstance(name, str) and known and name not in known:
            yield unknown_task(part.name, name, known, ("train", "per_task", name))


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
    for i, seed in repeated((i, s) for i, s in enumerate(_list_at(data, ("seeds",))) if type(s) is int):
        yield OptionError(f"the seed {seed} is given twice", ("seeds", i))


def _check_device(data: dict[str, Any]) -> Iterator[OptionError]:
    device = data.get("device", "auto")
    if isinstance(device, str) and not re.fullmatch(r"auto|cpu|mps|cuda(:(0|[1-9]\d?))?", device):
        yield OptionError(f"expected auto, cpu, cuda, cuda:N or mps, got {device!r}", ("device",))


def _check_cache(data: dict[str, Any]) -> Iterator[OptionError]:
    """A single word that names no folder is rather a mistyped auto or off."""
    cache = get(data, ("evaluate", "cache"))
    if not isinstance(cache, str) or cache in ("auto", "off"):
        return
    if cache.startswith("~") and os.path.expanduser(cache) == cache:
        yield OptionError(f"{cache}: this machine has no user of that name", ("evaluate", "cache"))
        return
    if re.search(r"[/\\]", cache):
        return
    if cache.strip() and Path(cache).is_dir():
        return
    hint = f"; write ./{cache} for a new folder of that name" if re.fullmatch(r"[\w.-]+", cache) else ""
    yield OptionError(f"expected auto, off or a folder, got {cache!r}{hint}", ("evaluate", "cache"))


def _check_metrics(data: dict[str, Any]) -> Iterator[OptionError]:
    """Metrics that mean something else among other candidate classes."""
    classes = get(data, ("evaluate", "classes")) or "task"
    for i, name in enumerate(_list_at(data, ("evaluate", "metrics"))):
        part = catalog().parts.get(("metric", str(name)))
        if part is not None and part.classes not in ("", classes):
            message = f"the metric {part.name!r} needs evaluate.classes: {part.classes}, got {format_value(classes)}"
            yield OptionError(message, ("evaluate", "metrics", i))


def is_template(template: str) -> bool:
    """Whether a text has `{}`, which the class name replaces, and no other braces."""
    return "{}" in template and not any(brace in template.replace("{}", "") for brace in "{}")


def _check_template(data: dict[str, Any]) -> Iterator[OptionError]:
    template = get(data, ("evaluate", "template"))
    if isinstance(template, str) and not is_template(template):
        expected = "expected '{}' in the class name's place, and no other braces, as in 'a photo of a {}.'"
        yield OptionError(f"{expected}, got {format_value(template)}", ("evaluate", "template"))


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
    stream, reference = data.get("stream"), data.get("reference")
    yield from check_selection(reference, ("reference",))
    if may_share_images(stream, reference):
        yield OptionError("expected a stream that shares no task with the one that is learned", ("reference", "name"))
