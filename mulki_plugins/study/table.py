"""The table of a study: a CSV file with a line for each finished run."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from attrs import NOTHING, asdict, field, fields, frozen

from mulki_plugins.errors import MulkiError
from mulki_plugins.files import write_text
from mulki_plugins.report.result import Result
from mulki_plugins.study.plan import PlannedRun

if TYPE_CHECKING:
    from attrs import AttrsInstance

Row = TypeVar("Row", bound="AttrsInstance")


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
    zero_shot_later: float | None = None
    """Mean over all tasks, and over all but the first, which Transfer is to be compared with; None with a single one."""
    seconds: float = 0.0
    memory: float = 0.0
    """Of training, and the peak in MiB."""
    trained: int | None = None
    weights: int | None = None
    """The number of weights that the last task's training changes, and of all; unknown in lines of earlier versions."""


def line_of(run: PlannedRun, result: Result) -> Line:
    """A complete run as a line of the table, rounded as the file has it."""
    matrix, zero, job = result.matrix, result.zero_shot, run.job
    known = {name: _rounded(result.metrics.get(name)) for name in ("transfer", "average", "forgetting")}
    return Line(
        part=job.part, order=job.order, label=job.label, seed=job.seed, fingerprint=run.fingerprint,
        device=str(result.device.get("type", "")), code=str(result.identity.get("code", {}).get("mulki", ""))[:12], **known,
        last=_rounded(statistics.fmean(matrix[-1])),
        just_learned=_rounded(statistics.fmean(row[i] for i, row in enumerate(matrix))),
        zero_shot=_rounded(statistics.fmean(zero)) or 0.0,
        zero_shot_later=_rounded(statistics.fmean(zero[1:])) if len(zero) > 1 else None,
        seconds=_rounded(sum(result.seconds.get("train", []))) or 0.0,
        memory=_rounded(result.device.get("peak_memory_mib")) or 0.0,
        trained=result.parameters.get("trained"), weights=result.parameters.get("all"),
    )  # fmt: skip


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(float(value), 4)


def read_lines(path: Path | None) -> list[Line]:
    """The lines of a table; none if there is no such file. MulkiError if it is no table of a study."""
    return read_rows(path, Line)


def read_rows(path: Path | None, kind: type[Row]) -> list[Row]:
    """The rows of a CSV file as objects of a class of attrs; none if there is no such file.

    A column of a later version that the file lacks has its default. MulkiError if it is no such file, or a line is damaged.
    """
    if path is None or not path.is_file():
        return []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or ()
            missing = [a.name for a in fields(kind) if a.default is NOTHING and a.name not in columns]
            if missing:
                what = f"{path}: not the table of a study: it has no column {missing[0]!r}"
                raise MulkiError(what, "it is a CSV file with commas and a line of names")
            return [_read_row(row, kind, f"{path}:{reader.line_num}") for row in reader]
    except (ValueError, csv.Error, OSError) as error:
        raise MulkiError(f"{path}: not the table of a study: {error}") from error


def _read_row(row: dict[Any, Any], kind: type[Row], place: str) -> Row:
    hint = "remove the line; a run whose folder is still there gets it back"
    if None in row or None in row.values():
        raise MulkiError(f"{place}: a damaged line: it has not as many values as the table has columns", hint)
    values = {}
    for each in fields(kind):
        if each.name in row:
            try:
                values[each.name] = _read(str(each.type), row[each.name])
            except ValueError:
                raise MulkiError(f"{place}: {each.name}: expected a number, got {row[each.name]!r}", hint) from None
    return kind(**values)


def _read(kind: str, text: str) -> Any:
    """A cell. ValueError if it is no number where one is expected, or not a finite one."""
    if not text and "None" in kind:
        return None
    if "float" in kind:
        if not math.isfinite(value := float(text)):
            raise ValueError
        return value
    return int(text) if "int" in kind else text


def write_lines(path: Path, lines: Iterable[Line]) -> None:
    """Write the whole table, atomically."""
    write_rows(path, Line, lines)


def write_rows(path: Path, kind: type[Row], rows: Iterable[Row]) -> None:
    """Write a CSV file with a row for each object, atomically."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [a.name for a in fields(kind)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text.getvalue())


def find_line(run: PlannedRun, lines: Sequence[Line], device: str) -> Line | None:
    """The newest line that was measured with the settings of a run. device: of the study; auto for any."""
    job = run.job
    for line in reversed(lines):
        same = (line.part, line.order, line.label, line.seed) == (job.part, job.order, job.label, job.seed)
        if same and line.fingerprint in run.known and device in ("auto", line.device):
            return line
    return None


def mean_of(line: Line, metrics: Sequence[str]) -> float | None:
    """The mean of these metrics, Forgetting negative; None if the run has not all of them."""
    values = [getattr(line, name) for name in metrics]
    if None in values:
        return None
    return statistics.fmean(-v if name == "forgetting" else v for name, v in zip(metrics, values, strict=True))
