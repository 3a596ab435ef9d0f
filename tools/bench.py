"""Benchmarks: what a checkpoint costs, how long `mulki list` takes with many packages, how fast images load.

python tools/bench.py checkpoints                          ViT-B-16 with random weights; no data and no download
python tools/bench.py list --packages 50
python tools/bench.py loading                              draws images of 500 x 375; as many workers as cores
python tools/bench.py loading --root data --task Food      images of an existing data set
python tools/bench.py index                                looks for 415,000 generated, empty files
python tools/bench.py step                                 a step of the main job beside the same step by hand
python tools/bench.py gpu                                  the strategies on a GPU, in each precision
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).parent.parent


class _Commands(click.Group):
    """These, and those of other files, whose libraries take seconds to import."""

    elsewhere = {"gpu": "bench_gpu", "step": "bench_step"}  # noqa: RUF012  # never changed

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *self.elsewhere})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in self.elsewhere:
            command: click.Command = getattr(import_module(self.elsewhere[cmd_name]), cmd_name)
            return command
        return super().get_command(ctx, cmd_name)


@click.group(cls=_Commands, help=(__doc__ or "").splitlines()[0])
def main() -> None:
    pass


@main.command()
@click.option("--model", default="ViT-B-16", show_default=True)
@click.option("--strategy", default="mulki", show_default=True)
@click.option("--batch-size", default=64, show_default=True)
@click.option("--steps", default=6, show_default=True, help="Steps of each of the two runs.")
@click.option("--every", default=200, show_default=True, help="Steps between two checkpoints of the run to estimate.")
def checkpoints(model: str, strategy: str, batch_size: int, steps: int, every: int) -> None:
    """Compare a run that writes a checkpoint after every step with one that writes none within its task."""
    settings = (
        "stream.tasks=[digits]", f"model={{name: {model}, pretrained: random}}", f"train.iterations={steps}",
        f"train.batch_size={batch_size}", "train.schedule.warmup=0", "evaluate.batch_size=64", "loggers=[]",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        without, memory, _ = _train(strategy, (*settings, "train.checkpoint={every: null, keep: 2}"), Path(folder, "a"))
        total, peak, size = _train(strategy, (*settings, "train.checkpoint={every: 1, keep: 2}"), Path(folder, "b"))
    step, cost = without / steps, (total - without) / (steps - 1)
    click.echo(f"model {model}, strategy {strategy}, batches of {batch_size}")
    click.echo(f"a step                       {step:10.2f} s")
    click.echo(f"a checkpoint                 {cost:10.2f} s, {size / 2**20:.0f} MiB")
    click.echo(f"one every {every:>4} steps costs   {100 * cost / (every * step):10.2f} % of the time")
    click.echo(f"memory at the peak           {peak - memory:10.0f} MiB more")


def _train(strategy: str, settings: tuple[str, ...], out: Path) -> tuple[float, float, int]:
    """A run in its own process: seconds of training, its peak memory in MiB, and the bytes of a checkpoint."""
    words = [word for setting in settings for word in ("--set", setting)]
    command = [sys.executable, "-m", "mulki_plugins", "run", "mtil", "--strategy", strategy, *words, "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise click.ClickException(f"failed: {' '.join(command)}")
    [result] = out.rglob("result.json")
    files = [file for manifest in out.rglob("manifest.json") for file in manifest.parent.iterdir()]
    return (
        sum(json.loads(result.read_text())["seconds"]["train"]),
        usage.ru_maxrss / 2**10,
        sum(file.stat().st_size for file in files) // max(1, sum(file.name == "manifest.json" for file in files)),
    )


HOOKS = """\
from pathlib import Path
from mulki_plugins import hookimpl

@hookimpl
def mulki_register(register):
    register.plugin("{name}", "{module}.stage:Stage", summary="a stage", requires=["teachers"])
    register.stream("{name}", "{module}.stage:stream", summary="a stream", tasks=["one", "two"])
    register.folder("strategies", Path(__file__).parent / "strategies")
"""


@main.command("list")
@click.option("--packages", default=50, show_default=True)
@click.option("--repeats", default=9, show_default=True)
def list_packages(packages: int, repeats: int) -> None:
    """Time `mulki list` with and without that many installed packages.

    Prints the median and the minimum of the wall-clock time, and the minimum of the CPU time, which depends less on other
    processes. The first call compiles and does not count.
    """
    with tempfile.TemporaryDirectory() as folder:
        _write_packages(Path(folder), packages)
        for count, path in ((0, []), (packages, [folder])):
            clock, cpu = _time_list(path, repeats)
            seconds = f"median {statistics.median(clock):.2f} s, minimum {min(clock):.2f} s"
            click.echo(f"{count:>4} packages: {seconds}; CPU {min(cpu):.2f} s")


def _write_packages(site: Path, count: int) -> None:
    """Distributions with metadata, each with a hook that registers a plugin, a stream and a folder with a strategy."""
    for i in range(count):
        name, module = f"bench-{i}", f"bench_{i}"
        strategies = site / module / "strategies"
        strategies.mkdir(parents=True)
        (site / module / "__init__.py").write_text("")
        (site / module / "hooks.py").write_text(HOOKS.format(name=name, module=module))
        (strategies / f"{name}.yaml").write_text(f"name: {name}\nsummary: one of many\nplugins: [teachers, {name}]\n")
        info = site / f"{module}-1.0.dist-info"
        info.mkdir()
        head = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nSummary: one of many\nRequires-Dist: mulki>=0.1\n\n"
        (info / "METADATA").write_text(head + "A long description.\n" * 100)
        (info / "entry_points.txt").write_text(f"[mulki]\n{name} = {module}.hooks\n")


def _time_list(path: list[str], repeats: int) -> tuple[list[float], list[float]]:
    """Wall-clock and CPU seconds of each call."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*path, os.environ.get("PYTHONPATH", "")])}
    clock, cpu = [], []
    for _ in range(repeats + 1):
        began, used = time.perf_counter(), _cpu_seconds()
        command = [sys.executable, "-m", "mulki_plugins", "list"]
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        clock.append(time.perf_counter() - began)
        cpu.append(_cpu_seconds() - used)
    return clock[1:], cpu[1:]


def _cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return children.ru_utime + children.ru_stime


@main.command()
@click.option("--root", help="The folder with the data; images are drawn by default.")
@click.option("--task", default="Caltech101", show_default=True)
@click.option("--images", default=1024, show_default=True, help="Images per round.")
@click.option("--workers", default=os.cpu_count() or 1, show_default=True)
@click.option("--rounds", default=5, show_default=True)
def loading(root: str | None, task: str, images: int, workers: int, rounds: int) -> None:
    """Compare the input pipelines of training and evaluation with the decoder alone, in images per second.

    Measures with the same number of processes: decoding a file to RGB; decoding and the transform; the whole pipeline as a
    run builds it, of training, of an evaluation that decodes, and of one that finds its images in the cache. They alternate,
    and each one's best round counts, so that other processes disturb less.
    """
    from bench_loading import measure

    with _temporary_cache() as folder:
        measure(root or _draw_images(folder / "data", images), task, images, workers, rounds)


class _temporary_cache(tempfile.TemporaryDirectory[str]):
    """A temporary folder that also holds MulKI's cache."""

    def __enter__(self) -> Any:
        import torch

        torch.set_num_threads(1)
        folder = Path(super().__enter__())
        os.environ["MULKI_CACHE"] = str(folder / "cache")
        return folder


def _draw_images(root: Path, count: int) -> str:
    """Smooth colours with some noise. As JPEG they are about as large as photographs of that size."""
    import mtil_layouts
    import numpy as np
    from PIL import Image

    from mulki_plugins.streams.mtil.declaration import declaration

    rng = np.random.default_rng(0)

    def write(path: Path, label: int) -> None:
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        smooth = coarse.resize((500, 375), Image.Resampling.BICUBIC)
        noisy = np.asarray(smooth, dtype=np.float32) + rng.normal(0, 6, (375, 500, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=88)

    classes = list(declaration("Caltech101").classes)
    mtil_layouts.caltech101(root, classes, [i % len(classes) for i in range(int(count / 0.79))], write)
    return str(root)


@main.command()
def index() -> None:
    """Time a first and a second look for all eleven MTIL data sets, with as many files as the originals."""
    from mulki_plugins.streams.mtil.dataset import look
    from mulki_plugins.streams.mtil.declaration import ORDERS

    with _temporary_cache() as folder:
        root = folder / "data"
        for name in ORDERS["I"]:
            _write_empty(name, root)
        time.sleep(3)  # until the folders' modification times have settled
        for title in ("first look", "second look, from the cache"):
            began, images, times = time.perf_counter(), 0, []
            for name in ORDERS["I"]:
                start = time.perf_counter()
                data_set = look(name, root, "zscl")
                assert data_set.state == "found", (name, data_set.state)
                images += sum(data_set.sizes[part] for part in ("train", "test"))
                times.append(f"{name} {time.perf_counter() - start:.2f}")
            click.echo(f"{title}: {images:,} images in {time.perf_counter() - began:.2f} s: {', '.join(times)}")


def _write_empty(name: str, root: Path) -> None:
    """A data set with its published classes and numbers of images; every image file is empty."""
    import mtil_layouts
    import numpy as np

    from mulki_plugins.streams.mtil.declaration import declaration

    declared = declaration(name)
    classes = list(declared.classes)
    train, test = ([i % len(classes) for i in range(n)] for n in declared.images["zscl"])

    def write(path: Path, label: int) -> None:
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY))

    if name in ("Caltech101", "EuroSAT", "SUN397"):
        getattr(mtil_layouts, name.lower())(root, classes, sorted(train + test), write)
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
