"""The model's weights after each task, as safetensors: open_clip's own names, readable by `model.pretrained`."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save

from mulki_plugins.models.classifier import ClipClassifier
from mulki_plugins.report.folder import write_bytes


def save_weights(model: ClipClassifier, folder: Path, task: int, name: str, keep: int) -> None:
    """Write `checkpoints/task-<n>-<name>.safetensors`, then remove all but the newest `keep` of this run's.

    task: how many tasks have been learned. An older file is removed only after the newer one has been written whole.
    """
    if keep == 0:
        return
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    weights = {key: value.detach().cpu().contiguous().clone() for key, value in model.clip.state_dict().items()}
    safe = "".join(c if c.isalnum() or c in "-_" else "-" for c in name)
    write_bytes(checkpoints / f"task-{task:02d}-{safe}.safetensors", save(weights, metadata={"format": "pt"}))
    for old in sorted(checkpoints.glob("task-*.safetensors"), key=lambda p: int(p.name.split("-")[1]))[:-keep]:
        old.unlink()
