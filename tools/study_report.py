"""What the study's runs say: a line for each in a CSV file, and of these the tables and the figure."""

from __future__ import annotations

import csv
import os
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from attrs import asdict, field, fields, frozen
from matplotlib.figure import Figure

METRICS = ("transfer", "average", "last")


@frozen(kw_only=True)
class Line:
    """What the table keeps of a run."""

    part: str
    order: str
    label: str
    seed: int
    fingerprint: str
    """Of the resolved recipe."""
    device: str
    code: str
    """A fingerprint of the package's code."""
    transfer: float | None = None
    average: float | None = None
    last: float | None = None
    forgetting: float | None = None
    just_learned: float | None = None
    zero_shot: float = field(default=0.0)
    zero_shot_later: float = field(default=0.0)
    """Mean over all tasks, and over all but the first, which is what Transfer is to be held against."""
    seconds: float = 0.0
    memory: float = 0.0
    """Of training, and the peak in MiB."""


def read_lines(path: Path) -> list[Line]:
    """The table so far."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [Line(**{a.name: _read(a.type, row[a.name]) for a in fields(Line)}) for row in csv.DictReader(file)]


def _read(kind: Any, text: str) -> Any:
    if "float" in str(kind):
        return float(text) if text else None
    return int(text) if "int" in str(kind) else text


def add_line(path: Path, line: Line) -> None:
    """One line more, written whole."""
    new = not path.is_file()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [a.name for a in fields(Line)], lineterminator="\n")
        if new:
            writer.writeheader()
        row = {key: round(value, 4) if isinstance(value, float) else value for key, value in asdict(line).items()}
        writer.writerow(row)
        file.flush()
        os.fsync(file.fileno())


def mean_of_three(line: Line) -> float | None:
    """The mean of Transfer, Average and Last, by which settings are chosen."""
    values = [getattr(line, name) for name in METRICS]
    return None if None in values else statistics.fmean(values)


def _cell(values: Iterable[float | None]) -> str:
    """Mean ± standard deviation (n − 1)."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    spread = f" ± {statistics.stdev(known):.1f}" if len(known) > 1 else ""
    return f"{statistics.fmean(known):.1f}{spread}"


def results_table(lines: Sequence[Line], plan: dict[str, Any]) -> str:
    """Markdown: for each order, and for the ablation, a line for each strategy."""
    parts = []
    for order in plan["orders"]:
        chosen = [line for line in lines if line.part == "study" and line.order == order]
        parts.append(f"### Order {order}\n\n{_table(chosen, [*plan['many'], *plan['few']])}" if chosen else "")
    ablation = [line for line in lines if line.part == "ablation"]
    seeds = {line.seed for line in ablation}
    whole = [
        x
        for x in lines
        if (x.part, x.order, x.label) == ("study", "I", plan["ablation"]["strategy"]) and x.seed in seeds
    ]
    if ablation:
        labels = list(dict.fromkeys(line.label for line in [*whole, *ablation]))
        parts.append(f"### Ablation, order I, the same seeds\n\n{_table([*whole, *ablation], labels)}")
    return "\n\n".join(part for part in parts if part)


def _table(lines: Sequence[Line], labels: Sequence[str]) -> str:
    by_label: dict[str, list[Line]] = defaultdict(list)
    for line in lines:
        by_label[line.label].append(line)
    rows = [
        "| | seeds | Transfer | Average | Last | mean of the three | Forgetting | just learned |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for label in labels:
        if found := by_label.get(label):
            values = [[getattr(line, name) for line in found] for name in METRICS]
            values.append([mean_of_three(line) for line in found])
            values += [[line.forgetting for line in found], [line.just_learned for line in found]]
            rows.append(f"| {label} | {len(found)} | " + " | ".join(map(_cell, values)) + " |")
    return "\n".join(rows)


def choice_table(lines: Sequence[Line]) -> str:
    """Markdown: every setting that was tried, the best of each method first."""
    rows = ["| setting | Transfer | Average | Last | mean |", "| --- | --- | --- | --- | --- |"]
    by_method: dict[str, list[Line]] = defaultdict(list)
    for line in lines:
        by_method[line.label.split(":")[0]].append(line)
    for tried in by_method.values():
        for line in sorted(tried, key=lambda x: -(mean_of_three(x) or 0.0)):
            numbers = (*(getattr(line, name) for name in METRICS), mean_of_three(line))
            rows.append(f"| {line.label} | " + " | ".join(_cell([n]) for n in numbers) + " |")
    return "\n".join(rows)


def cost_table(costs: dict[str, list[tuple[float, float]]], base: str = "finetune") -> str:
    """Markdown: median seconds and memory over those of `base`, and the range of the rounds' ratios."""
    rows = ["| | time | from – to | peak memory |", "| --- | --- | --- | --- |"]
    for name, rounds in costs.items():
        ratios = [seconds / other for (seconds, _), (other, _) in zip(rounds, costs[base], strict=True)]
        memory = statistics.median(m for _, m in rounds) / statistics.median(m for _, m in costs[base])
        rows.append(
            f"| {name} | {statistics.median(ratios):.2f} | {min(ratios):.2f} – {max(ratios):.2f} | {memory:.2f} |"
        )
    return "\n".join(rows)


def figure(lines: Sequence[Line], plan: dict[str, Any]) -> Figure:
    """For each order Last over Transfer: what is kept of the zero-shot ability, and what has been learned."""
    orders = [order for order in plan["orders"] if any(line.order == order for line in lines)]
    result = Figure(figsize=(5.2 * max(1, len(orders)), 5.0), layout="constrained")
    for i, order in enumerate(orders):
        axes = result.add_subplot(1, len(orders), i + 1)
        chosen = [line for line in lines if line.part == "study" and line.order == order]
        for k, name in enumerate([*plan["many"], *plan["few"]]):
            found = [line for line in chosen if line.label == name and line.transfer is not None]
            if not found or name in plan["once"]:
                continue
            x, y = ([getattr(line, metric) for line in found] for metric in ("transfer", "last"))
            spread = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in (x, y)]
            marker = "*" if name == plan["ablation"]["strategy"] else "o"
            at = statistics.fmean(x), statistics.fmean(y)
            axes.errorbar(
                *at,
                xerr=spread[0],
                yerr=spread[1],
                fmt=marker,
                markersize=13 if marker == "*" else 6,
                color=f"C{k % 10}",
            )
            place = (6, -12 if k % 2 else 5)  # so that fewer names lie on each other
            axes.annotate(name, at, xytext=place, textcoords="offset points", fontsize=9, parse_math=False)
        if chosen:
            axes.axvline(chosen[0].zero_shot_later, color="grey", linestyle=":", linewidth=1)
            axes.axhline(chosen[0].zero_shot, color="grey", linestyle=":", linewidth=1)
        axes.set_title(f"order {order}", fontsize=10, parse_math=False)
        axes.set_xlabel("Transfer (%)")
        axes.set_ylabel("Last (%)")
    result.suptitle("mtil-mini: mean and standard deviation over seeds; dotted: zero-shot", fontsize=10)
    return result


def zero_shot_text(lines: Sequence[Line]) -> str:
    """What Transfer is to be held against."""
    known = {line.order: line for line in lines if line.part == "study"}
    said = [f"{line.zero_shot_later:.1f} in order {order}" for order, line in known.items()]
    if not said:
        return ""
    mean = next(iter(known.values())).zero_shot
    return f"Zero-shot: {mean:.1f} in the mean of all tasks; of all but the first {', '.join(said)}."


def alone_text(lines: Sequence[Line]) -> str:
    """What fine-tuning reaches on each task alone, from the pre-trained model."""
    by_task: dict[str, list[float]] = defaultdict(list)
    for line in lines:
        if line.part == "alone" and line.last is not None:
            by_task[line.label].append(line.last)
    if not by_task:
        return ""
    means = {task: statistics.fmean(values) for task, values in by_task.items()}
    each = ", ".join(f"{task} {value:.1f}" for task, value in means.items())
    return f"Fine-tuned on each task alone: {statistics.fmean(means.values()):.1f} in the mean ({each})."


def write_between_marks(path: Path, name: str, text: str) -> None:
    """Put a table where a document marks its place; a document without the marks is left alone."""
    start, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    document = path.read_text("utf-8") if path.is_file() else ""
    before, begun, rest = document.partition(start)
    _, ended, after = rest.partition(end)
    if begun and ended:
        path.write_text(f"{before}{start}\n\n{text}\n\n{end}{after}", "utf-8")
