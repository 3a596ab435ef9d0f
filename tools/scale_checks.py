"""Measurements on this machine, with two processes, of what tools/scale.py computes.

The fastest of several rounds counts: it is the one that other work on the machine disturbed least.
"""

from __future__ import annotations

import functools
import io
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import scale
import torch
import torch.distributed as dist
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

MIB = 2**20
SIZES = (1, 4, 16, 64)
"""MiB of an all-reduce; bandwidth and latency are fitted to the first and the last."""
ROUNDS = 60


def lines() -> Iterator[str]:
    """A line for each formula: what it gives, what was measured, and their ratio."""
    torch.set_num_threads(1)
    yield from flops_lines()
    yield from all_reduce_lines()
    yield from step_lines()
    yield from loading_lines()
    yield from checkpoint_lines()


def flops_lines() -> Iterator[str]:
    for model, name in ((scale.VIT_B_16, "ViT-B-16"), (scale.VIT_L_14, "ViT-L-14")):
        counted = counted_flops(name)
        yield _line(f"operations of {model.name}'s image tower", model.image.flops / 1e9, counted / 1e9, "GFLOP")


def counted_flops(name: str) -> float:
    """torch's count for one image, on tensors without values."""
    with torch.device("meta"):
        clip = open_clip.create_model(name, pretrained=None, device="meta")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            clip.encode_image(torch.empty(1, 3, 224, 224))
    return float(counter.get_total_flops())


def all_reduce_lines() -> Iterator[str]:
    measured = {size: min(seconds) for size, seconds in two_processes(_all_reduces).items()}
    latency, bandwidth = fit_ring(measured)
    fitted = f"{bandwidth / 1e9:.2f} GB/s, {1e6 * latency:.0f} µs a message"
    yield f"all-reduce of two gloo processes: {fitted}, from {SIZES[0]} and {SIZES[-1]} MiB"
    for size in SIZES[1:-1]:
        computed = scale.all_reduce_seconds(size * MIB, 2, bandwidth, latency)
        yield _line(f"  {size} MiB", 1000 * computed, 1000 * measured[size], "ms")


def fit_ring(measured: dict[float, float]) -> tuple[float, float]:
    """Latency and bandwidth of two ranks, of which the smallest and the largest size give the measured times."""
    small, large = min(measured), max(measured)
    bandwidth = (large - small) * MIB / (measured[large] - measured[small])
    return max(0.0, measured[small] - small * MIB / bandwidth) / 2, bandwidth


def _all_reduces(rank: int) -> dict[float, list[float]]:
    found = {}
    for size in SIZES:
        values = torch.zeros(int(size * MIB) // 4)
        found[size] = _times(functools.partial(dist.all_reduce, values), ROUNDS)
    return found


def step_lines() -> Iterator[str]:
    """The computation of two ranks with half of a batch each, by a line through two batch sizes of one rank; in CPU time."""
    alone = {batch: min(_times(_training_step(batch), ROUNDS, time.process_time)) for batch in (4, 16)}
    rate = (alone[16] - alone[4]) / 12
    shared = two_processes(_half_step)
    one = f"of one rank: {1000 * alone[16]:.0f} ms with 16 images, {1000 * alone[4]:.0f} ms with 4"
    yield _line(
        f"computation of two ranks with 8 images each ({one})", 1000 * (alone[4] + 4 * rate), 1000 * shared, "ms"
    )


def _half_step(rank: int) -> float:
    return min(_times(_training_step(8), ROUNDS, time.process_time))


@functools.cache
def _model() -> torch.nn.Module:
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(192, 4, 768, batch_first=True, norm_first=True)
    return torch.nn.TransformerEncoder(layer, 6, enable_nested_tensor=False).train()


def _training_step(batch: int) -> Callable[[], None]:
    model, values = _model(), torch.randn(batch, 50, 192)

    def step() -> None:
        model.zero_grad()
        model(values).square().mean().backward()

    return step


def loading_lines() -> Iterator[str]:
    """Images a second of CPU time of one process, and of each of two: a core loads as fast beside another one."""
    noise = np.random.default_rng(0).integers(0, 256, (25, 19, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(noise).resize((500, 375), Image.Resampling.BICUBIC).save(data, "jpeg", quality=90)
    context = multiprocessing.get_context("spawn")
    rates = {}
    for processes in (1, 2):
        with context.Pool(processes) as pool:
            rates[processes] = sum(pool.map(_loading_rate, [data.getvalue()] * processes, chunksize=1))
    yield _line("images loaded by two processes", 2 * rates[1], rates[2], "images per second of CPU time")


def _loading_rate(data: bytes) -> float:
    torch.set_num_threads(1)
    transform = open_clip.image_transform(224, is_train=False)
    best = min(_times(lambda: [transform(Image.open(io.BytesIO(data))) for _ in range(10)], ROUNDS, time.process_time))
    return 10 / best


def checkpoint_lines() -> Iterator[str]:
    """Writes of two sizes, synced: in proportion to the bytes."""
    with tempfile.TemporaryDirectory() as folder:
        seconds = {size: min(_times(functools.partial(_write, Path(folder), size), 5)) for size in (64, 256)}
    yield f"checkpoints: {64 * MIB / seconds[64] / 1e6:.0f} MB/s"
    yield _line("  256 MiB from the time of 64 MiB", 4 * seconds[64], seconds[256], "s")


def _write(folder: Path, size: int) -> None:
    with (folder / "checkpoint").open("wb") as file:
        file.write(bytes(size * MIB))
        file.flush()
        os.fsync(file.fileno())


def two_processes(measure: Callable[[int], Any]) -> Any:
    """What `measure(rank)` returns on rank 0 of two gloo processes with a thread each."""
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        processes = [context.Process(target=_rank, args=(rank, folder, measure, queue)) for rank in (0, 1)]
        for process in processes:
            process.start()
        result = queue.get(timeout=600)
        for process in processes:
            process.join()
        return result


def _rank(rank: int, folder: str, measure: Callable[[int], Any], queue: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    result = measure(rank)
    if rank == 0:
        queue.put(result)
    dist.barrier()
    dist.destroy_process_group()


def _times(function: Callable[[], object], rounds: int, clock: Callable[[], float] = time.perf_counter) -> list[float]:
    """Seconds of each round, after one that is not timed."""
    function()
    found = []
    for _ in range(rounds):
        began = clock()
        function()
        found.append(clock() - began)
    return found


def _line(what: str, computed: float, measured: float, unit: str) -> str:
    return f"{what}: computed {computed:.4g} {unit}, measured {measured:.4g} {unit}, ratio {computed / measured:.2f}"
