"""The accuracy matrix as a picture."""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Iterator
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mulki_plugins.characters import printable
from mulki_plugins.report.fonts import drawable, families_for
from mulki_plugins.report.result import Result
from mulki_plugins.report.table import named_rows

LONGEST = 30
"""Characters of a name in a picture; longer ones leave no room for what is drawn."""

WIDEST = 30.0
"""Inches of a picture, so that hundreds of tasks still make one, in seconds."""

MOST_TASKS = 50
"""Of more tasks a picture has the colours, and only some of the names; all numbers and names would take minutes."""


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """For all that matplotlib draws here: its own defaults, whatever the user's settings are, and no warnings of glyphs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings: dict[Any, Any] = {
            name: value for name, value in matplotlib.rcParamsDefault.items() if name != "backend"
        }
        with matplotlib.rc_context(settings):
            yield


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    file = io.BytesIO()
    with drawing():
        figure.set_dpi(130)
        FigureCanvasAgg(figure).print_png(file)  # type: ignore[no-untyped-call]
    return file.getvalue()


def as_label(name: str) -> str:
    """A name on one line, and short enough; to be drawn with `parse_math=False`, since a `$` in it begins no formula."""
    name = printable(name)
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


def matrix_figure(result: Result) -> Figure:
    """The figure of `_matrix_figure`, drawn with matplotlib's own settings."""
    with drawing():
        return _matrix_figure(result)


def _matrix_figure(result: Result) -> Figure:
    """A heat map with the number in each cell; rows are the tasks as they are learned, on top the zero-shot row.

    Above the stair is what was not learned yet (transfer), below it what was learned before.
    """
    named = named_rows(result)
    rows = [row for _, row in named]
    title = f"{as_label(result.recipe)}: {as_label(result.strategy)}, seed {result.seed}"
    families = families_for([title, *result.tasks, *result.metrics])
    tasks = [drawable(as_label(name), families) for name in result.tasks]
    labels = [name if name == "zero-shot" else f"after {drawable(as_label(name), families)}" for name, _ in named]
    values = np.array(rows, dtype=float)
    figure = Figure(
        figsize=(min(WIDEST, max(6.0, 2.2 + 0.72 * len(result.tasks))), min(WIDEST, 1.6 + 0.42 * len(rows))),
        layout="constrained",
    )
    axes = figure.add_subplot()
    image = axes.imshow(values, cmap="viridis", vmin=0, vmax=100, aspect="auto")
    for i, row in enumerate(values if len(result.tasks) <= MOST_TASKS else ()):
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
    stairs = stairs if len(result.tasks) <= MOST_TASKS else 0
    every = math.ceil(len(result.tasks) / MOST_TASKS)
    for j in range(stairs):  # each task's own cell and what lies below it
        axes.plot([j - 0.5, j + 0.5], [first + j - 0.5] * 2, color="white", linewidth=2)
        axes.plot([j - 0.5] * 2, [first + j - 0.5, first + j + (-1.5 if j else 0.5)], color="white", linewidth=2)
    axes.set_xticks(range(0, len(tasks), every), tasks[::every], rotation=35, ha="right", parse_math=False)
    axes.set_yticks(range(0, len(rows), every), labels[::every], parse_math=False)
    axes.set_xlim(-0.5, len(result.tasks) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("test set")
    numbers = printable(
        ", ".join(f"{name.capitalize()} {value:.1f}" for name, value in result.metrics.items() if value is not None)
    )
    axes.set_title(drawable(title, families) + "\n" + drawable(numbers, families), fontsize=10, parse_math=False)
    for text in (axes.title, *axes.get_xticklabels(), *axes.get_yticklabels()):
        text.set_fontfamily(families)
    figure.colorbar(image, ax=axes, label="accuracy (%)")
    return figure
