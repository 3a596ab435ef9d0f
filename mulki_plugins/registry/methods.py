"""The callbacks of a registered plugin, read without importing it, and what is wrong with them."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator

from mulki_plugins.errors import MulkiError
from mulki_plugins.registry.callbacks import Method, looks_like_callback, methods_of, wrong_callbacks
from mulki_plugins.registry.parts import Part
from mulki_plugins.registry.syntax import Definition, Function, class_named, definition, lineage, place
from mulki_plugins.registry.unfit import unfit

_OTHER = {"staticmethod", "classmethod", "property", "cached_property", "functools.cached_property"}
_AVALANCHE = "avalanche"


def callback_mistakes(part: Part) -> list[str]:
    """A line for each callback of a plugin that Avalanche would ignore or could not call, and for what it cannot do.

    Of a function, the classes that it returns by name are looked at; what it makes otherwise shows when it is made.
    """
    if not isinstance(part.target, str):
        return list(wrong_callbacks(methods_of(part.target))) if inspect.isclass(part.target) else []
    module, _, attribute = part.target.partition(":")
    try:
        found = definition(module, attribute)
    except MulkiError:
        return []  # reported with the signature
    wrong: list[str] = []
    for kind in [found] if isinstance(found.node, ast.ClassDef) else _returned(found):
        classes = list(lineage(kind))
        wrong += wrong_callbacks(_methods(classes))
        if reason := unfit({c.node.name for c in classes if c.module.split(".")[0] == _AVALANCHE}):
            wrong.append(reason)
    return wrong


def _returned(found: Definition) -> list[Definition]:
    calls = [
        node.value.func
        for node in ast.walk(found.node)
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Call)
    ]
    kinds = (class_named(call, found.module) for call in calls if isinstance(call, (ast.Name, ast.Attribute)))
    return [kind for kind in kinds if kind is not None]


def _methods(classes: list[Definition]) -> Iterator[Method]:
    seen = set()
    for kind in classes:
        if kind.module.split(".")[0] == _AVALANCHE:
            continue
        for node in reversed(kind.node.body):  # of two with one name the last counts
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and looks_like_callback(node.name):
                decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
                if node.name not in seen and not decorators & _OTHER:
                    yield _method(node, place(kind.module, node))
                seen.add(node.name)


def _method(node: Function, where: str) -> Method:
    arguments = node.args
    by_position = [*arguments.posonlyargs, *arguments.args]
    without_default = by_position[: len(by_position) - len(arguments.defaults)][2:]
    keyword_only = [
        a for a, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if default is None
    ]
    return Method(
        name=node.name,
        place=where,
        positional=len(by_position),
        open_positional=arguments.vararg is not None,
        open_keywords=arguments.kwarg is not None,
        required=tuple(a.arg for a in (*without_default, *keyword_only)),
        coroutine=isinstance(node, ast.AsyncFunctionDef),
    )
