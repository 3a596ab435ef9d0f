"""Charts as SVG: a plane with axes, and what is drawn on it. Sizes are in CSS pixels; names are escaped by Markup.

Colours are classes (`s0` … `s7`), which the page's style sheet sets for light and dark. Line styles and markers differ too, so
that series can be told apart without colours.
"""

from __future__ import annotations

from collections.abc import Sequence

from attrs import define, field, frozen
from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

from mulki_plugins.characters import printable, width

COLOURS = 8
DASHES = ("", "6 3", "2 2", "8 3 2 3")
FONT = 12
"""Pixels of the labels at the charts' natural size."""

Point = tuple[float, float]
Limits = tuple[float, float]


def shorten(text: str, columns: int) -> str:
    """A text of at most so many columns, on one line."""
    text = printable(text)
    if width(text) <= columns:
        return text
    while text and width(text) > columns - 1:
        text = text[:-1]
    return text + "…"


def text_width(text: str) -> float:
    """Pixels that a label takes, rather too many than too few."""
    return 0.6 * FONT * width(text)


def style_of(index: int) -> Markup:
    """Class and line style of a series."""
    dash = DASHES[index // COLOURS % len(DASHES)]
    return Markup('class="line s{}"{}').format(
        index % COLOURS, Markup(' stroke-dasharray="{}"').format(dash) if dash else ""
    )


def marker(index: int, x: float, y: float, size: float = 4.5) -> Markup:
    """A marker: its shape and colour tell the series."""
    shapes = (
        "M-1,0A1,1 0 1 0 1,0A1,1 0 1 0 -1,0Z", "M-.9,-.9H.9V.9H-.9Z", "M0,-1.15L1.1,.8H-1.1Z", "M0,-1.25L1.25,0L0,1.25L-1.25,0Z",
        "M0,1.15L1.1,-.8H-1.1Z", "M-.35,-1.1H.35V-.35H1.1V.35H.35V1.1H-.35V.35H-1.1V-.35H-.35Z",
        "M-1.1,-.5L0,-1.2L1.1,-.5V.6L0,1.2L-1.1,.6Z", "M-1.2,-.4H1.2V.4H-1.2Z",
    )  # fmt: skip
    return Markup('<path class="mark s{}" transform="translate({:.1f} {:.1f}) scale({})" d="{}"/>').format(
        index % COLOURS, x, y, size, shapes[(index + index // COLOURS) % len(shapes)]
    )


def swatch(index: int) -> Markup:
    """The line and marker of a series, for a legend."""
    line = Markup('<path {} d="M1,7H29"/>').format(style_of(index))
    return Markup('<svg class="swatch" viewBox="0 0 30 14" aria-hidden="true">{}{}</svg>').format(
        line, marker(index, 15, 7)
    )


def label(text: str, x: float, y: float, anchor: str = "start", kind: str = "", columns: int = 60) -> Markup:
    """A text; one that is cut gets its whole as a tooltip."""
    short = shorten(text, columns)
    whole = Markup("<title>{}</title>").format(printable(text)) if short != printable(text) else ""
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}" class="{}">{}{}</text>').format(
        x, y, anchor, kind, whole, short
    )


@frozen
class Series:
    """A line: points in data coordinates, and a band around it."""

    index: int
    """Its colour, line style and marker."""
    name: str
    points: Sequence[Point]
    band: Sequence[Limits] = ()


@define
class Plane:
    """An SVG image with axes."""

    width: float
    height: float
    x: Limits
    y: Limits
    left: float = 44
    right: float = 12
    top: float = 12
    bottom: float = 40
    parts: list[Markup] = field(factory=list)

    def place(self, x: float, y: float) -> Point:
        """Data coordinates in pixels."""
        (x0, x1), (y0, y1) = self.x, self.y
        across, up = (x - x0) / (x1 - x0), (y - y0) / (y1 - y0)
        return (
            self.left + across * (self.width - self.left - self.right),
            self.height - self.bottom - up * (self.height - self.top - self.bottom),
        )

    def add(self, markup: Markup) -> None:
        self.parts.append(markup)

    def draw_axes(self, x_ticks: Sequence[tuple[float, str]], x_label: str, y_label: str, y_ticks: int = 6) -> None:
        """Grid lines, tick labels and the axes' names."""
        x0, y0 = self.place(self.x[0], self.y[0])
        x1, y1 = self.place(self.x[1], self.y[1])
        for value in ticks(self.y, y_ticks):
            y = self.place(0, value)[1]
            self.add(Markup('<path class="grid" d="M{:.1f},{:.1f}H{:.1f}"/>').format(x0, y, x1))
            self.add(label(f"{value:g}", x0 - 5, y + 4, "end", "tick"))
        for value, text in x_ticks:
            x = self.place(value, 0)[0]
            self.add(Markup('<path class="axis" d="M{:.1f},{:.1f}v4"/>').format(x, y0))
            self.add(label(text, x, y0 + 16, "middle", "tick"))
        self.add(Markup('<path class="axis" d="M{:.1f},{:.1f}H{:.1f}"/>').format(x0, y0, x1))
        if x_label:
            self.add(label(x_label, (x0 + x1) / 2, self.height - 5, "middle", "name"))
        if y_label:
            turned = Markup(
                '<text class="name" text-anchor="middle" transform="translate(12 {:.1f}) rotate(-90)">{}</text>'
            )
            self.add(turned.format((y0 + y1) / 2, y_label))

    def draw_series(self, series: Series, markers: bool = True) -> None:
        """A line with its band, in a group that the page can bring out."""
        places = [self.place(*point) for point in series.points]
        parts = []
        if len(series.band) == len(places) > 1:
            edge = [self.place(p[0], high) for p, (_, high) in zip(series.points, series.band, strict=True)]
            edge += [self.place(p[0], low) for p, (low, _) in zip(series.points, series.band, strict=True)][::-1]
            parts.append(Markup('<path class="band s{}" d="{}Z"/>').format(series.index % COLOURS, path(edge)))
        parts.append(Markup('<path {} d="{}"/>').format(style_of(series.index), path(places)))
        if markers or len(places) == 1:
            parts += [marker(series.index, x, y, 2.6) for x, y in places]
        self.add(
            Markup('<g data-series="{}"><title>{}</title>{}</g>').format(
                series.index, printable(series.name), Markup("").join(parts)
            )
        )

    def render(self, description: str, kind: str = "") -> Markup:
        """The image, with a description for those who cannot see it."""
        return Markup('<svg class="chart {}" viewBox="0 0 {:.0f} {:.0f}" role="img" aria-label="{}">{}</svg>').format(
            kind, self.width, self.height, printable(description), Markup("\n").join(self.parts)
        )


def path(points: Sequence[Point]) -> str:
    """Points as the `d` of a path."""
    return "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points)


def ticks(limits: Limits, count: int = 5) -> list[float]:
    """Round values within the limits."""
    low, high = limits
    values = MaxNLocator(nbins=count, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    slack = 1e-9 * (high - low)
    return [float(value) for value in values if low - slack <= value <= high + slack]


def limits_of(values: Sequence[float], within: Limits | None = None, room: float = 0.06) -> Limits:
    """Limits that hold the values with some room, but do not leave `within`."""
    low, high = min(values), max(values)
    reach = max((high - low) * room, 0.5 if high == low else 0.0, 1e-6)
    low, high = low - reach, high + reach
    return (low, high) if within is None else (max(low, within[0]), min(high, within[1]))


def spread(heights: Sequence[float], gap: float, limits: Limits) -> list[float]:
    """Positions near these heights that are at least `gap` apart, in the same order; within the limits if they fit."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    placed = list(heights)
    for before, i in zip([None, *order], order, strict=False):
        placed[i] = max(placed[i], limits[0] if before is None else placed[before] + gap)
    ceiling = limits[1]
    for i in reversed(order):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    return placed
