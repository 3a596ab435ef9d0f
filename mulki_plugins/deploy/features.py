"""The text features of a run's classes: read from an export, or computed once and kept in the cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from attrs import frozen
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from mulki_plugins.deploy.model import DeployedClip, class_keys
from mulki_plugins.deploy.source import Source
from mulki_plugins.errors import MulkiError, describe_error
from mulki_plugins.files import cache_folder, write_bytes
from mulki_plugins.models.text import HasPrompts

FILE = "text_features.safetensors"
"""In an export: `text.<task>` [C, d] and `key.<task>` [C] for each task's index."""
_WORTH_CACHING = 500
"""Sentences: fewer are encoded as fast as a file is read."""


@frozen(eq=False)
class TextFeatures:
    """The features of a task's classes."""

    text: Tensor
    """[C, d], unit norm."""
    keys: tuple[int, ...]
    """Equal for classes that the model cannot tell apart, also across tasks."""


def compute_features(model: DeployedClip, task: HasPrompts) -> TextFeatures:
    """The features of a task's classes over all its templates."""
    keys = class_keys(model, task.class_names, task.templates)
    return TextFeatures(model.encode_classes(task.class_names, task.templates), tuple(keys.tolist()))


def text_features(source: Source, model: DeployedClip, indices: Sequence[int]) -> dict[int, TextFeatures]:
    """The features of some of a source's tasks by index. MulkiError if an export's file is damaged."""
    if source.exported:
        return _read(source.folder / FILE, source, indices, model)
    tasks = {i: source.tasks[i] for i in indices}
    if sum(len(task.class_names) * len(task.templates) for task in tasks.values()) < _WORTH_CACHING:
        return {i: compute_features(model, task) for i, task in tasks.items()}
    kept = cache_folder() / "text-features" / f"{_fingerprint(source, indices, model)}.safetensors"
    if kept.is_file():
        try:
            return _read(kept, source, indices, model)
        except MulkiError:
            pass  # damaged: computed again
    features = {i: compute_features(model, task) for i, task in tasks.items()}
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(kept, save(as_tensors(features)))
    except OSError:
        pass  # a cache that cannot be written costs only time
    return features


def as_tensors(features: dict[int, TextFeatures]) -> dict[str, Tensor]:
    """The content of a file of text features."""
    from torch import tensor

    tensors = {f"text.{i}": each.text.float().cpu().contiguous() for i, each in features.items()}
    return tensors | {f"key.{i}": tensor(each.keys) for i, each in features.items()}


def _read(path: Path, source: Source, indices: Sequence[int], model: DeployedClip) -> dict[int, TextFeatures]:
    try:
        tensors = load_file(path)
        features = {}
        for i in indices:
            text, keys = tensors[f"text.{i}"], tensors[f"key.{i}"]
            if text.ndim != 2 or not len(text) == len(keys) == len(source.tasks[i].class_names):
                raise ValueError(f"task {i} has {len(text)} rows for {len(source.tasks[i].class_names)} classes")
            features[i] = TextFeatures(text.to(model.device), tuple(keys.tolist()))
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise MulkiError(
            f"{path}: the text features cannot be read: {describe_error(error)}", "export it again"
        ) from error
    return features


def _fingerprint(source: Source, indices: Sequence[int], model: DeployedClip) -> str:
    """Changes with the weights, the sentences, and how they are computed."""
    assert source.recipe is not None
    options = source.recipe.model.options
    place = source.weights or Path(str(options.get("pretrained") or ""))  # a file, or the folder of a run
    files = [place, *sorted(place.glob("*.safetensors"))] if place.name else []
    weights = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]
    texts = [[list(source.tasks[i].class_names), list(source.tasks[i].templates)] for i in indices]
    described = [weights, source.recipe.model.name, options, texts, list(indices), source.precision, model.device.type]
    return hashlib.sha256(json.dumps(described, default=str).encode()).hexdigest()[:32]
