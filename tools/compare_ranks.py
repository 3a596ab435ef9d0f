"""Compares runs on several gloo ranks with runs on one process, and kills ranks at random moments and resumes.

    python tools/compare_ranks.py equal                 # every strategy: weights and matrix of two ranks and of one process
    python tools/compare_ranks.py equal lwf snd --tasks digits flags --iterations 10 --ranks 3
    python tools/compare_ranks.py equal --double        # the same in double precision: what is left is no rounding
    python tools/compare_ranks.py killed --times 20     # SIGKILL of a rank at a random moment, then resume: the same bits
    python tools/compare_ranks.py killed mulki --processes 7

The recipe is `mtil` with a global batch of 32 images. The ranks are forks of this process, with one thread each; `--processes`
makes that many comparisons at the same time, each of which keeps one core busy and then `--ranks` of them. A line is printed
as soon as its comparison is done. The exit status is 1 if one of them differs, fails, or takes longer than `--limit`.

The biases of attention keys are compared apart: they add the same to all of a query's logits, which the softmax takes away
again. Their gradient is 0 but for rounding, which Adam makes into whole steps in directions of chance.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from attrs import frozen
from safetensors.torch import load_file

from mulki_plugins.cli import main as mulki
from mulki_plugins.libraries import import_libraries
from mulki_plugins.ranks.check import problems
from mulki_plugins.recipe.files import list_registered
from mulki_plugins.recipe.resolve import Changes, resolve
from mulki_plugins.testing.ranks import forked_ranks, run_on_ranks

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
"""How far the weights may be apart, relative to their size."""
TEST_IMAGES = 320
"""Of each task of mtil-mini."""


@frozen
class Comparison:
    """What one comparison found: the line to print, and whether it is as it should be."""

    line: str
    right: bool


class FailedError(Exception):
    """A run that should have succeeded, with the end of what it printed."""


def main() -> None:
    options = read_options()
    os.environ["OMP_NUM_THREADS"] = "1"
    import_libraries()
    torch.set_num_threads(1)
    if options.double:
        torch.set_default_dtype(torch.float64)
    if not options.strategies:
        options.strategies = strategies_for(options.ranks)
    folder = Path(options.folder or tempfile.mkdtemp(prefix="ranks-"))
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    try:
        done = list((compare_all if options.what == "equal" else kill_all)(options, folder))
    finally:
        if not options.folder:
            shutil.rmtree(folder, ignore_errors=True)
    wrong = sum(not each.right for each in done)
    print(f"{len(done)} comparisons in {time.monotonic() - began:.0f} s, {wrong} differ", flush=True)
    sys.exit(wrong > 0)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["equal", "killed"])
    parser.add_argument("strategies", nargs="*", help="default: all that train and may run on several ranks")
    parser.add_argument("--tasks", nargs="+", default=["digits", "flags", "scans"])
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument(
        "--times", type=int, default=20, help="kills, shared out over the strategies; at least one of each"
    )
    parser.add_argument("--double", action="store_true", help="compute in double precision")
    parser.add_argument("--processes", type=int, default=1, help="comparisons at the same time")
    parser.add_argument("--limit", type=int, default=900, help="seconds for one comparison")
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which ranks are killed")
    parser.add_argument("--set", action="append", default=[], dest="settings")
    parser.add_argument("--folder", help="where the runs are kept")
    return parser.parse_intermixed_args()


def strategies_for(ranks: int) -> list[str]:
    """The strategies that train, but for those that are refused on so many ranks; these are named."""
    allowed = []
    for name in sorted(list_registered("strategies")):
        recipe = resolve("mtil", Changes(strategy=name)).recipe
        if wrong := list(problems(recipe, ranks)):
            print(f"{name}: left out: {'; '.join(wrong)}", flush=True)
        elif recipe.strategy.base != "none":
            allowed.append(name)
    return allowed


def side_by_side(
    tasks: Iterable[tuple[Callable[..., Comparison], tuple[object, ...]]], processes: int, limit: int
) -> Iterator[Comparison]:
    """What the tasks return, as soon as each is done; their lines are printed. A task is a function and its arguments."""
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("fork")) as pool:
        for future in as_completed([pool.submit(within, limit, *task) for task in tasks]):
            comparison = future.result()
            print(comparison.line, flush=True)
            yield comparison


def within(limit: int, compare: Callable[..., Comparison], arguments: tuple[object, ...]) -> Comparison:
    """What a comparison found within so many seconds."""
    label = " ".join(str(each) for each in arguments if isinstance(each, (str, int)))
    try:
        with time_limit(limit):
            return compare(*arguments)
    except FailedError as error:
        return Comparison(f"{label}: {error}", right=False)
    except Exception as error:  # the other comparisons go on
        return Comparison(f"{label}: {type(error).__name__}: {error}", right=False)


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def end(number: int, frame: object) -> None:
        raise TimeoutError(f"took longer than {seconds} s")

    signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def command(options: argparse.Namespace, strategy: str, out: Path, *more: str) -> Callable[[], object]:
    settings = [
        f"stream.tasks=[{','.join(options.tasks)}]",
        f"train.iterations={options.iterations}",
        *options.settings,
    ]
    chosen = [word for setting in settings for word in ("--set", setting)]
    words = ["run", "mtil", "--strategy", strategy, "--name", strategy, "--out", str(out), *chosen, *more]

    def run() -> object:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        return mulki.main(words)

    return run


def run_in(folder: Path, strategy: str) -> Path:
    return folder / "mtil" / strategy / "seed-0"


def emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def run_to_its_end(start: Callable[[], object], ranks: int, said: Path) -> None:
    """FailedError if a rank does not succeed, with what the ranks printed to stderr."""
    said.mkdir(parents=True, exist_ok=True)
    if any(statuses := run_on_ranks(start, ranks, said)):
        printed = "".join((said / f"stderr-{rank}").read_text()[-2000:] for rank in range(ranks))
        raise FailedError(f"FAILED on {ranks} ranks with {statuses}:\n{printed}")


# equal


def compare_all(options: argparse.Namespace, folder: Path) -> Iterator[Comparison]:
    print(f"{'strategy':18}{'weights':>12}{'key biases':>12}{'images':>8}{'seconds':>16}", flush=True)
    tasks = [(compare, (options, folder / "equal" / strategy, strategy)) for strategy in options.strategies]
    return side_by_side(tasks, options.processes, options.limit)


def compare(options: argparse.Namespace, folder: Path, strategy: str) -> Comparison:
    """How far a strategy's run on the ranks is from that of one process."""
    seconds, runs = [], []
    for ranks in (1, options.ranks):
        out, began = emptied(folder / f"on-{ranks}"), time.monotonic()
        run_to_its_end(command(options, strategy, out), ranks, out / "said")
        seconds.append(time.monotonic() - began)
        runs.append(run_in(out, strategy))
    (far, keys), images = distance(*runs), different_answers(*runs)
    line = f"{strategy:18}{far:12.1e}{keys:12.1e}{images:8d}{seconds[0]:8.0f}{seconds[1]:8.0f}"
    return Comparison(line, far <= TOLERANCE[torch.get_default_dtype()] and images <= 1)


def distance(run: Path, other: Path) -> tuple[float, float]:
    """‖θ − θ'‖/‖θ‖ over the weights of the last checkpoint but the biases of keys, and ‖b − b'‖/‖θ‖ of these."""
    a, b = ({n: t for n, t in tensors_of(each).items() if t.is_floating_point()} for each in (run, other))
    squares, keys, size = 0.0, 0.0, sum(float(each.double().square().sum()) for each in a.values())
    for name in a:
        moved = (a[name].double() - b[name].double()).square()
        if name.endswith(("in_proj_bias", "qkv.bias")):
            third = len(moved) // 3
            keys += float(moved[third : 2 * third].sum())
            moved[third : 2 * third] = 0
        squares += float(moved.sum())
    return (squares / size) ** 0.5 if size else 0.0, (keys / size) ** 0.5 if size else 0.0


def tensors_of(run: Path) -> dict[str, torch.Tensor]:
    """The weights and the buffers of the last checkpoint, but those that are still the pre-trained model's.

    Without the Gaussians of adapters with routes: they follow from the frozen model alone, and are larger than all that learns.
    """
    state = torch.load(last_checkpoint(run) / "state.pt", weights_only=True)
    tensors = load_file(last_checkpoint(run) / "weights.safetensors") | state["model"]
    return {name: tensor for name, tensor in tensors.items() if ".gaussians." not in name}


def last_checkpoint(run: Path) -> Path:
    return max(each for each in (run / "checkpoints").iterdir() if not each.name.startswith((".", "start")))


def different_answers(run: Path, other: Path) -> int:
    """The largest difference in the number of images that one evaluation of one task has right."""
    a, b = (json.loads((each / "result.json").read_text()) for each in (run, other))
    assert a["tasks"] == b["tasks"]
    first, second = (np.array([each["zero_shot"], *each["matrix"]]) for each in (a, b))
    return round(float(np.abs(first - second).max()) / (100 / TEST_IMAGES))


# killed


def kill_all(options: argparse.Namespace, folder: Path) -> Iterator[Comparison]:
    """Kill a rank at random moments, resume, and compare the bits with a run that nothing disturbs."""
    wholes = [(run_whole, (options, folder / "whole", strategy)) for strategy in options.strategies]
    done = list(side_by_side(wholes, options.processes, options.limit))
    yield from (each for each in done if not each.right)
    files = {strategy: folder / "whole" / strategy / "duration" for strategy in options.strategies}
    durations = {strategy: float(file.read_text()) for strategy, file in files.items() if file.exists()}
    draw, tasks = random.Random(options.seed), []
    for number in range(max(options.times, len(durations)) if durations else 0):
        strategy = list(durations)[number % len(durations)]
        moment, rank = draw.uniform(0.05, 0.95) * durations[strategy], draw.randrange(options.ranks)
        tasks.append((kill, (options, folder, strategy, number + 1, moment, rank)))
    yield from side_by_side(tasks, options.processes, options.limit)


def words_of_kill(options: argparse.Namespace) -> tuple[str, str]:
    return "--set", f"train.checkpoint.every={max(1, options.iterations // 4)}"


def run_whole(options: argparse.Namespace, folder: Path, strategy: str) -> Comparison:
    """The run that nothing disturbs; how long it took is in its folder."""
    out, began = emptied(folder / strategy), time.monotonic()
    run_to_its_end(command(options, strategy, out, *words_of_kill(options)), options.ranks, out / "said")
    duration = time.monotonic() - began
    (out / "duration").write_text(str(duration))
    return Comparison(f"{strategy}: undisturbed in {duration:.1f} s", right=True)


def kill(options: argparse.Namespace, folder: Path, strategy: str, number: int, moment: float, rank: int) -> Comparison:
    """Kill a rank at a moment, resume, and compare; at half the moment if the run has ended by then."""
    out = folder / "killed" / f"{strategy}-{number}"
    while True:
        start = command(options, strategy, emptied(out), *words_of_kill(options))
        ended = killed_at(start, options.ranks, out, moment, rank)
        if ended is not None:
            break
        moment /= 2
    run_to_its_end(command(options, strategy, out, *words_of_kill(options), "--resume"), options.ranks, out / "said-2")
    same = same_bits(run_in(folder / "whole" / strategy, strategy), run_in(out, strategy))
    shutil.rmtree(out)
    return Comparison(
        f"{number}: {strategy}: rank {rank} killed after {moment:.1f} s, the others ended {ended:.1f} s later; "
        f"resumed: {'the same bits' if same else 'DIFFERENT'}",
        same,
    )


def killed_at(start: Callable[[], object], ranks: int, said: Path, moment: float, rank: int) -> float | None:
    """Kill a rank at a moment; returns the seconds until all others have ended, None if the run had ended before."""
    with forked_ranks(start, ranks, said) as forks:
        time.sleep(moment)
        os.kill(forks.processes[rank], signal.SIGKILL)
        began = time.monotonic()
        statuses = forks.wait()
        return time.monotonic() - began if statuses[rank] == -signal.SIGKILL else None


def same_bits(run: Path, other: Path) -> bool:
    a, b = tensors_of(run), tensors_of(other)
    matrices = [json.loads((each / "result.json").read_text())["matrix"] for each in (run, other)]
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a) and matrices[0] == matrices[1]


if __name__ == "__main__":
    main()
