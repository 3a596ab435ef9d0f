"""A resolved recipe as YAML, with or without the origin of each value as a comment."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from mulki_plugins.characters import pad, printable, width
from mulki_plugins.errors import Location
from mulki_plugins.recipe.layers import leaves
from mulki_plugins.recipe.yaml import Tree, format_path, parse_value


class _Dumper(yaml.SafeDumper):
    """Writes what our reader reads: texts of YAML 1.2, and floats that any reader takes for floats."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: _Dumper, value: str) -> yaml.ScalarNode:
    try:
        unquoted = parse_value(value, "").value == value
    except Exception:  # no scalar without quotes
        unquoted = False
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if unquoted else '"')


def _represent_float(dumper: _Dumper, value: float) -> yaml.ScalarNode:
    text = repr(value)
    if "." not in text and "e" in text:
        text = text.replace("e", ".0e")
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(float, _represent_float)


def dump_yaml(value: Any) -> str:
    """Plain data as YAML."""
    return _dump(value, width=110, default_flow_style=None)


def dump_inline(value: Any) -> str:
    """Plain data as YAML on one line, as it can follow a key."""
    return _dump(value, width=10**9, default_flow_style=True).removesuffix("\n").removesuffix("\n...")


def _dump(value: Any, **style: Any) -> str:
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, **style)
    return text


def dump_annotated(tree: Tree) -> str:
    """The recipe, one value per line, each with its origin as a comment."""
    lines = list(_lines(tree, tree.value, (), 0))
    columns = min(64, max((width(text) for text, _ in lines), default=0))
    return "".join(
        f"{pad(text, columns)}  # {printable(origin)}\n" if origin else f"{text}\n" for text, origin in lines
    )


def _lines(tree: Tree, value: dict[str, Any], path: Location, indent: int) -> Iterator[tuple[str, str]]:
    for key, item in value.items():
        here = (*path, key)
        label = f"{'  ' * indent}{dump_inline(key)}:"
        if here == ("strategy", "plugins") and item:
            yield label, ""
            for i, entry in enumerate(item):
                [(name, options)] = entry.items()
                at = (*here, i, name)
                if options:
                    yield f"{'  ' * indent}- {dump_inline(name)}:", str(tree.origin(at))
                    yield from _lines(tree, options, at, indent + 2)
                else:
                    yield f"{'  ' * indent}- {dump_inline(name)}: {{}}", str(tree.origin(at))
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
            yield f"{label} {dump_inline(item)}", _origin(tree, here)


def _origin(tree: Tree, path: Location) -> str:
    """Where a value was written; a value that was not written counts as default, even inside a mapping that was."""
    return str(tree.origins.get(path, "default"))


def list_origins(tree: Tree) -> dict[str, str]:
    """`$.train.iterations` -> `recipes/mtil.yaml:12`, for every value that is not a mapping."""
    return {format_path(path): _origin(tree, path) for path, _ in leaves(tree.value)}
