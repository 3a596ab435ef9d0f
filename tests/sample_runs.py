"""Folders of runs as MulKI writes them, with answers drawn from a seed instead of a model's."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mulki_plugins.metrics import average, forgetting, last, transfer
from mulki_plugins.report.predictions import Answers, write_row, write_stream
from mulki_plugins.report.result import Result

CLASSES = 3
FUNCTIONS = {"transfer": transfer, "average": average, "last": last, "forgetting": forgetting}


def write_run(
    out: Path, strategy: str = "mulki", seed: int = 0, *, tasks: Sequence[str] = ("a", "b", "c"), images: int = 40,
    skill: float = 0.7, noise: int = 0, predictions: bool = True, losses: bool = True, rows: int | None = None, **more: Any,
) -> Result:  # fmt: skip
    """Write a run's folder. skill: the share of right answers; noise: distinguishes runs that otherwise answer alike."""
    folder = out / "runs" / f"{len(list(out.glob('runs/*')))}"
    folder.mkdir(parents=True)
    count = len(tasks)
    labels = [np.random.default_rng([1, j]).integers(CLASSES, size=images) for j in range(count)]
    if predictions:
        write_stream(folder, tasks, [["x", "y", "z"]] * count, labels, [None] * count)
    accuracies = []
    for row in range((count if rows is None else rows) + 1):
        answers = []
        for j in range(count):
            drawn = np.random.default_rng([2, row, j, noise]).random(images)
            right = drawn < (skill if 0 <= j < row else skill - 0.3)
            label = labels[j] + CLASSES * j
            wrong = CLASSES * j + (labels[j] + 1) % CLASSES
            answers.append(Answers(predicted=np.where(right, label, wrong), confidence=np.full(images, 99, np.uint8)))
        accuracies.append([100 * float(np.mean(a.predicted == labels[j] + CLASSES * j)) for j, a in enumerate(answers)])
        if predictions:
            write_row(folder, row, answers, CLASSES * count)
    complete = len(accuracies) == count + 1
    fields: dict[str, Any] = {
        "recipe": "mtil", "status": "complete" if complete else "failed", "protocol": {"stream": "small", "classes": "task"},
        "metrics": {n: f(accuracies[1:]) for n, f in FUNCTIONS.items()} if complete and count > 1 else {},
        "identity": {"data": dict.fromkeys(tasks, f"9 + {images} images, 0a1b")}, "settings": strategy,
        "versions": {"python": "3.11.7", "torch": "2.6.0"}, "seconds": {"train": [30.0] * count, "total": 120.0},
        "device": {"type": "cpu", "name": "a machine", "peak_memory_mib": 800.5}, "started": f"2026-01-01T00:00:{seed:02d}",
    }  # fmt: skip
    result = Result(
        strategy=strategy,
        seed=seed,
        tasks=list(tasks),
        zero_shot=accuracies[0],
        matrix=accuracies[1:],
        **(fields | more),
    )
    result.write(folder)
    if losses:
        with (folder / "metrics.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["tag", "step", "value"])
            writer.writerows(["eval/accuracy/a", step, 50] for step in (0, 10, 20))
            writer.writerows(
                [f"train/loss/{term}", step, f"{share * (1 + 9 / (step + 1)):.8g}"]
                for step in range(30) for term, share in (("total", 1), ("cross_entropy", 0.75), ("adding", 0.25))
            )  # fmt: skip
    return result
