"""How fast images are loaded: the input pipeline beside the decoder alone, and the index of all data sets.

    python tools/bench_loading.py                              images that it draws, 500 x 375, as many workers as processors
    python tools/bench_loading.py --root data --task Food      images of a data set that is there
    python tools/bench_loading.py --index                      generates 415,000 empty files in a temporary folder

Three rates in images a second, with as many processes each: opening and decoding a file to RGB; that and the transform, each
for itself; and the whole pipeline as a run builds it (the stream, Avalanche's benchmark and loader, workers that persist over
epochs, batches). Rounds of the three alternate; the best round of each counts, so that other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import mtil_layouts
import numpy as np
import open_clip
import torch
from avalanche.benchmarks.utils.data_loader import TaskBalancedDataLoader
from PIL import Image

from mulki_plugins.streams.benchmark import as_benchmark
from mulki_plugins.streams.images import open_rgb
from mulki_plugins.streams.mtil.dataset import look
from mulki_plugins.streams.mtil.declaration import ORDERS, declaration
from mulki_plugins.streams.mtil.stream import mtil
from mulki_plugins.streams.task import TaskStream
from mulki_plugins.training.batches import TaskBatches

BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="folder of the data; without it images are drawn")
    parser.add_argument("--task", default="Caltech101")
    parser.add_argument("--images", type=int, default=1024, help="how many images are loaded in a round")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--index", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MULKI_CACHE"] = str(Path(folder) / "cache")
        if options.index:
            index(Path(folder) / "data")
        else:
            root = options.root or drawn(Path(folder) / "data", options.images)
            loading(mtil(root=root, tasks=[options.task]), options.images, options.workers, options.rounds)


def drawn(root: Path, count: int) -> str:
    """Smooth colours with some noise, which a JPEG needs as many bytes for as for a photograph of that size."""
    rng = np.random.default_rng(0)

    def write(path: Path, label: int) -> None:
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize(
            (500, 375), Image.Resampling.BICUBIC
        )
        noisy = np.asarray(coarse, dtype=np.float32) + rng.normal(0, 6, (375, 500, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=88)

    classes = list(declaration("Caltech101").classes)
    mtil_layouts.caltech101(root, classes, [i % len(classes) for i in range(int(count / 0.79))], write)
    return str(root)


def loading(stream: TaskStream, count: int, workers: int, rounds: int) -> None:
    train: Any = stream.tasks[0].train
    count = min(count, len(train)) // BATCH * BATCH
    if not count or not hasattr(train, "path"):
        sys.exit(f"{stream.tasks[0].name}: expected at least {BATCH} training images, each in a file of its own")
    paths = [train.path(i) for i in range(count)]
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    transforms = [open_clip.image_transform(224, is_train=part, mean=mean, std=std) for part in (True, False)]
    experience = as_benchmark(stream, *transforms).train_stream[0]
    dataset = experience.dataset.subset(range(count))
    loader = TaskBalancedDataLoader(
        dataset, batch_size=BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0
    )
    ways: dict[str, Callable[[], None]] = {}
    with get_context("fork").Pool(max(workers, 1), _begin, (transforms[0],)) as pool:
        ways["decoder alone"] = lambda: _through(pool.imap_unordered(_decode, paths, chunksize=BATCH))
        ways["decoder and transform"] = lambda: _through(pool.imap_unordered(_prepare, paths, chunksize=BATCH))
        ways["pipeline"] = lambda: _through(TaskBatches(loader, count // BATCH))
        rates = _measured(ways, count, rounds)
    pids = _workers(loader)
    _through(TaskBatches(loader, 2 * count // BATCH))
    print(
        f"{stream.tasks[0].name}: {count} images of about {Image.open(paths[0]).size} pixels, {workers} workers, {rounds} rounds"
    )
    print(f"{'':24}{'images/s':>10}{'of decoder':>12}{'of decoder and transform':>26}")
    for name, rate in rates.items():
        print(
            f"{name:24}{rate:>10.0f}"
            + "".join(
                f"{rate / rates[base]:>{w}.0%}" for base, w in (("decoder alone", 12), ("decoder and transform", 26))
            )
        )
    said = ("the same" if pids == _workers(loader) else "other ones") if workers else "none"
    print(f"workers after two more epochs: {said}")


def _measured(ways: dict[str, Callable[[], None]], count: int, rounds: int) -> dict[str, float]:
    for way in ways.values():  # starts workers, fills the disk's cache
        way()
    best = dict.fromkeys(ways, 0.0)
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            best[name] = max(best[name], count / (time.perf_counter() - began))
    return best


def _through(items: Any) -> None:
    for _ in items:
        pass


def _workers(loader: Any) -> list[int]:
    inner = getattr(loader, "_persistent_loader", None)
    return [worker.pid for worker in inner._iterator._workers] if inner is not None else []


_transform: Any = None


def _begin(transform: Any) -> None:
    global _transform
    _transform = transform
    torch.set_num_threads(1)


def _decode(path: str) -> None:
    open_rgb(path)


def _prepare(path: str) -> None:
    _transform(open_rgb(path))


def index(root: Path) -> None:
    """All eleven with as many files as the originals; the time of a first and of a second look."""
    print("writing ...", end=" ", flush=True)
    for name in ORDERS["I"]:
        written(name, root)
    time.sleep(3)  # until the folders' times of change are settled
    print("done")
    for what in ("first look", "second look, listings cached"):
        began, rows = time.perf_counter(), []
        for name in ORDERS["I"]:
            start = time.perf_counter()
            found = look(name, root, "zscl")
            rows.append(
                (name, sum(found.sizes[part] for part in ("train", "test")), time.perf_counter() - start, found.state)
            )
        total = time.perf_counter() - began
        print(
            f"{what}: {sum(row[1] for row in rows):,} images in {total:.2f} s: "
            + ", ".join(f"{n} {t:.2f}" for n, _, t, _ in rows)
        )
        assert all(state == "found" for *_, state in rows), rows


def written(name: str, root: Path) -> None:
    """One data set with its published classes and numbers of images, every file empty."""
    declared = declaration(name)
    classes = list(declared.classes)
    train, test = ([i % len(classes) for i in range(n)] for n in declared.images["zscl"])

    def write(path: Path, label: int) -> None:
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY))

    together = sorted(train + test)
    if name in ("Caltech101", "EuroSAT", "SUN397"):
        writer = {
            "Caltech101": mtil_layouts.caltech101,
            "EuroSAT": mtil_layouts.eurosat,
            "SUN397": mtil_layouts.sun397,
        }[name]
        writer(root, classes, together, write)
    elif name == "CIFAR100":
        mtil_layouts.cifar100(root, classes, train, test, lambda label: np.zeros(3072, dtype=np.uint8))
    elif name == "MNIST":
        mtil_layouts.mnist(root, train, test, lambda label: np.zeros((28, 28), dtype=np.uint8))
    elif name == "Flowers":
        mtil_layouts.flowers102(root, train, test, write)
    else:
        writers = {
            "Aircraft": mtil_layouts.aircraft, "DTD": mtil_layouts.dtd, "Food": mtil_layouts.food101,
            "OxfordPet": mtil_layouts.oxford_pet, "StanfordCars": mtil_layouts.stanford_cars,
        }  # fmt: skip
        writers[name](root, classes, train, test, write)


if __name__ == "__main__":
    main()
