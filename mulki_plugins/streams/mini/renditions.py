"""Renditions of sprites: in many poses, on many backgrounds, slightly bent, blurred and noisy."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from attrs import frozen
from torch import Tensor

SIZE = 48
"""Side of a rendition in pixels."""

BANDS = 12
"""Bands of the range of rotations, used by train and test alternately."""

AT_ONCE = 32
"""Sprites warped at once: more would not fit into the processor's cache."""

Split = Literal["train", "test", "any"]


@frozen(kw_only=True)
class Style:
    """Ranges from which renditions are drawn; lengths are fractions of the picture's side."""

    rotation: float = 16.0
    """Largest rotation, in degrees, either way."""
    scale: tuple[float, float] = (0.7, 1.0)
    shear: float = 0.1
    aspect: float = 0.1
    """Largest log ratio of width to height."""
    bend: float = 0.025
    """Standard deviation of the elastic displacement."""
    tint: float = 0.2
    """Largest change of a colour channel's gain."""
    blur: float = 0.6
    """Largest standard deviation of the Gaussian blur, in pixels of the rendition."""
    noise: float = 0.04
    """Largest standard deviation of the pixel noise."""
    clutter: float = 0.35
    """Share of uneven backgrounds, from 0 to 1."""
    inked: bool = False
    """Sprites are stencils, filled with a colour that differs from the background's."""


STYLES = {
    "drawing": Style(),
    "flag": Style(rotation=12.0, scale=(0.8, 1.0), tint=0.12),
    "glyph": Style(rotation=12.0, scale=(0.6, 0.95), inked=True, tint=0.0),
    "shape": Style(rotation=20.0, scale=(0.45, 0.95), tint=0.1, bend=0.04),
}


def render(sprites: Tensor, style: Style, split: Split, generator: torch.Generator) -> Tensor:
    """One rendition of each sprite.

    sprites: uint8 [N, S, S, 4] (RGBA). Returns uint8 [N, SIZE, SIZE, 3].
    Train and test rotate by angles from disjoint bands, so they share no pose.
    """
    n = len(sprites)
    colour, alpha = pose(sprites, style, split, generator)
    background = _backgrounds(n, style.clutter, generator)
    if style.inked:
        colour = alpha * _ink(background, generator)
    gain = 1 + style.tint * _uniform((n, 3, 1, 1), -1, 1, generator)
    return disturb(colour * gain + (1 - alpha) * background, style, generator)


def pose(sprites: Tensor, style: Style, split: Split, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rotate, scale, shear, shift and bend each sprite.

    Returns colours times alpha [N, 3, SIZE, SIZE], and alpha [N, 1, SIZE, SIZE].
    """
    n = len(sprites)
    moves, bends = _affine(n, style, split, generator), _bends(n, style, generator)
    few = [slice(start, start + AT_ONCE) for start in range(0, n, AT_ONCE)]
    warped = torch.cat([_warp(sprites[some], moves[some], bends[some]) for some in few])
    return warped[:, :3], warped[:, 3:]


def _warp(sprites: Tensor, moves: Tensor, bends: Tensor) -> Tensor:
    """Some sprites in their poses: colours times alpha, and alpha, [N, 4, SIZE, SIZE]."""
    picture = sprites.permute(0, 3, 1, 2).float() / 255
    picture[:, :3] *= picture[:, 3:]  # premultiplied, so that edges blend without a dark rim
    side = 2 * SIZE
    grid = F.affine_grid(moves, [len(sprites), 4, side, side], align_corners=False)
    smooth = F.interpolate(bends, size=(side, side), mode="bicubic", align_corners=True)
    grid = grid + smooth.permute(0, 2, 3, 1)
    return F.avg_pool2d(F.grid_sample(picture, grid, align_corners=False), 2)


def disturb(image: Tensor, style: Style, generator: torch.Generator) -> Tensor:
    """Add blur and noise: float [N, 3, H, W] in 0..1 -> uint8 [N, H, W, 3]."""
    n = len(image)
    image = _blur(image, _uniform((n,), 0.0, style.blur, generator))
    sigma = _uniform((n, 1, 1, 1), 0.0, style.noise, generator)
    image = image + sigma * torch.randn(image.shape, generator=generator)
    return (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def angles(n: int, limit: float, split: Split, generator: torch.Generator) -> Tensor:
    """Rotations [n] in degrees within ±limit: `train` from the even bands, `test` from the odd ones, `any` from all."""
    if split == "any":
        return _uniform((n,), -limit, limit, generator)
    band = torch.randint(0, BANDS // 2, (n,), generator=generator) * 2 + (split == "test")
    within = _uniform((n,), 0.05, 0.95, generator)  # a gap between neighbouring bands
    return ((band + within) / BANDS * 2 - 1) * limit


def _affine(n: int, style: Style, split: Split, generator: torch.Generator) -> Tensor:
    """Rotation, scale, shear, aspect and shift [N, 2, 3]: from positions in -1..1 to those in the sprite."""
    angle = torch.deg2rad(angles(n, style.rotation, split, generator))
    scale = _uniform((n,), *style.scale, generator)
    aspect = torch.exp(_uniform((n,), -style.aspect, style.aspect, generator) / 2)
    shear = _uniform((n,), -style.shear, style.shear, generator)
    cos, sin = angle.cos(), angle.sin()
    rotation = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
    zero = torch.zeros(n)
    stretch = torch.stack(
        [torch.stack([scale * aspect, shear * scale], -1), torch.stack([zero, scale / aspect], -1)], -2
    )
    inverse = torch.linalg.inv(rotation @ stretch)
    room = (1 - scale).clamp(min=0)[:, None]
    shift = _uniform((n, 2), -1, 1, generator) * room
    return torch.cat([inverse, -(inverse @ shift[..., None])], -1)


def _bends(n: int, style: Style, generator: torch.Generator) -> Tensor:
    """Random displacements on a coarse grid, [N, 2, 5, 5]."""
    return torch.randn((n, 2, 5, 5), generator=generator) * style.bend


def _backgrounds(n: int, clutter: float, generator: torch.Generator) -> Tensor:
    """Uniform, shaded or mottled colours, [N, 3, SIZE, SIZE] in 0..1; most of them pale."""
    base = torch.rand((n, 3, 1, 1), generator=generator)
    pale = torch.rand((n, 1, 1, 1), generator=generator) < 0.65
    base = torch.where(pale, 0.75 + 0.25 * base, base)
    cells = torch.rand((n, 3, 4, 4), generator=generator) - 0.5
    mottle = F.interpolate(cells, size=(SIZE, SIZE), mode="bicubic", align_corners=False)
    strength = torch.rand((n, 1, 1, 1), generator=generator)
    uneven = torch.rand((n, 1, 1, 1), generator=generator) < clutter
    return (base + uneven * strength * mottle).clamp(0, 1)


def _ink(background: Tensor, generator: torch.Generator) -> Tensor:
    """A colour that stands out from the background: [N, 3, 1, 1]."""
    mean = background.mean((2, 3), keepdim=True)
    light = mean.mean(1, keepdim=True)
    colour = torch.rand((len(background), 3, 1, 1), generator=generator)
    return torch.where(light > 0.5, 0.5 * colour * light, 1 - 0.5 * colour * (1 - light))


def _blur(image: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of radius 3, with one standard deviation per image: sigma [N]."""
    n, channels, height, width = image.shape
    distance = torch.arange(-3, 4, dtype=image.dtype)
    kernel = torch.exp(-(distance**2) / (2 * sigma.clamp(min=1e-3)[:, None] ** 2))
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)
    flat = F.pad(image.reshape(1, n * channels, height, width), (3, 3, 3, 3), mode="replicate")
    flat = F.conv2d(flat, kernel[:, None, :, None], groups=n * channels)
    flat = F.conv2d(flat, kernel[:, None, None, :], groups=n * channels)
    return flat.reshape(n, channels, height, width)


def _uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)
