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
from mulki_plugins.models.tensors import load_state, read_state
from mulki_plugins.models.weights import weight_file

_HERE = Path(__file__).parent


def mulki_tiny(*, pretrained: str | None = None) -> LoadedClip:
    """The bundled CLIP of 2.8 M parameters for 48 x 48 images and sentences of 16 tokens, pre-trained.

    Args:
        pretrained: A file of weights, the folder of a run, or `random` for random weights; null for its own.
    """
    settings = json.loads((_HERE / "mulki-tiny.json").read_text())
    context = settings["text_cfg"]["context_length"]
    tokenizer = SimpleTokenizer(bpe_path=str(_HERE / "mulki-tiny-merges.txt.gz"), context_length=context)
    half = (0.5, 0.5, 0.5)
    if pretrained == RANDOM:
        clip, notices = CLIP(**settings), []
    else:
        # its random weights are replaced at once and must not advance the random state
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
        config=settings,
    )


def _load(clip: CLIP, pretrained: str | None) -> list[str]:
    """Load the weights, by default its own. Returns notices for the user."""
    bundled = _HERE / "mulki-tiny.safetensors"
    if not pretrained:
        load_state(clip, load_file(bundled), bundled, TINY)
        return []
    file = weight_file(pretrained)
    refuse_another(file, TINY)
    if file.known.quickgelu:
        raise MulkiError(f"{file.path}: the weights were trained with QuickGELU, and {TINY} is built with GELU")
    load_state(clip, read_state(file), file.path, TINY)
    return [file.note] if file.note else []


def _channels_last(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Put the channels of the images innermost, which makes convolutions faster on a CPU.

    The weights, and so their gradients, stay contiguous: code such as Avalanche's AGEM relies on it.
    """
    return (inputs[0].contiguous(memory_format=torch.channels_last), *inputs[1:])
