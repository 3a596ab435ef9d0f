"""The logger `mlflow`: a run of MLflow for each run of MulKI, in an experiment for each recipe."""

from __future__ import annotations

import hashlib
import posixpath
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from avalanche.logging import BaseLogger
from matplotlib.figure import Figure

from mulki_trackers.run import RunFolder, load

BATCH = 500
"""Values sent at once; a server takes 1,000 at most."""
MOST = 250
"""Characters of a name."""
LONGEST = 500
"""Characters of a parameter's value."""


class MlflowLogger(BaseLogger):
    """Collects values and sends them in batches, at the latest after an evaluation."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._mlflow = load("mlflow")
        self._client = self._mlflow.MlflowClient()
        self._run_folder = RunFolder(folder)
        self._waiting: list[Any] = []
        self._closed = False
        known = self._run_folder.read_id("mlflow")
        self._run_id: str = known or self._begin()
        if known:
            self._client.update_run(known, status="RUNNING")

    def _begin(self) -> str:
        recipe, client = self._run_folder.recipe, self._client
        experiment = str(recipe.get("name", "mulki"))
        found = client.get_experiment_by_name(experiment)
        number = client.create_experiment(experiment) if found is None else found.experiment_id
        tags = {"group": self._run_folder.group, "folder": str(self._run_folder.path.absolute())}
        run_id: str = client.create_run(number, run_name=self._run_folder.name, tags=tags).info.run_id
        self._run_folder.keep_id("mlflow", run_id)
        for name, value in flatten(recipe):
            client.log_param(run_id, allowed(name), str(value)[:LONGEST])
        return run_id

    def log_single_metric(self, name: str, value: Any, x_plot: int) -> None:
        if isinstance(value, Figure):
            self._client.log_figure(self._run_id, value, f"{allowed(name)}-{x_plot:03d}.png")
            return
        now = int(1000 * time.time())
        self._waiting.append(self._mlflow.entities.Metric(allowed(name), float(value), now, x_plot))
        if len(self._waiting) >= BATCH:
            self._send()

    def after_eval(self, strategy: Any, metric_values: Any) -> None:
        self._send()

    def _send(self) -> None:
        waiting, self._waiting = self._waiting, []
        if waiting:
            self._client.log_batch(self._run_id, metrics=waiting)

    def state_dict(self) -> dict[str, int]:
        """Nothing of its own; but what a checkpoint has seen is sent before it is written."""
        self._send()
        return {}

    def close(self) -> None:
        """Called when the run ends, also when it failed."""
        if not self._closed:
            self._closed = True
            self._send()
            self._client.set_terminated(self._run_id, "FINISHED" if self._run_folder.complete else "FAILED")


def allowed(name: str) -> str:
    """The name with a code for each character that MLflow refuses: `eval/accuracy/花` -> `eval/accuracy/_82b1_`."""
    safe = "".join(c if c.isascii() and (c.isalnum() or c in "-_. /") else f"_{ord(c):x}_" for c in name)
    if posixpath.normpath(safe) != safe or safe.startswith((".", "/")):  # no path to MLflow
        safe = safe.replace("/", "_2f_").replace(".", "_2e_")
    if len(safe) > MOST:
        safe = f"{safe[: MOST - 9]}_{hashlib.sha256(name.encode('utf-8', 'backslashreplace')).hexdigest()[:8]}"
    return safe or "_"


def flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested data, each with its dotted path."""
    if isinstance(value, (dict, list)) and value:
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from flatten(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value
