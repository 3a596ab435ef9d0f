"""Layers of values: one tree laid over another, and single values set by their path. Each value keeps its origin."""

from __future__ import annotations

import copy
import re
import shlex
from collections.abc import Iterator
from typing import Any

from mulki_plugins.characters import name_lookalikes, simplify
from mulki_plugins.errors import Location, Mistakes
from mulki_plugins.recipe.yaml import Origin, Tree, format_path, locate, parse_value

EXCLUSIVE: dict[Location, Location] = {
    ("train", "iterations"): ("train", "epochs"),
    ("train", "epochs"): ("train", "iterations"),
}
"""Mutually exclusive keys: setting one in a layer removes the other from the layers below."""


HEAD: Location = ("model", "head")
"""The one part that is chosen as `{name: {options}}`."""


def overlay(lower: Tree, upper: Tree) -> Tree:
    """Both trees as one: mappings are merged, everything else is replaced by the upper layer's value."""
    result = Tree(copy.deepcopy(lower.value), dict(lower.origins))
    _lay(result, upper, (), upper.value)
    result.origins.update(upper.origins)
    return result


def _lay(into: Tree, upper: Tree, path: Location, value: Any) -> None:
    if (
        isinstance(value, dict)
        and isinstance(below := get(into.value, path), dict)
        and not _another(path, value, below)
    ):
        for key, item in value.items():
            _lay(into, upper, (*path, key), item)
        return
    other = EXCLUSIVE.get(path)
    if other and value is not None and get(upper.value, other) is None and get(into.value, other) is not None:
        remove(into, other)
    put(into, path, copy.deepcopy(value), upper.origin(path))


def _another(path: Location, value: dict[str, Any], below: dict[str, Any]) -> bool:
    """Whether the layers choose different heads: the upper one then replaces the lower one, with its options."""
    return path == HEAD and value.keys() != below.keys()


def get(value: Any, path: Location) -> Any:
    """The value at a path; None if there is none."""
    for part in path:
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
        else:
            return None
    return value


def put(tree: Tree, path: Location, value: Any, origin: Origin) -> None:
    """Set the value at a path, creating the mappings that lead to it."""
    if isinstance(get(tree.value, path), (dict, list)):
        _forget_origins(tree, path)
    tree.origins[path] = origin
    if not path:
        tree.value = value
        return
    at = tree.value
    for i, part in enumerate(path[:-1]):
        inner = get(at, (part,))
        if not isinstance(inner, (dict, list)):
            inner = at[part] = {}
            tree.origins[path[: i + 1]] = origin
        at = inner
    at[path[-1]] = value


def remove(tree: Tree, path: Location) -> None:
    """Remove the value at a path, which must exist."""
    del get(tree.value, path[:-1])[path[-1]]
    _forget_origins(tree, path)


def _forget_origins(tree: Tree, path: Location) -> None:
    for inner in [p for p in tree.origins if p[: len(path)] == path]:
        del tree.origins[inner]


def leaves(value: Any, path: Location = ()) -> Iterator[tuple[Location, Any]]:
    """The path and value of everything that is neither a mapping nor a list of mappings."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for i, item in enumerate(value):
            yield from leaves(item, (*path, i))
    else:
        yield path, value


def write_out_short_forms(tree: Tree) -> None:
    """Expand a recipe's short forms: `stream: name`, `model: name`, `optimizer: name`, `- adapter`, `- plugin`."""
    for path in (("stream",), ("reference",), ("model",), ("train", "optimizer"), ("train", "schedule")):
        if isinstance(name := get(tree.value, path), str):
            origin = tree.origin(path)
            put(tree, path, {}, origin)
            put(tree, (*path, "name"), name, origin)
    write_out_head(tree)
    write_out_plugins(tree, ("model", "adapters"))
    write_out_plugins(tree, ("strategy", "plugins"))


def write_out_head(tree: Tree, path: Location = HEAD) -> None:
    """Expand the short form of a head: `name` becomes `name: {}`."""
    head = get(tree.value, path)
    if isinstance(head, str):
        origin = tree.origin(path)
        put(tree, path, {}, origin)
        put(tree, (*path, head), {}, origin)
    elif isinstance(head, dict) and list(head.values()) == [None]:
        head[next(iter(head))] = {}


def write_out_plugins(tree: Tree, path: Location) -> None:
    """Expand the short form of a list's entries: `- name` becomes `- name: {}`."""
    plugins = get(tree.value, path)
    for i, entry in enumerate(plugins if isinstance(plugins, list) else ()):
        if isinstance(entry, str):
            put(tree, (*path, i), {entry: {}}, tree.origin((*path, i)))
        elif isinstance(entry, dict) and list(entry.values()) == [None]:
            entry[next(iter(entry))] = {}


def set_value(tree: Tree, assignment: str) -> None:
    """Apply one `--set key.path=value`; the value is YAML. Raises Mistakes.

    The path is written as in an error, with or without `$.`: `strategy.plugins[1].adding.weight`. A plugin's name may
    stand for its entry in the stack: `strategy.plugins.adding.weight`, or shorter `strategy.adding.weight`.
    """
    origin = Origin(f"--set {assignment}")
    key, equals, text = assignment.partition("=")
    parts = _split(key.strip().removeprefix("$").removeprefix("."))
    if not equals or not parts:
        raise Mistakes([locate(origin, (), _explain_no_assignment(key, equals))])
    path, problem = _resolve_path(tree.value, parts)
    if problem:
        raise Mistakes([locate(origin, path, problem)])
    value = parse_setting(text, origin, path)
    _write_out_nested_stream(tree, path)
    other = EXCLUSIVE.get(path)
    if other and value is not None and get(tree.value, other) is not None:
        remove(tree, other)
    put(tree, path, value, origin)


def _write_out_nested_stream(tree: Tree, path: Location) -> None:
    """Expand the names in `of` that the path leads through: `of: [birds]` becomes `of: [{name: birds}]`."""
    for end in range(2, len(path)):
        stream = get(tree.value, path[:end])
        if path[0] in ("stream", "reference") and "of" in path[end - 2 : end] and isinstance(stream, str):
            put(tree, path[:end], {"name": stream}, tree.origin(path[:end]))


def _explain_no_assignment(key: str, equals: str) -> str:
    what = "expected key.path=value, such as train.iterations=50"
    meant = re.fullmatch(r"\s*([^=:]*[^=:\s])\s*[=:]\s*(\S.*)", simplify(key))
    if not equals and meant and _split(meant[1]):
        return f"{what}; type --set {shlex.quote(f'{meant[1]}={meant[2]}')}"
    odd = name_lookalikes(key)
    return f"{what}; it contains {odd}" if odd else what


def parse_setting(text: str, origin: Origin, path: Location) -> Any:
    """The YAML value of a `--set`, or of a `--task` of extend. Raises Mistakes that name the option."""
    if not text.strip():
        key = format_path(path).removeprefix("$.")
        message = f"expected a value after the =; type {key}=null for none, \"{key}=''\" for an empty text"
        raise Mistakes([locate(origin, path, message)])
    try:
        text.encode()
        return parse_value(text, "").value
    except UnicodeEncodeError:
        raise Mistakes([locate(origin, path, "this is no UTF-8 text")]) from None
    except Mistakes as mistakes:
        messages = [line.split(": ", 2)[-1] for line in mistakes.lines()]
        advice = ""
        if any(text.count(opening) > text.count(closing) for opening, closing in ("[]", "{}")):  # the shell split it
            option, _, assignment = origin.source.partition(" ")
            example = f"{assignment.partition('=')[0]}=[a, b]" if assignment else "{name: birds, images: DIR}"
            advice = f"; put a value with spaces in quotes: {option} '{example}'"
        raise Mistakes([locate(origin, path, message + advice) for message in messages]) from None


def _split(key: str) -> list[str | int]:
    """`a.b[1].c` in parts; an empty list if it does not have this form."""
    if not re.fullmatch(r"[^.\[\]]+(\.[^.\[\]]+|\[[0-9]{1,6}\])*", key):
        return []
    return [int(i) if i else name for name, i in re.findall(r"([^.\[\]]+)|\[([0-9]+)\]", key) if name or i]


def _resolve_path(value: Any, parts: list[str | int]) -> tuple[Location, str]:
    """The path that the parts of a key lead to, and what is wrong with it, if anything."""
    if parts[0] == "strategy" and len(parts) > 1 and parts[1] not in ("name", "base", "plugins"):
        parts = ["strategy", "plugins", *parts[1:]]
    path: list[str | int] = []
    rest = list(parts)
    while rest:
        part, at = rest.pop(0), get(value, tuple(path))
        if isinstance(at, list):
            index, name = _find_entry(at, part, rest)
            if index is None:
                names = ", ".join(str(e.get("name", next(iter(e)))) for e in at if isinstance(e, dict) and e)
                among = f" among {names}" if names else ""
                of = "strategy.PLUGIN" if path[0] == "strategy" else f"{format_path(tuple(path))[2:]}.NAME"
                form = f"; write an option as {of}.OPTION" if names and not rest else ""
                return tuple(path), f"there is no entry {part!r}{among}{form}"
            path.append(index)
            if name:
                path.append(name)
                del rest[: name.count(".")]
        elif isinstance(part, int) and not isinstance(at, dict):
            return tuple(path), f"this is not a list, so it has no entry [{part}]"
        else:
            path.append(part if isinstance(at, dict) and not isinstance(part, int) else str(part))
    return tuple(path), ""


def _find_entry(entries: list[Any], part: str | int, rest: list[str | int]) -> tuple[int | None, str]:
    """The index of a list's entry, by number or by its plugin's name (which may contain dots), and that name.

    An entry that calls itself by a `name` of this value is found too, then without one.
    """
    if isinstance(part, int) or re.fullmatch("[0-9]{1,6}", part):
        return (int(part), "") if int(part) < len(entries) else (None, "")
    for length in range(len(rest), -1, -1):
        name = ".".join([part, *map(str, rest[:length])])
        for i, entry in enumerate(entries):
            if isinstance(entry, dict) and name in entry and "name" not in entry:
                return i, name
    for i, entry in enumerate(entries):
        if isinstance(entry, dict) and entry.get("name") == part:
            return i, ""
    return None, ""
