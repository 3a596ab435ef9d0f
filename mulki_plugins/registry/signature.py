"""What options a part takes, read from its source without importing it.

`mulki validate` must know the keyword arguments of every plugin and may not import torch, so the parameters of a target
given as `module:attribute` are read from the syntax tree of its module. A target given as an object is inspected.
"""

from __future__ import annotations

import ast
import functools
import inspect
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Union, get_type_hints

from attrs import evolve, frozen

from mulki_plugins.errors import MulkiError
from mulki_plugins.options import NAMES
from mulki_plugins.registry.parts import Part

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
    try:
        hints = get_type_hints(function, include_extras=True)
    except Exception:  # an annotation that cannot be evaluated is not checked
        hints = {}
    options, is_open = {}, False
    for name, parameter in list(inspect.signature(function).parameters.items())[1 if inspect.isclass(target) else 0 :]:
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            is_open = True
        elif parameter.kind is not inspect.Parameter.VAR_POSITIONAL:
            options[name] = Option(name=name, kind=hints.get(name, Any), default=parameter.default)
    return Signature(options=options, open=is_open)


@functools.cache
def _read(module: str, attribute: str) -> Signature:
    tree = _parsed(module)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == attribute:
            return _signature(node.args, module)
        if isinstance(node, ast.ClassDef) and node.name == attribute:
            for item in node.body:
                if isinstance(item, ast.FunctionDef) and item.name == "__init__":
                    return _signature(item.args, module, bound=True)
            return _inherited(node, tree, module)
    for origin, name in _imports(tree, module):
        if name == attribute:
            return _read(origin, name)
    raise MulkiError(f"{module} defines no {attribute!r}")


def _inherited(node: ast.ClassDef, tree: ast.Module, module: str) -> Signature:
    """The signature of the first base class that has one; none where the bases are not classes by name."""
    local = {item.name for item in tree.body if isinstance(item, ast.ClassDef)}
    imported = {name: origin for origin, name in _imports(tree, module)}
    for base in node.bases:
        if isinstance(base, ast.Subscript):
            base = base.value
        if isinstance(base, ast.Name) and (base.id in local or base.id in imported):
            return _read(module if base.id in local else imported[base.id], base.id)
    return Signature(options={})


def _imports(tree: ast.Module, module: str) -> list[tuple[str, str]]:
    """(module, name) of each `from module import name` at the top of a module."""
    found = []
    parts = [*module.split("."), "__init__"] if _file(module).name == "__init__.py" else module.split(".")
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            package = parts[: -node.level] if node.level else []
            origin = ".".join([*package, *(node.module.split(".") if node.module else [])])
            found += [(origin, alias.name) for alias in node.names if alias.asname in (None, alias.name)]
    return found


@functools.cache
def _parsed(module: str) -> ast.Module:
    try:
        return ast.parse(_file(module).read_bytes())
    except (SyntaxError, ValueError) as error:
        raise MulkiError(f"the module {module!r} cannot be read: {error}") from error


def _file(module: str) -> Path:
    """The source of a module, found without importing any of its packages."""
    top, *rest = module.split(".")
    try:
        spec = find_spec(top)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise MulkiError(f"the package {top!r} is not installed", f"pip install {top}")
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    candidates = [Path(spec.origin)] if not rest and spec.origin else []
    for folder in folders:
        place = folder.joinpath(*rest)
        candidates += [place.with_suffix(".py"), place / "__init__.py"] if rest else []
    for candidate in candidates:
        if candidate.suffix == ".py" and candidate.is_file():
            return candidate
    raise MulkiError(f"the module {module!r} has no source file")


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


_PLAIN: dict[str, Any] = {"int": int, "float": float, "bool": bool, "str": str, "None": None, "Any": Any, **NAMES}


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
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        name = node.value.id
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
    tree = _parsed(module)
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return _evaluated(node.value, module)
    for origin, imported in _imports(tree, module):
        if imported == name:
            return _alias(name, origin)
    raise LookupError
