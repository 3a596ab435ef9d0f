"""The reports of `mulki data check`: every data set of a stream, as plain data and as text."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mulki_plugins.streams.check import stream_faults
from mulki_plugins.streams.folders.stream import folders
from mulki_plugins.streams.images import find_damaged
from mulki_plugins.streams.mtil.contents import shorten
from mulki_plugins.streams.mtil.dataset import look
from mulki_plugins.streams.mtil.declaration import ORDERS, Split, root_folder
from mulki_plugins.streams.names import select_tasks
from mulki_plugins.streams.task import LabelledImages, Task

_STATES = {"found": "found", "odd": "differs", "damaged": "damaged", "missing": "missing"}
_MOST = 20
"""Damaged files are named up to this number."""


def report_mtil(options: dict[str, Any], *, decode: bool = False) -> dict[str, Any]:
    """The data sets of a stream `mtil` with these options: folder, state, sizes found and expected, what is wrong.

    Both ends of every image file are read, or with `decode` all of it. Nothing is written.
    """
    root = root_folder(options.get("root", "data")).absolute()
    split: Split = options.get("split", "zscl")
    names = select_tasks("mtil", ORDERS, options.get("order"), options.get("tasks"))
    entries = [_report_dataset(name, root, split, decode) for name in names]
    return {
        "root": str(root), "split": split, "decoded": decode, "ok": all(e["state"] == "found" for e in entries),
        "datasets": entries,
    }  # fmt: skip


def _report_dataset(name: str, root: Path, split: Split, decode: bool) -> dict[str, Any]:
    dataset = look(name, root, split)
    wrong = [*dataset.problems, *dataset.differences]
    state = _STATES[dataset.state]
    if dataset.contents is not None and not dataset.contents.damage:
        damaged = _damaged(dataset.contents.parts.values(), decode)
        wrong += damaged
        state = "damaged" if damaged else state
    expected, sizes = dataset.expected, dataset.sizes
    return {
        "name": name, "title": dataset.declared.title, "state": state, "folder": str(dataset.folder),
        "classes": {"found": sizes.get("classes"), "expected": expected["classes"]},
        "images": {part: {"found": sizes.get(part), "expected": expected[part]} for part in ("train", "test")},
        "wrong": wrong, "get": dataset.declared.how_to_get(root) if state == "missing" else None,
    }  # fmt: skip


def report_folders(tasks: list[dict[str, Any]], *, decode: bool = False) -> dict[str, Any]:
    """The tasks of a stream `folders`: classes, images, damaged files, and notes on the data. MulkiError if one is invalid."""
    stream = folders(tasks=tasks)
    entries = [_report_task(task, declared, decode) for task, declared in zip(stream.tasks, tasks, strict=True)]
    faults = [f"warning: {fault.problem}; {fault.fix}" for fault in stream_faults(stream)]
    return {
        "decoded": decode, "ok": all(entry["state"] == "found" for entry in entries), "datasets": entries,
        "notes": [*stream.notices, *faults],
    }  # fmt: skip


def _report_task(task: Task, declared: dict[str, Any], decode: bool) -> dict[str, Any]:
    damaged = _damaged((task.train, task.test), decode)
    paths = [declared[key] for key in ("images", "train", "test") if declared.get(key)]
    sizes = {"train": len(task.train), "test": len(task.test)}
    return {
        "name": task.name, "title": task.name, "state": "damaged" if damaged else "found", "folder": ", ".join(paths),
        "classes": {"found": len(task.class_names), "expected": None},
        "images": {part: {"found": size, "expected": None} for part, size in sizes.items()},
        "wrong": damaged, "get": None,
    }  # fmt: skip


def _damaged(parts: Iterable[LabelledImages], decode: bool) -> list[str]:
    return shorten(list(find_damaged(parts, decode=decode)), _MOST)


def list_problems(report: dict[str, Any]) -> list[str]:
    """A line for each problem of each data set, and one for the missing ones."""
    problems = [f"{e['name']}: {text}" for e in report["datasets"] for text in e["wrong"]]
    missing = [e["name"] for e in report["datasets"] if e["state"] == "missing"]
    if missing:
        problems.append(f"{len(missing)} of {len(report['datasets'])} data sets are missing: {', '.join(missing)}")
    return problems
