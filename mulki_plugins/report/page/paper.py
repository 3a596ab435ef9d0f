"""The tables of a report for a paper: LaTeX with booktabs, and CSV."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Iterator, Sequence

from mulki_plugins.report.formats import escape_formula, escape_latex
from mulki_plugins.report.page.experiment import LEVEL, Experiment
from mulki_plugins.report.significance import CONFIDENCE

LATEX_MARK = "% a report of MulKI"
CSV_HEAD = ("experiment", "recipe", "tasks", "table", "strategy", "against", "metric", "value", "std", "low", "high", "seeds",
            "p", "p_corrected", "best", "method")  # fmt: skip


Value = str | int | float | None


def latex_tables(compared: Sequence[Experiment]) -> str:
    """A table of metrics and one of accuracies at the end for each experiment, to be put in with \\input."""
    head = [
        LATEX_MARK,
        "% \\usepackage{booktabs,graphicx}; names with other letters than Latin ones need XeLaTeX or LuaLaTeX",
        "% Bold: the best mean and every strategy that the paired tests do not tell from it (Holm-corrected p >= "
        f"{LEVEL}); nothing is bold where the best was not tested against every other strategy.",
    ]
    tables = [line for experiment in compared for line in [*_metrics_table(experiment), *_last_table(experiment)]]
    return "\n".join([*head, *tables]) + "\n"


def _metrics_table(experiment: Experiment) -> Iterator[str]:
    metrics = experiment.metrics
    if not metrics:
        return
    yield from _open(
        f"{experiment.recipe}: mean ± standard deviation over seeds, in percent.", "lr" + "r" * len(metrics)
    )
    yield _row(["strategy", "seeds", *(name.capitalize() for name in metrics)])
    yield r"\midrule"
    best = {name: experiment.best(name) for name in metrics}
    for i, strategy in enumerate(experiment.strategies):
        cells = [escape_latex(strategy.name), str(len(strategy.group.seeds))]
        for name in metrics:
            estimate = strategy.estimates.get(name)
            if estimate is None:
                cells.append("--")
                continue
            number = f"{estimate.mean:.2f}"
            if i in best[name]:
                number = rf"\textbf{{{number}}}"
            cells.append(number if estimate.deviation is None else rf"{number} $\pm$ {estimate.deviation:.2f}")
        yield _row(cells, escaped=True)
    yield from _close()


def _last_table(experiment: Experiment) -> Iterator[str]:
    """Accuracy on each task after the last one, means over seeds. Nothing is bold: single tasks are not tested."""
    tasks, rows = experiment.tasks, len(experiment.tasks)
    yield from _open(
        f"{experiment.recipe}: accuracy on each task after the last one, in percent.", "l" + "r" * (rows + 1)
    )
    yield _row(["strategy", *tasks, "mean"])
    yield r"\midrule"
    for strategy in experiment.strategies:
        means = [statistics.fmean(strategy.cell(rows, task)) for task in range(rows)]
        yield _row([strategy.name, *(f"{mean:.1f}" for mean in means), f"{statistics.fmean(means):.1f}"])
    yield from _close()


def _open(caption: str, columns: str) -> Iterator[str]:
    yield from ("", r"\begin{table}", r"\centering", rf"\caption{{{escape_latex(caption)}}}")
    yield from (
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
    )


def _close() -> Iterator[str]:
    yield from (r"\bottomrule", r"\end{tabular}}", r"\end{table}")


def _row(cells: Sequence[str], escaped: bool = False) -> str:
    return " & ".join(cells if escaped else map(escape_latex, cells)) + r" \\"


def table_rows(compared: Sequence[Experiment]) -> Iterator[dict[str, Value]]:
    """All estimates, tests and mean accuracies of a report, one a row."""
    for number, experiment in enumerate(compared, 1):
        about: dict[str, Value] = {"experiment": number, "recipe": experiment.recipe, "tasks": len(experiment.tasks)}
        for row in (*_estimate_rows(experiment), *_test_rows(experiment), *_accuracy_rows(experiment)):
            yield about | row


def _estimate_rows(experiment: Experiment) -> Iterator[dict[str, Value]]:
    for metric in experiment.metrics:
        best = experiment.best(metric)
        for i, strategy in enumerate(experiment.strategies):
            if (estimate := strategy.estimates.get(metric)) is not None:
                low, high = estimate.interval or (None, None)
                yield {
                    "table": "metrics", "strategy": strategy.name, "metric": metric, "value": estimate.mean,
                    "std": estimate.deviation, "low": low, "high": high, "seeds": len(strategy.group.seeds),
                    "best": int(i in best) if best else None,
                    "method": f"{CONFIDENCE:.0%} interval over {estimate.method}" if estimate.method else None,
                }  # fmt: skip


def _test_rows(experiment: Experiment) -> Iterator[dict[str, Value]]:
    for metric, pairs in experiment.tests.items():
        for pair in pairs:
            yield {
                "table": "tests", "strategy": experiment.strategies[pair.first].name,
                "against": experiment.strategies[pair.second].name, "metric": metric, "value": pair.test.difference,
                "low": pair.test.low, "high": pair.test.high, "p": pair.test.p, "p_corrected": pair.corrected,
                "method": pair.test.method,
            }  # fmt: skip


def _accuracy_rows(experiment: Experiment) -> Iterator[dict[str, Value]]:
    """The mean matrix of each strategy: `metric` names the test set, `against` the task learned before."""
    for strategy in experiment.strategies:
        for row, learned in enumerate(["zero-shot", *experiment.tasks]):
            for j, task in enumerate(experiment.tasks):
                if values := strategy.cell(row, j):
                    yield {
                        "table": "accuracy", "strategy": strategy.name, "against": learned, "metric": task,
                        "value": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else None,
                        "seeds": len(values),
                    }  # fmt: skip


def write_csv(rows: Iterable[dict[str, Value]]) -> str:
    """Rows under CSV_HEAD. Numbers keep all digits; a name that a spreadsheet would compute gets an apostrophe before it."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_HEAD)
    for row in rows:
        cells = [row.get(name) for name in CSV_HEAD]
        writer.writerow([escape_formula(cell) if isinstance(cell, str) else cell for cell in cells])
    return text.getvalue()
