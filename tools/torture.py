"""Kills runs at random moments, resumes them until they end, and compares the result with an undisturbed run.

    python tools/torture.py                                  three strategies, 34 kills each
    python tools/torture.py --kills 100 --strategy mulki     more of one

SIGKILL ends a run either at a random moment or while its thread writes a checkpoint; checkpoints come by steps and by time. The
run then continues from its latest complete checkpoint, as `mulki resume` does, and is killed again, at most eight times. More
runs follow until all kills are spent. The comparison covers the weights, the last checkpoint's state, result.json without times,
matrix.csv, metrics.csv, and the points of the TensorBoard curves.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import sys
import time
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).parent.parent
COSTS = ("seconds", "started", "device", "flops")
"""Keys of result.json that differ from run to run: a resumed run encodes sentences again, and counts that."""
OF_A_RUN = 8
"""The most kills of one run."""


def carry_out(recipe: str, strategy: str, settings: tuple[str, ...], out: Path, log: Path) -> None:
    """In a process of its own: begin the run, or go on with it."""
    with log.open("a") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
        os.dup2(file.fileno(), sys.stdout.fileno())
    import torch

    from mulki_plugins.cli import main

    torch.set_num_threads(1)
    words = [word for setting in settings for word in ("--set", setting)]
    main(["run", recipe, "--strategy", strategy, *words, "--name", strategy, "--out", str(out), "--resume"])


def killed(process: Any, folder: Path, moment: float | None, draw: random.Random) -> bool:
    """Kill the process so many seconds after its start, or (None) while it writes a checkpoint; False where it had ended.

    Which checkpoint, and how far into it, is drawn as well.
    """
    began, wanted, seen = time.monotonic(), draw.randint(1, 4), set()
    while process.is_alive():
        parts = {part.name for part in (folder / "checkpoints").glob(".*.part")}
        seen |= parts
        if moment is not None and time.monotonic() - began > moment:
            break
        if moment is None and parts and len(seen) >= wanted:
            time.sleep(draw.random() * 0.03)
            break
        time.sleep(0.001)
    else:
        return False
    process.kill()
    process.join()
    return bool(process.exitcode != 0)


def differing(one: Path, other: Path) -> list[str]:
    """Names of what differs between two runs' folders; empty if nothing does."""
    found = []
    for name in ("recipe.yaml", "matrix.csv", "metrics.csv"):
        if (one / name).read_bytes() != (other / name).read_bytes():
            found.append(name)
    results = [json.loads((folder / "result.json").read_text()) for folder in (one, other)]
    for result in results:
        for key in COSTS:
            del result[key]
    if results[0] != results[1]:
        found.append("result.json")
    files = [json.loads((_last(folder) / "manifest.json").read_text())["files"] for folder in (one, other)]
    found += [f"{name} of {_last(one).name}" for name in files[0] if files[0][name] != files[1].get(name)]
    if list(points(one)) != list(points(other)):
        found.append("event files")
    return found


def _last(folder: Path) -> Path:
    return max(path for path in (folder / "checkpoints").iterdir() if "step" not in path.name)


def points(folder: Path) -> Iterator[tuple[str, int, bytes]]:
    """Every point of the TensorBoard curves but those of time and memory, in the order in which they were written."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader  # type: ignore[import-untyped]

    for file in sorted(folder.glob("events.out.tfevents.*"), key=lambda path: _order(path.name)):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "scalars" and not value.tag.startswith("cost/"):
                    yield value.tag, event.step, value.SerializeToString()


def _order(name: str) -> tuple[int, int]:
    """The second in which an event file began, and its number within its process."""
    parts = name.split(".")
    return int(parts[3]), int(parts[-1])


def trial(
    context: ForkServerContext, recipe: str, strategy: str, settings: tuple[str, ...], out: Path, kills: int,
    length: float, draw: random.Random,
) -> int:  # fmt: skip
    """One run with that many kills, or fewer if it ends before; returns the number."""
    folder, done = out / "mtil" / strategy / "seed-0", 0
    while True:
        process = context.Process(target=carry_out, args=(recipe, strategy, settings, out, out / "log.txt"))
        process.start()
        if done == kills:
            process.join()
        else:
            moment = draw.random() * length / 2 if draw.random() < 0.5 else None
            if killed(process, folder, moment, draw):
                done += 1
                continue
        if process.exitcode:
            raise click.ClickException(f"the run ended with {process.exitcode}; see {out / 'log.txt'}")
        return done


@click.command(help=(__doc__ or "").splitlines()[0])
@click.option("--strategy", "strategies", multiple=True, default=("mulki", "replay", "zscl"), show_default=True)
@click.option("--kills", default=34, show_default=True, help="Kills per strategy.")
@click.option("--recipe", default=str(ROOT / "recipes" / "mtil.yaml"))
@click.option(
    "--set",
    "settings",
    multiple=True,
    default=(
        "stream.tasks=[digits,scans,shapes]",
        "train.iterations=12",
        "train.batch_size=16",
        "train.schedule.warmup=2",
        "train.checkpoint.every=3",
        "train.checkpoint.minutes=0.01",
        "device=cpu",
    ),
    show_default=True,
)
@click.option("--seed", default=0, show_default=True, help="Seed of the moments.")
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "runs" / "torture", show_default=True)
def main(strategies: tuple[str, ...], kills: int, recipe: str, settings: tuple[str, ...], seed: int, out: Path) -> None:
    """Print a table; exit with status 1 if a run differs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mulki_plugins.training.run"])
    shutil.rmtree(out, ignore_errors=True)
    runs = failed = 0
    click.echo("strategy            run  kills  seconds  differing")
    for name in strategies:
        alone, number, left = out / "alone", 0, kills
        alone.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        trial(context, recipe, name, settings, alone, 0, 0.0, random.Random())
        length = time.monotonic() - began
        while left:
            draw = random.Random(f"{seed} {name} {number}")
            place = out / f"run-{number}"
            place.mkdir(exist_ok=True)
            began = time.monotonic()
            done = trial(context, recipe, name, settings, place, min(left, OF_A_RUN), length, draw)
            wrong = differing(*(folder / "mtil" / name / "seed-0" for folder in (alone, place)))
            seconds = time.monotonic() - began
            click.echo(f"{name:<16}  {number:>5}  {done:>5}  {seconds:>7.0f}  {', '.join(wrong) or 'nothing'}")
            number, left = number + 1, left - done
            runs, failed = runs + 1, failed + bool(wrong)
    click.echo(f"{kills * len(strategies)} kills, {runs} runs, {failed} differ")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
