"""The colours of heat maps, as a style sheet: each step of a scale has a colour and a readable text on it, for light and dark."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

STEPS = 20
WIDEST_CHANGE = 40.0
"""Points of change that get the strongest colour."""

_LEVELS = {
    "light": ("#f4f8fc", "#c9dff0", "#84b9dc", "#3f8cc4", "#135a9c", "#08306b"),
    "dark": ("#172330", "#1c3d5c", "#24608f", "#3b89c3", "#7fbbe4", "#d6ecfb"),
}
_CHANGES = {
    "light": ("#9a4a00", "#d9822b", "#f6cfa4", "#f5f5f5", "#b4d4ee", "#4a93cd", "#0b4f8a"),
    "dark": ("#ffb469", "#b8651b", "#5c3714", "#20262d", "#173f63", "#2f7fbd", "#8ccbff"),
}
"""From orange, worse, to blue, better: a pair that colour-blind readers can tell apart."""


def level_step(accuracy: float) -> int:
    """The step of an accuracy in percent."""
    return round(min(max(accuracy, 0.0), 100.0) / 100 * STEPS)


def change_step(change: float) -> int:
    """The step of a change in points; the middle is no change."""
    return round((min(max(change / WIDEST_CHANGE, -1.0), 1.0) + 1) / 2 * STEPS)


def scale_css(mode: str) -> str:
    """The rules of all steps, for `light` or `dark`."""
    return "\n".join([*_rules("q", _LEVELS[mode]), *_rules("d", _CHANGES[mode])])


def _rules(letter: str, stops: Sequence[str]) -> Iterator[str]:
    view = "change" if letter == "d" else "level"
    channels = np.array([[int(stop[i : i + 2], 16) for i in (1, 3, 5)] for stop in stops], dtype=float)
    for step in range(STEPS + 1):
        at = step / STEPS * (len(stops) - 1)
        colour = [round(float(np.interp(at, range(len(stops)), channels[:, c]))) for c in range(3)]
        text = "#000" if _contrast(colour, 0.0) >= _contrast(colour, 1.0) else "#fff"
        yield f".heat.{view} .{letter}{step}{{background:rgb({','.join(map(str, colour))});color:{text}}}"


def _contrast(colour: Sequence[int], other: float) -> float:
    """The contrast of a colour with a grey of this luminance, as WCAG 2 defines it."""
    linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return (max(luminance, other) + 0.05) / (min(luminance, other) + 0.05)
