"""What a study says: Markdown tables of its lines, and the places in a document where they belong."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from mulki_plugins.errors import MulkiError
from mulki_plugins.files import write_text
from mulki_plugins.study.choose import ranked
from mulki_plugins.study.plan import STUDY
from mulki_plugins.study.schema import Choice, Part, Study
from mulki_plugins.study.state import State
from mulki_plugins.study.table import Line, mean_of

METRICS = ("transfer", "average", "last")
Cost = Mapping[str, Sequence[tuple[float, float]]]
"""For each strategy the seconds of the last task and the peak memory of each round."""


def results_text(found: Sequence[State], study: Study) -> str:
    """The tables of all parts, then what is said in a sentence, then how many runs are still to come."""
    parts = study.parts or {STUDY: Part(runs=[])}
    tables = [_part_tables(name, part, found) for name, part in parts.items() if part.show == "table"]
    sentences = [_sentence(name, part, found) for name, part in parts.items() if part.show == "sentence"]
    left = sum(state.line is None for state in found)
    unfinished = f"{left} of the plan's {len(found)} runs are still to come." if left else ""
    texts = [*tables, _zero_shot(found, next(iter(parts))), *sentences, unfinished]
    return "\n\n".join(filter(None, texts))


def _part_tables(name: str, part: Part, found: Sequence[State]) -> str:
    own = [state for state in found if state.run.job.part == name and state.run.job.in_tables]
    texts = []
    for order in dict.fromkeys(state.run.job.order for state in own):
        lines = [state.line for state in own if state.run.job.order == order and state.line is not None]
        if not lines:
            continue
        labels = dict.fromkeys(state.run.job.label for state in own)
        beside = _beside(part, order, {line.seed for line in lines}, found)
        labels = dict.fromkeys([line.label for line in beside]) | labels
        title = part.title.format(order=order) if part.title else " ".join(filter(None, (name, order)))
        texts.append(f"### {title}\n\n{_table([*beside, *lines], list(labels))}")
    return "\n\n".join(texts)


def _beside(part: Part, order: str, seeds: set[int], found: Sequence[State]) -> list[Line]:
    """The rows of another part that a table begins with."""
    if (other := part.beside) is None:
        return []
    lines = [state.line for state in found if state.line is not None]
    return [x for x in lines if (x.part, x.order, x.label) == (other.part, order, other.label) and x.seed in seeds]


def _table(lines: Sequence[Line], labels: Sequence[str]) -> str:
    by_label: dict[str, list[Line]] = defaultdict(list)
    for line in lines:
        by_label[line.label].append(line)
    rows = [
        "| | seeds | Transfer | Average | Last | mean of the three | Forgetting | just learned |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for label in labels:
        if own := by_label.get(label):
            values = [[getattr(line, name) for line in own] for name in METRICS]
            values.append([mean_of(line, METRICS) for line in own])
            values += [[line.forgetting for line in own], [line.just_learned for line in own]]
            rows.append(f"| {_escaped(label)} | {len(own)} | " + " | ".join(map(_cell, values)) + " |")
    return "\n".join(rows)


def _cell(values: Iterable[float | None]) -> str:
    """Mean ± standard deviation (n − 1)."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    spread = f" ± {statistics.stdev(known):.1f}" if len(known) > 1 else ""
    return f"{statistics.fmean(known):.1f}{spread}"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _zero_shot(found: Sequence[State], part: str) -> str:
    """The zero-shot accuracies, with which Transfer is to be compared."""
    known = {state.line.order: state.line for state in found if state.line is not None and state.line.part == part}
    if not known:
        return ""
    mean = next(iter(known.values())).zero_shot
    each = ", ".join(
        f"{line.zero_shot_later:.1f}" + (f" in order {order}" if order else "") for order, line in known.items()
    )
    return f"Zero-shot: {mean:.1f} in the mean of all tasks; of all but the first {each}."


def _sentence(name: str, part: Part, found: Sequence[State]) -> str:
    """The mean of Last over the part's labels, and each of them."""
    by_label: dict[str, list[float]] = defaultdict(list)
    for state in found:
        line = state.line
        if state.run.job.part == name and line is not None and line.last is not None:
            by_label[line.label].append(line.last)
    if not by_label:
        return ""
    means = {label: statistics.fmean(values) for label, values in by_label.items()}
    each = ", ".join(f"{label} {value:.1f}" for label, value in means.items())
    return f"{part.title or name}: {statistics.fmean(means.values()):.1f} in the mean ({each})."


def choice_table(found: Sequence[State], rule: Choice) -> str:
    """Every setting that was tried, the best of each method first."""
    names = [name.capitalize() for name in rule.by]
    rows = [f"| setting | {' | '.join(names)} | mean |", "| --- " * (len(names) + 2) + "|"]
    for tried in ranked(found, rule).values():
        for line in (state.line for state in tried if state.line is not None):
            numbers = [*(getattr(line, name) for name in rule.by), mean_of(line, rule.by)]
            rows.append(f"| {_escaped(line.label)} | " + " | ".join(_cell([n]) for n in numbers) + " |")
    return "\n".join(rows)


def cost_table(costs: Cost, base: str) -> str:
    """Median seconds and memory over those of `base`, and the range of the rounds' ratios."""
    rows = ["| | time | from – to | peak memory |", "| --- | --- | --- | --- |"]
    for name, rounds in costs.items():
        pairs = list(zip(rounds, costs.get(base, ()), strict=False))
        if not pairs:
            continue
        ratios = [seconds / other for (seconds, _), (other, _) in pairs]
        memory = statistics.median(m for (_, m), _ in pairs) / statistics.median(m for _, (_, m) in pairs)
        between = f"{min(ratios):.2f} – {max(ratios):.2f}"
        rows.append(f"| {_escaped(name)} | {statistics.median(ratios):.2f} | {between} | {memory:.2f} |")
    return "\n".join(rows)


def write_between_marks(path: Path, texts: Mapping[str, str]) -> list[str]:
    """Put texts where a document marks their places: `<!-- name: begin -->` to `<!-- name: end -->`. Returns the names found.

    MulkiError if the document cannot be read, or has none of the marks.
    """
    try:
        document = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MulkiError(f"{path}: cannot be read: {error}") from error
    written = []
    for name, text in texts.items():
        start, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, begun, rest = document.partition(start)
        _, ended, after = rest.partition(end)
        if begun and ended:
            document = f"{before}{start}\n\n{text}\n\n{end}{after}"
            written.append(name)
    if not written:
        marks = ", ".join(f"<!-- {name}: begin -->" for name in texts)
        raise MulkiError(
            f"{path}: the document marks no place for a table", f"expected one of {marks}, and the same with end"
        )
    write_text(path, document)
    return written
