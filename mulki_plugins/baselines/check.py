"""Mistakes in the options of a baseline that their types do not show. Imports no torch, so `mulki validate` finds them too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mulki_plugins.errors import OptionError


def check_si(options: Mapping[str, Any]) -> list[OptionError]:
    """A list of factors has one for each task."""
    return _check_factors(options, "si_lambda")


def check_lwf(options: Mapping[str, Any]) -> list[OptionError]:
    """A list of factors has one for each task."""
    return _check_factors(options, "alpha")


def _check_factors(options: Mapping[str, Any], name: str) -> list[OptionError]:
    return [OptionError("expected a number, or a list with one for each task", (name,))] if options[name] == [] else []


def check_ewc(options: Mapping[str, Any]) -> list[OptionError]:
    """One decaying sum of importances needs its decay; importances of each task have none."""
    online, decay = options["mode"] == "online", options["decay_factor"]
    if online and decay is None:
        return [OptionError("expected a number from 0 to 1, since mode is online", ("decay_factor",))]
    if not online and decay is not None:
        return [OptionError("only mode online has a decay", ("decay_factor",))]
    return []
