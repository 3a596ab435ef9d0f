"""The logger `wandb`: a run of Weights & Biases for each run of MulKI."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from avalanche.logging import BaseLogger
from matplotlib.figure import Figure

from mulki_trackers.run import RunFolder, load

TRAINING, TASKS = "train/iteration", "tasks_learned"
"""The x-axes: the number of training iterations for `train/…`, the number of tasks learned for all else."""


class WandbLogger(BaseLogger):
    """Sends every value under its own name, with an x-axis of its own: W&B's one step counter would mix the two."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._wandb = load("wandb")
        self._run_folder = RunFolder(folder)
        self._run: Any = self._wandb.init(  # not with `dir=folder`: it makes links, and a run's folder must hold none
            name=self._run_folder.name, group=self._run_folder.group, config=self._run_folder.recipe,
            id=self._run_folder.read_id("wandb"), resume="allow",
        )  # fmt: skip
        self._run_folder.keep_id("wandb", self._run.id)
        for axis, names in ((TASKS, "*"), (TRAINING, "train/*")):
            self._run.define_metric(axis, hidden=True)
            self._run.define_metric(names, step_metric=axis)

    def log_single_metric(self, name: str, value: Any, x_plot: int) -> None:
        axis = TRAINING if name.startswith("train/") else TASKS
        shown = self._wandb.Image(value) if isinstance(value, Figure) else float(value)
        self._run.log({name: shown, axis: x_plot})

    def close(self) -> None:
        """Called when the run ends, also when it failed."""
        if self._run is not None:
            self._run.finish(exit_code=0 if self._run_folder.complete else 1)
            self._run = None
