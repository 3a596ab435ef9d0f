"""What a run of the published protocol costs on 1, 4, 8 and 4 × 8 GPUs, and what limits it. The formulas of docs/scale.md.

    python tools/scale.py table                   the tables of docs/scale.md
    python tools/scale.py table --bench out.json  from `mulki bench mtil-vitb16 --json` on your GPU instead of ours
    python tools/scale.py check                   each formula against a measurement on this machine, with two processes

Nothing here was measured on more than one GPU. What is assumed stands in `Machine`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import click
from attrs import evolve, frozen

TASKS, STEPS, BATCH = 11, 1000, 64
"""The protocol: tasks, steps of each, images of a step over all GPUs."""
TEST_IMAGES, TRAIN_IMAGES, CLASSES = 97_209, 319_352, 109
"""The protocol: test images, training images, classes of a task in the mean (1,201 / 11)."""
PIXELS = 224 * 224 * 3


@frozen(kw_only=True)
class Tower:
    """A transformer: its layers, its width, and the tokens of an image or a sentence."""

    layers: int
    width: int
    tokens: int

    @property
    def flops(self) -> float:
        """Operations of one forward pass: 24 T w² for the products with weights, 4 T² w for attention, in each layer."""
        t, w = self.tokens, self.width
        return self.layers * (24.0 * t * w**2 + 4.0 * t**2 * w)


@frozen(kw_only=True)
class Model:
    """A CLIP: its towers, and how many weights it has. Sentences are cut to the longest one, about 16 tokens."""

    name: str
    image: Tower
    text: Tower
    weights: float


VIT_B_16 = Model(
    name="ViT-B/16", image=Tower(layers=12, width=768, tokens=197), text=Tower(layers=12, width=512, tokens=16),
    weights=149.6e6,
)  # fmt: skip
VIT_L_14 = Model(
    name="ViT-L/14", image=Tower(layers=24, width=1024, tokens=257), text=Tower(layers=12, width=768, tokens=16),
    weights=427.6e6,
)  # fmt: skip
MODELS = (VIT_B_16, VIT_L_14)


@frozen(kw_only=True)
class Machine:
    """Nodes of GPUs, and what they reach. Times in seconds, bandwidths in bytes per second."""

    gpus: int = 8
    nodes: int = 1
    cores: int = 16
    """CPU cores of each GPU."""
    link: float = 350e9
    """Between the GPUs of a node, of an all-reduce. Assumed: NVLink of an H100 at about four fifths of its 450 GB/s."""
    network: float = 320e9
    """Of a node. Assumed: one port of 400 Gb/s for each GPU, at four fifths."""
    memory: float = 2.7e12
    """Of a GPU. Assumed: four fifths of an H100's 3.35 TB/s."""
    latency: float = 20e-6
    """Of one message. Assumed."""
    loading: float = 90.0
    """Images that a core decodes, resizes and crops each second. Measured: 1,355/s with 15 workers, 957/s with 8."""
    encoding: float = 10_061.0
    """Images that a GPU encodes each second with a ViT-B/16 in bf16. Measured on one H100."""
    cached: float = 5e9
    """Reading decoded test images from a node's page cache. Assumed."""
    disk: float = 1e9
    """Writing to the shared file system. Assumed."""
    step: float = 41.4e-3
    """What the GPU is busy with in a step of ViT-B/16, batch 64, bf16. Measured on one H100: compiled, with CUDA graphs."""
    host: float = 52.5e-3
    """What the host needs to start a step's kernels. Measured: the step without CUDA graphs, which the host limits."""
    graphs: bool = False
    """Whether CUDA graphs take this limit away. `train.compile` records them of the image towers, not of the text tower."""

    @property
    def ranks(self) -> int:
        return self.gpus * self.nodes


def step_flops(model: Model, images: float, classes: float = CLASSES) -> tuple[float, float]:
    """Operations of a step of the method on `images` images: those that grow with the images, and those that do not.

    The student's forward and backward pass (three forwards) over images and the task's classes, and both teachers' forward
    pass over images. Each rank encodes all texts.
    """
    return images * (3 + 2) * model.image.flops, classes * 3 * model.text.flops


def optimizer_seconds(model: Model, machine: Machine) -> float:
    """AdamW reads four numbers for each weight and writes three, on every rank."""
    return 7 * 4 * model.weights / machine.memory


def compute_seconds(model: Model, images: float, machine: Machine) -> float:
    """A step on one GPU, without waiting: operations at the speed at which the measured step ran, then the optimizer."""
    speed = sum(step_flops(VIT_B_16, BATCH)) / (machine.step - optimizer_seconds(VIT_B_16, machine))
    return sum(step_flops(model, images)) / speed + optimizer_seconds(model, machine)


def host_seconds(model: Model, machine: Machine) -> float:
    """What the host needs to start a step, in proportion to the layers; nothing with CUDA graphs."""
    layers = (m.image.layers + m.text.layers for m in (model, VIT_B_16))
    own, measured = layers
    return 0.0 if machine.graphs else machine.host * own / measured


def all_reduce_seconds(size: float, ranks: int, bandwidth: float, latency: float) -> float:
    """A ring: each rank sends 2 (n − 1) messages of size / n bytes."""
    return 2 * (ranks - 1) * (size / ranks / bandwidth + latency)


def gradient_seconds(model: Model, machine: Machine) -> float:
    """The sum of all gradients in single precision: within each node, then between the nodes, each GPU a share."""
    size = 4 * model.weights
    within = all_reduce_seconds(size, machine.gpus, machine.link, machine.latency)
    between = all_reduce_seconds(size, machine.nodes, machine.network, machine.latency)
    return within + between


def statistics_seconds(model: Model, machine: Machine, rounds: int = 12) -> float:
    """The small sums and gathers of a step (class sums, counts, features of a batch): in a tree, 2 log₂ n messages each.

    Their bytes, 2 d numbers an image, count once over the links.
    """
    messages = 2 * math.ceil(math.log2(machine.ranks)) if machine.ranks > 1 else 0
    size = 4 * 2 * model.text.width * BATCH if machine.ranks > 1 else 0
    return rounds * messages * machine.latency + size / machine.link


def loading_rate(machine: Machine) -> float:
    """Images that the whole machine loads each second, with all cores but one of each GPU."""
    return machine.loading * max(1, machine.cores - 1) * machine.ranks


def step_parts(model: Model, machine: Machine) -> dict[str, float]:
    """What takes how long in a step on this machine. Reductions follow the backward pass; loading goes on beside both."""
    return {
        "compute": compute_seconds(model, BATCH / machine.ranks, machine),
        "gradients": gradient_seconds(model, machine),
        "statistics": statistics_seconds(model, machine),
        "host": host_seconds(model, machine),
        "loading": BATCH / loading_rate(machine),
    }


def step_seconds(model: Model, machine: Machine) -> float:
    """A step: compute and reductions one after another; or the host, or the loader, if one of these takes longer."""
    parts = step_parts(model, machine)
    return max(parts["compute"] + parts["gradients"] + parts["statistics"], parts["host"], parts["loading"])


def limit(model: Model, machine: Machine) -> str:
    """What a step waits for."""
    parts = step_parts(model, machine)
    sums = parts["gradients"] + parts["statistics"]
    candidates = {"compute": parts["compute"] + sums, "host": parts["host"], "loading": parts["loading"]}
    slowest = max(candidates, key=lambda name: candidates[name])
    return "reductions" if slowest == "compute" and sums > parts["compute"] else slowest


def encoding_rate(model: Model, machine: Machine) -> float:
    """Images that one GPU encodes each second, by the operations of the tower."""
    return machine.encoding * VIT_B_16.image.flops / model.image.flops


def shard(images: int, ranks: int) -> int:
    """The most images that a rank evaluates if each image is evaluated once."""
    return math.ceil(images / ranks)


def evaluation_seconds(model: Model, machine: Machine, *, cached: bool) -> float:
    """One evaluation of all test images, each on one rank; decoded ones are read from the cache."""
    encoding = shard(TEST_IMAGES, machine.ranks) / encoding_rate(model, machine)
    reading = TEST_IMAGES * PIXELS / (machine.cached * machine.nodes) if cached else TEST_IMAGES / loading_rate(machine)
    return max(encoding, reading)


def prototypes_seconds(model: Model, machine: Machine) -> float:
    """One pass over all training images of the protocol for both teachers' prototypes."""
    return max(2 * TRAIN_IMAGES / machine.ranks / encoding_rate(model, machine), TRAIN_IMAGES / loading_rate(machine))


def checkpoint_bytes(model: Model) -> float:
    """Weights, both moments of AdamW and the teacher before the task, in single precision."""
    return 4 * 4 * model.weights


def checkpoint_wait(model: Model, machine: Machine, seconds: float) -> float:
    """What a run waits for a checkpoint that a thread writes while training goes on for these seconds, on rank 0."""
    return max(0.0, checkpoint_bytes(model) / machine.disk - seconds)


def run_parts(model: Model, machine: Machine) -> dict[str, float]:
    """A whole run of the protocol with `mulki`, in seconds."""
    training = TASKS * STEPS * step_seconds(model, machine)
    later = evaluation_seconds(model, machine, cached=True)
    return {
        "training": training,
        "evaluation": evaluation_seconds(model, machine, cached=False) + TASKS * later,
        "prototypes": prototypes_seconds(model, machine),
        "checkpoints": TASKS * checkpoint_wait(model, machine, training / TASKS + later),
    }


def machines(base: Machine) -> dict[str, Machine]:
    """The machines of the tables."""
    nodes = evolve(base, nodes=4)
    return {
        "1": evolve(base, gpus=1),
        "4": evolve(base, gpus=4),
        "8": evolve(base, gpus=8),
        "4 × 8": nodes,
        "4 × 8, one port of 100 Gb/s a node": evolve(nodes, network=10e9),
    }


def table(base: Machine) -> str:
    """Markdown: for each model and machine a step, what limits it, the run, and its speed per GPU beside one GPU's."""
    rows = [
        "| GPUs | model | a step | waits for | training | evaluation | prototypes | run | GPU-hours | efficiency |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for model in MODELS:
        alone = sum(run_parts(model, evolve(base, gpus=1)).values())
        for name, machine in machines(base).items():
            parts = run_parts(model, machine)
            total = sum(parts.values())
            cells = [
                name, model.name, f"{1000 * step_seconds(model, machine):.1f} ms", limit(model, machine),
                *(f"{parts[part] / 60:.1f} min" for part in ("training", "evaluation", "prototypes")),
                f"{total / 60:.1f} min", f"{total / 3600 * machine.ranks:.2f}",
                f"{100 * alone / total / machine.ranks:.0f} %",
            ]  # fmt: skip
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def from_bench(path: Path) -> Machine:
    """A machine like ours, with the step and the encoding rate that `mulki bench mtil-vitb16 --json` measured."""
    measured = json.loads(path.read_text("utf-8"))
    step = measured["tasks"][-1]["step_seconds"]
    evaluation = measured["evaluations"][-1]
    return Machine(step=step, host=step, encoding=evaluation["images"] / evaluation["encoding_seconds"])


@click.group(help=(__doc__ or "").splitlines()[0])
def main() -> None:
    pass


@main.command("table")
@click.option("--bench", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="JSON of `mulki bench`.")
def print_table(bench: Path | None) -> None:
    """Print the plan without CUDA graphs and with them: two bounds, between which `train.compile` lies."""
    base = from_bench(bench) if bench else Machine()
    click.echo(f"Without CUDA graphs:\n\n{table(base)}\n\nWith CUDA graphs:\n\n{table(evolve(base, graphs=True))}")


@main.command()
def check() -> None:
    """Print each formula beside what this machine measures."""
    import scale_checks

    for line in scale_checks.lines():
        click.echo(line)


if __name__ == "__main__":
    main()
