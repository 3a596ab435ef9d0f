"""Runs beside the published tables, and everything that keeps them from being compared."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from attrs import asdict, frozen

from mulki_plugins import metrics
from mulki_plugins.characters import printable
from mulki_plugins.report import published
from mulki_plugins.report.compare import Group, groups
from mulki_plugins.report.published import BACKBONES, METRICS, NOT_STATED, WEIGHTS, Row
from mulki_plugins.report.result import Result

NEAR = 0.5
"""Points of zero-shot accuracy that may lie between a run and the published figure of the same weights and protocol."""
ITERATIONS = {"full": 1000, "5": 500}
"""Of 64 images a task, in ZSCL's protocol and in its five-shot variant."""


@frozen(kw_only=True)
class Placed:
    """The runs of one experiment, and what keeps them from being compared with the published rows."""

    group: Group
    warnings: list[str]

    @property
    def name(self) -> str:
        seeds = self.group.seeds
        said = f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds"
        return printable(f"{self.group.recipe} / {self.group.name} / {said}")


@frozen(kw_only=True)
class Beside:
    """Runs of one protocol, and the published rows that come nearest to it."""

    runs: list[Placed]
    rows: list[Row]
    order: str
    classes: str
    shots: str
    """Of the rows."""
    split: str
    """Of the runs."""
    on_mtil: bool
    """Whether the runs learned MTIL's data sets at all."""


def beside(results: Sequence[Result], order: str | None = None) -> list[Beside]:
    """The complete runs by protocol, each with the published rows of its order, or of the order given."""
    gathered: dict[str, list[Group]] = {}
    for group in groups(results):
        gathered.setdefault(str((sorted(group.protocol.items(), key=str), group.tasks)), []).append(group)
    return [_beside(found, order) for found in gathered.values()]


def _beside(found: list[Group], asked: str | None) -> Beside:
    said = found[0].protocol
    classes = str(said.get("classes", "task"))
    own = published.order_of(found[0].tasks, classes)
    order = asked or own or "I"
    shots = "full" if said.get("shots") is None else str(said["shots"])
    on_mtil = said.get("stream") == "mtil"
    rows = published.rows_of(order, classes, shots) if on_mtil else []
    shared = []
    if not on_mtil:
        what = "the published numbers are of MTIL's eleven data sets"
        shared.append(f"nothing here is comparable: the stream is {printable(str(said.get('stream')))}, and {what}")
    else:
        shared += _differences(found[0], order, own, rows)
        if not rows:
            what = f"order {order}, classes {printable(classes)}, {shots_in_words(shots)}"
            shared.append(f"nothing is published for {what}; shown is order {order}, classes task, all training images")
    if not rows:
        classes, shots = "task", "full"
        rows = published.rows_of(order, classes, shots)
    runs = [
        Placed(group=group, warnings=shared + (list(_of_one(group, classes, shots)) if on_mtil else []))
        for group in found
    ]
    split = str(said.get("split", NOT_STATED))
    return Beside(runs=runs, rows=rows, order=order, classes=classes, shots=shots, split=split, on_mtil=on_mtil)


def _differences(group: Group, order: str, own: str | None, rows: Sequence[Row]) -> Iterator[str]:
    """What sets runs on MTIL's data sets apart from the published protocol, of which these are the rows."""
    said = group.protocol
    model, weights = said.get("model"), said.get("pretrained")
    if model not in BACKBONES:
        yield f"the backbone is {printable(str(model))}, and {BACKBONES[0]} in the published tables"
    if weights != WEIGHTS:
        which = "random, or not recorded" if weights is None else printable(str(weights))
        yield f"the pre-trained weights are {which}, and {WEIGHTS} in the published tables"
    if said.get("images"):
        yield f"the accuracies are those of {printable(str(said['images']))} images, and of test images in the published tables"
    yield from _splits(said.get("split"), rows)
    if left := [name for name in published.expected("I", str(said.get("classes"))) if name not in group.tasks]:
        tasks = "1 task was" if len(group.tasks) == 1 else f"{len(group.tasks)} tasks were"
        yield (
            f"{tasks} learned, without {', '.join(left)}: no mean is comparable, nor is a data set's Transfer or Average,"
            " which depend on what was learned before it and how many rows there are"
        )
    elif own is None:
        yield "the tasks came in an order that is neither I nor II, and Transfer and Average depend on the order"
    elif own != order:
        yield f"the runs learned order {own}, and the tables are of order {order}: Transfer and Average depend on the order"
    if said.get("classes") == "all":
        yield "X-TAIL is published on ten data sets, without CIFAR100, and with one template for all of them"


def _splits(split: Any, rows: Sequence[Row]) -> Iterator[str]:
    """Where the runs' split is not that of the published protocol."""
    others = " and ".join(dict.fromkeys(row.split for row in rows if row.split not in (split, NOT_STATED)))
    if split is None:
        yield "the runs do not say on which split they were measured"
    elif rows and not any(row.split == split for row in rows):
        yield f"the split is {printable(str(split))}, and no published row of this protocol is known to be of it"
    elif others and split != "zscl":
        yield f"the split is {printable(str(split))}: the rows of the split {others} are not comparable"


def _of_one(group: Group, classes: str, shots: str) -> Iterator[str]:
    """What sets one experiment apart from the published protocol."""
    yield from dict.fromkeys(printable(text) for run in group.runs for text in run.incomparable)
    if left_out := [part for run in group.runs for part in run.left_out]:
        parts = printable(", ".join(dict.fromkeys(left_out)))
        yield f"images that could not be read were left out of {parts}: no number on them can be compared"
    budget, expected = group.runs[0].budget, ITERATIONS.get(shots)
    if group.runs[0].base == "joint":
        yield "trained on all tasks at once, it has no Transfer and no Average"
    if (
        budget
        and expected
        and classes != "all"
        and (budget.get("iterations"), budget.get("batch_size")) != (expected, 64)
    ):
        own = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in budget.items())
        yield printable(
            f"the budget of a task is {own}; in ZSCL's protocol iterations {expected}, batch size 64; others have their own"
        )
    if far := list(_far_from_zero_shot(group)):
        what = "that is split, prompts, images or weights, and not the method"
        yield f"before any training it differs from the published zero-shot accuracy on {', '.join(far)}: {what}"


def _far_from_zero_shot(group: Group) -> Iterator[str]:
    """Data sets on which the untouched model already differs from the published one, where it should be the same."""
    said = group.protocol
    same = said.get("model") in BACKBONES and said.get("pretrained") == WEIGHTS and said.get("split") == "zscl"
    if not same or said.get("classes") == "all" or said.get("images"):
        return
    rows = published.rows_of("I", "task", "full")
    expected = next(row for row in rows if (row.method, row.metric) == ("CLIP zero-shot", "last")).cells
    for name, accuracy in zip(group.tasks, group.runs[0].zero_shot, strict=False):
        if name in expected and abs(accuracy - expected[name]) > NEAR:
            yield f"{name} ({accuracy:.1f}, published {expected[name]:.1f})"


def by_dataset(group: Group, metric: str) -> dict[str, float]:
    """A metric for each task, the mean over seeds; empty where the runs have none of it."""
    if len(group.tasks) < 2 or (group.runs[0].base == "joint" and metric != "last"):
        return {}
    compute = {
        "transfer": metrics.transfer_by_task, "average": metrics.average_by_task, "last": metrics.last_by_task,
    }[metric]  # fmt: skip
    values = [compute(run.matrix).tolist() for run in group.runs]
    tasks = group.tasks[1:] if metric == "transfer" else group.tasks
    return {task: statistics.fmean(each[i] for each in values) for i, task in enumerate(tasks)}


def mean_of(group: Group, metric: str) -> tuple[float, float | None] | None:
    """Mean and standard deviation over seeds of a metric, out of the matrices; None where the runs have none of it."""
    if not by_dataset(group, metric):
        return None
    compute = {"transfer": metrics.transfer, "average": metrics.average, "last": metrics.last}[metric]
    values = [compute(run.matrix) for run in group.runs]
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def shots_in_words(shots: str) -> str:
    said: str = published.explanations()["shots"].get(shots, f"{printable(shots)} images a class")
    return said


def beside_data(results: Sequence[Result], order: str | None = None) -> dict[str, Any]:
    """All of it as printable data: for each protocol the runs with their warnings and the published rows; what the words mean."""
    return {"comparisons": [_data(each) for each in beside(results, order)], **published.explanations()}


def _data(each: Beside) -> dict[str, Any]:
    return {
        "order": each.order, "classes": each.classes, "shots": each.shots, "split_of_runs": each.split,
        "runs": [_run_data(run) for run in each.runs],
        "published": [asdict(row) | {"same_split": row.split == each.split != NOT_STATED} for row in each.rows],
    }  # fmt: skip


def _run_data(run: Placed) -> dict[str, Any]:
    group = run.group
    return {
        "recipe": group.recipe, "strategy": group.strategy, "settings": group.settings,
        "seeds": group.seeds, "tasks": group.tasks,
        "protocol": group.protocol, "budget": group.runs[0].budget,
        "comparable": not run.warnings, "warnings": run.warnings,
        "metrics": {
            metric: {"mean": found[0], "std": found[1], "by_dataset": by_dataset(group, metric)}
            for metric in METRICS
            if (found := mean_of(group, metric))
        },
    }  # fmt: skip
