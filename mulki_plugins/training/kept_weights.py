"""The weights after each task, kept beside the checkpoints for as long as the run: `mulki extend` tests them on new tasks.

`weights/task-02-digits/` is a checkpoint without what a training needs to go on: the model alone. Its file of weights is a
hard link to that of the checkpoint of the task's end, and takes room of its own only when that one is gone.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mulki_plugins.files import link_or_copy
from mulki_plugins.models.weights import WEIGHTS
from mulki_plugins.training.checkpoint import (
    STATE,
    Checkpoint,
    Damaged,
    OtherFormat,
    new_folder,
    read_checkpoint,
    write_manifest,
    write_state,
)

FOLDER = "weights"


def keep_weights(run: Path, end: Checkpoint, state: Mapping[str, Any]) -> None:
    """Keep the weights of a task's end. state: the checkpoint's, of which the model's and the adapters' part is kept."""
    model = {key: state[key] for key in ("model", "adapters") if key in state}
    with new_folder(run / FOLDER, end.path.name) as part:
        link_or_copy(end.path / WEIGHTS, part / WEIGHTS)
        files = {WEIGHTS: end.files[WEIGHTS], STATE: write_state(part / STATE, model)}
        write_manifest(part, end.moment, None, files, {"learned": end.run["learned"]}, end.left_out)


def kept_weights(run: Path) -> dict[int, Checkpoint]:
    """The kept weights by the number of tasks learned; without those whose manifest is damaged."""
    kept = {}
    folder = run / FOLDER
    for path in sorted(folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else ():
        if path.is_dir() and not path.is_symlink() and not path.name.startswith("."):
            with suppress(Damaged, OtherFormat):
                weights = read_checkpoint(path)
                kept[weights.moment.tasks] = weights
    return kept
