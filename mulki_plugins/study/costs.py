"""What strategies cost: a line for each run of `mulki study cost`, and the table that compares them with a base."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from attrs import frozen

from mulki_plugins.recipe.budget import trainings
from mulki_plugins.report.compare import mean_and_deviation
from mulki_plugins.report.result import Result
from mulki_plugins.study.plan import PlannedRun

_TASK = re.compile(r"task-(\d+)-")
"""How the folder with the model after a task is called."""


@frozen(kw_only=True)
class CostLine:
    """What one run cost. Numbers of the same round are compared, for they were measured one after another."""

    label: str
    round: int
    fingerprint: str
    """Of the resolved recipe."""
    device: str
    machine: str
    threads: int
    code: str
    """A fingerprint of the package's code."""
    seconds: float
    """Of the last task's training, from its prototypes to its last step; 0 without training."""
    step: float | None
    """The same in milliseconds for each of its steps; None if it has none, or an unknown number."""
    memory: float
    """The peak in MiB: of the process, or of what tensors took on a GPU."""
    trained: int | None
    weights: int | None
    """The number of weights that the last task's training changes, and of all."""
    kept: int
    """Bytes of the model on disk after the last task, without pre-trained weights that did not change."""


def cost_line(run: PlannedRun, result: Result) -> CostLine:
    """A complete run as a line of costs."""
    device = result.device
    train = result.seconds.get("train") or []
    seconds = float(train[-1]) if train else 0.0
    steps = _steps(run, result)
    return CostLine(
        label=run.job.label, round=run.job.seed, fingerprint=run.fingerprint, device=str(device.get("type", "")),
        machine=str(device.get("name", "")), threads=int(device.get("threads") or 0),
        code=str(result.identity.get("code", {}).get("mulki", ""))[:12], seconds=seconds,
        step=round(1000 * seconds / steps, 2) if steps and seconds else None,
        memory=float(device.get("peak_memory_mib") or 0.0), trained=result.parameters.get("trained"),
        weights=result.parameters.get("all"), kept=_kept_on_disk(run.folder),
    )  # fmt: skip


def with_earlier(lines: Sequence[CostLine], earlier: Sequence[CostLine]) -> list[CostLine]:
    """These lines and the earlier ones that they do not replace.

    A round that another machine, number of threads or state of the code has begun to measure anew is replaced as a whole,
    since the lines of a round are compared.
    """
    places = {(line.label, line.round) for line in lines}
    measured = {line.round for line in lines}
    conditions = {(line.round, line.machine, line.threads, line.code) for line in lines}
    kept = [
        line
        for line in earlier
        if (line.label, line.round) not in places
        and (line.round not in measured or (line.round, line.machine, line.threads, line.code) in conditions)
    ]
    return [*kept, *lines]


def _steps(run: PlannedRun, result: Result) -> int:
    """The steps of the last training; 0 if there are none, or as many as the images need."""
    plan = trainings(run.recipe, dict.fromkeys(result.tasks, 0))
    return plan[-1].steps if plan and result.parameters.get("trained") else 0


def _kept_on_disk(folder: Path) -> int:
    ends = {int(match[1]): path for path in (folder / "weights").glob("task-*") if (match := _TASK.match(path.name))}
    files = ends[max(ends)].iterdir() if ends else folder.glob("model*.safetensors")
    return sum(file.stat().st_size for file in files)


def costs_beside(table: Path) -> Path:
    """The file of the costs that belongs to the table of a study: study.csv has study-cost.csv."""
    return table.with_name(f"{table.stem}-cost.csv")


@frozen(kw_only=True)
class Cost:
    """A strategy's cost over its rounds, ready to print: mean ± standard deviation (n − 1)."""

    step: str
    relative: str
    """Time over that of the base in the same round."""
    memory: str
    relative_memory: str
    trained: str
    kept: str


def summarize(lines: Iterable[CostLine], base: str) -> dict[str, Cost]:
    """The cost of each strategy, in the order of the lines."""
    rounds: dict[str, dict[int, CostLine]] = defaultdict(dict)
    for line in lines:
        rounds[line.label][line.round] = line
    return {label: _cost(list(own.values()), rounds.get(base, {})) for label, own in rounds.items()}


def _cost(own: Sequence[CostLine], base: Mapping[int, CostLine]) -> Cost:
    pairs = [(line, base[line.round]) for line in own if line.round in base and _comparable(line, base[line.round])]
    return Cost(
        step=spread([line.step for line in own if line.step is not None], ".1f"),
        relative=spread([ratio for a, b in pairs if (ratio := _ratio(a, b)) is not None], ".2f"),
        memory=spread([line.memory for line in own], ".0f"),
        relative_memory=spread([a.memory / b.memory for a, b in pairs if b.memory], ".2f"),
        trained=mean_trained((line.trained, line.weights) for line in own),
        kept=f"{own[-1].kept / 1e6:.1f}",
    )


def _comparable(line: CostLine, base: CostLine) -> bool:
    return (line.machine, line.threads) == (base.machine, base.threads)


def _ratio(line: CostLine, base: CostLine) -> float | None:
    """The time of a step over that of the base; of the whole task where one of them has no steps. None without training."""
    if line.step is not None and base.step is not None:
        return line.step / base.step
    return line.seconds / base.seconds if line.seconds and base.seconds else None


def spread(values: Sequence[float], form: str) -> str:
    """Mean ± standard deviation (n − 1) of several values; a dash without any."""
    if not values:
        return "–"
    mean, deviation = mean_and_deviation(values)
    return f"{mean:{form}}" + ("" if deviation is None else f" ± {deviation:{form}}")


def mean_trained(counts: Iterable[tuple[int | None, int | None]]) -> str:
    """How many weights learn, of how many, in the mean of the runs that say so: experts, for one, grow by seed."""
    known = [(trained, weights) for trained, weights in counts if trained is not None and weights]
    return trained_text(*(round(statistics.fmean(each)) for each in zip(*known, strict=True))) if known else "–"


def trained_text(trained: int | None, weights: int | None) -> str:
    """`67 k (2.4 %)`; a dash if it is unknown."""
    if trained is None or not weights:
        return "–"
    share = f"{100 * trained / weights:.1f}".removesuffix(".0")
    return f"{trained / 1000:.0f} k ({share} %)"
