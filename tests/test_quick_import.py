"""A prediction imports what its model needs, and what it left out is there for whoever asks later."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mulki_plugins.deploy.quick_import import architecture_of

CODE = """
import sys
from mulki_plugins.deploy.quick_import import import_open_clip
import_open_clip('{"embed_dim": 16}')
left_out = ("torch._dynamo", "timm")
assert not [name for name in left_out if name in sys.modules]
import open_clip, torch
from open_clip.model import CLIP
vision = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}
text = {"context_length": 12, "vocab_size": 300, "width": 32, "heads": 2, "layers": 1}
clip = CLIP(16, vision, text).eval()
with torch.inference_mode():
    assert clip.encode_image(torch.zeros(2, 3, 16, 16)).shape == (2, 16)
import torch._dynamo
assert torch._dynamo.config is not None
import timm
assert timm.list_models("vit_tiny*")
"""


def test_a_plain_clip_needs_neither_timm_nor_the_compiler():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def source(name, folder=Path(), exported=False):
    return SimpleNamespace(recipe=SimpleNamespace(model=SimpleNamespace(name=name)), folder=folder, exported=exported)


@pytest.mark.parametrize(
    ("name", "timm", "transformers"),
    [("ViT-B-32", False, False), ("mulki-tiny", True, False), ("ViT-B-16-SigLIP", True, True),
     ("roberta-ViT-B-32", False, True), ("coca_ViT-B-32", False, False)],
)  # fmt: skip
def test_the_description_says_what_an_architecture_needs(name, timm, transformers):
    text = architecture_of(source(name))
    assert ('"timm_' in text, '"hf_' in text) == (timm, transformers)


def test_of_an_export_its_own_description_counts(tmp_path):
    (tmp_path / "open_clip_config.json").write_text('{"model_cfg": {"vision_cfg": {"timm_model_name": "x"}}}')
    assert '"timm_' in architecture_of(source("ViT-B-32", tmp_path, exported=True))


def test_of_a_model_of_another_package_nothing_is_known():
    assert architecture_of(source("somebody-elses")) is None
    assert architecture_of(SimpleNamespace(recipe=None, folder=Path("nowhere"), exported=True)) is None
