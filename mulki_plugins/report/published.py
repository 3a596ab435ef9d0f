"""Published numbers on MTIL and of class-incremental CLIP (published.csv), and what keeps a run from being compared with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from attrs import asdict, frozen

from mulki_plugins.characters import printable
from mulki_plugins.report.compare import Group, groups, mean_and_deviation
from mulki_plugins.report.published_rows import (
    METRICS,
    NOT_STATED,
    STEP_METRICS,
    Row,
    datasets_of,
    explanations,
    order_of,
    rows_of,
    words_for_shots,
)
from mulki_plugins.report.result import Result

STEPS_OF = "CIFAR100"
"""The data set whose steps can be rebuilt; the others were published with parts of their own."""
STEPS_SPLIT, STEPS_BACKBONE, STEPS_WEIGHTS, STEPS_SEED = "c3box", "ViT-B-16", "laion400m_e32", 1993
"""Split, model, weights and class order of the published class-incremental rows."""
BACKBONES = ("ViT-B-16", "ViT-B-16-quickgelu")
WEIGHTS = "openai"
NEAR = 0.5
"""Largest difference in points to the published zero-shot accuracy of the same weights and protocol."""
ITERATIONS = {"full": 1000, "5": 500}
"""Steps of 64 images per task, in ZSCL's protocol and in its five-shot variant."""


@frozen(kw_only=True)
class ComparedRun:
    """The runs of one experiment, and the warnings that keep them from being compared with the published rows."""

    group: Group
    warnings: list[str]

    @property
    def name(self) -> str:
        seeds = self.group.seeds
        which = f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds"
        return printable(f"{self.group.recipe} / {self.group.name} / {which}")

    def by_task(self, metric: str) -> dict[str, float]:
        """A metric of METRICS for each task, averaged over seeds; empty if the runs do not have that metric."""
        from mulki_plugins import metrics

        if metric in STEP_METRICS or not self._has(metric):
            return {}
        compute: Callable[..., Any] = getattr(metrics, f"{metric}_by_task")
        values = [compute(run.matrix).tolist() for run in self.group.runs]
        tasks = self.group.tasks[1:] if metric == "transfer" else self.group.tasks
        return {
            task: mean_and_deviation(column)[0] for task, column in zip(tasks, zip(*values, strict=True), strict=True)
        }

    def mean(self, metric: str) -> tuple[float, float | None] | None:
        """Mean and standard deviation over seeds, computed from the matrices; None if the runs do not have the metric."""
        return mean_and_deviation([self._of_run(metric, run) for run in self.group.runs]) if self._has(metric) else None

    def _of_run(self, metric: str, run: Result) -> float:
        from mulki_plugins import metrics

        compute: Callable[..., float] = getattr(metrics, metric.replace("-", "_"))
        return compute(run.matrix, run.counted_images) if metric in STEP_METRICS else compute(run.matrix)

    def _has(self, metric: str) -> bool:
        if len(self.group.tasks) < 2 or (self.group.runs[0].base == "joint" and metric != "last"):
            return False
        try:
            return all(isinstance(self._of_run(metric, run), float) for run in self.group.runs)
        except ValueError:  # an extended run may lack accuracies
            return False


@frozen(kw_only=True)
class Comparison:
    """Runs of one protocol, and the published rows closest to it."""

    runs: list[ComparedRun]
    rows: list[Row]
    order: str
    classes: str
    shots: str
    """Order, classes and shots of the rows."""
    split: str
    """The split of the runs."""
    on_published: bool
    """Whether the runs learned the data sets of the rows."""
    metrics: tuple[str, ...] = METRICS


def compare_with_published(results: Sequence[Result], order: str | None = None) -> list[Comparison]:
    """The complete runs by protocol, each protocol with the published rows of its order, or of the given `order`."""
    by_protocol: dict[str, list[Group]] = {}
    for group in groups(results):
        by_protocol.setdefault(str((sorted(group.protocol.items(), key=str), group.tasks)), []).append(group)
    return [_compare(alike, order) for alike in by_protocol.values()]


def _compare(alike: list[Group], requested: str | None) -> Comparison:
    protocol = alike[0].protocol
    if requested is None and (steps := _compare_steps(alike)) is not None:
        return steps
    classes = str(protocol.get("classes", "task"))
    learned = order_of(alike[0].tasks, classes)
    order = requested or learned or "I"
    shots = "full" if protocol.get("shots") is None else str(protocol["shots"])
    on_mtil = protocol.get("stream") == "mtil"
    rows = rows_of(order, classes, shots) if on_mtil else []
    if on_mtil:
        shared = list(_protocol_warnings(alike[0], order, learned, rows))
        if not rows:
            missing = f"order {order}, classes {printable(classes)}, {words_for_shots(shots)}"
            shared.append(
                f"nothing is published for {missing}; shown is order {order}, classes task, all training images"
            )
        runs = [
            ComparedRun(group=group, warnings=[*shared, *_group_warnings(group, classes, shots)]) for group in alike
        ]
    else:
        stream = printable(str(protocol.get("stream")))
        warning = (
            f"nothing here is comparable: the stream is {stream}, the published numbers are on MTIL's eleven data sets"
        )
        runs = [ComparedRun(group=group, warnings=[warning]) for group in alike]
    if not rows:
        classes, shots = "task", "full"
        rows = rows_of(order, classes, shots)
    split = str(protocol.get("split", NOT_STATED))
    return Comparison(
        runs=runs, rows=rows, order=order, classes=classes, shots=shots, split=split, on_published=on_mtil
    )


def _compare_steps(alike: list[Group]) -> Comparison | None:
    """Runs of class-incremental learning beside the rows of their data set and steps; None if nothing is published for them."""
    protocol = alike[0].protocol
    data = str(protocol.get("of", "")).removeprefix("mtil ")
    order = f"{data} B{protocol.get('base')} Inc{protocol.get('increment')}"
    rows = rows_of(order, "seen", "full")
    if protocol.get("stream") != "split" or protocol.get("classes") != "seen" or not rows:
        return None
    shared = list(_step_warnings(protocol, data, len(alike[0].tasks), max(row.tasks for row in rows)))
    runs = [ComparedRun(group=group, warnings=[*shared, *_group_warnings(group, "seen", "")]) for group in alike]
    split = STEPS_SPLIT if data == STEPS_OF else str(protocol.get("split", NOT_STATED))
    return Comparison(
        runs=runs, rows=rows, order=order, classes="seen", shots="full", split=split, on_published=True,
        metrics=STEP_METRICS,
    )  # fmt: skip


def _step_warnings(protocol: dict[str, Any], data: str, learned: int, steps: int) -> Iterator[str]:
    """Differences between the protocol of class-incremental runs and the published one: `learned` of its `steps` steps."""
    if learned != steps:
        yield f"{learned} of the {steps} steps were learned: no mean is comparable"
    model, weights, order = (protocol.get(key) for key in ("model", "pretrained", "class_order"))
    if model != STEPS_BACKBONE:
        yield f"the backbone is {printable(str(model))}; the published tables use {STEPS_BACKBONE}"
    if weights != STEPS_WEIGHTS:
        described = "random, or not recorded" if weights is None else printable(str(weights))
        yield f"the pre-trained weights are {described}; most published rows use {STEPS_WEIGHTS}"
    if order != STEPS_SEED:
        others = isinstance(order, list) or order is None
        described = "in an order of their own" if others else f"in that of seed {order}"
        yield f"the classes come {printable(described)}; the published tables use seed {STEPS_SEED}"
    if data != STEPS_OF:
        yield f"the images of {printable(data)} are parted in another way than the published ones"
    if (shots := protocol.get("shots")) is not None:
        yield f"training used {printable(str(shots))} images a class; the published tables use all"
    if images := protocol.get("images"):
        yield f"accuracy was measured on {printable(str(images))} images; the published tables use test images"
    if protocol.get("template"):
        yield "one template was used; the published tables use the mean over a data set's templates"


def _protocol_warnings(group: Group, order: str, learned: str | None, rows: Sequence[Row]) -> Iterator[str]:
    """Differences between the protocol of runs on MTIL's data sets and the published one."""
    protocol = group.protocol
    model, weights = protocol.get("model"), protocol.get("pretrained")
    if model not in BACKBONES:
        yield f"the backbone is {printable(str(model))}; the published tables use {BACKBONES[0]}"
    if weights != WEIGHTS:
        described = "random, or not recorded" if weights is None else printable(str(weights))
        yield f"the pre-trained weights are {described}; the published tables use {WEIGHTS}"
    if images := protocol.get("images"):
        yield f"accuracy was measured on {printable(str(images))} images; the published tables use test images"
    yield from _split_warnings(protocol.get("split"), rows)
    if missing := [name for name in datasets_of("I", str(protocol.get("classes"))) if name not in group.tasks]:
        learned_tasks = "1 task was" if len(group.tasks) == 1 else f"{len(group.tasks)} tasks were"
        yield (
            f"{learned_tasks} learned, without {', '.join(missing)}: no mean is comparable, nor is a data set's Transfer or"
            " Average, which depend on the tasks learned before and on the number of rows"
        )
    elif learned is None:
        yield "the tasks came in an order that is neither I nor II; Transfer and Average depend on the order"
    elif learned != order:
        yield f"the runs learned order {learned}, the tables show order {order}; Transfer and Average depend on the order"
    if protocol.get("classes") == "all" and not (learned and protocol.get("template")):
        what = "X-TAIL is published on ten data sets, without CIFAR100, and with one template for all of them"
        yield f"{what} (evaluate.template)"


def _split_warnings(split: Any, rows: Sequence[Row]) -> Iterator[str]:
    others = " and ".join(dict.fromkeys(row.split for row in rows if row.split not in (split, NOT_STATED)))
    if split is None:
        yield "the runs do not record the split they were measured on"
    elif rows and not any(row.split == split for row in rows):
        yield f"the split is {printable(str(split))}; no published row of this protocol is known to use it"
    elif others and split != "zscl":
        yield f"the split is {printable(str(split))}: the rows of the split {others} are not comparable"


def _group_warnings(group: Group, classes: str, shots: str) -> Iterator[str]:
    """Differences between one experiment and the published protocol."""
    yield from dict.fromkeys(printable(text) for run in group.runs for text in run.incomparable)
    if skipped := dict.fromkeys(part for run in group.runs for part in run.left_out):
        yield f"unreadable images were left out of {printable(', '.join(skipped))}: numbers on these data sets are not comparable"
    if group.runs[0].base == "joint":
        yield "joint training learns all tasks at once: it has no Transfer and no Average"
    budget, steps = group.runs[0].budget, ITERATIONS.get(shots)
    usual = (budget.get("iterations"), budget.get("batch_size")) == (steps, 64)
    if budget and steps and classes != "all" and not usual:
        words = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in budget.items())
        yield printable(
            f"the budget of a task is {words}; ZSCL's protocol has iterations {steps}, batch size 64; other papers differ"
        )
    if far := list(_far_from_zero_shot(group)):
        cause = "the cause is the split, prompts, images or weights, not the method"
        yield f"before any training it differs from the published zero-shot accuracy on {', '.join(far)}: {cause}"


def _far_from_zero_shot(group: Group) -> Iterator[str]:
    """Data sets on which the untrained model should match the published zero-shot accuracy and does not."""
    protocol = group.protocol
    if protocol.get("model") not in BACKBONES or (protocol.get("pretrained"), protocol.get("split")) != (
        WEIGHTS,
        "zscl",
    ):
        return
    if protocol.get("classes") == "all" or protocol.get("images"):
        return
    rows = rows_of("I", "task", "full")
    published = next(row for row in rows if (row.method, row.metric) == ("CLIP zero-shot", "last")).cells
    for name, accuracy in zip(group.tasks, group.runs[0].zero_shot, strict=False):
        if name in published and abs(accuracy - published[name]) > NEAR:
            yield f"{name} ({accuracy:.1f}, published {published[name]:.1f})"


def published_data(results: Sequence[Result], order: str | None = None) -> dict[str, Any]:
    """For each protocol the runs with their warnings and the published rows, and what the words mean; ready for JSON."""
    return {
        "comparisons": [_comparison_data(each) for each in compare_with_published(results, order)],
        **explanations(),
    }


def _comparison_data(comparison: Comparison) -> dict[str, Any]:
    split = comparison.split
    return {
        "order": comparison.order, "classes": comparison.classes, "shots": comparison.shots, "split_of_runs": split,
        "runs": [_run_data(run, comparison.metrics) for run in comparison.runs],
        "published": [asdict(row) | {"same_split": row.split == split != NOT_STATED} for row in comparison.rows],
    }  # fmt: skip


def _run_data(run: ComparedRun, metrics: Sequence[str]) -> dict[str, Any]:
    group = run.group
    return {
        "recipe": group.recipe, "strategy": group.strategy, "settings": group.settings,
        "seeds": group.seeds, "tasks": group.tasks,
        "protocol": group.protocol, "budget": group.runs[0].budget,
        "comparable": not run.warnings, "warnings": run.warnings,
        "metrics": {
            metric: {"mean": mean[0], "std": mean[1], "by_dataset": run.by_task(metric)}
            for metric in metrics
            if (mean := run.mean(metric))
        },
    }  # fmt: skip
