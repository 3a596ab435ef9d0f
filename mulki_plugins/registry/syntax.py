"""Classes and functions of a module, read from its source without importing it, through imports and base classes.

`mulki validate` must know the keyword arguments and the callbacks of every plugin and may not import torch.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from attrs import frozen

from mulki_plugins.errors import MulkiError

Function = ast.FunctionDef | ast.AsyncFunctionDef


@frozen(eq=False)
class Definition:
    """A class or function, and the module in which it stands."""

    node: ast.ClassDef | Function
    module: str

    @property
    def place(self) -> str:
        """`my_package/stage.py:12`"""
        return place(self.module, self.node)


def place(module: str, node: ast.stmt) -> str:
    path = source_file(module)
    return f"{path.parent.name}/{path.name}:{node.lineno}"


def definition(module: str, attribute: str) -> Definition:
    """The class or function of that name, followed through imports. MulkiError where there is none."""
    asked, names = module, (module, attribute)
    seen = set()
    while names not in seen:
        seen.add(names)
        home, name = names
        for node in statements(parsed(home)):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == name:
                return Definition(node, home)
        found = imports(home).get(name)
        if found is None or not found[1]:
            break
        names = found[0], found[1]
    for home in _stars(module):
        try:
            return definition(home, attribute)
        except MulkiError:
            continue
    raise MulkiError(f"{asked} defines no {attribute!r}")


def lineage(found: Definition) -> Iterator[Definition]:
    """A class and its bases, depth first, as far as they can be read; each once."""
    seen: set[tuple[str, str]] = set()

    def walk(each: Definition) -> Iterator[Definition]:
        if (each.module, each.node.name) in seen:
            return
        seen.add((each.module, each.node.name))
        yield each
        for base in each.node.bases if isinstance(each.node, ast.ClassDef) else ():
            if (parent := class_named(base, each.module)) is not None:
                yield from walk(parent)

    return walk(found)


def class_named(node: ast.expr, module: str) -> Definition | None:
    """The class that an expression of a module names, such as `Stage`, `stages.Stage` or `Base[int]`; None for another."""
    if isinstance(node, ast.Subscript):
        node = node.value
    home, _, name = ast.unparse(node).rpartition(".")
    try:
        if home:
            origin, inner = imports(module).get(home, (home, ""))
            found = definition(f"{origin}.{inner}" if inner else origin, name)
        else:
            found = definition(module, name)
    except (MulkiError, RecursionError):
        return None
    return found if isinstance(found.node, ast.ClassDef) else None


@functools.cache
def imports(module: str) -> dict[str, tuple[str, str]]:
    """Each imported name of a module with where it is from: (module, name), the name empty for a module itself."""
    package = module.split(".") if source_file(module).name == "__init__.py" else module.split(".")[:-1]
    found = {}
    for node in statements(parsed(module)):
        if isinstance(node, ast.ImportFrom):
            origin = _origin(node, package)
            found.update({alias.asname or alias.name: (origin, alias.name) for alias in node.names})
        elif isinstance(node, ast.Import):
            found.update({alias.asname or alias.name: (alias.name, "") for alias in node.names})
    return found


def _origin(node: ast.ImportFrom, package: list[str]) -> str:
    above = package[: len(package) - node.level + 1] if node.level else []
    return ".".join([*above, *(node.module.split(".") if node.module else [])])


def _stars(module: str) -> list[str]:
    package = module.split(".") if source_file(module).name == "__init__.py" else module.split(".")[:-1]
    nodes = [node for node in statements(parsed(module)) if isinstance(node, ast.ImportFrom)]
    return [_origin(node, package) for node in nodes if any(alias.name == "*" for alias in node.names)]


def statements(tree: ast.Module | ast.If | ast.Try) -> Iterator[ast.stmt]:
    """The statements of a module, also those within `if` and `try`."""
    blocks = [tree.body, getattr(tree, "orelse", []), getattr(tree, "finalbody", [])]
    blocks += [handler.body for handler in getattr(tree, "handlers", [])]
    for node in (node for block in blocks for node in block):
        if isinstance(node, (ast.If, ast.Try)):
            yield from statements(node)
        else:
            yield node


@functools.cache
def parsed(module: str) -> ast.Module:
    """The syntax tree of a module. MulkiError where it has no source or is not Python."""
    try:
        return ast.parse(source_file(module).read_bytes())
    except (SyntaxError, ValueError, OSError) as error:
        raise MulkiError(f"the module {module!r} cannot be read: {error}") from error


@functools.cache
def source_file(module: str) -> Path:
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
        path = folder.joinpath(*rest)
        candidates += [path.with_suffix(".py"), path / "__init__.py"] if rest else []
    for candidate in candidates:
        if candidate.suffix == ".py" and candidate.is_file():
            return candidate
    raise MulkiError(f"the module {module!r} has no source file")
