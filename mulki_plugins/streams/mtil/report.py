"""What `mulki data check` says: every data set of a stream, as plain data and as text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mulki_plugins.streams.mtil.contents import some
from mulki_plugins.streams.mtil.damage import damaged
from mulki_plugins.streams.mtil.declaration import ORDERS, Split
from mulki_plugins.streams.mtil.found import look
from mulki_plugins.streams.mtil.root import root_folder
from mulki_plugins.streams.selection import chosen

WORDS = {"found": "found", "odd": "differs", "damaged": "damaged", "missing": "missing"}


def checked(options: dict[str, Any], *, decode: bool = False) -> dict[str, Any]:
    """Each data set of a stream `mtil` with these options: where it is, what is there, what was expected, what is wrong.

    Every image file is opened for a look at both ends, or decoded. Nothing is written but the cache of the folders' listings.
    """
    root = root_folder(options.get("root", "data")).absolute()
    split: Split = options.get("split", "zscl")
    names = chosen("mtil", ORDERS, options.get("order"), options.get("tasks"))
    entries = [_entry(name, root, split, decode) for name in names]
    return {
        "root": str(root), "split": split, "decoded": decode, "ok": all(e["state"] == "found" for e in entries),
        "datasets": entries,
    }  # fmt: skip


def _entry(name: str, root: Path, split: Split, decode: bool) -> dict[str, Any]:
    found = look(name, root, split)
    wrong = [*found.problems, *found.differences]
    state = WORDS[found.state]
    if found.contents is not None and not found.contents.damage:
        spoilt = list(damaged(found.contents.parts.values(), decode))
        wrong += spoilt[:20] + some(spoilt[20:], 0)
        state = "damaged" if spoilt else state
    expected, sizes = found.expected, found.sizes
    return {
        "name": name, "title": found.declared.title, "state": state, "folder": str(found.folder),
        "classes": {"found": sizes.get("classes"), "expected": expected["classes"]},
        "images": {part: {"found": sizes.get(part), "expected": expected[part]} for part in ("train", "test")},
        "wrong": wrong, "get": found.declared.how_to_get(root) if state == "missing" else None,
    }  # fmt: skip


def report_text(report: dict[str, Any]) -> str:
    """A line for each data set, and how to get what is missing."""
    entries = report["datasets"]
    rows = [("data set" if "root" in report else "task", "state", "classes", "train", "test", "looked for in")]
    rows += [
        (
            e["name"],
            e["state"],
            _count(e["classes"]),
            *(_count(e["images"][part]) for part in ("train", "test")),
            e["folder"],
        )
        for e in entries
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = (
        [f"root {report['root']}, split {report['split']}; numbers are found / expected", ""]
        if "root" in report
        else []
    )
    for row in rows:
        left = "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=False))
        )
        lines.append(f"{left}  {row[5]}")
    missing = [e for e in entries if e["state"] == "missing"]
    if missing:
        lines += ["", "to get what is missing:"]
        lines += [f"  {e['name']}: {e['get']}" for e in missing]
    return "\n".join(lines)


def problems(report: dict[str, Any]) -> list[str]:
    """A line for everything that is wrong, and one for what is missing."""
    wrong = [f"{e['name']}: {text}" for e in report["datasets"] for text in e["wrong"]]
    missing = [e["name"] for e in report["datasets"] if e["state"] == "missing"]
    if missing:
        wrong.append(f"{len(missing)} of {len(report['datasets'])} data sets are missing: {', '.join(missing)}")
    return wrong


def _count(numbers: dict[str, int | None]) -> str:
    found = numbers["found"]
    if numbers["expected"] is None:
        return f"{found:,}"
    return f"{'-' if found is None else f'{found:,}'} / {numbers['expected']:,}"
