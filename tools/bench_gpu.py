"""`python tools/bench.py gpu`: the strategies on one GPU in each precision, and how long the published protocol takes."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
from attrs import evolve

STRATEGIES = ("mulki", "finetune", "zscl")
MODES: dict[str, tuple[str, ...]] = {
    "fp32": (),
    "tf32": ("train.precision=tf32",),
    "bf16": ("train.precision=bf16",),
    "bf16 compiled": ("train.precision=bf16", "train.compile=true"),
}
EVALUATED = {"fp32": "fp32", "tf32": "fp32", "bf16": "bf16", "bf16 compiled": "bf16"}
"""The mode whose evaluations count for each mode: those of the first strategy in fp32 and in bf16 are measured."""
SMALL = (
    "stream={name: mtil-mini, tasks: [digits, scans], shots: 4, evaluate_on: validation}", "model=mulki-tiny",
    "train.batch_size=8", "train.workers=0",
    "train.per_task={}",
)  # fmt: skip


@click.command()
@click.option("--device", default="cuda", show_default=True)
@click.option("--small", is_flag=True, help="The bundled model on drawn images: shows that the command works.")
@click.option("--steps", default=25, show_default=True, help="Timed steps of each task.")
@click.option("--minutes", default=6.0, show_default=True, help="No further row is begun after this time.")
@click.option("--workers", default=max(1, (os.cpu_count() or 1) - 1), show_default=True, help="Of the loader.")
@click.option("--strategy", "strategies", multiple=True, default=STRATEGIES, show_default=True)
@click.option("--mode", "modes", multiple=True, type=click.Choice(list(MODES)), default=list(MODES), show_default=True)
def gpu(
    device: str,
    small: bool,
    steps: int,
    minutes: float,
    workers: int,
    strategies: tuple[str, ...],
    modes: tuple[str, ...],
) -> None:
    """Measure the steps of ViT-B/16 on synthetic images of MTIL's sizes.

    Two tasks of each strategy and precision: milliseconds of a step, memory at the peak, kernels started and waits in a
    step, images per second in an evaluation, and the predicted time of the whole protocol. Exit status 2 without the device.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        click.echo("this machine has no CUDA GPU; `--device cpu --small` runs the same on a small model", err=True)
        raise SystemExit(2)
    end = time.monotonic() + 60 * minutes
    name = torch.cuda.get_device_name() if device == "cuda" else device
    click.echo(f"{name}, {os.cpu_count()} cores, torch {torch.__version__}, {workers} workers")
    click.echo(
        f"{'strategy':10}{'mode':15}{'first task':>12}{'second task':>13}{'peak':>10}{'launches':>10}{'waits':>7}"
        f"{'reads':>7}{'eval images/s':>15}{'protocol':>14}"
    )
    evaluations: dict[str, Any] = {}
    settings = (f"device={device}", *(SMALL if small else (f"train.workers={workers}",)))
    with tempfile.TemporaryDirectory() as folder:
        for strategy in strategies:
            for mode in modes:
                row = f"{strategy:10}{mode:15}"
                if time.monotonic() > end:
                    click.echo(f"{row}left out: {minutes:g} minutes are over")
                    continue
                click.echo(row + _row(strategy, mode, settings, steps, evaluations, None if small else Path(folder)))


def _row(
    strategy: str, mode: str, settings: tuple[str, ...], steps: int, evaluations: dict[str, Any], folder: Path | None
) -> str:
    """The cells of one row, or why there are none. The first strategy's evaluations count for all."""
    from mulki_plugins.bench.measure import measure
    from mulki_plugins.bench.predict import predict, whole_evaluation
    from mulki_plugins.bench.synthetic import synthetic, without_weights
    from mulki_plugins.bench.table import duration
    from mulki_plugins.errors import MulkiError
    from mulki_plugins.recipe.resolve import Changes, resolve

    given = (*settings, *MODES[mode], *(("reference=mtil-mini-reference",) if strategy == "zscl" else ()))
    try:
        recipe, _ = without_weights(resolve("mtil-vitb16", Changes(strategy=strategy, settings=given)).recipe)
        if not any("compile" in setting for setting in MODES[mode]) and hasattr(recipe.train, "compile"):
            recipe = evolve(recipe, train=evolve(recipe.train, compile=False))
        if mode == "fp32":
            recipe = evolve(recipe, train=evolve(recipe.train, precision="fp32"))
        stream = synthetic(recipe.stream, folder) if folder else None
        key = EVALUATED[mode]
        with contextlib.redirect_stdout(sys.stderr):
            measured = measure(recipe, 0, stream=stream, steps=steps, evaluate=key not in evaluations)
    except MulkiError as error:
        return f"  {error.lines()[0]}"
    except Exception as error:  # such as too little memory: the other rows still count
        return f"  {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    evaluations.setdefault(key, measured.evaluations)
    measured = evolve(measured, evaluations=evaluations[key])
    first, second = measured.tasks[0].steps, measured.tasks[-1].steps
    images = sum(measured.test_images.values())
    rate = images / whole_evaluation(measured.evaluations[-1], measured)
    calls = [str(second.calls.get(what, "-")) for what in ("launches", "waits", "scalar_reads")]
    return (
        f"{1000 * first.median:>9.1f} ms{1000 * second.median:>10.1f} ms"
        f"{measured.tasks[-1].peak_memory_mib / 1024:>7.1f} GB{calls[0]:>10}{calls[1]:>7}{calls[2]:>7}"
        f"{rate:>15.0f}{duration(predict(measured).total):>14}"
    )
