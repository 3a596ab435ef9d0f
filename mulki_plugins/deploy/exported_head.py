"""The head of an exported model: what it has learned, how it is made again, and Python that answers like it without MulKI."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from mulki_plugins.deploy.head import load_kept, make_head
from mulki_plugins.deploy.source import Source
from mulki_plugins.errors import MulkiError, describe_error
from mulki_plugins.files import write_text
from mulki_plugins.models.head import Head
from mulki_plugins.models.tensors import read_state
from mulki_plugins.models.weights import weight_file

DESCRIPTION, STATE, CODE = "head.json", "head.safetensors", "head.py"
FILES = (DESCRIPTION, STATE, CODE)


def check_portable(source: Source, head: Head, *, onnx: bool) -> None:
    """MulkiError if a run's model cannot be exported with its head."""
    name = type(head).__name__
    if not _portable(head):
        what = f"{source.folder}: the head {name} answers for this model, and open_clip has no place for a head"
        hint = "classify images with `mulki predict`, which uses it; a head that sets `portable` can be exported"
        raise MulkiError(what, hint)
    if not _source_of(head).is_file():
        what = f"the package of the head {name} lacks {_source_of(head).name}, which `portable` names"
        raise MulkiError(what, f"it belongs beside {type(head).__module__}, and into the package's data")
    if onnx:
        what = f"--onnx: {source.folder}: the head {name} answers for this model, and it is not a part of image.onnx"
        raise MulkiError(what, "export it without --onnx")


def write_head(folder: Path, head: Head, chosen: Mapping[str, Any], begun: Sequence[int]) -> None:
    """Write what a head needs to answer. chosen: its name and options, as in the recipe. begun: the tasks it has grown for."""
    [(name, options)] = chosen.items()
    described = {"name": name, "options": dict(options), "reads_pooled": head.reads_pooled, "begun": list(begun)}
    write_text(folder / DESCRIPTION, json.dumps(described, indent=2) + "\n")
    kept = {key: value.cpu().contiguous() for key, value in head.state_dict().items() if key in head.portable_state}
    save_file(kept, folder / STATE)
    write_text(folder / CODE, _source_of(head).read_text("utf-8"))


def _source_of(head: Head) -> Path:
    module = importlib.util.find_spec(type(head).__module__)
    assert module is not None
    assert module.origin is not None
    return Path(module.origin).with_name(_portable(head))


def _portable(head: Head) -> str:
    """The file that a head's own class names: that of the class it derives from may answer in another way."""
    return str(vars(head).get("portable") or vars(type(head)).get("portable", ""))


def exported_head(source: Source, width: Callable[[Head], int]) -> Head | None:
    """The head of an exported folder; None if it has none. MulkiError if it is damaged, or the head is not installed."""
    path = source.folder / DESCRIPTION
    if not path.is_file():
        chosen = source.recipe.model.options.get("head", {}) if source.recipe else {}
        if chosen and "text" not in chosen:
            raise MulkiError(f"{path}: no such file; without it the model lacks its head", "export it again")
        return None
    try:
        described = json.loads(path.read_text("utf-8"))
        name, options = str(described["name"]), dict(described["options"])
        begun = [int(task) for task in described.get("begun", range(len(source.tasks)))]
        if not set(begun) <= set(range(len(source.tasks))):
            raise ValueError(f"begun: the model has {len(source.tasks)} tasks")
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise MulkiError(f"{path}: damaged: {describe_error(error)}", "export the model again") from error
    head = make_head(name, options)
    if not (source.folder / STATE).is_file():
        raise MulkiError(
            f"{source.folder / STATE}: no such file; without it the model lacks its head", "export it again"
        )
    load_kept(head, read_state(weight_file(str(source.folder / STATE))), begun, source, width)
    return head.eval()
