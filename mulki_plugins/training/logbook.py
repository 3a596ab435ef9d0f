"""What a run records as it goes: the values of a step, the last terms of the loss, and its loggers, each guarded.

A logger that fails costs the run nothing but its curves.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from avalanche.evaluation.metric_results import MetricValue
from avalanche.logging import BaseLogger
from torch import Tensor

from mulki_plugins.registry.catalog import Part
from mulki_plugins.registry.guard import cause_of

Reduction = Literal["last", "sum", "mean"]
Warn = Callable[[str, BaseException | None], None]


class StepLog:
    """Collects the values of a step, so that the loggers get each tag once."""

    def __init__(self) -> None:
        self._values: dict[tuple[str, int], tuple[Any, float]] = {}
        """By tag and iteration: a sum of values and of their weights."""

    def add(self, tag: str, at: int, value: Tensor | float, several: Reduction, weight: float) -> None:
        share = weight if several == "mean" else 1.0
        total, weights = self._values.get((tag, at), (0.0, 0.0)) if several != "last" else (0.0, 0.0)
        self._values[tag, at] = total + share * value, weights + share if several == "mean" else 1.0

    def take(self) -> list[tuple[str, int, Any]]:
        """The tag, iteration and value of everything collected, which is then forgotten."""
        values, self._values = self._values, {}
        return [(tag, at, total / weights if weights else 0.0) for (tag, at), (total, weights) in values.items()]


class LastTerms(BaseLogger):
    """Remembers the terms of the loss as they were last logged, for the message of a run that diverges."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, float] = {}

    def log_single_metric(self, name: str, value: Any, x_plot: int) -> None:
        if name.startswith("train/loss/"):
            self.values[name.removeprefix("train/loss/")] = float(value)


class GuardedLogger:
    """Stands in for a logger in Avalanche's EvaluationPlugin. Its first failure is reported, and it is not called again.

    Any exception is a failure, even SystemExit: while a run listens for signals, Ctrl-C raises none.
    """

    def __init__(self, part: Part, folder: Path, warn: Warn) -> None:
        self.part, self.name, self._warn = part, part.name, warn
        self._logger: Any = None
        self._logger = self._attempt("when it was made", lambda: _as_logger(part.load()(folder)))

    def __getattr__(self, name: str) -> Any:
        if not name.startswith(("before_", "after_")):
            raise AttributeError(name)

        def forward(strategy: Any, values: Sequence[MetricValue]) -> None:
            if (callback := getattr(self._logger, name, None)) is not None:
                self._attempt(f"in its {name}", lambda: callback(strategy, self._copies(values)))

        return forward

    def log_metrics(self, values: Sequence[MetricValue]) -> None:
        if self._logger is not None and values:
            self._attempt("in its log_metrics", lambda: self._logger.log_metrics(self._copies(values)))

    def log_single_metric(self, name: str, value: Any, x_plot: int) -> None:
        if self._logger is not None:
            self._attempt("in its log_single_metric", lambda: self._logger.log_single_metric(name, value, x_plot))

    def state_dict(self) -> Mapping[str, Any]:
        """What it needs when the run is resumed; empty if it keeps nothing, or nothing that JSON can hold."""
        if self._logger is None or not hasattr(self._logger, "state_dict"):
            return {}
        return self._attempt("in its state_dict", lambda: json.loads(json.dumps(self._logger.state_dict()))) or {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self._logger is not None and hasattr(self._logger, "load_state_dict"):
            self._attempt("in its load_state_dict", lambda: self._logger.load_state_dict(state))

    def close(self) -> None:
        if self._logger is not None and hasattr(self._logger, "close"):
            self._attempt("when it was closed", self._logger.close)

    def _attempt(self, when: str, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except BaseException as error:
            if worker_died(error):
                raise
            dropped, self._logger = self._logger, None
            if hasattr(dropped, "close") and when != "when it was closed":
                with contextlib.suppress(BaseException):  # the failure is reported below
                    dropped.close()
            cause = cause_of(error, "" if self.part.is_ours else self.part.package)
            self._warn(f"the {self.part} failed {when} and is not called again; the run goes on: {cause}", error)
            return None

    def _copies(self, values: Sequence[MetricValue]) -> list[MetricValue]:
        """Copies for another package's logger: all loggers share the values, and the loss is one of them."""
        if self.part.is_ours:
            return list(values)
        return [
            MetricValue(v.origin, v.name, v.value.clone() if isinstance(v.value, Tensor) else v.value, v.x_plot)
            for v in values
        ]


def _as_logger(logger: Any) -> Any:
    """The object, if it is a logger. TypeError otherwise."""
    if not callable(getattr(logger, "log_single_metric", None)) or not callable(getattr(logger, "log_metrics", None)):
        raise TypeError(f"expected a BaseLogger of Avalanche, got a {type(logger).__name__}")
    return logger


def worker_died(error: BaseException) -> bool:
    """Whether a data loader's worker has died: torch raises this error at any moment, so it is not the logger's."""
    return isinstance(error, RuntimeError) and "DataLoader worker" in str(error)
