"""Compares runs on several gloo ranks with runs on one process, and kills ranks at random moments and resumes.

    python tools/compare_ranks.py equal                 # every strategy: weights and matrix of two ranks and of one process
    python tools/compare_ranks.py equal lwf snd --tasks digits flags --iterations 10 --ranks 3
    python tools/compare_ranks.py killed --times 20     # SIGKILL of a rank at a random moment, then resume: the same bits

The recipe is `mtil` with a global batch of 32 images. The ranks are forks of this process, with one thread each. The biases of
attention keys are compared apart: they add the same to all of a query's logits, which the softmax takes away again. Their
gradient is 0 but for rounding, which Adam makes into whole steps in directions of chance.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from mulki_plugins.cli import main as mulki
from mulki_plugins.libraries import import_libraries
from mulki_plugins.testing.ranks import forked_ranks, run_on_ranks

STRATEGIES = [
    "finetune", "lwf", "ewc", "replay", "icarl", "zscl", "snd", "mulki", "lora", "null-space", "mas", "si", "l2", "wise-ft",
    "weight-ensemble", "lwf-vr", "lora-merge", "mulki-lora", "joint",
]  # fmt: skip
TOLERANCE = 1e-5


def main() -> None:
    options = read_options()
    os.environ["OMP_NUM_THREADS"] = "1"
    import_libraries()
    torch.set_num_threads(1)
    folder = Path(options.folder or tempfile.mkdtemp(prefix="ranks-"))
    wrong = (compare if options.what == "equal" else kill)(options, folder)
    if not options.folder:
        shutil.rmtree(folder)
    sys.exit(f"{wrong} differ" if wrong else 0)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["equal", "killed"])
    parser.add_argument("strategies", nargs="*", help="default: all, or mulki for killed")
    parser.add_argument("--tasks", nargs="+", default=["digits", "flags", "scans"])
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which ranks are killed")
    parser.add_argument("--set", action="append", default=[], dest="settings")
    parser.add_argument("--folder", help="where the runs are kept")
    return parser.parse_args()


def command(options: argparse.Namespace, strategy: str, out: Path, *more: str) -> Callable[[], object]:
    settings = [
        f"stream.tasks=[{','.join(options.tasks)}]",
        f"train.iterations={options.iterations}",
        *options.settings,
    ]
    chosen = [word for setting in settings for word in ("--set", setting)]
    words = ["run", "mtil", "--strategy", strategy, "--name", strategy, "--out", str(out), *chosen, *more]
    return lambda: mulki.main(words)


def compare(options: argparse.Namespace, folder: Path) -> int:
    """Print how far each strategy's run on the ranks is from that of one process; returns how many are too far."""
    wrong = 0
    print(f"{'strategy':18}{'weights':>12}{'key biases':>12}{'images':>8}{'seconds':>16}", flush=True)
    for strategy in options.strategies or STRATEGIES:
        seconds, runs = [], []
        for ranks in (1, options.ranks):
            out = folder / f"{ranks}"
            shutil.rmtree(out / "mtil" / strategy, ignore_errors=True)
            (folder / f"said-{ranks}").mkdir(parents=True, exist_ok=True)
            began = time.monotonic()
            statuses = run_on_ranks(command(options, strategy, out), ranks, folder / f"said-{ranks}")
            seconds.append(time.monotonic() - began)
            if any(statuses):
                sys.exit((folder / f"said-{ranks}" / "stderr-0").read_text())
            runs.append(out / "mtil" / strategy / "seed-0")
        far, keys = distance(*runs)
        images = different_answers(*runs)
        wrong += far > TOLERANCE or images > 1
        print(f"{strategy:18}{far:12.1e}{keys:12.1e}{images:8d}{seconds[0]:8.0f}{seconds[1]:8.0f}", flush=True)
    return wrong


def distance(run: Path, other: Path) -> tuple[float, float]:
    """‖θ − θ'‖/‖θ‖ over the weights of the last checkpoint but the biases of keys, and ‖b − b'‖/‖θ‖ of these."""
    a, b = (load_file(last_checkpoint(each) / "weights.safetensors") for each in (run, other))
    squares, keys, size = 0.0, 0.0, sum(float(each.double().square().sum()) for each in a.values())
    for name in a:
        moved = (a[name].double() - b[name].double()).square()
        if name.endswith(("in_proj_bias", "qkv.bias")):
            third = len(moved) // 3
            keys += float(moved[third : 2 * third].sum())
            moved[third : 2 * third] = 0
        squares += float(moved.sum())
    return (squares / size) ** 0.5, (keys / size) ** 0.5


def last_checkpoint(run: Path) -> Path:
    return max(each for each in (run / "checkpoints").iterdir() if not each.name.startswith((".", "start")))


def different_answers(run: Path, other: Path) -> int:
    """The largest difference in the number of images that one evaluation of one task has right."""
    a, b = (json.loads((each / "result.json").read_text()) for each in (run, other))
    sizes = {json.dumps(each["tasks"]) for each in (a, b)}
    assert len(sizes) == 1
    step = 100 / TEST_IMAGES
    rows = (np.array([each["zero_shot"], *each["matrix"]]) for each in (a, b))
    first, second = rows
    return round(float(np.abs(first - second).max()) / step)


TEST_IMAGES = 320
"""Of each task of mtil-mini."""


def kill(options: argparse.Namespace, folder: Path) -> int:
    """Kill a rank at random moments, resume, and compare the bits; returns how many runs differ."""
    wrong = 0
    for strategy in options.strategies or ["mulki"]:
        more = ("--set", f"train.checkpoint.every={max(1, options.iterations // 4)}")
        (folder / "said").mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder / "whole" / "mtil" / strategy, ignore_errors=True)
        began = time.monotonic()
        run_on_ranks(command(options, strategy, folder / "whole", *more), options.ranks, folder / "said")
        whole, duration = folder / "whole" / "mtil" / strategy / "seed-0", time.monotonic() - began
        draw = random.Random(options.seed)
        for number in range(options.times):
            shutil.rmtree(folder / "killed", ignore_errors=True)
            run = folder / "killed" / "mtil" / strategy / "seed-0"
            moment, rank = draw.uniform(0.05, 0.95) * duration, draw.randrange(options.ranks)
            ended = killed_at(
                command(options, strategy, folder / "killed", *more), options.ranks, folder / "said", moment, rank
            )
            statuses = run_on_ranks(
                command(options, strategy, folder / "killed", *more, "--resume"), options.ranks, folder / "said"
            )
            same = not any(statuses) and same_bits(whole, run)
            wrong += not same
            print(
                f"{strategy} {number + 1}: rank {rank} killed after {moment:.1f} of {duration:.1f} s, the others ended "
                f"{ended:.1f} s later; resumed: {'the same bits' if same else f'DIFFERENT {statuses}'}",
                flush=True,
            )
    return wrong


def killed_at(start: Callable[[], object], ranks: int, said: Path, moment: float, rank: int) -> float:
    """Kill a rank at a moment; returns the seconds until all others have ended."""
    with forked_ranks(start, ranks, said) as forks:
        time.sleep(moment)
        os.kill(forks.processes[rank], signal.SIGKILL)
        began = time.monotonic()
        forks.wait()
        return time.monotonic() - began


def same_bits(run: Path, other: Path) -> bool:
    a, b = (load_file(last_checkpoint(each) / "weights.safetensors") for each in (run, other))
    matrices = [json.loads((each / "result.json").read_text())["matrix"] for each in (run, other)]
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a) and matrices[0] == matrices[1]


if __name__ == "__main__":
    main()
