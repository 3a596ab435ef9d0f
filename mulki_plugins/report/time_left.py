"""How long a run still takes, from how long its steps, evaluations and preparations have taken so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from attrs import define, field


@define
class TimeLeft:
    """Told of each step and batch as it happens; knows the seconds that are left once it has seen one of each kind.

    steps: of each training, in order. evaluations: how many there are in all.
    """

    steps: Sequence[int] = ()
    evaluations: int = 0
    clock: Callable[[], float] = time.monotonic
    step: float | None = None
    """Seconds of a step: the mean over the current training, or over the last one."""
    preparation: float | None = None
    """Seconds from a training's beginning to the end of its first step."""
    evaluation: float | None = None
    """Seconds of an evaluation: of the last one, or estimated from the part that is done."""
    training: int = 0
    """The position of the current training, or of the next one between two."""
    done: int = 0
    """Steps of the current training."""
    evaluated: int = 0
    _began: float = field(init=False, default=0.0)
    _first: float = field(init=False, default=0.0)
    _evaluating: float | None = field(init=False, default=None)
    _share: float = field(init=False, default=0.0)
    _skipped: int = field(init=False, default=1)
    """Steps when the first one was seen: more than one in a resumed run."""

    def training_begins(self, position: int) -> None:
        self.training, self.done, self._began = position, 0, self.clock()
        self.evaluated = max(self.evaluated, position + 1)  # a resumed run has evaluated without being seen

    def step_ends(self, done: int) -> None:
        """done: the number of steps of this training so far, also those before the run was resumed."""
        now = self.clock()
        if not self.done:
            self._first, self._skipped = now, done
            self.preparation = now - self._began
        elif done - self._skipped >= 3 or self.step is None:
            self.step = (now - self._first) / max(1, done - self._skipped)
        self.done = done

    def training_ends(self) -> None:
        if not self.done:  # a task without steps
            self.step, self.preparation = 0.0, self.clock() - self._began
        self.training, self.done = self.training + 1, 0

    def evaluation_begins(self) -> None:
        self._evaluating, self._share = self.clock(), 0.0

    def batch_ends(self, share: float) -> None:
        """share: of the evaluation, in 0..1."""
        if self._evaluating is not None and share > 0:
            self._share = share
            if self.evaluated == 0 or self.evaluation is None:
                self.evaluation = (self.clock() - self._evaluating) / share

    def evaluation_ends(self) -> None:
        if self._evaluating is not None:
            self.evaluation = self.clock() - self._evaluating
        self._evaluating, self.evaluated = None, self.evaluated + 1

    def seconds(self) -> float | None:
        """What is left of the run; None as long as a kind of work that is left has not been seen."""
        steps = sum(self.steps[self.training :]) - self.done
        preparations = len(self.steps) - self.training - (1 if self.done else 0)
        evaluations = self.evaluations - self.evaluated - self._share * (self._evaluating is not None)
        total = 0.0
        for count, each in ((steps, self.step), (preparations, self.preparation), (evaluations, self.evaluation)):
            if count > 0:
                if each is None:
                    return None
                total += count * each
        return total


def in_words(seconds: float | None) -> str:
    """`40 s left`, `12 min left`, `1 h 45 min left`; empty for None."""
    if seconds is None:
        return ""
    if seconds < 59.5:
        return f"{max(1, round(seconds))} s left"
    minutes = round(seconds / 60)
    return f"{minutes} min left" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min left"
