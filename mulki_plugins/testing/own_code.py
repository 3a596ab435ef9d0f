"""Which code is a plugin's own: the modules that define it, and those of the same package."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

_FOREIGN = {"avalanche", "torch", "builtins", "abc", "typing", "numpy", "attr", "attrs", "dataclasses"}
_OURS = "mulki_plugins"


def own_modules(plugin: Any, factory: Callable[..., Any]) -> set[str]:
    """The names of the modules that a plugin's author wrote, as far as they are loaded.

    Of MulKI's own plugins only the modules with their classes, since the package also holds the kit.
    """
    homes = {_home(kind) for kind in type(plugin).__mro__}
    homes.add(getattr(factory, "__module__", None) or "")
    homes = {home for home in homes if home and home.split(".")[0] not in _FOREIGN}
    packages = {home.split(".")[0] for home in homes} - {_OURS}
    homes |= {name for name in list(sys.modules) if name.split(".")[0] in packages}
    return {home for home in homes if sys.modules.get(home) is not None}


def own_classes(plugin: Any, modules: set[str]) -> list[type]:
    return [kind for kind in type(plugin).__mro__ if _home(kind) in modules]


def _home(kind: type) -> str:
    """The module that defines a class; of one that is made by a call of `type`, that of its methods."""
    if kind.__module__ != "abc":
        return kind.__module__
    return next((value.__module__ for value in vars(kind).values() if inspect.isfunction(value)), "")


@contextlib.contextmanager
def another_hash(modules: set[str]) -> Iterator[None]:
    """`hash` of a text is another for this code, as it is in every other process."""
    patched = [vars(sys.modules[name]) for name in modules if "hash" not in vars(sys.modules[name])]
    for names in patched:
        names["hash"] = _salted_hash
    try:
        yield
    finally:
        for names in patched:
            names.pop("hash", None)


@functools.wraps(hash)
def _salted_hash(value: Any) -> int:
    return hash(value) ^ 1 if isinstance(value, (str, bytes)) else hash(value)
