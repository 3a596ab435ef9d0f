"""TensorBoard events under stable tags: `train/loss/<term>`, `eval/accuracy/<task>`, `metrics/<name>`, the matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from avalanche.logging import BaseLogger
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter


class TensorBoardLogger(BaseLogger):
    """Writes what is published as it is called: scalars and figures."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.writer = SummaryWriter(str(folder))  # type: ignore[no-untyped-call]

    def log_single_metric(self, name: str, value: Any, x_plot: int) -> None:
        if isinstance(value, Figure):
            self.writer.add_figure(name, value, x_plot)  # type: ignore[no-untyped-call]
        else:
            self.writer.add_scalar(name, float(value), x_plot)  # type: ignore[no-untyped-call]

    def after_eval(self, strategy: Any, metric_values: Any) -> None:
        self.writer.flush()  # type: ignore[no-untyped-call]

    def close(self) -> None:
        self.writer.close()  # type: ignore[no-untyped-call]
