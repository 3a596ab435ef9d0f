"""What options a part takes, read from its source without importing it.

`mulki validate` must know the keyword arguments of every plugin and may not import torch, so the parameters of a target
given as `module:attribute` are read from the syntax tree of its module. A target given as an object is inspected.
"""

from __future__ import annotations

import ast
import functools
import inspect
from typing import Any, Literal, Union

from attrs import evolve, frozen

from mulki_plugins.errors import MulkiError
from mulki_plugins.registry.parts import Part
from mulki_plugins.registry.syntax import Definition, definition, imports, lineage, parsed, statements
from mulki_plugins.types import OPTION_TYPES, read_hints

REQUIRED = inspect.Parameter.empty


@frozen(kw_only=True)
class Option:
    """One keyword argument. `default` is REQUIRED where there is none, and UNKNOWN where it is not a literal."""

    name: str
    kind: Any = Any
    default: Any = REQUIRED


class _Unknown:
    def __repr__(self) -> str:
        return "as the code says"


UNKNOWN = _Unknown()


@frozen(kw_only=True)
class Signature:
    """The options of a part; `open` where it takes others too (`**kwargs`)."""

    options: dict[str, Option]
    open: bool = False


def signature_of(part: Part) -> Signature:
    """The options that a recipe may give to this part. MulkiError where its module cannot be found or read."""
    if isinstance(part.target, str):
        module, _, attribute = part.target.partition(":")
        signature = _read(module, attribute)
    else:
        signature = _inspected(part.target)
    known = {
        name: evolve(option, kind=part.kinds.get(name, option.kind))
        for name, option in signature.options.items()
        if not (part.needs_reference and name == "reference")  # which the recipe declares, once for all plugins
    }
    return evolve(signature, options=known)


def _inspected(target: Any) -> Signature:
    function = target.__init__ if inspect.isclass(target) else target
    hints = read_hints(function)
    options, is_open = {}, False
    for name, parameter in list(inspect.signature(function).parameters.items())[1 if inspect.isclass(target) else 0 :]:
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            is_open = True
        elif parameter.kind is not inspect.Parameter.VAR_POSITIONAL:
            options[name] = Option(name=name, kind=hints.get(name, Any), default=parameter.default)
    return Signature(options=options, open=is_open)


@functools.cache
def _read(module: str, attribute: str) -> Signature:
    found = definition(module, attribute)
    if not isinstance(found.node, ast.ClassDef):
        return _signature(found.node.args, found.module)
    for kind in lineage(found):
        assert isinstance(kind.node, ast.ClassDef)
        for item in kind.node.body:
            if isinstance(item, ast.FunctionDef) and item.name == "__init__":
                return _signature(item.args, kind.module, bound=True)
        if _has_fields(kind.node):
            return Signature(options=_fields(found))
    return Signature(options={})


def _has_fields(node: ast.ClassDef) -> bool:
    """Whether a class has its `__init__` from its annotated fields, by dataclasses or attrs."""
    names = {ast.unparse(d.func if isinstance(d, ast.Call) else d).split(".")[-1] for d in node.decorator_list}
    return bool(names & {"dataclass", "define", "frozen", "mutable"})


def _fields(found: Definition) -> dict[str, Option]:
    options: dict[str, Option] = {}
    for kind in reversed(list(lineage(found))):
        for item in kind.node.body if _has_fields(kind.node) else ():  # type: ignore[arg-type]
            if not isinstance(item, ast.AnnAssign) or "ClassVar" in ast.unparse(item.annotation):
                continue
            if isinstance(item.target, ast.Name):
                name, annotation = item.target.id, _kind(item.annotation, kind.module)
                options[name] = Option(name=name, kind=annotation, default=_default(item.value))
    return options


def _signature(arguments: ast.arguments, module: str, bound: bool = False) -> Signature:
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults))
    pairs = list(zip(positional, [*defaults, *arguments.defaults], strict=True))[1 if bound else 0 :]
    pairs += list(zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True))
    options = {
        argument.arg: Option(name=argument.arg, kind=_kind(argument.annotation, module), default=_default(default))
        for argument, default in pairs
    }
    return Signature(options=options, open=arguments.kwarg is not None)


def _default(node: ast.expr | None) -> Any:
    if node is None:
        return REQUIRED
    try:
        return ast.literal_eval(node)
    except ValueError:
        return UNKNOWN


_PLAIN: dict[str, Any] = {
    "int": int,
    "float": float,
    "bool": bool,
    "str": str,
    "None": None,
    "Any": Any,
    **OPTION_TYPES,
}


def _kind(node: ast.expr | None, module: str) -> Any:
    """The type that an annotation names; Any where it is of no type that a YAML file can hold."""
    try:
        return Any if node is None else _evaluated(node, module)
    except (LookupError, MulkiError, RecursionError, SyntaxError, TypeError, ValueError):
        return Any


_GENERIC: dict[str, Any] = {
    "list": list, "List": list, "Sequence": list, "dict": dict, "Dict": dict, "Mapping": dict, "tuple": tuple, "Tuple": tuple,
}  # fmt: skip


def _evaluated(node: ast.expr, module: str) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return _evaluated(ast.parse(node.value, mode="eval").body, module)
    if isinstance(node, ast.Constant) and node.value is None:
        return None
    if isinstance(node, ast.Name):
        return _PLAIN[node.id] if node.id in _PLAIN else _alias(node.id, module)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _evaluated(node.left, module) | _evaluated(node.right, module)
    if isinstance(node, ast.Subscript):
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        name = ast.unparse(node.value).split(".")[-1]  # also typing.Literal
        if name == "Literal":
            return Literal[tuple(ast.literal_eval(item) for item in inner)]
        arms = tuple(_evaluated(item, module) for item in inner)
        if name == "Optional":
            arms = (*arms, None)
        if name in ("Optional", "Union"):
            return Union[arms]  # noqa: UP007 (made at run time)
        return _GENERIC[name][arms]
    raise LookupError


def _alias(name: str, module: str) -> Any:
    """A type that a module gives a name to, such as `Score = Literal[...]`, there or where it is imported from."""
    for node in statements(parsed(module)):
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return _evaluated(node.value, module)
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and node.target.id == name
            and node.value
        ):
            return _evaluated(node.value, module)
    origin, imported = imports(module).get(name, ("", ""))
    if imported:
        return _PLAIN[imported] if imported in _PLAIN else _alias(imported, origin)
    raise LookupError
