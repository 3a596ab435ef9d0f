"""The head of a run's model, with what it has learned: from the run's own file, or from a checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mulki_plugins.deploy.source import Source, read_manifest
from mulki_plugins.errors import MulkiError, describe_error
from mulki_plugins.models.head import HEAD, Head
from mulki_plugins.models.tensors import read_state
from mulki_plugins.models.weights import FINAL, FINAL_HEAD, weight_file
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.registry.guard import guarded_call


def head_of(source: Source, state: Mapping[str, Any], width: Callable[[Head], int]) -> Head | None:
    """The head of a run's model; None for the default, which compares images with sentences.

    state: what a checkpoint keeps beside its weights. width: finds the width of the features that a head reads.
    MulkiError if the head is not installed, or does not fit what was kept.
    """
    chosen = source.recipe.model.options.get("head", {}) if source.recipe else {}
    for name, options in chosen.items():
        assert source.weights is not None  # only a run without a head trains nothing at all
        head = make_head(name, options)
        at_end = source.weights.name == FINAL
        kept = _of_file(source.weights.parent / FINAL_HEAD) if at_end else _of_checkpoint(state)
        load_kept(head, kept, begun_tasks(source), source, width)
        return head.eval()
    return None


def begun_tasks(source: Source) -> list[int]:
    """The tasks that a run had begun when its weights were written, for which its head has grown."""
    if source.weights is None or source.weights.name == FINAL:
        return list(range(len(source.tasks)))
    tasks, steps, _ = read_manifest(source.weights.parent)
    return list(range(tasks + bool(steps)))


def _of_file(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise MulkiError(
            f"{path}: no such file; without it the model lacks its head", "run it again, or copy the file too"
        )
    return read_state(weight_file(str(path)))


def _of_checkpoint(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {n.removeprefix(HEAD): v for n, v in state.get("model", {}).items() if n.startswith(HEAD)}


def make_head(name: str, options: Mapping[str, Any]) -> Head:
    """A head by its name. MulkiError if it is not installed or its options are wrong."""
    part = catalog().find("head", name)
    what = f"the head {name!r} of {part.provenance} cannot be made"
    head: Head = guarded_call(what, part.load(), **copy.deepcopy(dict(options)))
    return head


def load_kept(
    head: Head, kept: dict[str, Tensor], begun: Iterable[int], source: Source, width: Callable[[Head], int]
) -> None:
    """Let a head grow as it did in the run, and load what was kept. begun: the tasks. MulkiError if that does not fit."""
    with torch.random.fork_rng(devices=[]):
        if type(head).begin is not Head.begin:
            head.begin(width(head))
        for task in begun:
            head.before_task(task, len(source.tasks[task].class_names))
    head.make_room(kept)
    try:
        head.load_state_dict(kept)
    except RuntimeError as error:
        raise MulkiError(
            f"{source.folder}: what was kept of the head does not fit it: {describe_error(error)}"
        ) from error
