"""The loss curves of a run, from its metrics.csv."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

from attrs import field, frozen

FILE = "metrics.csv"
PREFIX = "train/loss/"
POINTS = 150
"""Points of a curve: each is the mean over a stretch of steps."""


@frozen
class Curve:
    """A term of the loss over the steps of a run, smoothed to POINTS points."""

    points: list[tuple[float, float]]


@frozen
class Losses:
    """The terms of a run's loss, and the steps at which its tasks ended."""

    terms: dict[str, Curve] = field(factory=dict)
    ends: list[int] = field(factory=list)


def read_losses(folder: Path) -> Losses:
    """The loss curves of the run in a folder; empty without a readable metrics.csv. Lines that are no numbers are passed over."""
    values: dict[str, list[tuple[float, float]]] = {}
    ends: dict[int, None] = {}
    try:
        with (folder / FILE).open(newline="", encoding="utf-8", errors="replace") as file:
            for line in csv.reader(file):
                if len(line) != 3 or not line[0].startswith((PREFIX, "eval/accuracy/")):
                    continue
                try:
                    step, value = int(line[1]), float(line[2])
                except ValueError:
                    continue
                if line[0].startswith("eval/"):
                    ends[step] = None
                elif math.isfinite(value):
                    values.setdefault(line[0].removeprefix(PREFIX), []).append((step, value))
    except (OSError, csv.Error):
        return Losses()
    return Losses({term: Curve(smooth(points)) for term, points in values.items()}, list(ends))


def smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most POINTS points, each the mean of as many neighbours, in the order of the steps."""
    ordered = sorted(points)
    size = math.ceil(len(ordered) / POINTS)
    parts = [ordered[first : first + size] for first in range(0, len(ordered), size)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]
