"""model.safetensors: a finished run's weights, which stay when its checkpoints go."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mulki_plugins.errors import MulkiError
from mulki_plugins.files import in_place_of, link_or_copy
from mulki_plugins.models.weights import WEIGHTS
from mulki_plugins.training.checkpoint import Checkpoint, Damaged, checkpoints
from mulki_plugins.training.checksums import digest

FILE = "model.safetensors"


def write_final_weights(run: Path, tasks: int, weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write the weights after the last of so many tasks below the run's folder, under open_clip's names.

    A checkpoint of that moment holds them already: the file then is a second name for the same bytes on the disk.
    """
    if (end := find_end(run, tasks)) is not None:
        _link(end.path / WEIGHTS, run / FILE)
        return
    ready = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}
    with in_place_of(run / FILE) as temporary:
        save_file(ready, temporary, metadata={"format": "pt", **metadata})


def find_end(run: Path, tasks: int) -> Checkpoint | None:
    """The checkpoint with weights at the end of the last task; None if the run keeps none."""
    ends = (c for c in checkpoints(run)[0] if c.moment.tasks == tasks and not c.moment.steps and WEIGHTS in c.files)
    return next(ends, None)


def secure_final_weights(run: Path, tasks: int) -> None:
    """Make sure that the run's folder holds the final weights, from a checkpoint if need be.

    MulkiError if neither is whole; the checkpoints must stay then.
    """
    end = find_end(run, tasks)
    if (run / FILE).is_file() and _is_whole(run / FILE, end):
        return
    if end is None:
        raise MulkiError(f"{run}: has neither an intact {FILE} nor a checkpoint of its end", "nothing was removed")
    try:
        end.verify()
    except Damaged as error:
        raise MulkiError(f"{run}: its final weights are damaged: {error.message}", "nothing was removed") from error
    _link(end.path / WEIGHTS, run / FILE)


def _is_whole(path: Path, end: Checkpoint | None) -> bool:
    """Whether a file holds the weights of a checkpoint, or without one, weights at all."""
    try:
        with safe_open(path, framework="pt") as file:
            return end is None or digest(file.keys(), file.get_tensor) == end.files[WEIGHTS]
    except (OSError, SafetensorError):
        return False


def _link(source: Path, target: Path) -> None:
    with in_place_of(target) as temporary:
        temporary.unlink()
        link_or_copy(source, temporary)
