"""Which packages are asked for their parts: all that are installed, unless the user says otherwise.

`MULKI_PLUGINS=a,b`: only these; empty: none. `--no-plugin NAME`: all but that one. A package is meant by the name of its
distribution or of its entry point; `-`, `_` and capitals make no difference.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from attrs import frozen

VARIABLE = "MULKI_PLUGINS"

_off: tuple[str, ...] = ()


@frozen(kw_only=True)
class Selection:
    """only: names of packages, or None for all. without: names of packages that are left alone."""

    only: tuple[str, ...] | None = None
    without: tuple[str, ...] = ()

    def refusal(self, names: Iterable[str]) -> str:
        """Why the package of these names is switched off; empty where it is not."""
        own = {canonical(name) for name in names}
        if own & {canonical(name) for name in self.without}:
            return "by --no-plugin"
        if self.only is not None and not own & {canonical(name) for name in self.only}:
            return f"by {VARIABLE}"
        return ""


def selection() -> Selection:
    """What the environment and the command line say."""
    said = os.environ.get(VARIABLE)
    only = None if said is None else tuple(name.strip() for name in said.split(",") if name.strip())
    return Selection(only=only, without=_off)


def switch_off(names: Iterable[str]) -> bool:
    """Leave these packages alone from now on, and no others; whether that is a change."""
    global _off
    before, _off = _off, tuple(names)
    return before != _off


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
