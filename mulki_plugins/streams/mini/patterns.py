"""Pictures drawn by code: coloured shapes as sprites, textures as whole pictures."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from mulki_plugins.streams.mini.artworks import SPRITE
from mulki_plugins.streams.mini.renditions import SIZE, Split, angles

COLOURS = {
    "red": (214, 40, 40),
    "orange": (245, 130, 30),
    "yellow": (245, 215, 45),
    "green": (50, 160, 70),
    "blue": (40, 90, 205),
    "purple": (130, 60, 165),
}


def shape_sprite(name: str) -> NDArray[np.uint8]:
    """A filled outline such as `red star`, RGBA, [SPRITE, SPRITE, 4]."""
    colour, shape = name.split()
    big = 4 * SPRITE
    canvas = Image.new("RGBA", (big, big))
    points = [(big * (0.5 + 0.5 * x), big * (0.5 - 0.5 * y)) for x, y in _OUTLINES[shape]()]
    ImageDraw.Draw(canvas).polygon(points, fill=COLOURS[colour])
    return np.asarray(canvas.resize((SPRITE, SPRITE), Image.Resampling.LANCZOS))


def _circle() -> list[tuple[float, float]]:
    return [(math.cos(a), math.sin(a)) for a in np.linspace(0, 2 * math.pi, 72, endpoint=False)]


def _square() -> list[tuple[float, float]]:
    return [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]


def _triangle() -> list[tuple[float, float]]:
    return [(0, 0.95), (0.95, -0.75), (-0.95, -0.75)]


def _star() -> list[tuple[float, float]]:
    corner = [math.pi / 2 + k * math.pi / 5 for k in range(10)]
    return [
        ((1 if k % 2 == 0 else 0.42) * math.cos(a), (1 if k % 2 == 0 else 0.42) * math.sin(a))
        for k, a in enumerate(corner)
    ]


def _heart() -> list[tuple[float, float]]:
    ts = np.linspace(0, 2 * math.pi, 96, endpoint=False)
    return [
        (math.sin(t) ** 3, (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) + 2.5) / 15)
        for t in ts
    ]


def _cross() -> list[tuple[float, float]]:
    a, b = 0.3, 0.95
    return [(-a, b), (a, b), (a, a), (b, a), (b, -a), (a, -a), (a, -b), (-a, -b), (-a, -a), (-b, -a), (-b, a), (-a, a)]


_OUTLINES: dict[str, Callable[[], list[tuple[float, float]]]] = {
    "circle": _circle, "square": _square, "triangle": _triangle, "star": _star, "heart": _heart, "cross": _cross,
}  # fmt: skip


def textures(name: str, n: int, split: Split, generator: torch.Generator) -> Tensor:
    """Pictures of one texture, float [n, 3, SIZE, SIZE] in 0..1, each with its own angle, period and two colours."""
    side = 2 * SIZE
    axis = torch.linspace(-1, 1, side)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    turn = torch.deg2rad(angles(n, 40.0, split, generator))[:, None, None]
    bend = torch.randn((n, 2, 4, 4), generator=generator) * 0.03
    bend = torch.nn.functional.interpolate(bend, size=(side, side), mode="bicubic", align_corners=True)
    u = x * turn.cos() - y * turn.sin() + bend[:, 0]
    v = x * turn.sin() + y * turn.cos() + bend[:, 1]
    repeats = 2.2 + 3.0 * torch.rand((n, 1, 1), generator=generator)
    phase = torch.rand((2, n, 1, 1), generator=generator)
    mask = _TEXTURES[name](u * repeats / 2 + phase[0], v * repeats / 2 + phase[1], (u, v, repeats), generator)
    low, high = _two_colours(n, generator)
    picture = low + (high - low) * mask.float()[:, None]
    return torch.nn.functional.avg_pool2d(picture, 2)


Plane = tuple[Tensor, Tensor, Tensor]
"""The undistorted coordinates u and v in -1..1, and the number of repeats."""


def _cell(t: Tensor) -> Tensor:
    """Position within the unit cell, in -0.5..0.5."""
    return t - t.floor() - 0.5


def _striped(a: Tensor, b: Tensor, plane: Plane, generator: torch.Generator) -> Tensor:
    return _cell(a).abs() < 0.25


def _dotted(a: Tensor, b: Tensor, plane: Plane, generator: torch.Generator) -> Tensor:
    return torch.hypot(_cell(a), _cell(b)) < 0.28


def _checkered(a: Tensor, b: Tensor, plane: Plane, generator: torch.Generator) -> Tensor:
    return (a.floor() + b.floor()).remainder(2) < 1


def _zigzagged(a: Tensor, b: Tensor, plane: Plane, generator: torch.Generator) -> Tensor:
    return _cell(b + 2 * _cell(a).abs() * 0.8).abs() < 0.22


def _grid(a: Tensor, b: Tensor, plane: Plane, generator: torch.Generator) -> Tensor:
    return (_cell(a).abs() < 0.1) | (_cell(b).abs() < 0.1)


def _honeycombed(a: Tensor, b: Tensor, plane: Plane, generator: torch.Generator) -> Tensor:
    first = _hexagon(_cell(a), math.sqrt(3) * _cell(b / math.sqrt(3)))
    second = _hexagon(_cell(a + 0.5), math.sqrt(3) * _cell(b / math.sqrt(3) + 0.5))
    return torch.minimum(first, second) > 0.42


def _hexagon(x: Tensor, y: Tensor) -> Tensor:
    """Distance to the centre in the norm whose unit ball is a hexagon."""
    return torch.maximum(x.abs(), 0.5 * x.abs() + math.sqrt(3) / 2 * y.abs())


def _brick(a: Tensor, b: Tensor, plane: Plane, generator: torch.Generator) -> Tensor:
    row = b.floor()
    return (_cell(b).abs() > 0.4) | (_cell(a / 2 + 0.5 * row.remainder(2)).abs() > 0.45)


def _scaly(a: Tensor, b: Tensor, plane: Plane, generator: torch.Generator) -> Tensor:
    row = (2 * b).floor()
    x, y = _cell(a + 0.5 * row.remainder(2)), 2 * b - row
    return (torch.hypot(x, 0.5 * y) - 0.45).abs() < 0.08


def _wavy(a: Tensor, b: Tensor, plane: Plane, generator: torch.Generator) -> Tensor:
    return _cell(b + 0.25 * torch.sin(2 * math.pi * a * 0.8)).abs() < 0.22


def _spiralled(a: Tensor, b: Tensor, plane: Plane, generator: torch.Generator) -> Tensor:
    radius, angle = _polar(plane, generator)
    return _cell(radius * plane[2] / 2 + angle / (2 * math.pi)).abs() < 0.25


def _ringed(a: Tensor, b: Tensor, plane: Plane, generator: torch.Generator) -> Tensor:
    radius, _ = _polar(plane, generator)
    return _cell(radius * plane[2] / 2).abs() < 0.25


def _polar(plane: Plane, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Distance and direction from a centre near the middle."""
    u, v, _ = plane
    centre = (torch.rand((2, len(u), 1, 1), generator=generator) - 0.5) * 0.6
    return torch.hypot(u - centre[0], v - centre[1]), torch.atan2(v - centre[1], u - centre[0])


def _marbled(a: Tensor, b: Tensor, plane: Plane, generator: torch.Generator) -> Tensor:
    u, _, repeats = plane
    side = u.shape[-1]
    swirl = sum(
        torch.nn.functional.interpolate(
            torch.randn((len(u), 1, cells, cells), generator=generator) / cells, size=(side, side), mode="bicubic"
        )[:, 0]
        for cells in (4, 8, 16)
    )
    return 0.5 + 0.5 * torch.sin(math.pi * repeats * (u + 1.2 * swirl))


_TEXTURES: dict[str, Callable[[Tensor, Tensor, Plane, torch.Generator], Tensor]] = {
    "striped": _striped, "dotted": _dotted, "checkered": _checkered, "zigzagged": _zigzagged, "grid": _grid,
    "honeycombed": _honeycombed, "brick": _brick, "scaly": _scaly, "wavy": _wavy, "spiralled": _spiralled,
    "ringed": _ringed, "marbled": _marbled,
}  # fmt: skip


def _two_colours(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two colours [n, 3, 1, 1] that differ clearly in lightness."""
    colours = torch.rand((2, n, 3, 1, 1), generator=generator)
    swap = torch.rand((n, 1, 1, 1), generator=generator) < 0.5
    dark, light = 0.45 * colours[0], 0.55 + 0.45 * colours[1]
    return torch.where(swap, light, dark), torch.where(swap, dark, light)
