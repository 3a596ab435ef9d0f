"""Which of a method's candidate settings wins: that with the best mean of the rule's metrics."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from mulki_plugins.errors import MulkiError
from mulki_plugins.study.schema import Choice
from mulki_plugins.study.state import State
from mulki_plugins.study.table import mean_of

Method = tuple[str, str]
"""A recipe and a strategy, as the study names them."""


def ranked(found: Sequence[State], rule: Choice) -> dict[Method, list[State]]:
    """The candidates of each method that are done, the best first; of equal ones that which the file has first."""
    tried: dict[Method, list[State]] = defaultdict(list)
    for state in found:
        if state.line is not None:
            tried[_method(state)].append(state)

    def score(state: State) -> float:
        mean = mean_of(state.line, rule.by) if state.line is not None else None
        return float("inf") if mean is None else -mean

    return {method: sorted(states, key=score) for method, states in tried.items()}


def winners(found: Sequence[State], rule: Choice) -> dict[Method, tuple[str, ...]]:
    """The settings of each method's best candidate, once all of its candidates are done and have the rule's metrics."""
    unfinished = {_method(state) for state in found if state.line is None or mean_of(state.line, rule.by) is None}
    return {
        method: states[0].run.job.candidate
        for method, states in ranked(found, rule).items()
        if method not in unfinished
    }


def check_metrics(found: Sequence[State], rule: Choice) -> None:
    """MulkiError if a candidate lacks a metric of the rule."""
    for state in found:
        if state.line is not None and mean_of(state.line, rule.by) is None:
            lacking = [name for name in rule.by if getattr(state.line, name) is None]
            what = f"$.choice.by: the candidates of {state.run.job.changes.strategy} have no {' and no '.join(lacking)}"
            raise MulkiError(what, "name metrics that the stream has, such as `by: [last]`")


def _method(state: State) -> Method:
    job = state.run.job
    return job.recipe, str(job.changes.strategy)
