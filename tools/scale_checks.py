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
SIZES = (1, 4, 16, 64, 256)
"""MiB of an all-reduce; bandwidth and latency are fitted to the first and the last."""


def lines() -> Iterator[str]:
    """A line for each formula: what it gives, what was measured, and their ratio."""
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


def fit_ring(measured: dict[int, float]) -> tuple[float, float]:
    """Latency and bandwidth of two ranks, of which the smallest and the largest size give the measured times."""
    small, large = min(measured), max(measured)
    bandwidth = (large - small) * MIB / (measured[large] - measured[small])
    return max(0.0, measured[small] - small * MIB / bandwidth) / 2, bandwidth


def _all_reduces(rank: int) -> dict[int, list[float]]:
    found = {}
    for size in SIZES:
        values = torch.zeros(size * MIB // 4)
        found[size] = _times(functools.partial(dist.all_reduce, values), 25)
    return found


def step_lines() -> Iterator[str]:
    """A step of two ranks with half of the batch each: compute by a line through two batch sizes, then the gradients."""
    alone = {batch: min(_times(_training_step(batch, reduce=False), 15)) for batch in (8, 32)}
    rate = (alone[32] - alone[8]) / 24
    shared = two_processes(_shared_step)
    compute = alone[8] + 8 * rate
    computed = 1000 * (compute + shared["gradients"])
    yield _line("a step of two ranks with 16 images each", computed, 1000 * shared["step"], "ms")
    one = f"{1000 * alone[32]:.0f} ms with 32 images, {1000 * alone[8]:.0f} ms with 8"
    yield f"  one rank: {one}; gradients {1000 * shared['gradients']:.0f} ms"


def _shared_step(rank: int) -> dict[str, float]:
    step = _training_step(16, reduce=True)
    size = sum(p.numel() for p in _model().parameters())
    values = torch.zeros(size)
    return {
        "step": min(_times(step, 25)),
        "gradients": min(_times(functools.partial(dist.all_reduce, values), 25)),
    }


@functools.cache
def _model() -> torch.nn.Module:
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(192, 4, 768, batch_first=True, norm_first=True)
    return torch.nn.TransformerEncoder(layer, 6, enable_nested_tensor=False).train()


def _training_step(batch: int, *, reduce: bool) -> Callable[[], None]:
    model, values = _model(), torch.randn(batch, 50, 192)

    def step() -> None:
        model.zero_grad()
        model(values).square().mean().backward()
        if reduce:
            whole = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            dist.all_reduce(whole)

    return step


def loading_lines() -> Iterator[str]:
    """Images a second of one process and of two: in proportion to the cores."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image.jpg"
        noise = np.random.default_rng(0).integers(0, 256, (25, 19, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)
        data = path.read_bytes()
    context = multiprocessing.get_context("spawn")
    rates = {1: 0.0, 2: 0.0}
    for processes in rates:
        with context.Pool(processes) as pool:
            pool.map(_load, [(data, 5)] * processes)
            for _ in range(4):
                began = time.perf_counter()
                pool.map(_load, [(data, 60)] * processes, chunksize=1)
                rates[processes] = max(rates[processes], 60 * processes / (time.perf_counter() - began))
    yield _line(f"images loaded by two processes ({os.cpu_count()} cores)", 2 * rates[1], rates[2], "images/s")


def _load(job: tuple[bytes, int]) -> None:
    transform = open_clip.image_transform(224, is_train=False)
    for _ in range(job[1]):
        transform(Image.open(io.BytesIO(job[0])))


def checkpoint_lines() -> Iterator[str]:
    """Writes of two sizes, synced: in proportion to the bytes."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
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


def _times(function: Callable[[], object], rounds: int) -> list[float]:
    """Seconds of each round, after one that is not timed."""
    function()
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        function()
        found.append(time.perf_counter() - began)
    return found


def _line(what: str, computed: float, measured: float, unit: str) -> str:
    return f"{what}: computed {computed:.4g} {unit}, measured {measured:.4g} {unit}, ratio {computed / measured:.2f}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("\n".join(lines()))
