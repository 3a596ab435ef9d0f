"""Progress on stderr: what the run is doing and how long it will take; a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sized
from typing import Any, Protocol

import click
from avalanche.logging import BaseLogger
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column

from mulki_plugins.recipe.budget import evaluations, trainings
from mulki_plugins.recipe.schema import Recipe
from mulki_plugins.report.run_log import RunLog
from mulki_plugins.report.time_left import TimeLeft, in_words

MINUTE = 60.0
"""Seconds without a line after which a pipe gets one."""


class WatchedExperience(Protocol):
    """A task of the stream."""

    task_name: str


class WatchedClock(Protocol):
    """Avalanche's counters."""

    train_exp_iterations: int
    train_exp_counter: int


class Watched(Protocol):
    """What the progress shows of a strategy."""

    clock: WatchedClock
    experience: WatchedExperience
    budgets: int
    steps: int
    between_batches: Callable[[], None]

    @property
    def mb_y(self) -> Sized: ...


class ProgressLogger(BaseLogger):
    """Shows what a strategy is doing. Loss and accuracy are averaged over about twenty steps.

    verbosity: -1 prints warnings only, 1 also how long each part took. heard: gets every line in place of stderr.
    """

    def __init__(
        self,
        tasks: int,
        *,
        verbosity: int = 0,
        heard: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self.tasks, self.verbosity, self.clock = tasks, verbosity, clock
        self.left = TimeLeft(clock=clock)
        self.log: RunLog | None = None
        """Also receives the lines, once the run has a folder."""
        self._heard = heard
        self._draws = True
        """Whether a terminal can show a bar."""
        self._test_images = 0
        self._bar: Progress | None = None
        self._row = TaskID(0)
        self._average: dict[str, float] = {}
        self._training = ""
        """The label of the task in training."""
        self._doing = ""
        self._start = self._eval_start = 0.0
        self._steps = self._seen = self._batches = 0
        self._last_line = clock()

    # lines

    def say(self, text: str) -> None:
        """Print a line, and add it to the run's log."""
        if self.log is not None:
            self.log.line(text)
        if self._heard is not None:
            self._heard(text)
        elif self.verbosity >= 0 or text.startswith("warning"):
            self._print(text)

    def detail(self, text: str) -> None:
        """A line for those who ask for more; the log has it in any case."""
        if self.verbosity > 0:
            self.say(text)
        elif self.log is not None:
            self.log.line(text)

    def _print(self, text: str) -> None:
        self._last_line = self.clock()
        if self._bar is not None:
            with self._forgiving():
                self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
                return
        with contextlib.suppress(OSError, ValueError):  # the terminal is gone, or stderr closed
            click.echo(text, err=True)

    # what the run is doing

    def doing(self, what: str) -> None:
        """From now on the run does this, such as `evaluating the pre-trained model`."""
        self._doing, self._batches = what, 0
        if (
            self.verbosity > 0 and not self._is_terminal() and not what.endswith(": training")
        ):  # training is announced anyway
            self.say(f"    {what}")
        self._show(0, 0, "")
        self._draw()

    def task_begins(self, position: int, name: str) -> None:
        """The training at this position begins with what comes before its first step: teachers, prototypes."""
        self.left.training_begins(position)
        place = f"{position + 1}" if len(self.left.steps) == self.tasks else f"1-{self.tasks}"
        self._training = f"[{place}/{self.tasks}] {name}"
        self.doing(f"{self._training}: preparing")

    @contextlib.contextmanager
    def during(self, what: str) -> Iterator[None]:
        """The block does this; if it fails, the bar is removed before the error is printed."""
        self.doing(what)
        try:
            yield
        except BaseException:
            self.stop()
            raise

    def expect(self, recipe: Recipe, images: Mapping[str, tuple[int, int]], held_out: int = 0) -> None:
        """What the run will do. images: the numbers of training and test images of each task; held_out: further test images."""
        self.tasks, self._test_images = len(images), held_out + sum(test for _, test in images.values())
        plan = trainings(recipe, {name: train for name, (train, _) in images.items()})
        self.left.steps = [training.steps for training in plan]
        self.left.evaluations = evaluations(recipe, self.tasks)

    def follow(self, strategy: Watched) -> None:
        """Hear of the batches outside of training too."""
        between = strategy.between_batches

        def between_batches() -> None:
            between()
            self.batch_ends()

        strategy.between_batches = between_batches

    def batch_ends(self) -> None:
        """A batch of an evaluation, or of a pass over images before a task's steps."""
        self._batches += 1
        if self._doing.endswith(("preparing", "finishing")):
            self._show(0, 0, f"{self._batches} batches of images read")

    def _show(self, done: int, total: int, state: str) -> None:
        """Update the bar; elsewhere print a line once a minute."""
        left = in_words(self.left.seconds())
        if self._is_terminal():
            with self._forgiving():
                shown: dict[str, Any] = {
                    "description": self._doing.removesuffix(": training"), "total": total or None, "completed": done,
                    "count": f"{done}/{total}" if total else "", "state": state, "left": left,
                }  # fmt: skip
                if self._bar is None:
                    self._bar = Progress(
                        _column("description"), BarColumn(bar_width=12), *map(_column, ("count", "state", "left")),
                        console=Console(stderr=True), transient=True,
                    )  # fmt: skip
                    self._row = self._bar.add_task(**shown)
                    self._bar.start()
                else:
                    self._bar.update(self._row, **shown)
        elif self.verbosity >= 0 and self._heard is None and self.clock() - self._last_line >= MINUTE:
            count = f"{done} of {total}" if total else ""
            self._print(": ".join(filter(None, (self._doing, ", ".join(filter(None, (count, state, left)))))))

    def _draw(self) -> None:
        """Draw the bar now; it draws itself ten times a second."""
        if self._bar is not None:
            with self._forgiving():
                self._bar.refresh()

    def _is_terminal(self) -> bool:
        shown = self._draws and self.verbosity >= 0 and self._heard is None
        return shown and sys.stderr is not None and sys.stderr.isatty()

    # Avalanche's callbacks

    def before_training_exp(self, strategy: Watched, metric_values: Any) -> None:
        self._average, self._start, self._steps = {}, self.clock(), 0
        self._training = self._label(strategy)
        begins = f"{self._training}: training"
        if not self._is_terminal():
            self.say(begins)
        self.doing(begins)

    def log_single_metric(self, name: str, value: Any, x_plot: int) -> None:
        if name in ("train/loss/total", "train/accuracy"):
            old = self._average.get(name)
            self._average[name] = float(value) if old is None else 0.95 * old + 0.05 * float(value)

    def after_training_iteration(self, strategy: Watched, metric_values: Any) -> None:
        done = strategy.clock.train_exp_iterations + 1
        self.left.step_ends(done)
        if not self._steps and self.left.preparation is not None:
            self.detail(f"    the first step ended after {self.left.preparation:.1f} s")
        self._steps = done
        self._show(done, strategy.steps, self._state())

    def after_training_exp(self, strategy: Watched, metric_values: Any) -> None:
        label = self._label(strategy)
        self._draw()  # the last step, also of a task that is over in no time
        self.left.training_ends()
        how = f"{strategy.steps} steps in {self.clock() - self._start:.0f} s, {self._state()}"
        self.say(f"{label}: {how if strategy.steps else 'no steps, since nothing learns in them'}")
        self.doing(f"{label}: finishing")

    def before_eval(self, strategy: Watched, metric_values: Any) -> None:
        self._seen, self._eval_start = 0, self.clock()
        if not self.left.done:  # else a plugin evaluates in the middle of a task
            self.left.evaluation_begins()
        self.doing(f"{self._training}: evaluating" if self._training else "evaluating the pre-trained model")

    def after_eval_iteration(self, strategy: Watched, metric_values: Any) -> None:
        self._seen += len(strategy.mb_y)
        if self._test_images:
            self.left.batch_ends(min(1.0, self._seen / self._test_images))
        self._show(self._seen, self._test_images, strategy.experience.task_name)

    def after_eval(self, strategy: Watched, metric_values: Any) -> None:
        if not self.left.done:
            self.left.evaluation_ends()
        self.detail(f"    evaluated {self._seen} images in {self.clock() - self._eval_start:.1f} s")

    def stop(self) -> None:
        """Remove the bar, also after an error in training."""
        bar, self._bar = self._bar, None
        if bar:
            with self._forgiving():
                bar.stop()

    @contextlib.contextmanager
    def _forgiving(self) -> Iterator[None]:
        """A bar that cannot be drawn is dropped for good; the run continues."""
        try:
            yield
        except Exception:  # errors of the terminal, in whatever form rich reports them
            bar, self._bar, self._draws = self._bar, None, False
            if bar:
                with contextlib.suppress(Exception):
                    bar.stop()

    def _label(self, strategy: Watched) -> str:
        if strategy.budgets > 1:  # joint training: one experience for all tasks
            return f"[1-{self.tasks}/{self.tasks}] all tasks"
        return f"[{strategy.clock.train_exp_counter + 1}/{self.tasks}] {strategy.experience.task_name}"

    def _state(self) -> str:
        loss, accuracy = self._average.get("train/loss/total"), self._average.get("train/accuracy")
        return "" if loss is None else f"loss {loss:.3f}, accuracy {accuracy or 0:.0f} %"


def _column(name: str) -> TextColumn:
    text = "{task.description}" if name == "description" else f"{{task.fields[{name}]}}"
    return TextColumn(text, markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
