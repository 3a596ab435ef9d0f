"""A checkpoint of a model with adapters, which keeps weights and adapters apart: merged into a plain file of weights."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from mulki_plugins.deploy.source import Source, read_manifest
from mulki_plugins.errors import MulkiError, describe_error
from mulki_plugins.models.adapter import Adapter, apply_adapters, merge_adapters, plain_name
from mulki_plugins.models.weights import weight_file
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.registry.guard import guarded_call
from mulki_plugins.training.checkpoint import read_checkpoint
from mulki_plugins.training.pretrained import completed


@contextmanager
def merged_file(
    source: Source, clip: nn.Module, entries: Sequence[Mapping[str, Any]], state: Mapping[str, Any]
) -> Iterator[Path]:
    """A file, gone afterwards, of the checkpoint's weights with the adapters merged into them.

    clip: the architecture, with the pre-trained weights if the checkpoint leaves some out, else with any; entries: the
    recipe's adapters; state: what the checkpoint keeps beside the weights. MulkiError if an adapter is not installed or cannot
    be merged.
    """
    assert source.weights is not None
    adapters = [_make(name, options) for entry in entries for name, options in entry.items()]
    own = apply_adapters(clip, adapters)
    checkpoint = read_checkpoint(source.weights.parent)
    pretrained = {name: value.clone() for name, value in clip.state_dict().items() if plain_name(name) in own}
    tasks, steps, _ = read_manifest(source.weights.parent)
    for task in range(tasks):  # adapters grow as they did in the run
        for adapter in adapters:
            adapter.before_task(clip, task)
        for adapter in adapters:
            adapter.after_task(clip, task)
    for adapter in adapters if steps else ():
        adapter.before_task(clip, tasks)
    file = weight_file(str(source.weights))
    try:
        clip.load_state_dict(completed(checkpoint.weights(), checkpoint.left_out, pretrained, checkpoint.path))
    except RuntimeError as error:
        what = f"{source.weights}: the weights do not fit the recipe's adapters: {describe_error(error)}"
        raise MulkiError(what) from error
    for adapter, kept in zip(adapters, state.get("adapters", ()), strict=False):
        adapter.load_state_dict(kept)
    merged = {name: value.detach().contiguous().clone() for name, value in merge_adapters(clip, adapters, own).items()}
    with tempfile.TemporaryDirectory(prefix="mulki-") as folder:
        path = Path(folder) / source.weights.name
        save_file(merged, path, metadata={"format": "pt", **file.known.metadata()})
        yield path


def _make(name: str, options: Mapping[str, Any]) -> Adapter:
    part = catalog().find("adapter", name)
    made: Adapter = guarded_call(
        f"the adapter {name!r} of {part.provenance} cannot be made", part.load(), **copy.deepcopy(dict(options))
    )
    return made
