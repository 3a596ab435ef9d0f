"""TensorBoard events under stable tags: `train/loss/<term>`, `eval/accuracy/<task>`, `metrics/<name>`, the matrix."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from avalanche.logging import BaseLogger
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from mulki_plugins.report.plots import drawing


class TensorBoardLogger(BaseLogger):
    """Writes what is published as it is called: scalars and figures."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        earlier = set(_event_files(folder))
        self.writer = SummaryWriter(str(folder))  # type: ignore[no-untyped-call]
        self._own = set(_event_files(folder)) - earlier

    def log_single_metric(self, name: str, value: Any, x_plot: int) -> None:
        if isinstance(value, Figure):
            with drawing():
                self.writer.add_figure(name, value, x_plot)  # type: ignore[no-untyped-call]
        else:
            self.writer.add_scalar(name, float(value), x_plot)  # type: ignore[no-untyped-call]

    def after_eval(self, strategy: Any, metric_values: Any) -> None:
        self.writer.flush()  # type: ignore[no-untyped-call]

    def state_dict(self) -> dict[str, int]:
        """How far each event file goes."""
        self.writer.flush()  # type: ignore[no-untyped-call]
        return {file.name: file.stat().st_size for file in _event_files(self.folder)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take back what was written after that, so that no point of a curve is there twice; new ones go into a new file."""
        for file in set(_event_files(self.folder)) - self._own:
            if file.name in state:
                os.truncate(file, state[file.name])
            else:
                file.unlink()

    def close(self) -> None:
        self.writer.close()  # type: ignore[no-untyped-call]


def _event_files(folder: Path) -> list[Path]:
    return [path for path in folder.glob("events.out.tfevents.*") if path.is_file() and not path.is_symlink()]
