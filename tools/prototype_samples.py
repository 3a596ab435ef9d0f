"""How near prototypes from a sample of images come to those of all images, on mtil-mini: the table in docs/method.md.

    python tools/prototype_samples.py

Prints for each size the cosine of each class's two prototypes, as the bundled model sees it: the mean over the classes of all
tasks, and the smallest; and the share of the images that were read. The sample has a fixed seed.
"""

from __future__ import annotations

import click
import torch

from mulki_plugins.models import ClipClassifier, load_clip
from mulki_plugins.stages.prototypes import visual_prototypes
from mulki_plugins.stages.statistics import sampled
from mulki_plugins.streams import as_benchmark
from mulki_plugins.streams.mini.stream import mtil_mini

SIZES = (1, 2, 5, 10, 20, 40)


@click.command(help=(__doc__ or "").splitlines()[0])
def main() -> None:
    loaded, stream = load_clip("mulki-tiny"), mtil_mini()
    benchmark = as_benchmark(stream, loaded.transform(train=True), loaded.transform(train=False))
    model = ClipClassifier(loaded.clip, loaded.tokenizer, stream.tasks).eval()
    cosines: dict[int, list[torch.Tensor]] = {size: [] for size in SIZES}
    read, images = dict.fromkeys(SIZES, 0), 0
    for task, experience in enumerate(benchmark.train_stream):
        whole = visual_prototypes([model], experience.dataset, {task})[0][task]
        images += len(experience.dataset)
        for size in SIZES:
            some = sampled(experience.dataset, size)
            read[size] += len(some)
            cosines[size].append((visual_prototypes([model], some, {task})[0][task] * whole).sum(1))
    print("| images per class | mean cosine | smallest | images read |\n| --- | --- | --- | --- |")
    for size in SIZES:
        each = torch.cat(cosines[size])
        print(f"| {size} | {each.mean():.3f} | {each.min():.3f} | {100 * read[size] / images:.0f} % |")


if __name__ == "__main__":
    main()
