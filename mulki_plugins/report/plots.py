"""The accuracy matrix as a picture."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.figure import Figure

from mulki_plugins.report.result import Result
from mulki_plugins.report.table import named_rows


def matrix_figure(result: Result) -> Figure:
    """A heat map with the number in each cell; rows are the tasks as they are learned, on top the zero-shot row.

    Above the stair is what was not learned yet (transfer), below it what was learned before.
    """
    named = named_rows(result)
    rows = [row for _, row in named]
    labels = [name if name == "zero-shot" else f"after {name}" for name, _ in named]
    values = np.array(rows, dtype=float)
    figure = Figure(figsize=(max(6.0, 2.2 + 0.72 * len(result.tasks)), 1.6 + 0.42 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(values, cmap="viridis", vmin=0, vmax=100, aspect="auto")
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            axes.text(
                j,
                i,
                f"{math.floor(value + 0.5)}",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if value < 60 else "black",
            )
    first = 1 if result.zero_shot else 0
    stairs = len(rows) - first if len(rows) - first == len(result.matrix) else 0  # none in joint training's one row
    for j in range(stairs):  # each task's own cell and what lies below it
        axes.plot([j - 0.5, j + 0.5], [first + j - 0.5] * 2, color="white", linewidth=2)
        axes.plot([j - 0.5] * 2, [first + j - 0.5, first + j + (-1.5 if j else 0.5)], color="white", linewidth=2)
    axes.set_xticks(range(len(result.tasks)), result.tasks, rotation=35, ha="right")
    axes.set_yticks(range(len(rows)), labels)
    axes.set_xlim(-0.5, len(result.tasks) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("test set")
    numbers = ", ".join(
        f"{name.capitalize()} {value:.1f}" for name, value in result.metrics.items() if value is not None
    )
    axes.set_title(f"{result.recipe}: {result.strategy}, seed {result.seed}\n{numbers}", fontsize=10)
    figure.colorbar(image, ax=axes, label="accuracy (%)")
    return figure
