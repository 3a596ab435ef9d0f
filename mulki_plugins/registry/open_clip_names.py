"""The architectures that open_clip knows, and the tags of their weights, read from its files without importing it."""

from __future__ import annotations

import ast
import functools
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mulki_plugins.registry.parts import Part, Provenance

QUICKGELU = "-quickgelu"
"""What open_clip adds to the name of an architecture that is built with QuickGELU in place of GELU."""


@functools.cache
def open_clip_models() -> list[str]:
    """Names such as `ViT-B-16`, sorted; empty where open_clip is not installed."""
    folder = open_clip_folder()
    return sorted(path.stem for path in (folder / "model_configs").glob("*.json")) if folder else []


def open_clip_config(name: str) -> dict[str, Any]:
    """What open_clip builds under that name; empty where it has no such architecture."""
    folder = open_clip_folder()
    if folder is None or name not in open_clip_models():
        return {}
    config: dict[str, Any] = json.loads((folder / "model_configs" / f"{name}.json").read_text("utf-8"))
    return config


def open_clip_part(name: str) -> Part:
    """An architecture of open_clip as a part that a recipe can name."""
    return Part(
        kind="model",
        name=name,
        target="mulki_plugins.models.load:open_clip_model",
        summary="an architecture of open_clip",
        provenance=Provenance(distribution="open_clip_torch", version=""),
        defaults={"name": name},
        options={
            "pretrained": "a tag of open_clip, a file of weights, the folder of a run, or random for random weights",
            "quickgelu": "for a file that does not say it: trained with QuickGELU, not GELU; null for what the name says",
            "mean": "for such a file: the mean of its images' red, green and blue; null for the architecture's usual one",
            "std": "for such a file: the standard deviation; null for the architecture's usual one",
            "interpolation": "for such a file: how its images were resized; null for the architecture's usual way",
            "resize_mode": "for such a file: to which side they were resized; null for the architecture's usual way",
        },
        check="mulki_plugins.models.check:check_open_clip",
    )


def twin(name: str) -> str:
    """The same architecture with the other activation: `ViT-B-16` and `ViT-B-16-quickgelu`."""
    return name.removesuffix(QUICKGELU) if name.endswith(QUICKGELU) else name + QUICKGELU


def open_clip_tags(name: str) -> dict[str, str]:
    """The tags of the weights that fit an architecture, and for each the name under which open_clip lists it.

    These are the tags of the name itself and of its twin, which has the same weights.
    """
    return {tag: other for other in (twin(name), name) for tag in _tags().get(other, ())}


def tags_are_known() -> bool:
    """Whether the table of tags could be read; another version of open_clip may write it in another way."""
    return bool(_tags())


@functools.cache
def open_clip_folder() -> Path | None:
    """Where open_clip is installed; None where it is not."""
    spec = find_spec("open_clip")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


@functools.cache
def _tags() -> dict[str, list[str]]:
    """The table in open_clip's `pretrained.py`: for each architecture its tags."""
    folder = open_clip_folder()
    try:
        module = ast.parse((folder / "pretrained.py").read_text("utf-8")) if folder else ast.Module([], [])
        tables: dict[str, ast.expr] = {}
        for node in module.body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                tables[node.targets[0].id] = node.value
        whole = _entries(tables["_PRETRAINED"], tables)
        entries = {name: _entries(value, tables) for name, value in whole.items()}
    except (OSError, SyntaxError, LookupError, ValueError):
        return {}
    for name, tags in list(entries.items()):  # as open_clip itself does at the end of its table
        if quick := {tag: value for tag, value in tags.items() if _is_quick(value)}:
            entries[name + QUICKGELU] = quick
    return {name: list(tags) for name, tags in entries.items()}


def _entries(node: ast.expr, tables: dict[str, ast.expr]) -> dict[str, ast.expr]:
    """The items of a dictionary that is written as `{...}`, as `dict(...)` or as the name of one."""
    if isinstance(node, ast.Name):
        return _entries(tables[node.id], tables)
    if isinstance(node, ast.Dict):
        pairs = [
            (ast.literal_eval(key) if key else None, value) for key, value in zip(node.keys, node.values, strict=True)
        ]
    elif isinstance(node, ast.Call) and not node.args:
        pairs = [(keyword.arg, keyword.value) for keyword in node.keywords]
    else:
        raise ValueError
    found: dict[str, ast.expr] = {}
    for key, value in pairs:
        found |= _entries(value, tables) if key is None else {key: value}
    return found


def _is_quick(node: ast.expr) -> bool:
    keywords = node.keywords if isinstance(node, ast.Call) else []
    return any(k.arg == "quick_gelu" and isinstance(k.value, ast.Constant) and bool(k.value.value) for k in keywords)
