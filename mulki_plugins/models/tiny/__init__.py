"""mulki-tiny, the bundled model: a CLIP of open_clip's class for 48 x 48 images. See MODEL_CARD.md in this folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import load_file

from mulki_plugins.errors import MulkiError
from mulki_plugins.models.check import RANDOM, TINY, refuse_another
from mulki_plugins.models.load import LoadedClip
from mulki_plugins.models.state import load_state, read_state
from mulki_plugins.models.weight_files import weight_file

_HERE = Path(__file__).parent


def mulki_tiny(*, pretrained: str | None = None) -> LoadedClip:
    """The bundled model with its own weights, with those of a file or of a run's folder, or with `random` ones."""
    settings = json.loads((_HERE / "mulki-tiny.json").read_text())
    context = settings["text_cfg"]["context_length"]
    tokenizer = SimpleTokenizer(bpe_path=str(_HERE / "mulki-tiny-merges.txt.gz"), context_length=context)
    half = (0.5, 0.5, 0.5)
    if pretrained == RANDOM:
        clip, notices = CLIP(**settings), []
    else:
        # the random weights, replaced at once, must not move anybody's random numbers
        with torch.random.fork_rng(devices=[]):
            clip = CLIP(**settings)
        notices = _load(clip, pretrained)
    clip.visual.register_forward_pre_hook(_channels_last)
    return LoadedClip(
        clip=clip,
        tokenizer=tokenizer,
        image_size=settings["vision_cfg"]["image_size"],
        mean=half,
        std=half,
        notices=tuple(notices),
    )


def _load(clip: CLIP, pretrained: str | None) -> list[str]:
    """Put the weights in, its own where none are named; returns what is to be said of them."""
    own = _HERE / "mulki-tiny.safetensors"
    if not pretrained:
        load_state(clip, load_file(own), own, TINY)
        return []
    file = weight_file(pretrained)
    refuse_another(file, TINY)
    if file.known.quickgelu:
        raise MulkiError(f"{file.path}: the weights were trained with QuickGELU, and {TINY} is built with GELU")
    load_state(clip, read_state(file), file.path, TINY)
    return [file.note] if file.note else []


def _channels_last(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The images with their channels innermost, which a CPU convolves faster; the weights, and so their gradients, stay
    as they are: code such as Avalanche's AGEM takes them for contiguous."""
    return (inputs[0].contiguous(memory_format=torch.channels_last), *inputs[1:])
