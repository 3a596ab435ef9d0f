"""What a study says: Markdown tables of its lines, and the places in a document where they belong."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from mulki_plugins.errors import MulkiError
from mulki_plugins.files import write_text
from mulki_plugins.report.significance import Test, seeds_test
from mulki_plugins.study.choose import ranked
from mulki_plugins.study.costs import Cost, CostLine, mean_trained, spread, summarize
from mulki_plugins.study.plan import STUDY
from mulki_plugins.study.schema import Choice, Part, Study
from mulki_plugins.study.state import State
from mulki_plugins.study.table import Line, mean_of

METRICS = ("transfer", "average", "last")
_UNKNOWN = "–"
_SAME = 0.5
"""Points by which the zero-shot accuracies of one model may differ from machine to machine."""
_OPTIONAL = {"p": 1, "trained weights": 2, "step": 2, "peak memory": 2}
"""Columns that not every study can fill, and in how many rows something must be known."""
_ORDER_AND_P = (
    "The best mean of the three stands first. p: t test of that mean against the row below, over seeds; paired if both rows have "
    "the same seeds, else Welch's; two-sided, not corrected for the number of rows."
)
_COSTS = "What a step takes is relative to {base}; peak memory is in MiB."


def results_text(found: Sequence[State], study: Study, costs: Sequence[CostLine] = ()) -> str:
    """The tables of all parts, then the parts that are a sentence, then how many runs are still to come.

    costs: what strategies cost, for the rows that have their names.
    """
    parts = study.parts or {STUDY: Part(runs=[])}
    base = study.cost.base if study.cost is not None else ""
    known = summarize(costs, base)
    tables = [_part_tables(name, part, found, known) for name, part in parts.items() if part.show == "table"]
    tables = [*filter(None, tables)]
    tables += [_ORDER_AND_P] if any(" p |" in table for table in tables) else []
    tables += [_COSTS.format(base=base)] if any(" step |" in table for table in tables) else []
    sentences = [_sentence(name, part, found) for name, part in parts.items() if part.show == "sentence"]
    left = sum(state.line is None for state in found)
    unfinished = f"{left} of the plan's {len(found)} runs {'is' if left == 1 else 'are'} still to come." if left else ""
    texts = [*tables, _zero_shot(found, next(iter(parts))), *sentences, unfinished]
    return "\n\n".join(filter(None, texts))


def _part_tables(name: str, part: Part, found: Sequence[State], costs: Mapping[str, Cost]) -> str:
    own = [state for state in found if state.run.job.part == name and state.run.job.in_tables]
    texts = []
    for order in dict.fromkeys(state.run.job.order for state in own):
        lines = [state.line for state in own if state.run.job.order == order and state.line is not None]
        if not lines:
            continue
        labels = dict.fromkeys(state.run.job.label for state in own)
        beside = _beside(part, order, {line.seed for line in lines}, found)
        labels = dict.fromkeys([line.label for line in beside]) | labels
        title = part.title.replace("{order}", order) if part.title else " ".join(filter(None, (name, order)))
        texts.append(f"### {title}\n\n{_table([*beside, *lines], list(labels), costs)}")
    return "\n\n".join(texts)


def _beside(part: Part, order: str, seeds: set[int], found: Sequence[State]) -> list[Line]:
    """The rows of another part that join a table."""
    if (other := part.beside) is None:
        return []
    lines = [state.line for state in found if state.line is not None]
    return [x for x in lines if (x.part, x.order, x.label) == (other.part, order, other.label) and x.seed in seeds]


def _table(lines: Sequence[Line], labels: Sequence[str], costs: Mapping[str, Cost]) -> str:
    """A row for each label, the best mean of the three first. A column about which nothing is known is left out."""
    by_label: dict[str, list[Line]] = {label: [] for label in labels}
    for line in lines:
        by_label[line.label].append(line)
    by_label = _sorted_by_mean({label: own for label, own in by_label.items() if own})
    below = tests_of_neighbours(by_label)
    rows = [_row(label, own, below.get(label), costs.get(label)) for label, own in by_label.items()]
    shown = [name for name in rows[0] if _is_known(name, [row[name] for row in rows])]
    return markdown(shown, [[row[name] for name in shown] for row in rows])


def _row(label: str, lines: Sequence[Line], below: Test | None, cost: Cost | None) -> dict[str, str]:
    """The cells of a row by the heads of their columns. below: the test against the next row."""
    return {
        "": _escaped(label),
        "seeds": str(len(lines)),
        **{name.capitalize(): _cell(getattr(line, name) for line in lines) for name in METRICS},
        "mean of the three": _cell(mean_of(line, METRICS) for line in lines),
        "p": _p_value(below),
        "Forgetting": _cell(line.forgetting for line in lines),
        "just learned": _cell(line.just_learned for line in lines),
        "trained weights": _trained(lines, cost),
        "step": cost.relative if cost is not None else _UNKNOWN,
        "peak memory": cost.memory if cost is not None else _UNKNOWN,
    }


def _is_known(name: str, column: Sequence[str]) -> bool:
    """Whether a column is shown: one about costs if it compares at least two rows, or has the only one."""
    known = sum(cell != _UNKNOWN for cell in column)
    return name not in _OPTIONAL or known >= min(_OPTIONAL[name], len(column))


def _sorted_by_mean(by_label: Mapping[str, list[Line]]) -> dict[str, list[Line]]:
    """The best mean of the three first; rows without it come last, in their order."""

    def key(label: str) -> float:
        known = [mean for line in by_label[label] if (mean := mean_of(line, METRICS)) is not None]
        return -statistics.fmean(known) if known else math.inf

    return {label: by_label[label] for label in sorted(by_label, key=key)}


def tests_of_neighbours(by_label: Mapping[str, Sequence[Line]]) -> dict[str, Test]:
    """For each label the test of its mean of the three against that of the next one, over seeds, where both have two."""
    means = {
        label: {line.seed: mean for line in lines if (mean := mean_of(line, METRICS)) is not None}
        for label, lines in by_label.items()
    }
    tested = {a: seeds_test(means[a], means[b]) for a, b in itertools.pairwise(means)}
    return {label: test for label, test in tested.items() if test is not None}


def _p_value(test: Test | None) -> str:
    if test is None:
        return _UNKNOWN
    return f"{test.p:.3f}" if test.p >= 0.001 else "< 0.001"


def _trained(lines: Sequence[Line], cost: Cost | None) -> str:
    """What the runs themselves say, else what the measurement of the cost does."""
    if any(line.trained is not None for line in lines):
        return mean_trained((line.trained, line.weights) for line in lines)
    return cost.trained if cost is not None else _UNKNOWN


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("|" + "".join(f" {cell} |" if cell else " |" for cell in line) for line in lines)


def _cell(values: Iterable[float | None]) -> str:
    return spread([value for value in values if value is not None], ".1f")


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _zero_shot(found: Sequence[State], part: str) -> str:
    """The zero-shot accuracies of each recipe, with which Transfer is to be compared."""
    by_recipe: dict[str, dict[str, list[Line]]] = defaultdict(lambda: defaultdict(list))
    for state in found:
        if state.line is not None and state.line.part == part:
            by_recipe[state.run.job.recipe][state.line.order].append(state.line)
    return "\n\n".join(
        _zero_shot_of(lines, f"Zero-shot, {Path(recipe).stem}" if len(by_recipe) > 1 else "Zero-shot")
        for recipe, lines in by_recipe.items()
    )


def _zero_shot_of(by_order: Mapping[str, Sequence[Line]], what: str) -> str:
    every = [line.zero_shot for lines in by_order.values() for line in lines]
    if max(every) - min(every) > _SAME:
        return f"{what}: {min(every):.1f} to {max(every):.1f} in the mean of all tasks, for the runs differ in tasks or model."
    later = {order: lines[-1].zero_shot_later for order, lines in by_order.items()}
    known = [(order, value) for order, value in later.items() if value]  # 0: of one task, in lines of earlier versions
    each = ", ".join(f"{value:.1f}" + (f" in order {order}" if order else "") for order, value in known)
    return f"{what}: {every[0]:.1f} in the mean of all tasks" + (f"; of all but the first {each}." if each else ".")


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
    header = ["setting", *(name.capitalize() for name in rule.by), "mean"]
    rows = []
    for tried in ranked(found, rule).values():
        for line in (state.line for state in tried if state.line is not None):
            numbers = [*(getattr(line, name) for name in rule.by), mean_of(line, rule.by)]
            rows.append([_escaped(line.label), *(_cell([number]) for number in numbers)])
    return markdown(header, rows)


def cost_table(costs: Iterable[CostLine], base: str) -> str:
    """A row for each strategy: mean ± standard deviation over the rounds."""
    time, memory = f"time over {base}", f"memory over {base}"
    header = ["", "ms per step", time, "peak memory (MiB)", memory, "trained weights", "model on disk (MB)"]
    rows = [
        [_escaped(name), c.step, c.relative, c.memory, c.relative_memory, c.trained, c.kept]
        for name, c in summarize(costs, base).items()
    ]
    return markdown(header, rows)


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
