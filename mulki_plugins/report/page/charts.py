"""The charts of an experiment: accuracy over the tasks learned, Transfer against Last, losses, mean ranks."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial

from markupsafe import Markup

from mulki_plugins.report.page.experiment import Experiment, Strategy, by_seed, mean_row
from mulki_plugins.report.page.losses import Curve
from mulki_plugins.report.page.svg import (
    COLOURS,
    FONT,
    Plane,
    Point,
    Series,
    label,
    limits_of,
    marker,
    shorten,
    spread,
    text_width,
    ticks,
)
from mulki_plugins.report.significance import Ranking

WIDTH, HEIGHT = 420, 310
NAME = 18
"""Columns of a strategy's name in a chart."""

Box = tuple[float, float, float, float]


def mean_curve(experiment: Experiment) -> Markup:
    """The mean accuracy over all tasks after each task."""
    lines = [_line(i, s, partial(mean_row, s)) for i, s in enumerate(experiment.strategies)]
    learned = len(experiment.tasks)
    right = 14 + max(text_width(shorten(s.name, NAME)) for s in experiment.strategies)
    plane = Plane(WIDTH, HEIGHT, (0, learned), _limits(lines), right=right)
    plane.draw_axes(_row_ticks(learned), "tasks learned (0: zero-shot)", "mean accuracy on all tasks (%)")
    _draw_lines(plane, lines)
    _label_ends(plane, lines)
    return plane.render("Mean accuracy on all tasks after each task, a line for each strategy")


def task_curve(experiment: Experiment, task: int) -> Markup:
    """The accuracy on one task after each task; a rule marks when it was learned."""
    lines = [_line(i, s, partial(s.cell, task=task)) for i, s in enumerate(experiment.strategies)]
    learned = len(experiment.tasks)
    plane = Plane(180, 130, (0, learned), _limits(lines), left=28, right=8, top=8, bottom=22)
    plane.draw_axes(_row_ticks(learned, 4), "", "", 3)
    x, y0 = plane.place(task + 1, plane.y[0])
    plane.add(Markup('<path class="rule" d="M{:.1f},{:.1f}V{:.1f}"/>').format(x, y0, plane.top))
    _draw_lines(plane, lines)
    return plane.render(f"Accuracy on {experiment.tasks[task]} after each task, a line for each strategy", "small")


def _line(index: int, strategy: Strategy, values_of: Callable[[int], list[float]]) -> Series:
    """Means over seeds, with a band from the lowest seed to the highest."""
    points, band = [], []
    for row in range(len(strategy.group.tasks) + 1):
        if values := values_of(row):
            points.append((float(row), statistics.fmean(values)))
            band.append((min(values), max(values)))
    return Series(index, strategy.name, points, band if any(low != high for low, high in band) else ())


def _limits(lines: Sequence[Series]) -> tuple[float, float]:
    ends = [
        value for line in lines for value in (*(y for _, y in line.points), *(v for pair in line.band for v in pair))
    ]
    return limits_of(ends or [0.0, 100.0], (0, 100))


def _row_ticks(rows: int, count: int = 11) -> list[tuple[float, str]]:
    return [(value, f"{value:g}") for value in ticks((0, rows), count) if value == round(value)]


def _draw_lines(plane: Plane, lines: Sequence[Series]) -> None:
    for line in lines:
        if line.points:
            plane.draw_series(line, markers=len(line.points) <= 30)


def _label_ends(plane: Plane, lines: Sequence[Series]) -> None:
    """Each line's name at its end, in its colour; a thin line leads to a name that had to give way."""
    ending = [line for line in lines if line.points]
    ends = [plane.place(*line.points[-1]) for line in ending]
    heights = spread([y for _, y in ends], FONT + 2, (plane.top + 4, plane.height - plane.bottom))
    for line, (x, y), height in zip(ending, ends, heights, strict=True):
        if abs(height - y) > 4:
            plane.add(Markup('<path class="lead" d="M{:.1f},{:.1f}L{:.1f},{:.1f}"/>').format(x + 3, y, x + 9, height))
        plane.add(label(line.name, x + 10, height + 4, kind=f"direct s{line.index % COLOURS}", columns=NAME))


def pareto(experiment: Experiment) -> Markup | None:
    """Last against Transfer with intervals, each seed as a small dot, and the front of strategies that none beats in both."""
    points: dict[int, Point] = {}
    for i, strategy in enumerate(experiment.strategies):
        if {"transfer", "last"} <= strategy.estimates.keys():
            points[i] = (strategy.estimates["transfer"].mean, strategy.estimates["last"].mean)
    if not points:
        return None
    extremes = [point for i in points for point in _extent(experiment.strategies[i])]
    untrained = _untrained(experiment)
    xs = [x for x, _ in (*points.values(), *extremes)] + ([untrained[0]] if untrained else [])
    ys = [y for _, y in (*points.values(), *extremes)] + ([untrained[1]] if untrained else [])
    plane = Plane(WIDTH, HEIGHT, limits_of(xs, room=0.14), limits_of(ys, room=0.14))
    plane.draw_axes(
        [(v, f"{v:g}") for v in ticks(plane.x)], "Transfer (%): tasks not learned yet", "Last (%): all tasks at the end"
    )
    front = _front(points)
    steps = [plane.place(*point) for point in front]
    if len(steps) > 1:
        line = "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in steps)
        plane.add(Markup('<path class="front" d="{}"><title>no strategy is better in both</title></path>').format(line))
    drawn: list[Box] = []
    for i in points:
        drawn += _draw_estimate(plane, i, experiment.strategies[i])
    marks = [plane.place(*point) for point in points.values()]
    if untrained:
        x, y = plane.place(*untrained)
        plane.add(Markup('<path class="untrained" d="M{0:.1f},{1:.1f}m-5,-5l10,10m0,-10l-10,10"/>').format(x, y))
        marks.append((x, y))
    names = [experiment.strategies[i].name for i in points] + (["untrained"] if untrained else [])
    kinds = [f"direct s{i % COLOURS}" for i in points] + ["direct"]
    _label_points(plane, marks, names, kinds, drawn)
    return plane.render("Last against Transfer, a point for each strategy")


def _extent(strategy: Strategy) -> list[Point]:
    """The corners of a strategy's intervals, and its seeds."""
    x, y = strategy.estimates["transfer"], strategy.estimates["last"]
    corners = list(zip(x.interval or (x.mean,) * 2, y.interval or (y.mean,) * 2, strict=True))
    return corners + _seeds(strategy)


def _seeds(strategy: Strategy) -> list[Point]:
    transfers, lasts = (by_seed(strategy.group, name) for name in ("transfer", "last"))
    return [(transfers[seed], lasts[seed]) for seed in transfers if seed in lasts]


def _untrained(experiment: Experiment) -> Point | None:
    """The zero-shot accuracies on what Transfer and Last measure; None if nothing was measured before the first task."""
    for strategy in experiment.strategies:
        for run in strategy.group.runs:
            if len(run.zero_shot) > 1:
                return statistics.fmean(run.zero_shot[1:]), statistics.fmean(run.zero_shot)
    return None


def _front(points: dict[int, Point]) -> list[Point]:
    """The points that no other is better than in both coordinates, from left to right."""
    front: list[Point] = []
    for x, y in sorted(set(points.values()), reverse=True):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front[::-1]


def _draw_estimate(plane: Plane, index: int, strategy: Strategy) -> list[Box]:
    """Draw a strategy's point, intervals and seeds. Returns the places that its intervals take."""
    x, y = strategy.estimates["transfer"], strategy.estimates["last"]
    parts, taken = [], []
    for low, high in (
        [(bound, y.mean) for bound in x.interval or (x.mean, x.mean)],
        [(x.mean, bound) for bound in y.interval or (y.mean, y.mean)],
    ):
        (x0, y0), (x1, y1) = plane.place(*low), plane.place(*high)
        line = Markup('<path class="error s{}" d="M{:.1f},{:.1f}L{:.1f},{:.1f}"/>')
        parts.append(line.format(index % COLOURS, x0, y0, x1, y1))
        taken.append((x0 - 1, y1 - 1, x1 + 1, y0 + 1))
    if len(seeds := _seeds(strategy)) > 1:
        for point in seeds:
            parts.append(
                Markup('<circle class="seed s{}" cx="{:.1f}" cy="{:.1f}" r="1.8"/>').format(
                    index % COLOURS, *plane.place(*point)
                )
            )
    parts.append(marker(index, *plane.place(x.mean, y.mean)))
    title = f"{strategy.name}: Transfer {x.mean:.2f}, Last {y.mean:.2f}"
    plane.add(Markup('<g data-series="{}"><title>{}</title>{}</g>').format(index, title, Markup("").join(parts)))
    return taken


def _label_points(
    plane: Plane, points: Sequence[Point], names: Sequence[str], kinds: Sequence[str], drawn: Sequence[Box]
) -> None:
    """Names beside points, where they cover no other name, no point and nothing drawn."""
    taken = [*drawn, *((x - 6, y - 6, x + 6, y + 6) for x, y in points)]
    for (x, y), name, kind in zip(points, names, kinds, strict=False):
        name = shorten(name, NAME)
        box, distance = _free_box(plane, x, y, text_width(name), taken)
        taken.append(box)
        if distance > 14:
            across, up = min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3])
            plane.add(Markup('<path class="lead" d="M{:.1f},{:.1f}L{:.1f},{:.1f}"/>').format(x, y, across, up))
        plane.add(label(name, box[0], box[3] - 3, kind=kind))


def _free_box(plane: Plane, x: float, y: float, width: float, taken: Sequence[Box]) -> tuple[Box, float]:
    """The place of a label that covers least, and its distance: near places come first."""
    best: tuple[float, float, Box] | None = None
    for distance in (9, 14, 22, 32, 44, 58, 74):
        for across, up in ((1, -1), (1, 1), (-1, -1), (-1, 1), (1, 0), (-1, 0), (0, -1), (0, 1)):
            left = x + across * distance - (width if across < 0 else width / 2 if across == 0 else 0)
            top = y + up * distance - FONT / 2 - 2
            box = (left, top, left + width, top + FONT + 3)
            inside = (
                plane.left < left and left + width < plane.width and top > 0 and box[3] < plane.height - plane.bottom
            )
            covered = sum(_overlap(box, other) for other in taken) + (0 if inside else 1e6)
            if best is None or covered < best[0]:
                best = (covered, distance, box)
            if covered == 0:
                return box, distance
    assert best is not None
    return best[2], best[1]


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def loss_chart(curves: Sequence[tuple[int, str, Curve]], ends: Sequence[int], y_label: str) -> Markup:
    """Losses over the steps of the whole run; rules mark where a task ends."""
    lines = [Series(index, name, curve.points) for index, name, curve in curves]
    values = [y for line in lines for _, y in line.points]
    steps = [x for line in lines for x, _ in line.points]
    right = 14 + max(text_width(shorten(name, NAME)) for _, name, _ in curves)
    plane = Plane(WIDTH, 260, (0, max(*steps, 1)), limits_of(values), left=50, right=right)
    plane.draw_axes([(v, f"{v:g}") for v in ticks(plane.x)], "training step", y_label)
    y0 = plane.place(0, plane.y[0])[1]
    for end in ends[:100]:
        if 0 < end < plane.x[1]:
            plane.add(
                Markup('<path class="rule" d="M{:.1f},{:.1f}V{:.1f}"/>').format(plane.place(end, 0)[0], y0, plane.top)
            )
    for line in lines:
        plane.draw_series(line, markers=False)
    _label_ends(plane, lines)
    return plane.render(f"{y_label} over the steps of training")


def rank_diagram(ranking: Ranking) -> Markup:
    """A critical-difference diagram: mean ranks on a line, bars join strategies that Nemenyi's test cannot tell apart."""
    count = len(ranking.names)
    cliques = ranking.cliques()
    half = (count + 1) // 2
    axis, step = 50.0, FONT + 7
    below = axis + 14 + 7 * len(cliques)
    side = 12 + max(text_width(shorten(name, NAME)) for name in ranking.names)
    plane = Plane(WIDTH, below + step * half + 14, (1, max(count, 2)), (0, 1), left=side, right=side)

    def at(rank: float) -> float:
        return plane.place(rank, 0)[0]

    plane.add(Markup('<path class="axis" d="M{:.1f},{:.1f}H{:.1f}"/>').format(at(1), axis, at(count)))
    for whole in range(1, count + 1):
        plane.add(Markup('<path class="axis" d="M{:.1f},{:.1f}v-5"/>').format(at(whole), axis))
        plane.add(label(str(whole), at(whole), axis - 9, "middle", "tick"))
    reach = min(1 + ranking.critical_difference, count)
    plane.add(Markup('<path class="clique" d="M{:.1f},20H{:.1f}"/>').format(at(1), at(reach)))
    plane.add(label(f"critical difference {ranking.critical_difference:.2f}", at(1), 13, kind="tick"))
    for i, (name, rank) in enumerate(zip(ranking.names, ranking.ranks, strict=True)):
        on_left = i < half
        height = below + step * (i if on_left else count - 1 - i) + 8
        end = side - 6 if on_left else WIDTH - side + 6
        plane.add(Markup('<path class="lead" d="M{:.1f},{:.1f}V{:.1f}H{:.1f}"/>').format(at(rank), axis, height, end))
        x, anchor = (end - 3, "end") if on_left else (end + 3, "start")
        plane.add(label(name, x, height + 4, anchor, "direct", NAME))
    for level, (first, last) in enumerate(cliques):
        y = axis + 9 + 7 * level
        start, stop = at(ranking.ranks[first]) - 4, at(ranking.ranks[last]) + 4
        plane.add(Markup('<path class="clique" d="M{:.1f},{:.1f}H{:.1f}"/>').format(start, y, stop))
    listed = ", ".join(f"{name} {rank:.2f}" for name, rank in zip(ranking.names, ranking.ranks, strict=True))
    return plane.render(f"Mean ranks over {ranking.streams} streams: {listed}")
