"""Reads a part's signature, docstring and class attributes from its source, without importing it.

`mulki validate` must know the options of every plugin and may not import torch. A target `module:attribute` is therefore
read from the syntax tree of its module, through imports and base classes. A target given as an object is inspected.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Collection, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Union

from attrs import frozen

from mulki_plugins.errors import MulkiError
from mulki_plugins.types import OPTION_TYPES, read_hints

Target = str | Callable[..., Any]
"""`package.module:attribute`, or the class or function itself."""
Function = ast.FunctionDef | ast.AsyncFunctionDef
REQUIRED = inspect.Parameter.empty
"""The default of an option that has none."""


UNKNOWN: Any = type("Unknown", (), {"__repr__": lambda self: "as the code says"})()
"""The default of an option whose default is not a literal."""


@frozen(kw_only=True)
class Option:
    """One keyword argument; `kind` is its type, or Any if YAML cannot express it."""

    name: str
    kind: Any = Any
    default: Any = REQUIRED


@frozen(kw_only=True)
class Signature:
    """The options of a part; `open` if it also takes others (`**kwargs`)."""

    options: dict[str, Option]
    open: bool = False


@frozen(eq=False)
class Definition:
    """The syntax tree of a class or function, and the module that defines it."""

    node: ast.ClassDef | Function
    module: str

    def place(self, node: ast.stmt) -> str:
        """`my_package/stage.py:12`: where a statement of this definition stands."""
        path = find_source(self.module)
        return f"{path.parent.name}/{path.name}:{node.lineno}"


@functools.cache
def find_source(module: str) -> Path:
    """The source file of a module, found without importing its packages. MulkiError if there is no such file."""
    top, *rest = module.split(".")
    try:
        spec = find_spec(top)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise MulkiError(f"the package {top!r} is not installed", f"pip install {top}")
    paths = [Path(folder, *rest) for folder in spec.submodule_search_locations or ()]
    files = [file for path in paths for file in (path.with_suffix(".py"), path / "__init__.py")]
    for file in files if rest else [Path(spec.origin or "")]:
        if file.suffix == ".py" and file.is_file():
            return file
    raise MulkiError(f"the module {module!r} has no source file")


@functools.cache
def parse_module(module: str) -> ast.Module:
    """The syntax tree of a module. MulkiError if it has no source or is not Python."""
    try:
        return ast.parse(find_source(module).read_bytes())
    except (SyntaxError, ValueError, OSError) as error:
        raise MulkiError(f"the module {module!r} cannot be read: {error}") from error


@functools.cache
def read_imports(module: str) -> dict[str, tuple[str, str]]:
    """The names that a module imports, each with its origin (module, name); the name is empty for a module itself."""
    imports = {}
    for node in _statements(parse_module(module)):
        if isinstance(node, ast.ImportFrom):
            imports.update({alias.asname or alias.name: (_origin(node, module), alias.name) for alias in node.names})
        elif isinstance(node, ast.Import):
            imports.update({alias.asname or alias.name: (alias.name, "") for alias in node.names})
    return imports


def find_definition(module: str, attribute: str) -> Definition:
    """The class or function of that name, followed through imports. MulkiError if there is none."""
    home, name, seen = module, attribute, set()
    while name and (home, name) not in seen:
        seen.add((home, name))
        for node in _statements(parse_module(home)):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == name:
                return Definition(node, home)
        home, name = read_imports(home).get(name, ("", ""))
    for node in _statements(parse_module(module)):
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
            try:
                return find_definition(_origin(node, module), attribute)
            except MulkiError:
                continue
    raise MulkiError(f"{module} defines no {attribute!r}")


def find_class(node: ast.expr, module: str, skip: Collection[str] = ()) -> Definition | None:
    """The class that an expression names, such as `Stage` or `stages.Stage[int]`; None for others and for packages in `skip`."""
    home, _, name = ast.unparse(node.value if isinstance(node, ast.Subscript) else node).rpartition(".")
    try:
        origin, inner = read_imports(module).get(home or name, (home or module, ""))
        if origin.partition(".")[0] in skip:
            return None
        where = module if not home else f"{origin}.{inner}" if inner else origin
        definition = find_definition(where, name)
    except (MulkiError, RecursionError):
        return None
    return definition if isinstance(definition.node, ast.ClassDef) else None


def walk_bases(definition: Definition, skip: Collection[str] = ()) -> Iterator[Definition]:
    """A class and its bases, depth first, each once; bases that cannot be read, or that `skip` names, are left out."""
    seen, queue = set(), [definition]
    while queue:
        each = queue.pop(0)
        if (each.module, each.node.name) not in seen:
            seen.add((each.module, each.node.name))
            yield each
            bases = each.node.bases if isinstance(each.node, ast.ClassDef) else []
            queue[:0] = [parent for base in bases if (parent := find_class(base, each.module, skip))]


def _origin(node: ast.ImportFrom, module: str) -> str:
    """The absolute name of the module that `from … import` names."""
    if not node.level:
        return node.module or ""
    package = module.split(".") if find_source(module).name == "__init__.py" else module.split(".")[:-1]
    return ".".join([*package[: len(package) - node.level + 1], *(node.module.split(".") if node.module else [])])


def _statements(tree: ast.Module | ast.If | ast.Try) -> Iterator[ast.stmt]:
    """The statements of a module, including those within `if` and `try`."""
    blocks = [tree.body, getattr(tree, "orelse", []), getattr(tree, "finalbody", [])]
    blocks += [handler.body for handler in getattr(tree, "handlers", [])]
    for node in (node for block in blocks for node in block):
        if isinstance(node, (ast.If, ast.Try)):
            yield from _statements(node)
        else:
            yield node


def _assignments(body: list[ast.stmt] | Iterator[ast.stmt]) -> Iterator[tuple[str, ast.expr]]:
    """The names that statements assign, with their values."""
    for node in body:
        if isinstance(node, ast.Assign):
            yield from ((target.id, node.value) for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
            yield node.target.id, node.value


_LIBRARIES = ("avalanche", "torch")
"""Their classes know nothing of MulKI: no fact and no option is documented there."""


def read_docstring(target: Target) -> tuple[str, dict[str, str]]:
    """The first line of a target's docstring, and the entries of its `Args:` sections and of those of its bases.

    The line is a phrase for lists, without its period. MulkiError if the module cannot be found or read.
    """
    summary, *others = [inspect.cleandoc(doc or "") for doc in _docstrings(target)]
    options: dict[str, str] = {}
    for doc in (summary, *others):
        options = {**_read_args(doc), **options}
    return _phrase(summary), options


def read_attributes(target: Target, names: Collection[str]) -> dict[str, Any]:
    """The class attributes of these names, inherited ones too. UNKNOWN stands for a value that is not a literal."""
    if not isinstance(target, str):
        return {name: getattr(target, name) for name in names if inspect.isclass(target) and hasattr(target, name)}
    attributes: dict[str, Any] = {}
    for each in _lineage(target):
        values = {name: _literal(value) for name, value in _assignments(each.node.body) if name in names}
        attributes = {**values, **attributes} if isinstance(each.node, ast.ClassDef) else {}
    return attributes


def _lineage(target: str) -> list[Definition]:
    return list(walk_bases(find_definition(*target.split(":", 1)), _LIBRARIES))


def _docstrings(target: Target) -> Iterator[str | None]:
    """The docstring of a target, then those of its `__init__` and of its bases."""
    if not isinstance(target, str):
        for base in inspect.getmro(target) if inspect.isclass(target) else (target,):
            yield from (base.__doc__, getattr(getattr(base, "__dict__", {}).get("__init__"), "__doc__", None))
        return
    for each in _lineage(target):
        yield ast.get_docstring(each.node)
        for node in each.node.body:
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                yield ast.get_docstring(node)


def _phrase(doc: str) -> str:
    """A docstring's first line as a phrase for lists: without its period, and with a small first letter."""
    line = doc.partition("\n")[0].rstrip(".")
    word = re.split(r"\W", line, maxsplit=1)[0]
    return line[:1].lower() + line[1:] if word.isalpha() and word == word.capitalize() else line


def _read_args(doc: str) -> dict[str, str]:
    """The entries of a Google-style section `Args:`."""
    args: dict[str, str] = {}
    section = re.search(r"^Args:\n((?:[ \t]+\S.*(?:\n|\Z)|\n)+)", doc, re.MULTILINE)
    for line in textwrap.dedent(section[1]).splitlines() if section else ():
        if entry := re.match(r"\*{0,2}(\w+)(?: \([^)]*\))?:\s*(.*)", line):
            args[entry[1]] = entry[2]
        elif args and line.strip():
            last = next(reversed(args))
            args[last] = f"{args[last]} {line.strip()}".strip()
    return args


def read_signature(target: Target) -> Signature:
    """The keyword arguments of a class or function. MulkiError if its module cannot be found or read."""
    return _read_signature(target) if isinstance(target, str) else inspect_signature(target)


def inspect_signature(target: Callable[..., Any]) -> Signature:
    """The keyword arguments of an object, by `inspect`."""
    function = target.__init__ if inspect.isclass(target) else target
    hints = read_hints(function)
    parameters = list(inspect.signature(function).parameters.values())[inspect.isclass(target) :]
    named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    options = {p.name: Option(name=p.name, kind=hints.get(p.name, Any), default=p.default) for p in named}
    return Signature(options=options, open=any(p.kind is p.VAR_KEYWORD for p in parameters))


@functools.cache
def _read_signature(target: str) -> Signature:
    definition = find_definition(*target.split(":", 1))
    if not isinstance(definition.node, ast.ClassDef):
        return _from_arguments(definition.node.args, definition.module)
    for each in walk_bases(definition):
        for node in each.node.body:
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                return _from_arguments(node.args, each.module, bound=True)
        if _has_fields(each.node):
            return Signature(options=_from_fields(definition))
    return Signature(options={})


def _from_arguments(arguments: ast.arguments, module: str, bound: bool = False) -> Signature:
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults))
    pairs = list(zip(positional, [*defaults, *arguments.defaults], strict=True))[1 if bound else 0 :]
    pairs += list(zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True))
    options = [_option(argument.arg, argument.annotation, default, module) for argument, default in pairs]
    return Signature(options={option.name: option for option in options}, open=arguments.kwarg is not None)


def _option(name: str, annotation: ast.expr | None, default: ast.expr | None, module: str) -> Option:
    return Option(name=name, kind=_type(annotation, module), default=REQUIRED if default is None else _literal(default))


def _has_fields(node: ast.AST) -> bool:
    """Whether dataclasses or attrs make a class's `__init__` from its annotated fields."""
    decorators = node.decorator_list if isinstance(node, ast.ClassDef) else []
    names = {ast.unparse(d.func if isinstance(d, ast.Call) else d).split(".")[-1] for d in decorators}
    return bool(names & {"dataclass", "define", "frozen", "mutable"})


def _from_fields(definition: Definition) -> dict[str, Option]:
    options: dict[str, Option] = {}
    for each in reversed([each for each in walk_bases(definition) if _has_fields(each.node)]):
        for node in (node for node in each.node.body if isinstance(node, ast.AnnAssign)):
            if isinstance(node.target, ast.Name) and "ClassVar" not in ast.unparse(node.annotation):
                options[node.target.id] = _option(node.target.id, node.annotation, node.value, each.module)
    return options


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return UNKNOWN


_BUILTINS: dict[str, Any] = {kind.__name__: kind for kind in (int, float, bool, str)}
_NAMES = _BUILTINS | {"None": None, "Any": Any} | OPTION_TYPES
_GENERIC: dict[str, Any] = {
    "list": list, "List": list, "Sequence": list, "dict": dict, "Dict": dict, "Mapping": dict, "tuple": tuple, "Tuple": tuple,
}  # fmt: skip


def _type(node: ast.expr | None, module: str) -> Any:
    """The type that an annotation names; Any if YAML cannot express it."""
    try:
        return Any if node is None else _evaluate(node, module)
    except (LookupError, MulkiError, RecursionError, SyntaxError, TypeError, ValueError):
        return Any


def _evaluate(node: ast.expr, module: str) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return _evaluate(ast.parse(node.value, mode="eval").body, module)
    if isinstance(node, ast.Constant) and node.value is None:
        return None
    if isinstance(node, ast.Name):
        return _evaluate_name(node.id, module)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _evaluate(node.left, module) | _evaluate(node.right, module)
    if isinstance(node, ast.Subscript):
        arguments = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        name = ast.unparse(node.value).split(".")[-1]  # `typing.Literal` too
        if name == "Literal":
            return Literal[tuple(ast.literal_eval(argument) for argument in arguments)]
        arms = tuple(_evaluate(argument, module) for argument in arguments)
        if name == "Optional":
            return arms[0] | None
        return Union[arms] if name == "Union" else _GENERIC[name][arms]  # noqa: UP007 (built at run time)
    raise LookupError


def _evaluate_name(name: str, module: str) -> Any:
    """A type by its name, such as `Score = Literal[...]`, defined in this module or imported."""
    if name in _NAMES:
        return _NAMES[name]
    for assigned, value in _assignments(_statements(parse_module(module))):
        if assigned == name:
            return _evaluate(value, module)
    origin, name = read_imports(module)[name]
    return _evaluate_name(name, origin)
