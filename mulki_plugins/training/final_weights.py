"""model.safetensors: a finished run's weights, which stay when its checkpoints go."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mulki_plugins.errors import MulkiError
from mulki_plugins.files import in_place_of, link_or_copy
from mulki_plugins.models.adapter import can_merge
from mulki_plugins.models.classifier import ClipClassifier
from mulki_plugins.models.head import HEAD, TextHead
from mulki_plugins.models.weights import ADDED, FINAL, FINAL_HEAD, WEIGHTS
from mulki_plugins.training.checkpoint import Checkpoint, Damaged, checkpoints
from mulki_plugins.training.checksums import digest
from mulki_plugins.training.groups import CLIP

CHECKSUM = "sha256"
"""Where a file that no checkpoint has keeps the digest of its tensors, among its metadata."""


def write_final_weights(run: Path, tasks: int, model: ClipClassifier) -> None:
    """Write the weights after the last of so many tasks below the run's folder, under open_clip's names.

    A checkpoint of that moment holds them already: the file then is a second name for the same bytes on the disk. Adapters
    are merged into the weights, which the checkpoint keeps apart, and nothing is left out. Those that cannot be merged stay
    beside them, under the names that they have in the model; MulkiError if one of them also keeps something outside the model.
    What a head keeps is written beside them. Weights that a plugin has added outside of the model are named in the metadata.
    """
    if not isinstance(model.head, TextHead):
        _write_head(run, model.head.state_dict())
    added = _added(model.state_dict())
    if not model.adapters and (end := find_end(run, tasks)) is not None and not end.left_out:
        _take_over(end, run, added)
        return
    apart = not all(map(can_merge, model.adapters)) and not any(adapter.state_dict() for adapter in model.adapters)
    weights = model.merged_weights() if model.adapters and not apart else model.clip.state_dict()
    ready = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}
    with in_place_of(run / FINAL) as temporary:
        save_file(ready, temporary, metadata={"format": "pt", **model.weights_metadata, **_checksum(ready), **added})


def _added(names: Iterable[str]) -> dict[str, str]:
    """The entry that names what a plugin has added to the model, by the names of all weights; none if it added nothing."""
    added = [name for name in names if not name.startswith((CLIP, HEAD))]
    return {ADDED: json.dumps(added)} if added else {}


def _take_over(end: Checkpoint, run: Path, added: Mapping[str, str]) -> None:
    """Write the weights that a checkpoint holds, with this entry; without one they get a second name."""
    if not added:
        _link(end.path / WEIGHTS, run / FINAL)
        return
    with safe_open(end.path / WEIGHTS, framework="pt") as file:
        metadata = file.metadata() or {}
    with in_place_of(run / FINAL) as temporary:
        save_file(end.weights(), temporary, metadata={**metadata, **added})


def _checksum(weights: Mapping[str, Tensor]) -> dict[str, str]:
    return {CHECKSUM: digest(weights, weights.__getitem__)}


def _write_head(run: Path, state: Mapping[str, Tensor]) -> None:
    ready = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    with in_place_of(run / FINAL_HEAD) as temporary:
        save_file(ready, temporary, metadata={"format": "pt", **_checksum(ready)})


def find_end(run: Path, tasks: int) -> Checkpoint | None:
    """The checkpoint with weights at the end of the last task; None if the run keeps none."""
    ends = (c for c in checkpoints(run)[0] if c.moment.tasks == tasks and not c.moment.steps and WEIGHTS in c.files)
    return next(ends, None)


def secure_final_weights(run: Path, tasks: int) -> None:
    """Make sure that the run's folder holds the final weights, from a checkpoint if need be.

    MulkiError if neither is whole, or if the checkpoint has weights and adapters apart, or leaves out weights that are as
    pre-trained; the checkpoints must stay then.
    """
    end = find_end(run, tasks)
    _secure_head(run, end)
    apart = ""
    if end is not None:
        apart = "has weights and adapters apart" if end.state().get("adapters") else ""
        apart = apart or ("leaves out weights that are as pre-trained" if end.left_out else "")
    if (run / FINAL).is_file() and _is_whole(run / FINAL, None if apart else end):
        return
    if end is None:
        raise MulkiError(f"{run}: has neither an intact {FINAL} nor a checkpoint of its end", "nothing was removed")
    if apart:
        what = f"{run}: has no intact {FINAL}, and its checkpoint {apart}"
        raise MulkiError(what, f"nothing was removed; `mulki export {shlex.quote(str(run))} --to DIR` writes the model")
    try:
        end.verify()
    except Damaged as error:
        raise MulkiError(f"{run}: its final weights are damaged: {error.message}", "nothing was removed") from error
    _take_over(end, run, _added(end.state().get("model", {})))


def _secure_head(run: Path, end: Checkpoint | None) -> None:
    """Make sure that the run's folder holds what its head has learned, if a checkpoint says that there is one."""
    model = end.state().get("model", {}) if end is not None else {}
    head = {name.removeprefix(HEAD): value for name, value in model.items() if name.startswith(HEAD)}
    if head and not ((run / FINAL_HEAD).is_file() and _is_whole(run / FINAL_HEAD, None)):
        _write_head(run, head)


def _is_whole(path: Path, end: Checkpoint | None) -> bool:
    """Whether a file holds the weights of a checkpoint, or without one, those that its own checksum belongs to."""
    try:
        with safe_open(path, framework="pt") as file:
            checksum = end.files[WEIGHTS] if end else (file.metadata() or {}).get(CHECKSUM)
            return digest(file.keys(), file.get_tensor) == checksum if checksum else bool(file.keys())
    except (OSError, SafetensorError):
        return False


def _link(source: Path, target: Path) -> None:
    with in_place_of(target) as temporary:
        temporary.unlink()
        link_or_copy(source, temporary)
