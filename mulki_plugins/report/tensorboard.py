"""TensorBoard events under stable tags: curves, the matrix, images that were classified wrong, the recipe, hyper-parameters.

`train/loss/<term>`, `eval/accuracy/<task>`, `eval/mean`, `metrics/<name>`, `cost/<what>`, `matrix`, `wrong/<task>`. A run is
named by its folder below `--logdir`, such as `mtil/mulki-plus/seed-0`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from avalanche.evaluation.metric_results import MetricValue
from avalanche.logging import BaseLogger
from matplotlib.figure import Figure
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from torch.utils.tensorboard import SummaryWriter

from mulki_plugins.characters import printable
from mulki_plugins.report.folder import settings_at
from mulki_plugins.report.plots import drawing
from mulki_plugins.report.predictions import Answers
from mulki_plugins.report.result import FILE
from mulki_plugins.report.wrong_images import captions, choose_wrong, draw_sheet


class Tested(Protocol):
    """A task's test set in an Avalanche stream."""

    task_name: str
    task_label: int
    images: Any


class Named(Protocol):
    """The classes of a task."""

    @property
    def class_names(self) -> Sequence[str]: ...


class Classifier(Protocol):
    """A model that knows the classes of each task."""

    @property
    def prompts(self) -> Sequence[Named]: ...


class Evaluated(Protocol):
    """An Avalanche strategy after the evaluation of a test set."""

    experience: Tested
    model: Classifier
    learned: set[int]


class TensorBoardLogger(BaseLogger):
    """Writes scalars and figures under the names they are logged with, and what the run's folder says about the run."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        earlier = set(_event_files(folder))
        self.writer: Any = SummaryWriter(str(folder))
        self._new_files = set(_event_files(folder)) - earlier
        if not earlier:  # else an earlier part of this run has written it
            self._describe_run()

    def _describe_run(self) -> None:
        """The recipe as text, and the settings as hyper-parameters. TensorBoard groups the seeds of one folder."""
        with suppress(OSError, ValueError):
            recipe = (self.folder / "recipe.yaml").read_text("utf-8")
            lines = [
                f"    {printable(line)}" for line in recipe.splitlines()
            ]  # indented: code to Markdown, whatever it says
            self.writer.add_text("recipe", "\n".join([f"{printable(str(self.folder))}", "", *lines]), 0)
        if (settings := settings_at(self.folder)) is not None:
            parent, seed = self.folder.absolute().parent, self.folder.name
            values = {"strategy": parent.name, "seed": seed.removeprefix("seed-"), **settings}
            plain = {printable(name): _plain(value) for name, value in values.items() if value is not None}
            group = printable(f"{parent.parent.name}/{parent.name}")
            self.writer._get_file_writer().add_summary(hparams_pb(plain, trial_id=group))

    def log_single_metric(self, name: str, value: Any, x_plot: int) -> None:
        if isinstance(value, Figure):
            with drawing():
                self.writer.add_figure(name, value, x_plot)
        else:
            self.writer.add_scalar(name, float(value), x_plot)

    def after_eval_exp(self, strategy: Evaluated, metric_values: Sequence[MetricValue]) -> None:
        """Show a few wrongly classified images of a task when it has just been learned, and of each at the end."""
        name = strategy.experience.task_name
        tag = f"eval/accuracy/{name}"
        origin: Any = next((value.origin for value in metric_values if value.name == tag), None)
        if name not in getattr(origin, "answers", {}):  # another evaluation than that of a run
            return
        task, learned, tasks = strategy.experience.task_label, len(strategy.learned), strategy.model.prompts
        if learned == len(tasks) - len(getattr(strategy, "held_out", ())) or task == learned - 1:
            self._show_wrong(strategy.experience, origin.answers[name], tasks, learned)

    def _show_wrong(self, experience: Tested, answers: Answers, tasks: Sequence[Named], learned: int) -> None:
        names = [name for prompts in tasks for name in prompts.class_names]
        first = sum(len(prompts.class_names) for prompts in tasks[: experience.task_label])
        labels = np.asarray(experience.images.targets) + first
        images, shown = [], []
        for index in choose_wrong(answers, labels):
            with suppress(Exception):  # it was readable a moment ago; the others are shown without it
                images.append(experience.images.images[index][0].convert("RGB"))
                shown.append(index)
        if images:
            sheet = draw_sheet(images, captions(answers, shown, labels, names))
            self.writer.add_image(f"wrong/{printable(experience.task_name)}", sheet, learned, dataformats="HWC")

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
        if self.writer.file_writer is None:  # already closed; it would begin another file
            return
        end = HParamsPluginData(session_end_info=SessionEndInfo(status=self._status()))
        summary = Summary()
        summary.value.add(
            tag=metadata.SESSION_END_INFO_TAG,
            metadata=metadata.create_summary_metadata(end),
            tensor=metadata.NULL_TENSOR,
        )
        self.writer._get_file_writer().add_summary(summary)
        self.writer.close()

    def _status(self) -> Any:
        """How the run ended, by its result.json."""
        status = ""
        with suppress(OSError, ValueError, AttributeError):
            status = json.loads((self.folder / FILE).read_text("utf-8")).get("status")
        known = {"complete": api_pb2.STATUS_SUCCESS, "failed": api_pb2.STATUS_FAILURE}
        return known.get(status, api_pb2.STATUS_UNKNOWN)


def _plain(value: Any) -> bool | int | float | str:
    """A setting as a value that the hyper-parameters can hold."""
    if isinstance(value, (bool, int, float)):
        return value
    return printable(", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value))


def _event_files(folder: Path) -> list[Path]:
    return [path for path in folder.glob("events.out.tfevents.*") if path.is_file() and not path.is_symlink()]
