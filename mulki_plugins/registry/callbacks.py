"""Avalanche's callbacks: their names, and what is wrong with those of a plugin.

Avalanche calls the methods of these names and no others, with `strategy` and further keyword arguments.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

from attrs import frozen

from mulki_plugins.errors import did_you_mean

CALLBACKS = frozenset(
    f"{when}_{event}"
    for when in ("before", "after")
    for event in (
        "training", "train_dataset_adaptation", "training_exp", "training_epoch", "training_iteration", "forward",
        "backward", "update", "eval", "eval_dataset_adaptation", "eval_exp", "eval_iteration", "eval_forward",
    )
)  # fmt: skip
"""Of avalanche-lib 0.6's SupervisedPlugin."""

PREFIXES = ("before_", "after_")


@frozen(kw_only=True)
class Method:
    """A method that looks like a callback. positional: how many arguments may be given by position, `self` among them."""

    name: str
    place: str
    positional: int = 2
    open_positional: bool = False
    open_keywords: bool = True
    required: tuple[str, ...] = ()
    """Further arguments without a default, which Avalanche does not give."""
    coroutine: bool = False


def looks_like_callback(name: str) -> bool:
    return name.startswith(PREFIXES)


def wrong_callbacks(methods: Iterable[Method]) -> Iterator[str]:
    """A line for each method that Avalanche would not call, or not as it is meant."""
    for method in methods:
        where = f"{method.place}: " if method.place else ""
        if method.name not in CALLBACKS:
            hint = did_you_mean(method.name, CALLBACKS)
            hint = hint if hint.startswith("did") else "rename it, or begin its name with an underscore"
            yield f"{where}{method.name!r} is no callback of Avalanche, which would never call it ({hint})"
        elif method.coroutine:
            yield f"{where}{method.name!r} is a coroutine, which Avalanche never awaits; write `def`, not `async def`"
        elif not method.open_keywords:
            yield f"{where}{method.name!r} takes no **kwargs, which Avalanche passes; write {_written(method.name)}"
        elif (method.positional < 2 and not method.open_positional) or method.required:
            yield f"{where}{method.name!r} is called with the strategy and nothing else; write {_written(method.name)}"


def _written(name: str) -> str:
    return f"`def {name}(self, strategy, **kwargs)`"


def methods_of(kind: type) -> list[Method]:
    """The methods of a class that look like callbacks, but for those that Avalanche itself defines."""
    found = []
    for name in sorted({name for base in kind.__mro__ for name in vars(base) if looks_like_callback(name)}):
        home = next(base for base in kind.__mro__ if name in vars(base))
        value = vars(home)[name]
        if home.__module__.split(".")[0] == "avalanche" or not inspect.isfunction(value):
            continue
        found.append(_method(name, value))
    return found


def _method(name: str, function: Any) -> Method:
    parameters = list(inspect.signature(function).parameters.values())
    by_position = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    keyword_only = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    code = inspect.unwrap(function).__code__
    return Method(
        name=name,
        place=f"{code.co_filename}:{code.co_firstlineno}",
        positional=len(by_position),
        open_positional=any(p.kind is p.VAR_POSITIONAL for p in parameters),
        open_keywords=any(p.kind is p.VAR_KEYWORD for p in parameters),
        required=tuple(p.name for p in (*by_position[2:], *keyword_only) if p.default is p.empty),
        coroutine=inspect.iscoroutinefunction(function),
    )
