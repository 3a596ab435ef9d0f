"""Observes the steps of one task as the run makes them: how long each takes, its parts, and what it asks of the machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from attrs import define, evolve, field, frozen

from mulki_plugins.bench.hardware import Counter
from mulki_plugins.bench.stopwatch import PARTS, Part, Stopwatch
from mulki_plugins.training.strategy import ContinualTemplate

FIXED: tuple[Part, ...] = ("optimizer", "logging", "checkpoint")
"""Parts of a step that take the same time for a batch of any size."""


@frozen(kw_only=True)
class Steps:
    """What was observed of a task's steps; times in seconds."""

    warmup: int
    seconds: list[float]
    """Of each step after the warm-up."""
    parts: dict[Part, float]
    """The median over steps. On a GPU each part then ends with a wait, so they add up to more than a step."""
    span: float
    """From the end of the first step to the end of the last."""
    flops: int
    """Floating-point operations of a step; 0 if not counted."""
    calls: dict[str, int]
    """Launches, waits and scalar reads of a step; empty if not counted."""

    def of_batches(self, times: float, fixed: float) -> Steps:
        """What steps with so many times as many images would take; `fixed` seconds of a step do not grow with the images."""
        whole = self.median + (times - 1) * max(0.0, self.median - fixed)
        factor = whole / self.median if self.median else 1.0
        parts = {part: seconds if part in FIXED else seconds * factor for part, seconds in self.parts.items()}
        return evolve(self, seconds=[each * factor for each in self.seconds], parts=parts)

    @property
    def median(self) -> float:
        """0 if nothing learns in steps."""
        return statistics.median(self.seconds) if self.seconds else 0.0

    @property
    def mean(self) -> float:
        """With what happens in some steps only, such as an average of the weights. One interruption cannot spoil it."""
        return statistics.fmean(min(each, 3 * self.median) for each in self.seconds) if self.seconds else 0.0


@define(kw_only=True)
class StepObserver:
    """Called after each step. Ends the task by itself once it has seen enough.

    After the warm-up come the timed steps; on a device that runs behind, some with waits, for the parts; then one or two
    in which operations and launches are counted.
    """

    strategy: ContinualTemplate
    watch: Stopwatch
    wait: Callable[[], None]
    warmup: int
    steps: int
    limit: float
    """Seconds after which no further step is timed, once there are two."""
    asynchronous: bool
    count: bool = True
    clock: Callable[[], float] = time.perf_counter
    first: float = 0.0
    """When the first step ended."""
    _ends: list[float] = field(factory=list)
    _parts: list[dict[Part, float]] = field(factory=list)
    _stage: str = "warmup"
    _seen: int = 0
    _last: float = 0.0
    _counts: dict[str, int] = field(factory=dict)
    _counter: Any = None

    def __call__(self) -> None:
        """A step has ended."""
        if self._stage in ("warmup", "parts", "counting"):
            self.wait()
        now, parts = self.clock(), self.watch.take()
        self._last = now
        self.first = self.first or now
        self._seen += 1
        advance = getattr(self, f"_after_{self._stage}")
        advance(now, parts)

    def _after_warmup(self, now: float, parts: dict[Part, float]) -> None:
        if self._seen >= self.warmup or (now - self.first > self.limit / 2 and self._seen > 1):
            self._begin("timed")
            self._ends.append(now)

    def _after_timed(self, now: float, parts: dict[Part, float]) -> None:
        self._ends.append(now)
        if not self.asynchronous:
            self._parts.append(parts)
        late = len(self._ends) > 2 and now - self._ends[0] > self.limit
        if self._seen >= self.steps or late:
            if self.asynchronous:
                self.wait()  # what the last steps started must be in their time
                self._ends[-1] = self._last = self.clock()
                self.watch.waits = True
                self._begin("parts")
            else:
                self._count(kernels=True)

    def _after_parts(self, now: float, parts: dict[Part, float]) -> None:
        self._parts.append(parts)
        if self._seen >= max(3, self.steps // 3):
            self.watch.waits = False
            self._count(kernels=True)

    def _count(self, *, kernels: bool) -> None:
        if not self.count:
            self._end()
            return
        self._counter = Counter(self.strategy.device, kernels=kernels)
        self._counter.start()
        self._begin("counting")

    def _after_counting(self, now: float, parts: dict[Part, float]) -> None:
        counted = self._counter.stop()
        self._counts |= counted
        if "flops" in counted:
            self._end()
        else:
            self._count(kernels=False)

    def _begin(self, stage: str) -> None:
        self._stage, self._seen = stage, 0

    def _end(self) -> None:
        self._begin("over")
        self._last = self.clock()
        self.strategy.dataloader.count = self.strategy.clock.train_exp_iterations  # TaskBatches then ends the task

    def _after_over(self, now: float, parts: dict[Part, float]) -> None:
        """A step after the last one: the loader has an epoch that could not be cut."""

    def result(self) -> Steps:
        """What was observed. The task must have had two timed steps at least, or none at all."""
        seconds = [after - before for before, after in zip(self._ends, self._ends[1:], strict=False)]
        if self.asynchronous and seconds:  # single steps end before the device does; only their sum is right
            seconds = [(self._ends[-1] - self._ends[0]) / len(seconds)] * len(seconds)
        return Steps(
            warmup=self.warmup,
            seconds=seconds,
            parts={part: statistics.median([each[part] for each in self._parts] or [0.0]) for part in PARTS},
            span=self._last - self.first,
            flops=self._counts.get("flops", 0),
            calls={what: count for what, count in self._counts.items() if what != "flops"},
        )
