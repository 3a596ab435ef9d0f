"""Checks a stack of plugins before any data loads: names, options, requirements, conflicts and order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from mulki_plugins.errors import MulkiError, OptionError, did_you_mean
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.registry.methods import callback_mistakes
from mulki_plugins.registry.parts import Part
from mulki_plugins.registry.signature import REQUIRED, UNKNOWN, Signature, signature_of
from mulki_plugins.types import Path, collect_mistakes, convert


def check_options(part: Part, options: dict[str, Any], path: Path) -> tuple[dict[str, Any], list[OptionError]]:
    """The options with their types applied and the defaults filled in, and everything that is wrong with them."""
    try:
        signature = signature_of(part)
    except MulkiError as error:
        return options, [OptionError(f"the {part.kind} of {part.provenance}: {error.lines()[0]}", path)]
    wrong: list[OptionError] = []
    result = dict(_defaults(part, signature))
    for name, value in options.items():
        option = signature.options.get(name)
        if option is None:
            result[name] = value
            if not signature.open:
                hint = did_you_mean(name, signature.options)
                wrong.append(
                    OptionError(f"unknown option ({hint})" if hint else "unknown option; there is none", (*path, name))
                )
            continue
        try:
            result[name] = _plain(convert(value, option.kind))
        except Exception as error:
            wrong += collect_mistakes(error, (*path, name))
    for name, option in signature.options.items():
        if option.default is REQUIRED and name not in result:
            wrong.append(OptionError("missing; it has no default", (*path, name)))
    if not wrong:
        try:
            wrong += [error.below(path) for error in part.problems(result)]
        except MulkiError as error:
            wrong.append(OptionError(error.lines()[0], path))
    return result, wrong


def _defaults(part: Part, signature: Signature) -> Iterator[tuple[str, Any]]:
    for name, option in signature.options.items():
        if name in part.defaults:
            yield name, part.defaults[name]
        elif option.default not in (REQUIRED, UNKNOWN) and is_plain(option.default):
            yield name, option.default


def is_plain(value: Any) -> bool:
    """Whether a YAML file can hold it."""
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(item) for key, item in value.items())
    return value is None or isinstance(value, (bool, int, float, str))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def check_plugins(plugins: list[Any], path: Path) -> tuple[list[Any], list[OptionError]]:
    """A stack as plain data with all options filled in, and everything that is wrong with it; `path` leads to it."""
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
        wrong += [
            OptionError(f"the plugin of {part.provenance}: {mistake}", here) for mistake in callback_mistakes(part)
        ]
    return stack, wrong + _check_order(names, path)


def _check_order(names: list[str], path: Path) -> list[OptionError]:
    """What keeps these plugins, in this order, from working together. Unknown names are not reported here."""
    parts = {name: catalog().parts.get(("plugin", name)) for name in names}
    first = {name: i for i, name in reversed(list(enumerate(names)))}
    wrong = [
        OptionError("stands in the stack twice", (*path, i, name)) for i, name in repeated(enumerate(names)) if name
    ]
    for i, name in enumerate(names):
        here = (*path, i, name)
        part = parts[name]
        if part is None or first[name] < i:
            continue
        for other in part.requires:
            if other not in first:
                wrong.append(OptionError(f"needs the plugin {other!r}; add `- {other}` before it", here))
        for other in dict.fromkeys((*part.requires, *part.after)):
            if first.get(other, -1) > i:
                wrong.append(OptionError(f"must come after {other!r}", here))
        for other in part.conflicts:
            if other in first:
                wrong.append(OptionError(f"does not work together with {other!r}", here))
    return wrong


def repeated(items: Iterable[tuple[int, Any]]) -> list[tuple[int, Any]]:
    """The numbered items whose value stood there before."""
    seen: set[str] = set()
    again = []
    for i, item in items:
        if repr(item) in seen:
            again.append((i, item))
        seen.add(repr(item))
    return again
