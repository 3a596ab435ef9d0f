"""The architectures that open_clip knows, read from its folder of configurations without importing it."""

from __future__ import annotations

import functools
from importlib.util import find_spec
from pathlib import Path


@functools.cache
def open_clip_models() -> list[str]:
    """Names such as `ViT-B-16`, sorted; empty where open_clip is not installed."""
    spec = find_spec("open_clip")
    if spec is None or not spec.submodule_search_locations:
        return []
    folder = Path(next(iter(spec.submodule_search_locations))) / "model_configs"
    return sorted(path.stem for path in folder.glob("*.json"))
