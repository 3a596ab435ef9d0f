"""Layers of values: a tree laid over another, and single values set by their path; each keeps its origin."""

from __future__ import annotations

import re
import shlex
from typing import Any

from mulki_plugins.characters import name_lookalikes, simplify
from mulki_plugins.errors import Mistakes
from mulki_plugins.recipe.yaml import Origin, Tree, format_path, locate, parse_value
from mulki_plugins.types import Path

EITHER = {("train", "iterations"): ("train", "epochs"), ("train", "epochs"): ("train", "iterations")}
"""Values of which a layer's own replaces the other one of the layers below."""


def overlay(lower: Tree, upper: Tree) -> Tree:
    """Mappings are merged, everything else is replaced by the upper layer's."""
    result = Tree(_copied(lower.value), dict(lower.origins))
    _lay(result, upper, (), upper.value)
    result.origins.update(upper.origins)
    return result


def _lay(into: Tree, upper: Tree, path: Path, value: Any) -> None:
    if isinstance(value, dict) and isinstance(get(into.value, path), dict):
        for key, item in value.items():
            _lay(into, upper, (*path, key), item)
        return
    other = EITHER.get(path)  # type: ignore[arg-type]
    if other and get(upper.value, other) is None and get(into.value, other) is not None:
        remove(into, other)
    put(into, path, _copied(value), upper.origin(path))


def get(value: Any, path: Path) -> Any:
    """The value at a path; None where there is none."""
    for part in path:
        inside = part in value if isinstance(value, dict) else isinstance(value, list) and _indexes(part, value)
        if inside:
            value = value[part]
        else:
            return None
    return value


def _indexes(part: str | int, value: list[Any]) -> bool:
    return isinstance(part, int) and part < len(value)


def put(tree: Tree, path: Path, value: Any, origin: Origin) -> None:
    """Set the value at a path, with the mappings that lead to it."""
    if isinstance(get(tree.value, path), (dict, list)):
        for inner in [p for p in tree.origins if p[: len(path)] == path]:
            del tree.origins[inner]
    tree.origins[path] = origin
    if not path:
        tree.value = value
        return
    at = tree.value
    for i, part in enumerate(path[:-1]):
        step = get(at, (part,))
        if not isinstance(step, (dict, list)):
            step = at[part] = {}
            tree.origins[path[: i + 1]] = origin
        at = step
    at[path[-1]] = value


def remove(tree: Tree, path: Path) -> None:
    at = get(tree.value, path[:-1])
    del at[path[-1]]
    for inner in [p for p in tree.origins if p[: len(path)] == path]:
        del tree.origins[inner]


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def set_value(tree: Tree, assignment: str) -> None:
    """Apply one `--set key.path=value`; the value is YAML. Raises Mistakes.

    A path is written as in an error, with or without `$.`: `strategy.plugins[1].adding.weight`. In a stack a plugin's
    name stands for its entry: `strategy.plugins.adding.weight`, or shorter `strategy.adding.weight`.
    """
    origin = Origin(f"--set {assignment}")
    written, equals, text = assignment.partition("=")
    parts = _parts(written.strip().removeprefix("$").removeprefix("."))
    if not equals or not parts:
        raise Mistakes([locate(origin, (), _not_a_setting(written, equals))])
    path, problem = _followed(tree.value, parts)
    if problem:
        raise Mistakes([locate(origin, path, problem)])
    value = value_of(text, origin, path)
    other = EITHER.get(path)  # type: ignore[arg-type]
    if other and value is not None and get(tree.value, other) is not None:
        remove(tree, other)
    put(tree, path, value, origin)


def _not_a_setting(written: str, equals: str) -> str:
    """Why a `--set` is none, with what was probably meant."""
    what = "expected key.path=value, such as train.iterations=50"
    meant = re.fullmatch(r"\s*([^=:]*[^=:\s])\s*[=:]\s*(\S.*)", simplify(written))
    if not equals and meant and _parts(meant[1]):
        return f"{what}; type --set {shlex.quote(f'{meant[1]}={meant[2]}')}"
    odd = name_lookalikes(written)
    return f"{what}; it holds {odd}" if odd else what


def value_of(text: str, origin: Origin, path: Path) -> Any:
    """The YAML value of a `--set`. Raises Mistakes, which name the option."""
    if not text.strip():
        key = format_path(path).removeprefix("$.")
        what = "expected a value behind the ="
        raise Mistakes([locate(origin, path, f"{what}; type {key}=null for none, \"{key}=''\" for an empty text")])
    try:
        text.encode()
        return parse_value(text, "").value
    except UnicodeEncodeError:
        raise Mistakes([locate(origin, path, "this is no UTF-8 text")]) from None
    except Mistakes as mistakes:
        said = [line.split(": ", 2)[-1] for line in mistakes.lines()]
        advice = f"; with spaces in it, put all of it in quotes: --set '{_example(origin)}'" if _cut(text) else ""
        raise Mistakes([locate(origin, path, message + advice) for message in said]) from None


def _cut(text: str) -> bool:
    """Whether a list or a mapping ends too early, as where a shell has split it at a space."""
    return any(text.count(opening) > text.count(closing) for opening, closing in ("[]", "{}"))


def _example(origin: Origin) -> str:
    key = origin.source.removeprefix("--set ").partition("=")[0]
    return f"{key}=[a, b]"


def _parts(written: str) -> list[str | int]:
    """`a.b[1].c` in parts; an empty list where it is not of that form."""
    if not re.fullmatch(r"[^.\[\]]+(\.[^.\[\]]+|\[[0-9]{1,6}\])*", written):
        return []
    return [int(i) if i else name for name, i in re.findall(r"([^.\[\]]+)|\[([0-9]+)\]", written) if name or i]


def _followed(value: Any, parts: list[str | int]) -> tuple[Path, str]:
    """The path that the parts lead to, and what is wrong with it, if anything."""
    if parts[0] == "strategy" and len(parts) > 1 and parts[1] not in ("name", "base", "plugins"):
        parts = ["strategy", "plugins", *parts[1:]]
    path: list[str | int] = []
    rest = list(parts)
    while rest:
        part, at = rest.pop(0), get(value, tuple(path))
        if isinstance(at, list):
            index, used = _place(at, part, rest)
            if index is None:
                names = ", ".join(str(next(iter(e))) for e in at if isinstance(e, dict) and e)
                among = f" among {names}" if names else ""
                such = "; an option is written strategy.PLUGIN.OPTION" if names and not rest else ""
                return tuple(path), f"there is no entry {part!r}{among}{such}"
            path.append(index)
            if used:
                path.append(used)
                del rest[: used.count(".")]
        elif isinstance(part, int) and not isinstance(at, dict):
            return tuple(path), f"this is no list, so that it has no entry [{part}]"
        else:
            path.append(part if isinstance(at, dict) and not isinstance(part, int) else str(part))
    return tuple(path), ""


def _place(entries: list[Any], part: str | int, rest: list[str | int]) -> tuple[int | None, str]:
    """Which entry of a list is meant: by number, or a stack's by its plugin's name (which may have dots)."""
    if isinstance(part, int) or re.fullmatch("[0-9]{1,6}", part):
        return (int(part), "") if int(part) < len(entries) else (None, "")
    for length in range(len(rest), -1, -1):
        name = ".".join([part, *map(str, rest[:length])])
        for i, entry in enumerate(entries):
            if isinstance(entry, dict) and name in entry:
                return i, name
    return None, ""
