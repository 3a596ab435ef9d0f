"""What others have published on MTIL, from published.csv: a row for each method, protocol and metric."""

from __future__ import annotations

import csv
import functools
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import yaml
from attrs import frozen

DATASETS = (
    "Aircraft", "Caltech101", "CIFAR100", "DTD", "EuroSAT", "Flowers", "Food", "MNIST", "OxfordPet", "StanfordCars", "SUN397",
)  # fmt: skip
ORDERS = {
    "I": DATASETS,
    "II": (
        "StanfordCars", "Food", "MNIST", "OxfordPet", "Flowers", "SUN397", "Aircraft", "Caltech101", "DTD", "EuroSAT",
        "CIFAR100",
    ),
}  # fmt: skip
METRICS = ("transfer", "average", "last")
BACKBONES = ("ViT-B-16", "ViT-B-16-quickgelu")
WEIGHTS = "openai"
NOT_STATED = "not stated"


@frozen(kw_only=True)
class Row:
    """One metric of one method, in percent, as it is published."""

    method: str
    order: str
    shots: str
    """`full`, or how many images a class, or `not stated`."""
    classes: str
    """What a test image is told from, as in a recipe's `evaluate.classes`."""
    split: str
    tasks: int
    metric: str
    mean: float
    cells: dict[str, float]
    """By data set; those that are published."""
    sources: tuple[str, ...]
    note: str


@functools.cache
def published_rows() -> tuple[Row, ...]:
    """Every row, in the file's order."""
    text = files("mulki_plugins.report").joinpath("published.csv").read_text("utf-8")
    return tuple(_row(fields) for fields in csv.DictReader(text.splitlines()))


def _row(said: dict[str, str]) -> Row:
    return Row(
        method=said["method"], order=said["order"], shots=said["shots"], classes=said["classes"], split=said["split"],
        tasks=int(said["tasks"]), metric=said["metric"], mean=float(said["mean"]),
        cells={name: float(said[name]) for name in DATASETS if said[name]},
        sources=tuple(said["source"].split()), note=said["note"],
    )  # fmt: skip


@functools.cache
def explanations() -> dict[str, Any]:
    """What the words in the rows mean: backbone, sources, splits, shots and classes."""
    said: dict[str, Any] = yaml.safe_load(files("mulki_plugins.report").joinpath("published.yaml").read_text("utf-8"))
    return said


def rows_of(order: str, classes: str, shots: str) -> list[Row]:
    """The rows of one protocol, whatever split they were measured on; those that do not state their shots are with `16`."""
    also = {shots, NOT_STATED} if (classes, shots) == ("all", "16") else {shots}
    return [row for row in published_rows() if (row.order, row.classes) == (order, classes) and row.shots in also]


def expected(order: str, classes: str) -> tuple[str, ...]:
    """The data sets of an order; X-TAIL (`all`) is published without CIFAR100."""
    return tuple(name for name in ORDERS[order] if classes != "all" or name != "CIFAR100")


def order_of(tasks: Sequence[str], classes: str) -> str | None:
    """`I` or `II` where the tasks are all of the protocol's, in that order."""
    return next((order for order in ORDERS if tuple(tasks) == expected(order, classes)), None)
