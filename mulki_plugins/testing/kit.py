"""`check_plugin`, `check_head` and `check_stream`: run all checks and report everything that is wrong at once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from mulki_plugins.registry.guard import cause_of
from mulki_plugins.testing import (
    adapter_checks,
    growth,
    head_checks,
    isolation_checks,
    optimizer_checks,
    resuming,
    stream_checks,
    training_checks,
)
from mulki_plugins.testing.laboratory import Laboratory
from mulki_plugins.testing.subject import Factory, Fault, find_subject

Check = Callable[[Any], None]
Checked = Literal["plugin", "adapter", "head", "optimizer", "stream"]

CHECKS: dict[str, dict[str, Check]] = {
    "plugin": {
        check.__name__: check
        for check in (
            training_checks.made,
            training_checks.callbacks,
            training_checks.trains,
            isolation_checks.quiet,
            training_checks.finite_loss,
            isolation_checks.batch,
            training_checks.optimizer,
            training_checks.gradients,
            isolation_checks.surroundings,
            isolation_checks.random_numbers,
            isolation_checks.files,
            isolation_checks.teachers,
            training_checks.repeatable,
            training_checks.nested_evaluation,
            training_checks.evaluation,
            resuming.resume,
            growth.growth,
            training_checks.replay,
            training_checks.extremes,
        )
    },
    "head": {
        check.__name__: check
        for check in (
            head_checks.made,
            head_checks.learns,
            head_checks.answers,
            head_checks.order,
            head_checks.independent,
            head_checks.unchanged,
            head_checks.saved,
            head_checks.repeatable,
            head_checks.quiet,
            head_checks.files,
            head_checks.extremes,
        )
    },
    "adapter": {
        check.__name__: check
        for check in (
            adapter_checks.made,
            adapter_checks.start,
            training_checks.trains,
            isolation_checks.quiet,
            training_checks.finite_loss,
            training_checks.optimizer,
            adapter_checks.learning,
            isolation_checks.surroundings,
            isolation_checks.random_numbers,
            isolation_checks.files,
            isolation_checks.teachers,
            training_checks.repeatable,
            training_checks.nested_evaluation,
            training_checks.evaluation,
            resuming.resume,
            adapter_checks.merged,
            growth.growth,
            training_checks.replay,
            training_checks.extremes,
        )
    },
    "optimizer": {
        check.__name__: check
        for check in (
            optimizer_checks.made,
            training_checks.trains,
            isolation_checks.quiet,
            training_checks.finite_loss,
            optimizer_checks.rates,
            optimizer_checks.frozen,
            optimizer_checks.later,
            optimizer_checks.state,
            isolation_checks.random_numbers,
            isolation_checks.files,
            training_checks.repeatable,
            resuming.resume,
        )
    },
    "stream": {
        check.__name__: check
        for check in (
            stream_checks.made,
            stream_checks.names,
            stream_checks.declared,
            stream_checks.labels,
            stream_checks.images,
            stream_checks.separate,
            stream_checks.repeatable,
            stream_checks.workers,
            stream_checks.quiet,
            stream_checks.trains,
        )
    },
}
"""The checks in order, by the names of PLUGIN_CHECKS and the like."""

_ESSENTIAL = {
    "plugin": ("made", "callbacks", "trains"), "adapter": ("made", "trains"), "optimizer": ("made", "trains"),
    "head": ("made", "learns", "answers"), "stream": ("made",),
}  # fmt: skip
"""Checks without which the later ones would mean nothing."""


class CheckFailed(AssertionError):
    """A plugin or stream fails checks. `faults`: by the check's name, each with its problem and its fix."""

    def __init__(self, subject: str, faults: Mapping[str, Fault], skipped: Sequence[str] = ()) -> None:
        self.faults = dict(faults)
        lines = [f"{subject}: {len(faults)} {'check fails' if len(faults) == 1 else 'checks fail'}"]
        for name, fault in faults.items():
            lines += [f"  {name}: {fault.problem}", f"    fix: {fault.fix}"]
        if skipped:
            lines.append(f"  skipped until the above is fixed: {', '.join(skipped)}")
        super().__init__("\n".join(lines))


def check_plugin(factory: Factory, **options: Any) -> None:
    """Run every check of PLUGIN_CHECKS, which takes some seconds.

    factory: the class, a function that creates a plugin, or a registered name; options: its keyword arguments. If the class
    or function is registered, its registration counts (requires, conflicts, keeps_images, ...). Raises CheckFailed.
    """
    _check("plugin", factory, options)


def check_head(factory: Factory, **options: Any) -> None:
    """Run every check of HEAD_CHECKS.

    factory: the class, a function that creates a head, or a registered name; options: its keyword arguments. Raises
    CheckFailed.
    """
    _check("head", factory, options)


def check_adapter(factory: Factory, **options: Any) -> None:
    """Run every check of ADAPTER_CHECKS: small models are trained with it alone learning.

    factory: the class, a function that creates an adapter, or a registered name; options: its keyword arguments. Raises
    CheckFailed.
    """
    _check("adapter", factory, options)


def check_optimizer(factory: Factory, **options: Any) -> None:
    """Run every check of OPTIMIZER_CHECKS.

    factory: the class or function, which need not be registered, or a registered name; options: its keyword arguments besides
    the learning rate and the weight decay. Raises CheckFailed.
    """
    _check("optimizer", factory, options)


def check_stream(factory: Factory, **options: Any) -> None:
    """Run every check of STREAM_CHECKS.

    factory: the function that creates the stream, or a registered name; options: its keyword arguments. Raises CheckFailed.
    """
    _check("stream", factory, options)


def check_one(kind: Checked, name: str, factory: Factory, options: dict[str, Any]) -> None:
    """Run a single check by its name. Raises CheckFailed."""
    try:
        bench = _cached_bench(kind, factory, frozenset(options.items()))
    except TypeError:  # an unhashable option
        bench = _bench(kind, factory, options)
    try:
        _run(CHECKS[kind][name], bench)
    except Fault as fault:
        raise CheckFailed(bench.subject.name, {name: fault}) from None


def _check(kind: Checked, factory: Factory, options: dict[str, Any]) -> None:
    bench = _bench(kind, factory, options)
    faults: dict[str, Fault] = {}
    skipped: list[str] = []
    for name, check in CHECKS[kind].items():
        if any(essential in faults for essential in _ESSENTIAL[kind]):
            skipped.append(name)
            continue
        try:
            _run(check, bench)
        except Fault as fault:
            faults[name] = fault
    if faults:
        raise CheckFailed(bench.subject.name, faults, skipped)


def _run(check: Check, bench: Any) -> None:
    """Run a check. Any error in it becomes a Fault, so that it appears in the report."""
    try:
        with optimizer_checks.findable(bench.subject):
            check(bench)
    except Fault:
        raise
    except (Exception, SystemExit) as error:
        problem = f"the check ended in an error: {cause_of(error)}"
        fix = "mend the line that it names; if that is none of yours, report it to MulKI"
        raise Fault(problem, fix) from error


@functools.lru_cache(maxsize=4)
def _cached_bench(kind: Checked, factory: Factory, options: frozenset[tuple[str, Any]]) -> Any:
    return _bench(kind, factory, dict(options))


def _bench(kind: Checked, factory: Factory, options: dict[str, Any]) -> Any:
    """Where the checks of a kind find the subject and what they share."""
    subject = find_subject(kind, factory, options)
    if kind == "optimizer":
        subject = optimizer_checks.registered(subject)
    benches = {"head": head_checks.HeadBench, "stream": stream_checks.Library}
    return benches.get(kind, Laboratory)(subject)
