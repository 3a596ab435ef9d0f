"""What a run writes beside result.json: predictions, tables, the picture of the matrix, and its numbers for the loggers.

None of it decides how the run ends: result.json has all numbers, and a failure is only a warning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from attrs import frozen
from matplotlib.figure import Figure

from mulki_plugins.files import write_bytes, write_text
from mulki_plugins.report.plots import matrix_figure, png
from mulki_plugins.report.predictions import Answers, are_kept, copy_row, extend_row, write_row, write_stream
from mulki_plugins.report.result import Result
from mulki_plugins.report.tables import matrix_csv, matrix_table
from mulki_plugins.streams.task import TaskStream
from mulki_plugins.training.logbook import GuardedLogger
from mulki_plugins.training.marks import paths_of


@frozen(kw_only=True, eq=False)
class Records:
    """Writes into the run's folder and to its loggers."""

    folder: Path
    result: Result
    stream: TaskStream
    loggers: Sequence[GuardedLogger]
    only_warning: Callable[[str], AbstractContextManager[None]]
    """A context that turns errors into a warning."""
    predictions: bool
    """Whether to keep what was predicted for each test image."""

    def keep_predictions(self, answers: Mapping[str, Answers], rows: Sequence[int]) -> None:
        """Keep the answers to each task's test images as these rows; row 0 is the zero-shot row.

        Without answers, since no evaluation was needed, the rows repeat the zero-shot row.
        """
        if not self.predictions:
            return
        with self.only_warning("the predictions cannot be written"):
            if 0 in rows or not are_kept(self.folder):
                self._write_stream()
            for row in rows:
                if answers:
                    write_row(self.folder, row, [answers[task.name] for task in self.stream.tasks], self._classes)
                else:
                    copy_row(self.folder, 0, row)

    def add_predictions(self, answers: Mapping[str, Answers], row: int) -> None:
        """Add the answers to some tasks to a row that was kept without them."""
        if not self.predictions:
            return
        with self.only_warning("the predictions cannot be written"):
            if not are_kept(self.folder):
                self._write_stream()
            tasks = self.stream.tasks
            by_task = {i: answers[task.name] for i, task in enumerate(tasks) if task.name in answers}
            extend_row(self.folder, row, by_task, len(tasks), self._classes)

    @property
    def _classes(self) -> int:
        return sum(len(task.class_names) for task in self.stream.tasks)

    def _write_stream(self) -> None:
        tasks = self.stream.tasks
        images = [task.test for task in tasks]
        names, classes = [task.name for task in tasks], [task.class_names for task in tasks]
        labels, files = [part.targets for part in images], [paths_of(part) for part in images]
        write_stream(self.folder, names, classes, labels, files)

    def log_row(self, learned: int, peak_memory: float) -> None:
        """Give the loggers the means, the cost and the matrix so far. learned: the number of tasks learned."""
        row = self.result.matrix[-1] if self.result.matrix else self.result.zero_shot
        for name, values in {"": row, "_learned": row[:learned], "_future": row[learned:]}.items():
            if values and not any(map(math.isnan, values)):
                self._log(f"eval/mean{name}", sum(values) / len(values), learned)
        for name in ("train", "evaluate"):
            if learned and (seconds := self.result.seconds.get(name)):
                self._log(f"cost/{name}_seconds", seconds[-1], learned)
        self._log("cost/peak_memory_mib", peak_memory, learned)
        if 0 < len(self.result.matrix) < len(self.result.tasks) and self.loggers:  # `write_end` draws the whole one
            with suppress(Exception):  # `write_end` warns of it, once
                self._log_matrix(matrix_figure(self.result))

    def write_end(self) -> None:
        """Write the tables and the picture of a complete run, and give the loggers its metrics."""
        for file, text in {
            "matrix.csv": matrix_csv(self.result),
            "matrix.txt": matrix_table(self.result) + "\n",
        }.items():
            with self.only_warning(f"{file} cannot be written"):
                write_text(self.folder / file, text)
        for name, value in self.result.metrics.items():
            if value is not None:
                self._log(f"metrics/{name}", value, len(self.result.tasks))
        with self.only_warning("the picture of the matrix cannot be drawn"):
            figure = matrix_figure(self.result)
            write_bytes(self.folder / "matrix.png", png(figure))
            self._log_matrix(figure)

    def _log(self, name: str, value: float | Figure, learned: int) -> None:
        for logger in self.loggers:
            logger.log_single_metric(name, value, learned)

    def _log_matrix(self, figure: Figure) -> None:
        for logger in self.loggers:
            picture = figure if logger.part.is_ours else matrix_figure(self.result)  # other packages may draw on it
            logger.log_single_metric("matrix", picture, len(self.result.matrix))
