"""Textures, drawn by code as whole pictures."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mulki_plugins.streams.mini.renditions import SIZE, Split, angles


def textures(name: str, n: int, split: Split, generator: torch.Generator) -> Tensor:
    """n pictures of one texture, float [n, 3, SIZE, SIZE] in 0..1, varying in angle, period and two colours."""
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
