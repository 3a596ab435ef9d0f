"""The figure of a study: for each order Last over Transfer, that is, what was learned and what zero-shot ability was kept."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from mulki_plugins.study.plan import STUDY
from mulki_plugins.study.schema import Study
from mulki_plugins.study.state import State
from mulki_plugins.study.table import Line

Point = tuple[float, float]
_PLACES = [(x, y) for y in (4, -13, 16, -25, 28, -37) for x in (7, -7, 0)]
"""Where a name may stand, in points from what it names."""
_PER_POINT = 4.0
"""How much covered area, in square pixels, is as bad as one more point of distance."""
_FAR = 18.0
"""From how many pixels on a line joins a name to its point."""
_PASSES = 20
"""At most so often each name is placed anew; it settles after three or four."""


def draw(found: Sequence[State], study: Study) -> Figure:
    """A panel for each order of the first part: means and standard deviations over seeds; zero-shot dotted."""
    part = next(iter(study.parts), STUDY)
    own = [state for state in found if state.run.job.part == part]
    labels = list(dict.fromkeys(state.run.job.label for state in own if state.run.job.in_tables))
    lines = [state.line for state in own if state.line is not None]
    orders = list(dict.fromkeys(line.order for line in lines))
    result = Figure(figsize=(5.2 * max(1, len(orders)), 5.0), layout="constrained")
    for i, order in enumerate(orders):
        axes = result.add_subplot(1, len(orders), i + 1)
        chosen = [line for line in lines if line.order == order]
        for k, label in enumerate(labels):
            _draw_point(axes, [line for line in chosen if line.label == label], k, label == study.main)
        if chosen[0].zero_shot_later is not None:
            axes.axvline(chosen[0].zero_shot_later, color="grey", linestyle=":", linewidth=1)
        axes.axhline(chosen[0].zero_shot, color="grey", linestyle=":", linewidth=1)
        axes.set_title(f"order {order}" if order else "", fontsize=10, parse_math=False)
        axes.set_xlabel("Transfer (%)")
        axes.set_ylabel("Last (%)")
    result.suptitle(
        f"{study.name}: mean and standard deviation over seeds; dotted: zero-shot", fontsize=10, parse_math=False
    )
    result.draw_without_rendering()  # so that it is known where the points lie
    for axes, order in zip(result.axes, orders, strict=True):
        chosen = [line for line in lines if line.order == order]
        means = {label: _mean([line for line in chosen if line.label == label]) for label in labels}
        _write_names(axes, {label: mean for label, mean in means.items() if mean is not None}, labels)
    return result


def _points(lines: Sequence[Line]) -> list[Point]:
    return [(line.transfer, line.last) for line in lines if line.transfer is not None and line.last is not None]


def _mean(lines: Sequence[Line]) -> Point | None:
    points = _points(lines)
    return (statistics.fmean(x for x, _ in points), statistics.fmean(y for _, y in points)) if points else None


def _draw_point(axes: Axes, lines: Sequence[Line], position: int, is_main: bool) -> None:
    if (mean := _mean(lines)) is None:
        return
    spread = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in zip(*_points(lines), strict=True)]
    axes.errorbar(
        *mean, xerr=spread[0], yerr=spread[1], fmt="*" if is_main else "o", markersize=13 if is_main else 6,
        color=_color(position),
    )  # fmt: skip


def _color(position: int) -> str:
    return f"C{position % 10}"


def _write_names(axes: Axes, means: Mapping[str, Point], labels: Sequence[str]) -> None:
    """Write each name near its point, where it covers as little as possible of points, other names and the margins.

    One name after another takes its best place; then each may move again, until none does.
    """
    points = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in axes.transData.transform(list(means.values()))]
    names = {label: _names_around(axes, label, mean, _color(labels.index(label))) for label, mean in means.items()}
    boxes = {label: [name.get_window_extent() for name in around] for label, around in names.items()}
    chosen: dict[str, int] = {}
    for _ in range(_PASSES):
        before = dict(chosen)
        for label in means:
            taken = points + [boxes[other][place] for other, place in chosen.items() if other != label]
            costs = [
                _covered(box, taken, axes.bbox) + _PER_POINT * math.hypot(*place)
                for box, place in zip(boxes[label], _PLACES, strict=True)
            ]
            chosen[label] = costs.index(min(costs))
        if chosen == before:
            break
    for label, around in names.items():
        for place, name in enumerate(around):
            if place != chosen[label]:
                name.remove()
        _join(axes, means[label], boxes[label][chosen[label]], _color(labels.index(label)))


def _join(axes: Axes, mean: Point, box: Bbox, color: str) -> None:
    """Draw a thin line from a point to a name that stands too far off to be read as its own."""
    x, y = axes.transData.transform(mean)
    near = (min(max(x, box.x0), box.x1), min(max(y, box.y0), box.y1))
    if math.dist((x, y), near) > _FAR:
        ends = zip(mean, axes.transData.inverted().transform(near), strict=True)
        axes.plot(*ends, color=color, linewidth=0.6, scalex=False, scaley=False)


def _names_around(axes: Axes, label: str, mean: Point, color: str) -> list[Annotation]:
    return [
        axes.annotate(
            label, mean, xytext=place, textcoords="offset points", fontsize=9, parse_math=False, color=color,
            ha="left" if place[0] > 0 else "right" if place[0] < 0 else "center",
        )
        for place in _PLACES
    ]  # fmt: skip


def _covered(box: Bbox, taken: Sequence[Bbox], inside: Bbox) -> float:
    """The area of a box that lies on others or outside of the axes."""
    outside = box.width * box.height - float(_shared_areas(box, [inside])[0])
    return float(_shared_areas(box, taken).sum()) + outside


def _shared_areas(box: Bbox, others: Sequence[Bbox]) -> NDArray[np.float64]:
    """What a box shares with each of the others, all at once: a figure compares a hundred thousand pairs."""
    x0, y0, x1, y1 = np.array([other.extents for other in others]).T
    width = np.minimum(x1, box.x1) - np.maximum(x0, box.x0)
    height = np.minimum(y1, box.y1) - np.maximum(y0, box.y0)
    areas: NDArray[np.float64] = width.clip(0) * height.clip(0)
    return areas
