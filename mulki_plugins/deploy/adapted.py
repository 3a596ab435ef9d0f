"""A run's model with adapters: merged into a plain file of weights, or with the adapters applied if they cannot be merged."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from mulki_plugins.deploy.source import Source, read_manifest
from mulki_plugins.errors import MulkiError, describe_error
from mulki_plugins.models.adapter import Adapter, apply_adapters, can_merge, merge_adapters, plain_name
from mulki_plugins.models.tensors import read_state
from mulki_plugins.models.weights import WEIGHTS, weight_file
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.registry.guard import guarded_call


def all_merge(entries: Sequence[Mapping[str, Any]]) -> bool:
    """Whether every one of a recipe's adapters can be merged into plain weights."""
    return all(map(can_merge, _adapters(entries)))


def refuse_unmerged(entries: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """MulkiError if one of a recipe's adapters cannot be merged, so that open_clip cannot hold the model."""
    for adapter in _adapters(entries):
        if not can_merge(adapter):
            what = f"{folder}: the adapter {type(adapter).__name__} cannot be merged into plain weights"
            hint = "no other program knows it; use the model with `mulki predict` or `mulki evaluate`"
            raise MulkiError(f"{what}, so open_clip cannot load the model", hint)


def apply_trained(
    source: Source, clip: nn.Module, entries: Sequence[Mapping[str, Any]], state: Mapping[str, Any]
) -> tuple[list[Adapter], set[str]]:
    """Apply a run's adapters to a model of its architecture, let them grow as in the run, and load all weights.

    clip: with the pre-trained weights if the checkpoint leaves some out, else with any; entries: the recipe's adapters; state:
    what a checkpoint keeps beside the weights. Returns the adapters, and the names of
    the model's own weights. MulkiError if an adapter is not installed or the weights do not fit.
    """
    assert source.weights is not None
    adapters = _adapters(entries)
    own = apply_adapters(clip, adapters)
    pretrained = {name: value.clone() for name, value in clip.state_dict().items() if plain_name(name) in own}
    tasks, steps = len(source.learned), 0
    if source.weights.name == WEIGHTS:
        tasks, steps, _ = read_manifest(source.weights.parent)
    for task in range(tasks):  # adapters grow as they did in the run
        for adapter in adapters:
            adapter.before_task(clip, task)
        for adapter in adapters:
            adapter.after_task(clip, task)
    for adapter in adapters if steps else ():
        adapter.before_task(clip, tasks)
    try:
        clip.load_state_dict(_trained_weights(source, pretrained))
    except RuntimeError as error:
        what = f"{source.weights}: the weights do not fit the recipe's adapters: {describe_error(error)}"
        raise MulkiError(what) from error
    for adapter, kept in zip(adapters, state.get("adapters", ()), strict=False):
        adapter.load_state_dict(kept)
    return adapters, own


@contextmanager
def merged_file(
    source: Source, clip: nn.Module, entries: Sequence[Mapping[str, Any]], state: Mapping[str, Any]
) -> Iterator[Path]:
    """A file, gone afterwards, of the checkpoint's weights with the adapters merged into them.

    clip, entries, state: see `apply_trained`. MulkiError if an adapter cannot be merged.
    """
    with _temporary_file(source, merge_adapters(clip, *apply_trained(source, clip, entries, state))) as path:
        yield path


@contextmanager
def own_file(source: Source, clip: nn.Module) -> Iterator[Path]:
    """A file, gone afterwards, of the model's own weights alone, without those of adapters that cannot be merged.

    clip: as for `apply_trained`.
    """
    own = clip.state_dict()
    plain = {plain_name(name): value for name, value in _trained_weights(source, own).items()}
    with _temporary_file(source, {name: value for name, value in plain.items() if name in own}) as path:
        yield path


def _trained_weights(source: Source, pretrained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A run's weights, with those that its checkpoint leaves out taken from the pre-trained ones, by the same names."""
    assert source.weights is not None
    if source.weights.name != WEIGHTS:
        return read_state(weight_file(str(source.weights)))
    from mulki_plugins.training.checkpoint import read_checkpoint  # imports Avalanche, which no finished run needs here
    from mulki_plugins.training.pretrained import completed

    checkpoint = read_checkpoint(source.weights.parent)
    weights: dict[str, Tensor] = completed(checkpoint.weights(), checkpoint.left_out, pretrained, checkpoint.path)
    return weights


@contextmanager
def _temporary_file(source: Source, weights: Mapping[str, Tensor]) -> Iterator[Path]:
    assert source.weights is not None
    known = weight_file(str(source.weights)).known
    ready = {name: value.detach().contiguous().clone() for name, value in weights.items()}
    with tempfile.TemporaryDirectory(prefix="mulki-") as folder:
        path = Path(folder) / source.weights.name
        save_file(ready, path, metadata={"format": "pt", **known.metadata()})
        yield path


def _adapters(entries: Sequence[Mapping[str, Any]]) -> list[Adapter]:
    return [_make(name, options) for entry in entries for name, options in entry.items()]


def _make(name: str, options: Mapping[str, Any]) -> Adapter:
    part = catalog().find("adapter", name)
    made: Adapter = guarded_call(
        f"the adapter {name!r} of {part.provenance} cannot be made", part.load(), **copy.deepcopy(dict(options))
    )
    return made
