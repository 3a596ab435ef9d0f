"""mulki-tiny, the bundled model: a CLIP of open_clip's class for 48 x 48 images. See MODEL_CARD.md in this folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer
from safetensors import SafetensorError
from safetensors.torch import load_file

from mulki_plugins.errors import MissingData
from mulki_plugins.models.load import LoadedClip

_HERE = Path(__file__).parent


def mulki_tiny(*, pretrained: str | None = None) -> LoadedClip:
    """The bundled model with its own weights, or with those of a safetensors file such as a run's checkpoint."""
    settings = json.loads((_HERE / "mulki-tiny.json").read_text())
    context = settings["text_cfg"]["context_length"]
    tokenizer = SimpleTokenizer(bpe_path=str(_HERE / "mulki-tiny-merges.txt.gz"), context_length=context)
    # the random weights, replaced at once, must not move anybody's random numbers
    with torch.random.fork_rng(devices=[]):
        clip = CLIP(**settings)
    path = Path(pretrained) if pretrained else _HERE / "mulki-tiny.safetensors"
    try:
        weights = load_file(path)
        clip.load_state_dict({name: value.float() for name, value in weights.items()})
    except (OSError, SafetensorError, RuntimeError) as error:
        raise MissingData(f"model mulki-tiny: {path} holds no weights for it: {str(error).splitlines()[0]}") from error
    clip.visual.register_forward_pre_hook(_channels_last)
    half = (0.5, 0.5, 0.5)
    return LoadedClip(
        clip=clip, tokenizer=tokenizer, image_size=settings["vision_cfg"]["image_size"], mean=half, std=half
    )


def _channels_last(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The images with their channels innermost, which a CPU convolves faster; the weights, and so their gradients, stay
    as they are: code such as Avalanche's AGEM takes them for contiguous."""
    return (inputs[0].contiguous(memory_format=torch.channels_last), *inputs[1:])
