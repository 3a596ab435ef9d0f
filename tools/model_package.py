"""Writes a model that was pre-trained here as a package: once it is installed, recipes know the model by its name.

`tools/pretrain_tiny.py --model` uses it for every model but the bundled one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "{name}"
version = "1.0.0"
description = "A model for MulKI: {summary}"
requires-python = ">=3.10"
dependencies = ["mulki>=0.1"]

[project.entry-points.mulki]
{module} = "{module}.hooks"

[tool.setuptools]
packages = ["{module}"]

[tool.setuptools.package-data]
{module} = ["*.json", "*.gz", "*.safetensors"]
"""
HOOKS = '''\
"""Registers {name}."""

from mulki_plugins import hookimpl


@hookimpl
def mulki_register(register):
    register.model("{name}", "{module}.model:load", summary="{summary}")
'''
MODEL = '''\
"""{name}: {summary}."""

import json
from pathlib import Path

import torch
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import load_file

from mulki_plugins.models.load import LoadedClip

HERE = Path(__file__).parent


def load() -> LoadedClip:
    settings = json.loads((HERE / "{name}.json").read_text())
    with torch.random.fork_rng(devices=[]):  # random weights that are replaced at once
        clip = CLIP(**settings)
    clip.load_state_dict(load_file(HERE / "{name}.safetensors"))
    return LoadedClip(
        clip=clip,
        tokenizer=SimpleTokenizer(
            bpe_path=str(HERE / "{name}-merges.txt.gz"), context_length=settings["text_cfg"]["context_length"]
        ),
        image_size=settings["vision_cfg"]["image_size"],
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        config=settings,
    )
'''


def module_of(name: str) -> str:
    """The name of the package's module."""
    return name.replace("-", "_")


def write_package(folder: Path, name: str, summary: str) -> Path:
    """Write all of the package but the model's own three files. Returns the folder in which those belong."""
    module = folder / module_of(name)
    module.mkdir(parents=True, exist_ok=True)
    words = {"name": name, "module": module.name, "summary": summary}
    (folder / "pyproject.toml").write_text(PROJECT.format(**words))
    (module / "__init__.py").write_text(f'"""{name}: {summary}."""\n')
    (module / "hooks.py").write_text(HOOKS.format(**words))
    (module / "model.py").write_text(MODEL.format(**words))
    return module


def write_config(folder: Path, name: str, settings: Mapping[str, Any]) -> None:
    """Write the arguments of open_clip's class."""
    (folder / f"{name}.json").write_text(json.dumps(settings, indent=2) + "\n")
