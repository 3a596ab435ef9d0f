"""Tables for a terminal, LaTeX, Markdown and CSV. Names of tasks, classes and settings are hostile text in all of them."""

from __future__ import annotations

import csv
import io
import math
import shutil
from collections.abc import Sequence
from typing import Literal

from attrs import evolve, field, frozen

from mulki_plugins.characters import legible, pad, printable, width

Format = Literal["text", "latex", "csv", "md"]
Cell = str | float | tuple[float, float | None] | None
"""A text, a number, a mean with its standard deviation, or nothing."""

_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "±": r"$\pm$", "[": "{[}", "]": "{]}", '"': r"{\ttfamily\char34}",
}  # fmt: skip
"""Characters that are commands to LaTeX; brackets would be the argument of a row's end. LaTeX's default encoding has the straight
quotation mark in typewriter type only."""
_DIRECTIONS = "\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff"
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""Characters with which a spreadsheet begins a formula."""


@frozen(kw_only=True)
class Table:
    """A table of texts and numbers."""

    title: str
    head: list[str]
    rows: list[list[Cell]]
    labels: int = 1
    """The leading columns that say what a row is: aligned to the left, and repeated where a table is broken."""
    gap: str = "  "
    """Between two columns on a terminal."""
    digits: int = 2
    """Decimals of a number, but in CSV, which has four."""
    longest: int | None = 80
    """Characters of a text on a terminal, which is cut after them; None for all."""
    foot: list[str] = field(factory=list)
    """Lines below the table; not part of CSV."""


def columns(
    rows: Sequence[Sequence[object]], align: str = "<", least: Sequence[int] = (0,), gap: str = "  "
) -> list[str]:
    """Lay out rows of cells as lines whose columns line up on a terminal. Rows may have fewer cells than others.

    align: `<` (left) or `>` (right) for each column. least: the least width of each column. The last entry of both applies
    to all further columns. Cells that could steer a terminal are made harmless.
    """
    table = [[legible(str(cell), None) for cell in row] for row in rows]
    count = max(map(len, table), default=0)
    rights = [align[min(i, len(align) - 1)] == ">" for i in range(count)]
    widths = [
        max(least[min(i, len(least) - 1)], *(width(row[i]) for row in table if i < len(row))) for i in range(count)
    ]
    return [gap.join(map(pad, row, widths, rights)).rstrip() for row in table]


def terminal_width() -> int:
    """The columns of the terminal on stdout, or what COLUMNS says; 80 in a pipe."""
    return max(40, shutil.get_terminal_size((80, 24)).columns)


def render(tables: Sequence[Table], form: Format, most: int) -> str:
    """The tables as text in this format. most: the width of a line of text, if the labels leave room for it."""
    if form == "csv":
        return _csv(tables)
    if form == "latex":
        return "\n\n".join(map(_latex, tables))
    if form == "md":
        return "\n\n".join(map(_markdown, tables))
    return "\n\n".join("\n".join(lines_of(table, most)) for table in tables)


def lines_of(table: Table, most: int) -> list[str]:
    """The table as lines for a terminal, broken into blocks of columns where it is wider than `most`."""
    title = [legible(table.title, None)] if table.title else []
    lines = [line for block in _blocks(table, most) for line in ("", *_ruled(block))][1:]
    return [*title, *lines, *(legible(line, None) for line in table.foot)]


def _blocks(table: Table, most: int) -> list[Table]:
    """The table in blocks of columns, each with the labels and at least one column."""
    blocks, start, end = [], table.labels, len(table.head)
    while start < end:
        stop = end
        while stop > start + 1 and width(_ruled(block := _part(table, start, stop))[1]) > most:
            stop -= 1
        block = _part(table, start, stop)
        blocks.append(block)
        start = stop
    return blocks or [table]


def _part(table: Table, start: int, stop: int) -> Table:
    def cut(row: list[Cell]) -> list[Cell]:
        return [*row[: table.labels], *row[start:stop]]

    head = [*table.head[: table.labels], *table.head[start:stop]]
    return evolve(table, head=head, rows=list(map(cut, table.rows)))


def _ruled(table: Table) -> list[str]:
    """The head, a rule and the rows, as lines."""
    body = [[_text(cell, table.digits) for cell in row] for row in table.rows]
    cut = [[legible(cell, table.longest) for cell in row] for row in (table.head, *body)]
    head, *lines = columns(cut, "<" * table.labels + ">", gap=table.gap)
    rule = "-" * max(map(width, (head, *lines)))
    return [head, rule, *lines]


def _is_missing(cell: Cell) -> bool:
    """Whether there is no number, such as an accuracy that an extended run could not measure."""
    number = cell[0] if isinstance(cell, tuple) else cell
    return number is None or (isinstance(number, float) and math.isnan(number))


def _text(cell: Cell, digits: int) -> str:
    if cell is None or _is_missing(cell):
        return "-"
    if isinstance(cell, str):
        return cell
    if isinstance(cell, tuple):
        mean, deviation = cell
        return f"{mean:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")
    return f"{cell:.{digits}f}"


def _markdown(table: Table) -> str:
    rows = [table.head, *([_text(cell, table.digits) for cell in row] for row in table.rows)]
    head, *body = ["| " + " | ".join(map(_escape_markdown, row)) + " |" for row in rows]
    rule = "| " + " | ".join(["---"] * table.labels + ["--:"] * (len(table.head) - table.labels)) + " |"
    title = [f"**{_escape_markdown(table.title)}**", ""] if table.title else []
    foot = ["", *(f"{_escape_markdown(line)}  " for line in table.foot)] if table.foot else []
    return "\n".join([*title, head, rule, *body, *foot])


def _escape_markdown(text: str) -> str:
    text = printable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{c}" if c in "\\`*_[]|#~!$" else c for c in text)


def _latex(table: Table) -> str:
    """A tabular with the rules of booktabs; its title is a comment."""

    def line(row: Sequence[Cell]) -> str:
        return " & ".join(_latex_cell(cell, table.digits) for cell in row) + r" \\"

    spec = "l" * table.labels + "r" * (len(table.head) - table.labels)
    comments = [f"% {printable(text)}" for text in (table.title, *table.foot) if text]
    return "\n".join(
        [
            *comments, f"\\begin{{tabular}}{{{spec}}}", r"\toprule", line(table.head), r"\midrule",
            *map(line, table.rows), r"\bottomrule", r"\end{tabular}",
        ]
    )  # fmt: skip


def _latex_cell(cell: Cell, digits: int) -> str:
    if isinstance(cell, str):
        return escape_latex(cell)
    if _is_missing(cell):
        return "--"
    return _text(cell, digits).replace(" ± ", r" $\pm$ ")


def escape_latex(text: str) -> str:
    """A text that LaTeX sets as it is: no command in it, and nothing that changes the direction of what follows."""
    shown = (c for c in printable(text) if c not in _DIRECTIONS)
    return "".join(_LATEX.get(c, c) for c in shown).replace("--", "-{}-")  # two would become a dash


def _csv(tables: Sequence[Table]) -> str:
    """A mean and its deviation are two columns. The first column names the table, if there are several."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    previous: list[str] = []
    for table in tables:
        paired = [any(isinstance(row[i], tuple) for row in table.rows) for i in range(len(table.head))]
        head = [part for i, name in enumerate(table.head) for part in ((name, f"{name} std") if paired[i] else (name,))]
        title = [table.title] if len(tables) > 1 else []
        if head != previous:
            if previous:
                writer.writerow([])
            writer.writerow(map(_csv_cell, [*(["table"] if title else []), *head]))
            previous = head
        for row in table.rows:
            values: list[str | float | None] = [*title]
            for cell, pair in zip(row, paired, strict=True):
                mean, deviation = cell if isinstance(cell, tuple) else (cell, None)
                values += [mean, deviation] if pair else [mean]
            writer.writerow(map(_csv_cell, values))
    return text.getvalue().rstrip("\n")


def _csv_cell(value: str | float | None) -> str:
    """A text that a spreadsheet would compute gets an apostrophe."""
    if value is None or _is_missing(value):
        return ""
    return escape_formula(value) if isinstance(value, str) else f"{value:.4f}"


def escape_formula(text: str) -> str:
    """A text for a spreadsheet, with an apostrophe before it if it would be computed."""
    text = printable(text)
    return f"'{text}" if text.lstrip().startswith(_FORMULA) else text
