"""The accuracy matrix as text: one row for each task trained, one column for each test set, the metrics below."""

from __future__ import annotations

from collections.abc import Sequence

from mulki_plugins.characters import pad, printable, width
from mulki_plugins.report.result import Result


def matrix_table(result: Result) -> str:
    """A run's matrix and metrics, in percent."""
    names = [printable(name) for name in result.tasks]
    columns = max(6, *(width(name) for name in names)) + 1
    rows = named_rows(result)
    label = max(width(name) for name in ("zero-shot", *names, *(printable(name) for name, _ in rows))) + 2
    lines = [f"{'after':<{label}}" + "".join(pad(name, columns, right=True) for name in names) + f"{'mean':>8}"]
    rule = "-" * width(lines[0])
    lines += [rule, *(_row(printable(name), row, label, columns) for name, row in rows), rule]
    if result.metrics:
        shown = {name: "-" if value is None else f"{value:.2f}" for name, value in result.metrics.items()}
        lines.append("   ".join(f"{printable(name).capitalize()} {value}" for name, value in shown.items()))
    if result.status != "complete":
        done = f"{len(result.matrix)} of {len(names)} tasks finished"
        lines.append(f"{printable(result.status)}: {done}" + (f"; {printable(result.error)}" if result.error else ""))
    return "\n".join(lines)


def named_rows(result: Result) -> list[tuple[str, list[float]]]:
    """The zero-shot row and the rows of the matrix, each with what had been learned; joint training has but one."""
    rows = [("zero-shot", result.zero_shot)] if result.zero_shot else []
    if result.base == "joint" and result.matrix:
        return [*rows, ("all tasks", result.matrix[-1])]
    return [*rows, *zip(result.tasks, result.matrix, strict=False)]


def _row(name: str, values: Sequence[float], label: int, columns: int) -> str:
    return pad(name, label) + "".join(f"{v:>{columns}.1f}" for v in values) + f"{sum(values) / len(values):>8.1f}"


def heading(result: Result) -> str:
    """One line that says which run it is."""
    where = f"  ({printable(result.folder)})" if result.folder else ""
    return f"{printable(result.recipe)} / {printable(result.strategy)} / seed {result.seed}{where}"
