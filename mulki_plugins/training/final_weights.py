"""model.safetensors: a finished run's weights, which stay when its checkpoints go."""

from __future__ import annotations

import shlex
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mulki_plugins.errors import MulkiError
from mulki_plugins.files import in_place_of, link_or_copy
from mulki_plugins.models.adapter import can_merge
from mulki_plugins.models.classifier import ClipClassifier
from mulki_plugins.models.weights import FINAL, WEIGHTS
from mulki_plugins.training.checkpoint import Checkpoint, Damaged, checkpoints
from mulki_plugins.training.checksums import digest


def write_final_weights(run: Path, tasks: int, model: ClipClassifier) -> None:
    """Write the weights after the last of so many tasks below the run's folder, under open_clip's names.

    A checkpoint of that moment holds them already: the file then is a second name for the same bytes on the disk. Adapters
    are merged into the weights, which the checkpoint keeps apart. Those that cannot be merged stay beside them, under the names
    that they have in the model; MulkiError if one of them also keeps something outside the model.
    """
    if not model.adapters and (end := find_end(run, tasks)) is not None:
        _link(end.path / WEIGHTS, run / FINAL)
        return
    apart = not all(map(can_merge, model.adapters)) and not any(adapter.state_dict() for adapter in model.adapters)
    weights = model.merged_weights() if model.adapters and not apart else model.clip.state_dict()
    ready = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}
    with in_place_of(run / FINAL) as temporary:
        save_file(ready, temporary, metadata={"format": "pt", **model.weights_metadata})


def find_end(run: Path, tasks: int) -> Checkpoint | None:
    """The checkpoint with weights at the end of the last task; None if the run keeps none."""
    ends = (c for c in checkpoints(run)[0] if c.moment.tasks == tasks and not c.moment.steps and WEIGHTS in c.files)
    return next(ends, None)


def secure_final_weights(run: Path, tasks: int) -> None:
    """Make sure that the run's folder holds the final weights, from a checkpoint if need be.

    MulkiError if neither is whole, or if the checkpoint has weights and adapters apart; the checkpoints must stay then.
    """
    end = find_end(run, tasks)
    apart = end is not None and bool(end.state().get("adapters"))
    if (run / FINAL).is_file() and _is_whole(run / FINAL, None if apart else end):
        return
    if end is None:
        raise MulkiError(f"{run}: has neither an intact {FINAL} nor a checkpoint of its end", "nothing was removed")
    if apart:
        what = f"{run}: has no intact {FINAL}, and its checkpoint has weights and adapters apart"
        raise MulkiError(what, f"nothing was removed; `mulki export {shlex.quote(str(run))} --to DIR` merges them")
    try:
        end.verify()
    except Damaged as error:
        raise MulkiError(f"{run}: its final weights are damaged: {error.message}", "nothing was removed") from error
    _link(end.path / WEIGHTS, run / FINAL)


def _is_whole(path: Path, end: Checkpoint | None) -> bool:
    """Whether a file holds the weights of a checkpoint, or without one, weights at all."""
    try:
        with safe_open(path, framework="pt") as file:
            return digest(file.keys(), file.get_tensor) == end.files[WEIGHTS] if end else bool(file.keys())
    except (OSError, SafetensorError):
        return False


def _link(source: Path, target: Path) -> None:
    with in_place_of(target) as temporary:
        temporary.unlink()
        link_or_copy(source, temporary)
