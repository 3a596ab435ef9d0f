"""The accuracy matrix as a picture, with names in any script."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import unicodedata
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font

from mulki_plugins.characters import printable
from mulki_plugins.report.beside import columns_beside
from mulki_plugins.report.result import Result
from mulki_plugins.report.tables import labelled_rows

LONGEST = 30
"""Characters of a name in a picture; longer names would leave no room for the matrix."""
WIDEST = 30.0
"""Inches of a picture at most, so that hundreds of tasks are drawn in seconds."""
MOST_TASKS = 50
"""With more tasks a picture shows no numbers and only some names: drawing all of them takes minutes."""

DEFAULT_FONT = "DejaVu Sans"
"""The font bundled with matplotlib: no Chinese, Japanese, Korean, Indic letters or emoji."""
_PREFERRED = (
    "noto sans cjk",
    "noto sans",
    "source han",
    "wenquanyi",
    "microsoft yahei",
    "pingfang",
    "hiragino",
    "malgun",
)
_UNSUITABLE = ("color", "last resort", "lastresort")
"""Fonts that matplotlib cannot draw, and fonts that contain only boxes."""
_INVISIBLE = {"Cf", "Mn", "Me", "Cc"}
"""Unicode categories that a font may draw as nothing, or on top of another character."""


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Draw with matplotlib's defaults instead of the user's settings, and without warnings about glyphs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        defaults: dict[Any, Any] = {key: value for key, value in matplotlib.rcParamsDefault.items() if key != "backend"}
        with matplotlib.rc_context(defaults):
            yield


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    file = io.BytesIO()
    with drawing():
        figure.set_dpi(130)
        FigureCanvasAgg(figure).print_png(file)  # type: ignore[no-untyped-call]  # matplotlib does not type it
    return file.getvalue()


def shorten_label(name: str) -> str:
    """A name on one line of at most LONGEST characters. Draw it with `parse_math=False`: a `$` starts no formula."""
    name = printable(name)
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


def matrix_figure(result: Result) -> Figure:
    """A heat map with a number in each cell: a row for each learned task, the zero-shot row on top, a column for each test set.

    The stair separates tasks not learned yet (above, transfer) from those learned before (below). Held-out tasks stand at
    the right, in brackets.
    """
    with drawing():
        return _draw_matrix(result)


def _draw_matrix(result: Result) -> Figure:
    rows = labelled_rows(result)
    title = f"{shorten_label(result.recipe)}: {shorten_label(result.strategy)}, seed {result.seed}"
    families = families_for([title, *result.tasks, *result.held_out, *result.metrics])
    held_out = [f"({name})" for name in result.held_out]
    tasks = [drawable(shorten_label(name), families) for name in (*result.tasks, *held_out)]
    labels = [name if name == "zero-shot" else f"after {drawable(shorten_label(name), families)}" for name, _ in rows]
    beside = columns_beside(result)
    more = [[*beside[name], *[math.nan] * len(rows)][: len(rows)] for name in held_out]
    values = np.array([[*row, *(column[i] for column in more)] for i, (_, row) in enumerate(rows)], dtype=float)
    size = (min(WIDEST, max(6.0, 2.2 + 0.72 * len(tasks))), min(WIDEST, 1.6 + 0.42 * len(rows)))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(values, cmap="viridis", vmin=0, vmax=100, aspect="auto")
    if len(tasks) <= MOST_TASKS:
        _write_numbers(axes, values)
        first = 1 if result.zero_shot else 0
        if len(rows) - first == len(result.matrix):  # joint training's single row has no stair
            _draw_stair(axes, first, len(result.matrix))
    if held_out:
        axes.axvline(len(result.tasks) - 0.5, color="white", linewidth=4)
    every = math.ceil(len(tasks) / MOST_TASKS)
    axes.set_xticks(range(0, len(tasks), every), tasks[::every], rotation=35, ha="right", parse_math=False)
    axes.set_yticks(range(0, len(rows), every), labels[::every], parse_math=False)
    axes.set_xlim(-0.5, len(tasks) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("test set")
    metrics = [f"{name.capitalize()} {value:.1f}" for name, value in result.metrics.items() if value is not None]
    subtitle = drawable(printable(", ".join(metrics)), families)
    axes.set_title(f"{drawable(title, families)}\n{subtitle}", fontsize=10, parse_math=False)
    for text in (axes.title, *axes.get_xticklabels(), *axes.get_yticklabels()):
        text.set_fontfamily(families)
    figure.colorbar(image, ax=axes, label="accuracy (%)")
    return figure


def _write_numbers(axes: Axes, values: Any) -> None:
    style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8}
    for (i, j), value in np.ndenumerate(values):
        if math.isnan(value):  # not measured
            continue
        axes.text(j, i, f"{math.floor(value + 0.5)}", color="white" if value < 60 else "black", **style)


def _draw_stair(axes: Axes, first: int, steps: int) -> None:
    """A line around each task's own cell and the cells below it."""
    for j in range(steps):
        top = first + j - 0.5
        axes.plot([j - 0.5, j + 0.5], [top] * 2, color="white", linewidth=2)
        axes.plot([j - 0.5] * 2, [top, top + (-1 if j else 1)], color="white", linewidth=2)


def families_for(texts: Iterable[str]) -> list[str]:
    """The font families that draw the texts, matplotlib's default first; each glyph comes from the first that has it."""
    missing = {character for text in texts for character in text} - _characters(font_manager.findfont(DEFAULT_FONT))
    families = [DEFAULT_FONT]
    for name, path in _installed_fonts() if missing else ():
        if drawn := missing & _characters(path):
            families.append(name)
            missing -= drawn
        if not missing:
            break
    return families


def drawable(text: str, families: Sequence[str]) -> str:
    """The text with replacements for characters that none of the fonts has: without accents, or as a number, [U+82B1]."""
    paths = dict(_installed_fonts())
    default = _characters(font_manager.findfont(DEFAULT_FONT))
    known = default.union(*(_characters(paths[name]) for name in families if name in paths))
    return "".join(c if c in known else _replacement(c, known) for c in text)


def font_for(text: str) -> tuple[str, str]:
    """The file of a font that draws the whole text, the default one if none does, and the text as that font can draw it."""
    paths = dict(_installed_fonts())
    for family in families_for([text])[1:]:
        if set(text) <= _characters(paths[family]):
            return paths[family], text
    return font_manager.findfont(DEFAULT_FONT), drawable(text, [])


def _replacement(character: str, known: Collection[str]) -> str:
    simpler = "".join(c for c in unicodedata.normalize("NFKD", character) if c in known)
    if simpler or unicodedata.category(character) in _INVISIBLE:
        return simpler
    return f"[U+{ord(character):04X}]"


@functools.cache
def _installed_fonts() -> list[tuple[str, str]]:
    """Families and files of the installed upright fonts of regular weight, those with many scripts first."""
    paths: dict[str, str] = {}
    for font in font_manager.fontManager.ttflist:
        regular = font.style == "normal" and str(font.weight) in ("400", "normal", "regular", "book")
        if regular and not any(word in font.name.lower() for word in _UNSUITABLE):
            paths.setdefault(font.name, font.fname)
    count = len(_PREFERRED)
    rank = {name: next((i for i, word in enumerate(_PREFERRED) if word in name.lower()), count) for name in paths}
    return sorted(paths.items(), key=lambda item: (rank[item[0]], item[0]))


@functools.lru_cache(maxsize=512)
def _characters(path: str) -> frozenset[str]:
    """The characters of a font; empty if it cannot be read."""
    try:
        return frozenset(map(chr, FT2Font(path).get_charmap()))
    except (OSError, RuntimeError, ValueError):
        return frozenset()
