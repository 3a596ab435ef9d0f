"""`check_plugin` and `check_stream`: all checks in turn, and one report of everything that is wrong."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from mulki_plugins.registry.guard import cause_of
from mulki_plugins.testing import plugin_checks, stream_checks
from mulki_plugins.testing.laboratory import Laboratory
from mulki_plugins.testing.names import PLUGIN_CHECKS, STREAM_CHECKS
from mulki_plugins.testing.subject import Factory, Fault, Subject, subject_of


class CheckFailed(AssertionError):
    """What is wrong with a plugin or a stream: each check by name, with what it found and how to fix it."""

    def __init__(self, subject: str, faults: Mapping[str, Fault], left: list[str]) -> None:
        self.faults = dict(faults)
        lines = [f"{subject}: {len(faults)} {'check fails' if len(faults) == 1 else 'checks fail'}"]
        for name, fault in faults.items():
            lines += [f"  {name}: {fault.wrong}", f"    fix: {fault.mend}"]
        if left:
            lines.append(f"  skipped until the above is fixed: {', '.join(left)}")
        super().__init__("\n".join(lines))


def check_plugin(factory: Factory, **options: Any) -> None:
    """Put a plugin through every check of PLUGIN_CHECKS, which takes some seconds. CheckFailed with all that is wrong.

    factory: the class, a function that makes one, or a registered name; options: its keyword arguments. What its
    registration declares (requires, conflicts, keeps_images, ...) counts, if it is registered under this class or function.
    """
    _check(
        subject_of("plugin", factory, options),
        Laboratory,
        plugin_checks.CHECKS,
        ("made", "callbacks", "trains"),
    )


def check_stream(factory: Factory, **options: Any) -> None:
    """Put a stream through every check of STREAM_CHECKS. CheckFailed with all that is wrong.

    factory: the function that makes it, or a registered name; options: its keyword arguments.
    """
    _check(subject_of("stream", factory, options), stream_checks.Library, stream_checks.CHECKS, ("made",))


def _check(
    subject: Subject, start: Callable[[Subject], Any], checks: Mapping[str, Any], first: tuple[str, ...]
) -> None:
    """first: checks without which the others could say nothing."""
    place, faults = start(subject), {}
    left: list[str] = []
    for name, check in checks.items():
        if any(needed in faults for needed in first if needed != name):
            left.append(name)
            continue
        try:
            _carry_out(check, place)
        except Fault as fault:
            faults[name] = fault
    if faults:
        raise CheckFailed(subject.name, faults, left)


def _carry_out(check: Callable[[Any], None], place: Any) -> None:
    """A check; whatever it ends in is a Fault, so that a report comes of it."""
    try:
        check(place)
    except Fault:
        raise
    except (Exception, SystemExit) as error:
        what = f"the check ended in an error: {cause_of(error)}"
        raise Fault(
            what, "the traceback below shows where; if no code of yours is in it, report it to MulKI"
        ) from error


def check_one(kind: str, name: str, factory: Factory, options: dict[str, Any]) -> None:
    """A single check by its name. CheckFailed where it fails."""
    try:
        key = frozenset(options.items())
        place = _kept(kind, factory, key)
    except TypeError:  # an option that cannot be a key
        place = _place(kind, factory, options)
    checks: Mapping[str, Any] = plugin_checks.CHECKS if kind == "plugin" else stream_checks.CHECKS
    try:
        _carry_out(checks[name], place)
    except Fault as fault:
        raise CheckFailed(place.subject.name, {name: fault}, []) from None


@functools.lru_cache(maxsize=4)
def _kept(kind: str, factory: Factory, options: frozenset[tuple[str, Any]]) -> Any:
    return _place(kind, factory, dict(options))


def _place(kind: str, factory: Factory, options: dict[str, Any]) -> Any:
    if kind == "plugin":
        return Laboratory(subject_of("plugin", factory, options))
    return stream_checks.Library(subject_of("stream", factory, options))


assert list(plugin_checks.CHECKS) == list(PLUGIN_CHECKS)
assert list(stream_checks.CHECKS) == list(STREAM_CHECKS)
