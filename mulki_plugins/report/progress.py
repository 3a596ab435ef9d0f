"""Progress on stderr: a bar for each task on a terminal, lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import click
from avalanche.logging import BaseLogger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mulki_plugins.report.run_log import RunLog


class ProgressLogger(BaseLogger):
    """Shows the training of a strategy. Loss and accuracy are averaged over about twenty steps."""

    def __init__(self, tasks: int) -> None:
        super().__init__()
        self.tasks = tasks
        self.log: RunLog | None = None
        """Also receives the lines, once the run has a folder."""
        self._bar: Progress | None = None
        self._row: Any = None
        self._average: dict[str, float] = {}
        self._start = 0.0

    def say(self, text: str) -> None:
        """Print a line, and add it to the run's log."""
        if self.log is not None:
            self.log.line(text)
        with contextlib.suppress(OSError, ValueError):  # the terminal is gone, or stderr closed
            click.echo(text, err=True)

    def before_training_exp(self, strategy: Any, metric_values: Any) -> None:
        self._average, self._start = {}, time.monotonic()
        label = self._label(strategy)
        if sys.stderr is not None and sys.stderr.isatty():
            with self._forgiving():
                self._bar = Progress(
                    TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
                    TextColumn("{task.fields[state]}", markup=False), TimeRemainingColumn(),
                    console=Console(stderr=True), transient=True,
                )  # fmt: skip
                self._row = self._bar.add_task(label, total=None, state="preparing")
                self._bar.start()
        else:
            self.say(f"{label}: training")

    def log_single_metric(self, name: str, value: Any, x_plot: int) -> None:
        if name in ("train/loss/total", "train/accuracy"):
            old = self._average.get(name)
            self._average[name] = float(value) if old is None else 0.95 * old + 0.05 * float(value)

    def after_training_iteration(self, strategy: Any, metric_values: Any) -> None:
        if self._bar:
            done = strategy.clock.train_exp_iterations + 1
            with self._forgiving():
                self._bar.update(self._row, total=strategy.steps, completed=done, state=self._state())

    def after_training_exp(self, strategy: Any, metric_values: Any) -> None:
        self.stop()
        label = self._label(strategy)
        self.say(f"{label}: {strategy.steps} steps in {time.monotonic() - self._start:.0f} s, {self._state()}")

    def stop(self) -> None:
        """Remove the bar, also after an error in training."""
        bar, self._bar = self._bar, None
        if bar:
            with self._forgiving():
                bar.stop()

    @contextlib.contextmanager
    def _forgiving(self) -> Iterator[None]:
        """A bar that cannot be drawn is dropped; the run continues."""
        try:
            yield
        except Exception:  # errors of the terminal, in whatever form rich reports them
            bar, self._bar = self._bar, None
            if bar:
                with contextlib.suppress(Exception):
                    bar.stop()

    def _label(self, strategy: Any) -> str:
        if strategy.budgets > 1:  # joint training: one experience for all tasks
            return f"[1-{self.tasks}/{self.tasks}] all tasks"
        return f"[{strategy.clock.train_exp_counter + 1}/{self.tasks}] {strategy.experience.task_name}"

    def _state(self) -> str:
        loss, accuracy = self._average.get("train/loss/total"), self._average.get("train/accuracy")
        return "" if loss is None else f"loss {loss:.3f}, accuracy {accuracy or 0:.0f} %"
