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
    """Writes scalars and figures under the names they are logged with."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        earlier = set(_event_files(folder))
        self.writer: Any = SummaryWriter(str(folder))
        self._new_files = set(_event_files(folder)) - earlier

    def log_single_metric(self, name: str, value: Any, x_plot: int) -> None:
        if isinstance(value, Figure):
            with drawing():
                self.writer.add_figure(name, value, x_plot)
        else:
            self.writer.add_scalar(name, float(value), x_plot)

    def after_eval(self, strategy: object, metric_values: object) -> None:
        self.writer.flush()

    def state_dict(self) -> dict[str, int]:
        """The length of each event file."""
        self.writer.flush()
        return {file.name: file.stat().st_size for file in _event_files(self.folder)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Drop the events written after the checkpoint, so that no point of a curve appears twice.

        Event files that the checkpoint does not know are renamed, never deleted: TensorBoard then ignores them.
        """
        for file in set(_event_files(self.folder)) - self._new_files:
            if file.name in state:
                os.truncate(file, min(state[file.name], file.stat().st_size))
            else:
                file.rename(file.with_name(file.name.replace("tfevents", "superseded")))

    def close(self) -> None:
        self.writer.close()


def _event_files(folder: Path) -> list[Path]:
    return [path for path in folder.glob("events.out.tfevents.*") if path.is_file() and not path.is_symlink()]
