"""The rows of published.csv, and what their words mean (published.yaml)."""

from __future__ import annotations

import csv
import functools
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import yaml
from attrs import frozen

from mulki_plugins.characters import printable

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
STEP_METRICS = ("incremental", "incremental-last")
NOT_STATED = "not stated"


@frozen(kw_only=True)
class Row:
    """One published metric of one method, in percent."""

    method: str
    order: str
    """`I` or `II`; in class-incremental learning the data set and its steps, such as `CIFAR100 B0 Inc10`."""
    shots: str
    """`full`, the number of images per class, or `not stated`."""
    classes: str
    """The candidate classes of a test image, as in a recipe's `evaluate.classes`."""
    split: str
    tasks: int
    metric: str
    mean: float
    cells: dict[str, float]
    """By data set, as far as they are published."""
    sources: tuple[str, ...]
    note: str


@functools.cache
def published_rows() -> tuple[Row, ...]:
    """Every row, in the file's order."""
    return tuple(map(_row, csv.DictReader(_read("published.csv").splitlines())))


@functools.cache
def explanations() -> dict[str, Any]:
    """The meaning of the words in the rows: backbone, sources, splits, shots and classes."""
    meaning: dict[str, Any] = yaml.safe_load(_read("published.yaml"))
    return meaning


def _read(name: str) -> str:
    return files("mulki_plugins.report").joinpath(name).read_text("utf-8")


def _row(fields: dict[str, str]) -> Row:
    return Row(
        method=fields["method"], order=fields["order"], shots=fields["shots"], classes=fields["classes"],
        split=fields["split"], tasks=int(fields["tasks"]), metric=fields["metric"], mean=float(fields["mean"]),
        cells={name: float(fields[name]) for name in DATASETS if fields[name]},
        sources=tuple(fields["source"].split()), note=fields["note"],
    )  # fmt: skip


def rows_of(order: str, classes: str, shots: str) -> list[Row]:
    """The rows of one protocol, of every split. X-TAIL rows that do not state their shots count as `16`."""
    accepted = {shots, NOT_STATED} if (classes, shots) == ("all", "16") else {shots}
    return [row for row in published_rows() if (row.order, row.classes) == (order, classes) and row.shots in accepted]


def datasets_of(order: str, classes: str) -> tuple[str, ...]:
    """The data sets of an order; X-TAIL (`all`) is published without CIFAR100."""
    return tuple(name for name in ORDERS[order] if classes != "all" or name != "CIFAR100")


def order_of(tasks: Sequence[str], classes: str) -> str | None:
    """`I` or `II` if the tasks are exactly those of the protocol, in that order."""
    return next((order for order in ORDERS if tuple(tasks) == datasets_of(order, classes)), None)


def words_for_shots(shots: str) -> str:
    """`all training images`, `5 images a class`."""
    words: str = explanations()["shots"].get(shots, f"{printable(shots)} images a class")
    return words
