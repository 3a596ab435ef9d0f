"""What is wrong with the parts that a recipe names: unknown names, their options, and the order of the stack."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from mulki_plugins.errors import MAX_REPORTED, Location, MulkiError, OptionError, did_you_mean, format_value
from mulki_plugins.recipe.schema import OF_EVERY_OPTIMIZER, is_yaml_value
from mulki_plugins.registry.builtin import open_clip_models, open_clip_part
from mulki_plugins.registry.callbacks import callback_mistakes
from mulki_plugins.registry.catalog import Kind, Part, signature_of, takes_decay
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.registry.static import REQUIRED, UNKNOWN
from mulki_plugins.types import collect_mistakes, convert

TRAIN = ("all", "image", "text", "adapters", "none")
"""What of a model learns: both towers, one of them, only what adapters add, or nothing."""

DEFAULT_HEAD = "text"
"""The head of a model whose recipe names none."""


def check_part(kind: Kind, value: dict[str, Any], path: Location) -> tuple[dict[str, Any], list[OptionError]]:
    """A stream or model by name, with its options filled in; a model may also be an architecture of open_clip."""
    name = value["name"]
    options = {key: option for key, option in value.items() if key != "name"}
    part: Part | None = catalog().parts.get((kind, name))
    if kind == "model":
        towers, adapters = options.pop("train", "all"), options.pop("adapters", [])
        head = options.pop("head", None)
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
        chosen, more = _check_head(head, (*path, "head"))
        own = {"train": towers, **({"adapters": filled} if filled else {}), **({"head": chosen} if chosen else {})}
        result = {**own, **result}
        wrong += problems + more
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


def _check_head(value: Any, path: Location) -> tuple[dict[str, Any], list[OptionError]]:
    """A model's head as {name: options} with all options filled in, and everything that is wrong; {} for the default."""
    if value is None:
        return {}, []
    [(name, options)] = value.items() if isinstance(value, dict) and len(value) == 1 else [(value, None)]
    if not isinstance(name, str) or not isinstance(options or {}, dict):
        return {}, [OptionError(f"expected a head as `name` or `name: {{options}}`, got {format_value(value)}", path)]
    here = (*path, name) if isinstance(value, dict) else path
    try:
        part = catalog().find("head", name)
    except MulkiError as error:
        return {}, [OptionError(error.message, here)]
    result, problems = check_options(part, options or {}, here)
    return ({} if name == DEFAULT_HEAD else {name: result}), problems


_ONCE_OF_ALL = ("betas", "momentum")
"""Options that recipes of earlier versions hold for every optimizer, as null."""


def check_optimizer(value: Any, path: Location) -> tuple[dict[str, Any], list[OptionError]]:
    """An optimizer with its options filled in, and everything that is wrong with its name and its own options."""
    name = value.get("name", "adamw") if isinstance(value, dict) else None
    if not isinstance(name, str):
        return {}, []  # reported by the schema
    try:
        part = catalog().find("optimizer", name)
        known, decays = signature_of(part), takes_decay(part)
    except MulkiError as error:
        return value, [OptionError(error.lines()[0], (*path, "name"))]
    common = {"name": name} | {key: item for key, item in value.items() if key in OF_EVERY_OPTIMIZER}
    own, wrong = {}, []
    for key, item in value.items():
        others = [] if known.open or key in (*common, *known.options) else _optimizers_with(key)
        if item is None and key in _ONCE_OF_ALL and others:
            continue
        if others:
            message = f"the optimizer {name!r} has no option {key!r}; {', '.join(others)} have it"
            wrong.append(
                OptionError(f"{message.removesuffix('have it')}has it" if len(others) == 1 else message, (*path, key))
            )
        elif key not in common:
            own[key] = item
    result, problems = check_options(part, own, path)
    wrong += problems
    if not decays and value.get("weight_decay"):
        wrong.append(OptionError(f"the optimizer {name!r} has no weight decay", (*path, "weight_decay")))
    return {**common, **result}, wrong


def _optimizers_with(option: str) -> list[str]:
    names = []
    for part in catalog().of_kind("optimizer"):
        with contextlib.suppress(MulkiError):  # a part whose source cannot be read
            names += [part.name] if option in signature_of(part).options else []
    return names


def check_options(part: Part, options: dict[str, Any], path: Location) -> tuple[dict[str, Any], list[OptionError]]:
    """The options of a part, converted and with defaults filled in, and everything that is wrong with them."""
    try:
        signature = signature_of(part)
    except MulkiError as error:
        return options, [OptionError(f"the {part.kind} of {part.provenance}: {error.lines()[0]}", path)]
    wrong: list[OptionError] = []
    result: dict[str, Any] = {}
    for name, option in signature.options.items():
        default = part.defaults.get(name, option.default)
        if name in part.defaults or (default not in (REQUIRED, UNKNOWN) and is_yaml_value(default)):
            result[name] = list(default) if isinstance(default, tuple) else default  # as YAML reads it
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


def check_names(kind: Kind, names: list[Any], path: Location) -> Iterator[OptionError]:
    texts = [(i, name) for i, name in enumerate(names) if isinstance(name, str)]
    for i, name in texts[:MAX_REPORTED]:
        try:
            catalog().find(kind, name)
        except MulkiError as error:
            yield OptionError(error.message, (*path, i))
    for i, name in repeated(texts):
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
    for i, name in repeated(enumerate(names)):
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


def repeated(items: Iterable[tuple[int, Any]]) -> list[tuple[int, Any]]:
    """The numbered items whose value occurred before."""
    seen: set[str] = set()
    again = []
    for i, item in items:
        if repr(item) in seen:
            again.append((i, item))
        seen.add(repr(item))
    return again
