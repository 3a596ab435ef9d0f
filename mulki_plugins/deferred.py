"""Defers the import of heavy modules that libraries import and MulKI never calls, until somebody uses them.

Avalanche imports torchmetrics (and with it scipy), wandb and gdown for a metric, a logger and a data set. While Avalanche is
imported, stand-ins take their places. A stand-in imports its module when anything is asked of it, so whoever uses that metric
gets it as ever; and it leaves `sys.modules` when the import is over, so that others import the module itself.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Collection, Iterator
from types import ModuleType
from typing import Any

DEFERRED: dict[str, frozenset[str]] = {
    "torchmetrics": frozenset(),
    "torchmetrics.functional": frozenset({"accuracy"}),
    "wandb": frozenset(),
    "gdown": frozenset(),
}
"""The modules, and the functions that are imported from them by name. Any other name imports the module at once."""

_ASKED_BY_PYTHON = ("__file__", "__wrapped__", "__warningregistry__", "__all__")
"""By `inspect`, which looks at every module: nothing has been asked of it yet."""


class StandIn(ModuleType):
    """In the place of a module until it is used."""

    def __init__(self, name: str, functions: Collection[str]) -> None:
        super().__init__(name)
        self._functions = functions
        self._module: ModuleType | None = None

    def __getattr__(self, name: str) -> Any:
        if name in _ASKED_BY_PYTHON or (
            name == "__path__" and self._functions
        ):  # `from module import function` asks it
            raise AttributeError(name)
        if name in self._functions and self._module is None:
            return self._later(name)
        return getattr(self._load(), name)

    def _later(self, name: str) -> Any:
        def function(*args: Any, **kwargs: Any) -> Any:
            return getattr(self._load(), name)(*args, **kwargs)

        function.__name__ = function.__qualname__ = name
        return function

    def _load(self) -> ModuleType:
        """The module itself, imported on the first call."""
        if self._module is None:
            _remove(self.__name__.partition(".")[0])
            self._module = importlib.import_module(self.__name__)
        return self._module


@contextlib.contextmanager
def deferring(modules: dict[str, frozenset[str]] | None = None) -> Iterator[None]:
    """Put stand-ins in the place of these modules within the block; not of any that is imported already or not installed."""
    modules = DEFERRED if modules is None else modules
    packages = {name.partition(".")[0] for name in modules}
    specs = {name: importlib.util.find_spec(name) for name in packages if name not in sys.modules}
    for name, functions in modules.items():
        spec = specs.get(name.partition(".")[0])
        if spec is not None and name not in sys.modules:
            stand_in = StandIn(name, functions)
            if name in packages:  # code that looks for installed packages finds it
                stand_in.__spec__, stand_in.__file__ = spec, spec.origin
            sys.modules[name] = stand_in
    try:
        yield
    finally:
        for name in packages:
            _remove(name)


def _remove(package: str) -> None:
    for name, module in list(sys.modules.items()):
        if isinstance(module, StandIn) and name.partition(".")[0] == package:
            del sys.modules[name]
