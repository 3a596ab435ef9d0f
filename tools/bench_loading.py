"""How fast images load: the measurements of `bench.py loading`."""

from __future__ import annotations

import time
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

import click
import open_clip
import torch
from attrs import evolve
from avalanche.benchmarks.utils.data_loader import SingleDatasetDataLoader, TaskBalancedDataLoader

from mulki_plugins.streams.benchmark import as_benchmark
from mulki_plugins.streams.cache import PixelCache
from mulki_plugins.streams.images import open_rgb
from mulki_plugins.streams.mtil.stream import mtil
from mulki_plugins.training.batches import TaskBatches

BATCH = 64
SIZE = 224


def measure(root: str, name: str, count: int, workers: int, rounds: int) -> None:
    """Print a row for each way to load `count` training images of a data set."""
    [task] = mtil(root=root, tasks=[name]).tasks
    train: Any = task.train
    count = min(count, len(train)) // BATCH * BATCH
    if not count or not hasattr(train, "path"):
        raise click.ClickException(f"{name}: expected at least {BATCH} training images, each in its own file")
    train = train.take(range(count))
    stream = evolve(mtil(root=root, tasks=[name]), tasks=(evolve(task, train=train, test=train),))
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    transforms = [open_clip.image_transform(SIZE, is_train=part, mean=mean, std=std) for part in (True, False)]
    options: dict[str, Any] = {"batch_size": BATCH, "num_workers": workers, "persistent_workers": workers > 0}
    loader = TaskBalancedDataLoader(as_benchmark(stream, *transforms).train_stream[0].dataset, shuffle=True, **options)
    decoding = _Evaluation(stream, transforms, options)
    cached = _Evaluation(stream, transforms, options, PixelCache())
    began = time.perf_counter()
    cached()
    first = count / (time.perf_counter() - began)
    paths = [train.path(i) for i in range(count)]
    with get_context("fork").Pool(max(workers, 1), _start_worker, (transforms[0],)) as pool:
        rates = _best_rates(
            {
                "decoder": lambda: _exhaust(pool.imap_unordered(open_rgb, paths, chunksize=BATCH)),
                "decoder, transform": lambda: _exhaust(pool.imap_unordered(_prepare, paths, chunksize=BATCH)),
                "pipeline": lambda: _exhaust(TaskBatches(loader, count // BATCH)),
                "evaluation": decoding,
                "from the cache": cached,
            },
            count,
            rounds,
        )
    pids = _worker_ids(loader)
    _exhaust(TaskBatches(loader, 2 * count // BATCH))
    click.echo(f"{name}: {count} images, {workers} workers, {rounds} rounds")
    click.echo(f"{'':20}{'images/s':>10}{'of decoder':>12}{'of both':>10}")
    for row, rate in rates.items():
        shares = f"{rate / rates['decoder']:>12.0%}{rate / rates['decoder, transform']:>10.0%}"
        click.echo(f"{row:20}{rate:>10.0f}{shares}")
    click.echo(f"the first evaluation, which fills the cache: {first:.0f} images/s")
    click.echo(f"from the cache {rates['from the cache'] / rates['evaluation']:.1f} times as fast as decoding")
    if workers:
        click.echo(f"the workers survive two epochs: {'yes' if pids == _worker_ids(loader) else 'no'}")


class _Evaluation:
    """One evaluation's batches as a run loads them, up to the numbers that the model gets. Call it to load them all."""

    def __init__(
        self, stream: Any, transforms: list[Any], options: dict[str, Any], cache: PixelCache | None = None
    ) -> None:
        experience = as_benchmark(stream, *transforms, cache=cache).test_stream[0]
        self.cached = experience.images.cached
        self.dataset = experience.dataset.with_transforms("pixels") if self.cached else experience.dataset
        self.options = options

    def __call__(self) -> None:
        if self.cached is not None:
            self.cached.prepare()
        for x, *_ in SingleDatasetDataLoader(self.dataset, **self.options):  # new workers each time, as in a run
            if self.cached is not None:
                x = self.cached.split.to_numbers(x)
            assert x.dtype == torch.float32


def _best_rates(ways: dict[str, Callable[[], None]], count: int, rounds: int) -> dict[str, float]:
    for way in ways.values():  # starts the workers and fills the disk's cache
        way()
    best = dict.fromkeys(ways, 0.0)
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            best[name] = max(best[name], count / (time.perf_counter() - began))
    return best


def _exhaust(items: Any) -> None:
    for _ in items:
        pass


def _worker_ids(loader: Any) -> list[int]:
    inner = getattr(loader, "_persistent_loader", None)
    return [worker.pid for worker in inner._iterator._workers] if inner is not None else []


_transform: Any = None


def _start_worker(transform: Any) -> None:
    global _transform
    _transform = transform
    torch.set_num_threads(1)


def _prepare(path: str) -> None:
    _transform(open_rgb(path))
