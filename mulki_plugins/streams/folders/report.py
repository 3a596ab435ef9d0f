"""What `mulki data check` says of the user's own folders, in the shape of the report on the published data sets."""

from __future__ import annotations

from typing import Any

from mulki_plugins.streams.check import stream_faults
from mulki_plugins.streams.folders.picture import open_picture
from mulki_plugins.streams.folders.stream import folders
from mulki_plugins.streams.mtil.contents import some
from mulki_plugins.streams.mtil.damage import damaged
from mulki_plugins.streams.task import Task, TaskStream


def checked(tasks: list[dict[str, Any]], *, decode: bool = False) -> dict[str, Any]:
    """Each task: its classes and images, and which image files are damaged. Every file is opened for a look, or decoded."""
    stream = folders(tasks=tasks)
    entries = [_entry(task, declared, decode) for task, declared in zip(stream.tasks, tasks, strict=True)]
    return {
        "decoded": decode, "ok": all(entry["state"] == "found" for entry in entries), "datasets": entries,
        "notes": [*stream.notices, *_notes(stream)],
    }  # fmt: skip


def _notes(stream: TaskStream) -> list[str]:
    return [f"warning: {fault.wrong}; {fault.mend}" for fault in stream_faults(stream)]


def _entry(task: Task, declared: dict[str, Any], decode: bool) -> dict[str, Any]:
    spoilt = list(damaged((task.train, task.test), decode, open_picture))
    where = [declared[key] for key in ("images", "train", "test") if declared.get(key)]
    sizes = {"train": len(task.train), "test": len(task.test)}
    return {
        "name": task.name, "title": task.name, "state": "damaged" if spoilt else "found", "folder": ", ".join(where),
        "classes": {"found": len(task.class_names), "expected": None},
        "images": {part: {"found": size, "expected": None} for part, size in sizes.items()},
        "wrong": spoilt[:20] + some(spoilt[20:], 0), "get": None,
    }  # fmt: skip
