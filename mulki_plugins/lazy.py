"""Names that a package offers and loads only when they are used, since they bring torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from importlib import import_module
from typing import Any

from mulki_plugins.libraries import import_libraries


def from_modules(package: str, homes: Mapping[str, str], light: Collection[str] = ()) -> Callable[[str], Any]:
    """A package's `__getattr__`: each name of `homes` is looked up in that module below the package, at its first use.

    light: the modules that bring no torch.
    """

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if homes[name] not in light:
            import_libraries()
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    return load
