"""A resolved recipe as YAML, with or without the origin of each value as a comment."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from mulki_plugins.characters import pad, printable, width
from mulki_plugins.recipe.yaml import Tree, format_path
from mulki_plugins.types import Path


class _Dumper(yaml.SafeDumper):
    """Writes what our reader reads: words of YAML 1.2, numbers that stay numbers."""


def _text(dumper: _Dumper, value: str) -> yaml.ScalarNode:
    from mulki_plugins.recipe.yaml import parse_value

    try:
        printable = parse_value(value, "").value == value
    except Exception:  # not a scalar on its own
        printable = False
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if printable else '"')


def _number(dumper: _Dumper, value: float) -> yaml.ScalarNode:
    text = repr(value)
    if "." not in text and "e" in text:
        text = text.replace("e", ".0e")
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


_Dumper.add_representer(str, _text)
_Dumper.add_representer(float, _number)
_Dumper.ignore_aliases = lambda self, data: True  # type: ignore[method-assign,assignment,misc]


def plain_yaml(value: Any) -> str:
    """Plain data as YAML."""
    text: str = yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110, default_flow_style=None
    )
    return text


def annotated_yaml(tree: Tree) -> str:
    """The recipe, a value a line, each followed by `# where it comes from`."""
    lines = list(_lines(tree, tree.value, (), 0))
    columns = min(64, max((width(text) for text, _ in lines), default=0))
    return "".join(
        f"{pad(text, columns)}  # {printable(origin)}\n" if origin else f"{text}\n" for text, origin in lines
    )


def _lines(tree: Tree, value: dict[str, Any], path: Path, indent: int) -> Iterator[tuple[str, str]]:
    for key, item in value.items():
        here = (*path, key)
        label = f"{'  ' * indent}{flow_yaml(key)}:"
        if here == ("strategy", "plugins") and item:
            yield label, ""
            for i, entry in enumerate(item):
                [(name, options)] = entry.items()
                at = (*here, i, name)
                if options:
                    yield f"{'  ' * indent}- {flow_yaml(name)}:", str(tree.origin(at))
                    yield from _lines(tree, options, at, indent + 2)
                else:
                    yield f"{'  ' * indent}- {flow_yaml(name)}: {{}}", str(tree.origin(at))
        elif isinstance(item, dict) and item:
            yield label, ""
            yield from _lines(tree, item, here, indent + 1)
        elif isinstance(item, list) and item and all(isinstance(entry, dict) and entry for entry in item):
            yield label, ""
            for i, entry in enumerate(item):
                inner = _lines(tree, entry, (*here, i), indent + 1)
                for n, (text, origin) in enumerate(inner):
                    yield (f"{'  ' * indent}- {text.lstrip()}" if n == 0 else text), origin
        else:
            yield f"{label} {flow_yaml(item)}", _origin(tree, here)


def _origin(tree: Tree, path: Path) -> str:
    """Where a value was written; what nobody wrote has its default, even where something around it was written."""
    return str(tree.origins.get(path, "default"))


def flow_yaml(value: Any) -> str:
    """Plain data as YAML on one line, as it may stand behind a key."""
    text: str = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=10**9, sort_keys=False
    )
    return text.removesuffix("\n").removesuffix("\n...")


def origins_by_path(tree: Tree) -> dict[str, str]:
    """`$.train.iterations` -> `recipes/mtil.yaml:12`, for every value that is no mapping."""
    return {format_path(path): _origin(tree, path) for path in _leaves(tree.value, ())}


def _leaves(value: Any, path: Path) -> Iterator[Path]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for i, item in enumerate(value):
            yield from _leaves(item, (*path, i))
    else:
        yield path
