"""What a checkpoint costs beside the training: seconds, bytes and memory, on ViT-B-16 by default.

    python tools/bench_checkpoints.py                        random weights; no data and no download
    python tools/bench_checkpoints.py --model mulki-tiny --batch-size 32

A task is trained for a few steps, of which every second one is followed by a checkpoint. The steps in between are the
measure: what is printed is the time of a checkpoint over that of `every` steps, and the memory that the process needed more
than before its first checkpoint, over the bytes of the weights that learn.
"""

from __future__ import annotations

import resource
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import click


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


@click.command(help=(__doc__ or "").splitlines()[0])
@click.option("--model", default="ViT-B-16", show_default=True)
@click.option("--strategy", default="mulki", show_default=True)
@click.option("--batch-size", default=64, show_default=True)
@click.option("--steps", default=6, show_default=True)
@click.option("--every", default=200, show_default=True, help="Steps between two checkpoints in the run that is meant.")
@click.option("--threads", default=0, help="0: as torch chooses.")
def main(model: str, strategy: str, batch_size: int, steps: int, every: int, threads: int) -> None:
    """Measure, and print a table."""
    import torch

    from mulki_plugins.recipe.resolve import Changes, resolve
    from mulki_plugins.training import state
    from mulki_plugins.training.run import run_experiment

    if threads:
        torch.set_num_threads(threads)
    at_step: list[float] = []
    written: list[tuple[float, float, float, int]] = []
    within = state.Checkpointing._save_step

    def timed(self: Any, step: int) -> Any:
        before, began = peak_mib(), time.perf_counter()
        checkpoint = within(self, step)
        size = sum(file.stat().st_size for file in checkpoint.path.iterdir())
        written.append((time.perf_counter() - began, before, peak_mib(), size))
        learning = [p for p in self.strategy.model.parameters() if p.requires_grad]
        weights.append(sum(p.nbytes for p in learning))
        return checkpoint

    def stepped(self: Any) -> None:
        at_step.append(time.perf_counter())
        after_step(self)
        at_step.append(time.perf_counter())

    weights: list[int] = []
    after_step = state.Checkpointing.after_step
    state.Checkpointing._save_step, state.Checkpointing.after_step = timed, stepped  # type: ignore[method-assign,assignment]
    settings = (
        "stream.tasks=[digits]", f"model={{name: {model}, pretrained: random}}",
        f"train.iterations={steps + 1}", f"train.batch_size={batch_size}",
        "train.schedule.warmup=1", "train.checkpoint={every: 2, keep: 2}", "evaluate.batch_size=64",
    )  # fmt: skip
    out = Path(tempfile.mkdtemp())
    try:
        root = Path(__file__).parent.parent
        recipe = resolve(str(root / "recipes" / "mtil.yaml"), Changes(strategy=strategy, settings=settings))
        run_experiment(recipe, 0, out)
    finally:
        shutil.rmtree(out, ignore_errors=True)
    # from the end of what follows one step to the end of the next step itself
    pure = statistics.median(at_step[i + 1] - at_step[i] for i in range(1, len(at_step) - 1, 2))
    cost = statistics.median(seconds for seconds, *_ in written)
    more = max(after - before for _, before, after, _ in written)
    click.echo(f"model {model}, strategy {strategy}, batches of {batch_size}, {torch.get_num_threads()} threads")
    click.echo(f"a step                       {pure:10.2f} s")
    click.echo(f"a checkpoint                 {cost:10.2f} s, {written[-1][3] / 2**20:.0f} MiB")
    click.echo(f"one every {every:>4} steps costs   {100 * cost / (every * pure):10.2f} % of the time")
    click.echo(
        f"memory at the peak           {more:10.0f} MiB more ({more * 2**20 / weights[0]:.2f} of the weights that learn)"
    )


if __name__ == "__main__":
    main()
