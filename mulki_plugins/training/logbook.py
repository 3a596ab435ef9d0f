"""What a run records as it goes: the values of a step, the last terms of the loss, and its loggers, each guarded.

A logger that fails costs the run nothing but its curves.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from attrs import define, field
from avalanche.evaluation.metric_results import MetricValue
from avalanche.logging import BaseLogger
from avalanche.training.plugins import EvaluationPlugin
from torch import Tensor

from mulki_plugins.errors import MulkiError
from mulki_plugins.ranks import collectives
from mulki_plugins.registry.catalog import Part
from mulki_plugins.registry.guard import cause_of
from mulki_plugins.training.finite import Diverged
from mulki_plugins.training.over_ranks import over_ranks

Reduction = Literal["last", "sum", "mean"]
Warn = Callable[[str, BaseException | None], None]

_SKIPPED_STEP = ""
"""The tag under which a step notes that it was left out; the loggers do not get it."""


class StepLog:
    """Collects the values of steps, each tag once a step. They stay on their device until they are read, in one copy."""

    def __init__(self) -> None:
        self._values: dict[tuple[str, int], tuple[Any, float]] = {}
        """Of the current step, by tag and iteration: a sum of values and of their weights."""
        self._steps: list[_Values] = []
        """The steps that nobody has read yet."""

    def __len__(self) -> int:
        """The number of steps to read."""
        return len(self._steps)

    def add(self, tag: str, at: int, value: Tensor | float, several: Reduction, weight: float = 1.0) -> None:
        share = weight if several == "mean" else 1.0
        value = share * value  # a copy: its owner may go on to change the value in place
        if several == "last" or (tag, at) not in self._values:
            self._values[tag, at] = value, share
            return
        total, weights = self._values[tag, at]
        self._values[tag, at] = total + value, weights + share if several == "mean" else 1.0

    def end_step(self, *, keep: bool = False) -> None:
        """The current step is over. keep: it is not read at once, so its values become one tensor on their device."""
        values, self._values = self._values, {}
        means = [(tag, at, _divided(total, weights)) for (tag, at), (total, weights) in values.items()]
        self._steps.append(_Values.on_device(means) if keep else _Values(means))

    def read(self) -> list[tuple[str, int, Any]]:
        """The tag, iteration and value of everything in the steps so far, which are then forgotten.

        Numbers come from each device in one copy, as tensors on the CPU.
        """
        steps, self._steps = self._steps, []
        for kind in dict.fromkeys(kind for step in steps for kind in step.numbers):
            holders = [step for step in steps if kind in step.numbers]
            numbers = iter(torch.cat([step.numbers[kind] for step in holders]).cpu().unbind())
            for step in holders:
                for place in step.places[kind]:
                    tag, at, _ = step.values[place]
                    step.values[place] = tag, at, next(numbers)
        return [value for step in steps for value in step.values]


class Journal:
    """Hands the values of steps to an evaluator's loggers: after each step, or after every `ahead` steps in one copy.

    first_failure: from the iterations of steps that were not finite, and therefore left out, to the first one that ends the
    run, as (iteration, error); None if none does.
    """

    def __init__(
        self,
        evaluator: EvaluationPlugin,
        first_failure: Callable[[list[int]], tuple[int, Exception] | None],
        ahead: int,
    ) -> None:
        self.evaluator, self.ahead = evaluator, ahead
        self.log = StepLog()
        self._first_failure = first_failure

    def note_left_out(self, at: int, left_out: Tensor) -> None:
        """left_out: 1 on the device if the current step was not finite, else 0."""
        self.log.add(_SKIPPED_STEP, at, left_out, "last")

    def end_step(self, *, read: bool) -> None:
        """The current step is over. The evaluator gets all values if `ahead` steps wait, or if `read` says so."""
        self.log.end_step(keep=self.ahead > 1)
        if read or len(self.log) >= self.ahead:
            for value in self._read():
                self.evaluator.publish_metric_value(value)

    def settle(self, *, partial: bool = False) -> None:
        """Read the steps that wait; the loggers get their values now. partial: with those of a step that is not over, and, on
        several ranks, of this rank alone.

        Raises the error of the first step that was not finite, after the loggers have the values up to that step.
        """
        if partial:
            self.log.end_step()
        self._deliver(self._read(common=not partial))

    def settle_after(self, error: BaseException) -> None:
        """Read what waits after the training has failed. An earlier step that was not finite is the reason then."""
        if collectives.several():  # the others do not know of it yet
            return
        try:
            self.settle()
        except (Diverged, MulkiError) as earlier:
            raise earlier from error
        except Exception:  # the device may be out of order; the error that is on its way says why
            return

    def _read(self, *, common: bool = True) -> list[MetricValue]:
        values = over_ranks(self.log.read()) if common else self.log.read()
        failure = self._first_failure([at for tag, at, value in values if tag == _SKIPPED_STEP and bool(value)])
        metrics = [MetricValue(self, tag, value, at) for tag, at, value in values if tag != _SKIPPED_STEP]
        if failure is None:
            return metrics
        at, error = failure
        self._deliver([metric for metric in metrics if metric.x_plot <= at])
        raise error

    def _deliver(self, values: list[MetricValue]) -> None:
        """Give values to the loggers outside of the evaluator's own events."""
        for value in values:
            self.evaluator.last_metric_results[value.name] = value.value
        for logger in self.evaluator.loggers if values else ():
            logger.log_metrics(values)


_Kind = tuple[torch.dtype, torch.device]


@define(eq=False)
class _Values:
    """The values of one step; numbers that lie on a device are in one tensor for each type."""

    values: list[tuple[str, int, Any]]
    places: dict[_Kind, list[int]] = field(factory=dict)
    """The places of these numbers among the values."""
    numbers: dict[_Kind, Tensor] = field(factory=dict)

    @classmethod
    def on_device(cls, values: list[tuple[str, int, Any]]) -> _Values:
        places: dict[_Kind, list[int]] = {}
        for place, (_, _, value) in enumerate(values):
            if isinstance(value, Tensor) and value.numel() == 1 and value.layout is torch.strided:
                places.setdefault((value.dtype, value.device), []).append(place)
        numbers = {
            kind: torch.stack([values[place][2].detach().reshape(()) for place in group])
            for kind, group in places.items()
        }
        return cls(values, places, numbers)


def _divided(total: Any, weights: float) -> Any:
    if weights == 1:
        return total
    return total / weights if weights else 0.0


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

        def forward(strategy: object, values: Sequence[MetricValue]) -> None:
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
