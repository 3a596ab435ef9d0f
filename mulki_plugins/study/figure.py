"""The figure of a study: for each order Last over Transfer, that is, what was learned and what zero-shot ability was kept."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mulki_plugins.study.plan import STUDY
from mulki_plugins.study.schema import Study
from mulki_plugins.study.state import State
from mulki_plugins.study.table import Line


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
            _draw_label(axes, [line for line in chosen if line.label == label], k, label == study.main)
        axes.axvline(chosen[0].zero_shot_later, color="grey", linestyle=":", linewidth=1)
        axes.axhline(chosen[0].zero_shot, color="grey", linestyle=":", linewidth=1)
        axes.set_title(f"order {order}" if order else "", fontsize=10, parse_math=False)
        axes.set_xlabel("Transfer (%)")
        axes.set_ylabel("Last (%)")
    result.suptitle(
        f"{study.name}: mean and standard deviation over seeds; dotted: zero-shot", fontsize=10, parse_math=False
    )
    return result


def _draw_label(axes: Axes, lines: Sequence[Line], position: int, is_main: bool) -> None:
    points = [(line.transfer, line.last) for line in lines if line.transfer is not None and line.last is not None]
    if not points:
        return
    x, y = ([point[i] for point in points] for i in (0, 1))
    spread = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in (x, y)]
    at = statistics.fmean(x), statistics.fmean(y)

    axes.errorbar(
        *at, xerr=spread[0], yerr=spread[1], fmt="*" if is_main else "o", markersize=13 if is_main else 6,
        color=f"C{position % 10}",
    )  # fmt: skip
    offset = (6, -12 if position % 2 else 5)  # so that fewer names lie on each other
    axes.annotate(lines[0].label, at, xytext=offset, textcoords="offset points", fontsize=9, parse_math=False)
