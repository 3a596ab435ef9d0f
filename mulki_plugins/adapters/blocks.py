"""The residual blocks of a model's towers, in which experts and prompts have their place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from attrs import frozen
from open_clip.transformer import ResidualAttentionBlock, Transformer
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn

from mulki_plugins.adapters.projections import Towers


@frozen(eq=False)
class Block:
    """A residual block whose input and output have the same shape."""

    module: nn.Module
    width: int
    depth: int
    """Its place in its tower, from 0."""
    heads: int
    """Of its attention; 0 for a block of ConvNeXt, which has none."""
    of_images: bool
    """Whether it is in the image tower, where each rank has other images; all of them have the same sentences."""


def residual_blocks(clip: nn.Module, towers: Towers) -> list[Block]:
    """The blocks of open_clip's own transformers, and of timm's ConvNeXt, in these towers.

    ValueError if one of the towers has none.
    """
    found: list[Block] = []
    for tower in ("image", "text"):
        if towers in ("all", tower):
            blocks = list(_image_blocks(clip) if tower == "image" else _text_blocks(clip))
            if not blocks:
                raise ValueError(
                    f"the {tower} tower has no blocks that it can use; it knows those of open_clip's own transformers and, "
                    f"in the image tower, of timm's ConvNeXt"
                )
            found += blocks
    return found


def _image_blocks(clip: nn.Module) -> Iterator[Block]:
    visual = getattr(clip, "visual", None)
    if visual is None:
        return
    own = getattr(visual, "transformer", None)
    if isinstance(own, Transformer):
        yield from _attention_blocks(own, of_images=True)
        return
    convolutional = (module for module in visual.modules() if isinstance(module, ConvNeXtBlock))
    for depth, module in enumerate(each for each in convolutional if isinstance(each.shortcut, nn.Identity)):
        yield Block(module, cast(Any, module.conv_dw).out_channels, depth, 0, True)


def _text_blocks(clip: nn.Module) -> Iterator[Block]:
    tower = getattr(clip, "text", clip)
    own = getattr(tower, "transformer", None)
    if isinstance(own, Transformer):
        yield from _attention_blocks(own, of_images=False)


def _attention_blocks(transformer: Transformer, *, of_images: bool) -> Iterator[Block]:
    """Blocks with torch's own attention, batch first; blocks of another kind are left to the caller's error."""
    for depth, module in enumerate(transformer.resblocks):
        if isinstance(module, ResidualAttentionBlock) and module.attn.batch_first:
            yield Block(module, module.attn.embed_dim, depth, module.attn.num_heads, of_images)


def feature_width(clip: nn.Module) -> int:
    """The number of features d of an image or a text."""
    tower: Any = getattr(clip, "text", clip)
    projection: Any = tower.text_projection
    if projection is None:
        return int(tower.output_dim)
    return int(projection.out_features if isinstance(projection, nn.Linear) else projection.shape[1])


def as_tokens(x: Tensor) -> Tensor:
    """[B, L, w] for tokens [B, L, w] or a map of channels [B, w, H, W]."""
    return x if x.ndim == 3 else x.flatten(2).mT


def like(tokens: Tensor, x: Tensor) -> Tensor:
    """Tokens [B, L, w] in the shape of x, [B, L, w] or [B, w, H, W]."""
    return tokens if x.ndim == 3 else tokens.mT.reshape(x.shape)
