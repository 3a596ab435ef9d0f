"""metrics.csv: every logged value, as `tag,step,value`, but the cost: equal runs have equal files."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from avalanche.logging import BaseLogger
from matplotlib.figure import Figure


class CsvLogger(BaseLogger):
    """Appends a line for each scalar. It ignores figures, and times and memory, which result.json has."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._file = (folder / "metrics.csv").open("a", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file)
        if not self._file.tell():
            self._writer.writerow(["tag", "step", "value"])

    def log_single_metric(self, name: str, value: Any, x_plot: int) -> None:
        if not isinstance(value, Figure) and not name.startswith("cost/"):
            self._writer.writerow([name, x_plot, f"{float(value):.8g}"])

    def after_eval(self, strategy: object, metric_values: object) -> None:
        self._file.flush()

    def state_dict(self) -> dict[str, int]:
        """The file's length."""
        self._file.flush()
        return {"bytes": self._file.tell()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Drop the lines written after the checkpoint."""
        self._file.truncate(min(state["bytes"], self._file.tell()))

    def close(self) -> None:
        self._file.close()
