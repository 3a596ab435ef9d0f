"""A run's loggers, called so that one that fails costs the run nothing but its curves."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from avalanche.evaluation.metric_results import MetricValue
from torch import Tensor

from mulki_plugins.registry.guard import cause_of
from mulki_plugins.registry.parts import Part

Warn = Callable[[str, BaseException | None], None]


class GuardedLogger:
    """Stands in for a logger in Avalanche's EvaluationPlugin; the first failure is reported and drops the logger.

    Any exception counts as one, also SystemExit: while a run listens for signals, Ctrl-C raises none.
    """

    def __init__(self, part: Part, folder: Path, warn: Warn) -> None:
        self.part, self.name, self._warn = part, part.name, warn
        self._logger: Any = None
        self._logger = self._attempt("when it was made", lambda: _checked(part.load()(folder)))

    def __getattr__(self, name: str) -> Any:
        if not name.startswith(("before_", "after_")):
            raise AttributeError(name)

        def forward(strategy: Any, values: Sequence[MetricValue]) -> None:
            if (callback := getattr(self._logger, name, None)) is not None:
                self._attempt(f"in its {name}", lambda: callback(strategy, self._copied(values)))

        return forward

    def log_metrics(self, values: Sequence[MetricValue]) -> None:
        if self._logger is not None and values:
            self._attempt("in its log_metrics", lambda: self._logger.log_metrics(self._copied(values)))

    def log_single_metric(self, name: str, value: Any, x_plot: int) -> None:
        if self._logger is not None:
            self._attempt("in its log_single_metric", lambda: self._logger.log_single_metric(name, value, x_plot))

    def state_dict(self) -> Mapping[str, Any]:
        """What it wants to have back when the run goes on; empty if it has none, or none that JSON can hold."""
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
            if _worker_died(error):
                raise
            dropped, self._logger = self._logger, None
            if hasattr(dropped, "close") and when != "when it was closed":
                with contextlib.suppress(BaseException):  # the failure is reported below
                    dropped.close()
            cause = cause_of(error, "" if self.part.is_ours else self.part.package)
            self._warn(f"the {self.part} failed {when} and logs no more; the run goes on: {cause}", error)
            return None

    def _copied(self, values: Sequence[MetricValue]) -> list[MetricValue]:
        """For another package's logger, copies: the loss is among the values, and one list is handed to all loggers."""
        if self.part.is_ours:
            return list(values)
        return [
            MetricValue(v.origin, v.name, v.value.clone() if isinstance(v.value, Tensor) else v.value, v.x_plot)
            for v in values
        ]


def _checked(logger: Any) -> Any:
    if not callable(getattr(logger, "log_single_metric", None)) or not callable(getattr(logger, "log_metrics", None)):
        raise TypeError(f"expected a BaseLogger of Avalanche, got a {type(logger).__name__}")
    return logger


def _worker_died(error: BaseException) -> bool:
    """Whether torch raised it, which it does at whatever the run is doing, when a loader's worker has died."""
    return isinstance(error, RuntimeError) and "DataLoader worker" in str(error)
