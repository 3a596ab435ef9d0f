"""`python tools/bench.py step`: a step of the strategy mulki beside the same step written by hand in plain PyTorch."""

from __future__ import annotations

import copy
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from mulki_plugins.losses import (
    class_sums,
    feature_distillation,
    members_of,
    prototype_alignment,
    relation_distillation,
    relation_logits,
    smoothed_cross_entropy,
    teacher_scores,
    teacher_weights,
)
from mulki_plugins.models.load import load_clip

TASKS = ("digits", "scans")
GOAL = 1.05


@click.command()
@click.option("--steps", default=30, show_default=True, help="Steps of each kind, after a warm-up.")
@click.option("--warmup", default=3, show_default=True)
def step(steps: int, warmup: int) -> None:
    """Compare a step of the strategy mulki on the second task with a loop by hand, which has the same losses and optimizer.

    The two alternate in one process, step by step, so that whatever else runs here slows both. Prints the ratio of medians.
    """
    by_run, by_hand = alternate(steps + warmup)
    run, hand = (statistics.median(each[warmup:]) for each in (by_run, by_hand))
    ratios = [a / b for a, b in zip(by_run[warmup:], by_hand[warmup:], strict=True)]
    click.echo(f"mulki run      {1000 * run:8.1f} ms a step (median of {steps}), {torch.get_num_threads()} threads")
    click.echo(f"by hand        {1000 * hand:8.1f} ms a step")
    click.echo(
        f"ratio          {run / hand:8.3f} (goal: at most {GOAL}; median of the pairs {statistics.median(ratios):.3f})"
    )


def alternate(count: int) -> tuple[list[float], list[float]]:
    """Seconds of steps of the second task: the run's own, and those by hand that follow each of them."""
    from mulki_plugins.recipe.resolve import Changes, resolve
    from mulki_plugins.report.progress import ProgressLogger
    from mulki_plugins.training.build import build_seeded
    from mulki_plugins.training.run import Run

    settings = (
        f"stream.tasks=[{', '.join(TASKS)}]",
        f"train.iterations={count}",
        "train.checkpoint.every=null",
        "evaluate.predictions=false",
    )
    settings += (f"train.per_task={{{TASKS[0]}: {{iterations: 2}}}}",)
    recipe = resolve("mtil", Changes(strategy="mulki", settings=settings)).recipe
    built = build_seeded(recipe, 0)
    by_run: list[float] = []
    by_hand: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        run = Run(recipe, built, Path(folder), 0, ProgressLogger(0, verbosity=-1))
        run.set_up({})
        run.evaluate = lambda *_: [0.0] * len(TASKS)  # type: ignore[method-assign]  # only steps are compared
        run.checkpointing.started()
        run.train_task(0, built.benchmark.train_stream[0])
        hand = by_hand_steps(built, recipe)
        after_step, ended = run.strategy.after_step, [0.0]

        def step_ends() -> None:
            after_step()
            now = time.perf_counter()
            if ended[0]:
                by_run.append(now - ended[0])
                next(hand)
                by_hand.append(time.perf_counter() - now)
            ended[0] = time.perf_counter()

        run.strategy.after_step = step_ends
        run.train_task(1, built.benchmark.train_stream[1])
        run.close()
    return by_run, by_hand


def by_hand_steps(built: Any, recipe: Any) -> Iterator[None]:
    """The second task as one would write it without a framework. Each `next` is one step."""
    torch.manual_seed(0)
    options = {name: each for entry in recipe.strategy.plugins for name, each in ((entry.name, entry.options),)}
    classifier = copy.deepcopy(built.model)
    student: Any = classifier.clip.train()
    initial, previous = (copy.deepcopy(student).eval().requires_grad_(False) for _ in range(2))
    tokens = [
        classifier.tokenizer([each.templates[0].replace("{}", name) for name in each.class_names])
        for each in built.stream.tasks
    ]
    s = student.logit_scale.detach().exp()
    task, transform = built.stream.tasks[1], load_clip(recipe.model.name).transform(train=True)
    batches = endless(task.train, transform, recipe.train.batch_size)
    width = student.encode_text(tokens[0][:1]).shape[1]

    with torch.no_grad():
        texts = {teacher: [unit(teacher.encode_text(each)) for each in tokens] for teacher in (initial, previous)}
    classes = [len(each) for each in tokens]
    visual = [unit(torch.randn(n, width)) for n in classes]  # the numbers take no time
    followed = visual[1].clone()
    weights = {name: p for name, p in student.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(weights.values(), lr=recipe.train.optimizer.lr, weight_decay=0.0)
    mean: dict[str, Tensor] = {}
    momentum, adding = options["eliciting"]["momentum"], options["adding"]
    kappa, score = options["distinguishing"]["temperature"], options["distinguishing"]["score"]
    done = 0
    while True:
        optimizer.param_groups[0]["lr"] = recipe.train.optimizer.lr * (1 + math.cos(math.pi * done / 1000)) / 2
        x, y = next(batches)
        optimizer.zero_grad()
        z, t = unit(student.encode_image(x)), unit(student.encode_text(tokens[1]))
        loss = smoothed_cross_entropy(s * z @ t.T, y, recipe.train.label_smoothing)

        counts = members_of(y, classes[1]).sum(0)  # eliciting
        means = class_sums(z, y, classes[1]) / counts.clamp(min=1)[:, None]
        moved = F.normalize(momentum * followed + (1 - momentum) * means, dim=1).where((counts > 0)[:, None], followed)
        followed = moved.detach()
        loss = loss + options["eliciting"]["weight"] * prototype_alignment(moved, t, s)

        with torch.no_grad():  # adding and distinguishing
            seen = {teacher: unit(teacher.encode_image(x)) for teacher in (initial, previous)}
            logits = [s * image @ texts[teacher][1].T for teacher, image in seen.items()]
            w = teacher_weights([teacher_scores(each, y, score) for each in logits], kappa)
        for (teacher, image), share in zip(seen.items(), w, strict=True):
            own = texts[teacher][1]
            both = [
                {r: relation_logits(r, images, sentences, visual[1], own, s) for r in adding["relations"]}
                for images, sentences in ((z, t), (image, own))
            ]
            term = relation_distillation(both[0], both[1], adding["relations"], share, adding["temperature"])
            nearness = feature_distillation(z, image, share) + feature_distillation(t, own, share.mean())
            loss = loss + adding["weight"] * (term + adding["features"] * nearness)

        loss.backward()
        if not math.isfinite(loss.item()):
            raise ArithmeticError("the loss is not finite")
        optimizer.step()
        done += 1
        if done % options["connecting"]["every"] == 0:  # connecting: the mean of the weights
            n = done // options["connecting"]["every"]
            mean = {
                name: torch.lerp(mean[name], p.detach(), 1 / n) if mean else p.detach().clone()
                for name, p in weights.items()
            }
        yield


def unit(features: Tensor) -> Tensor:
    return F.normalize(features, dim=-1)


def endless(images: Any, transform: Callable[[Any], Tensor], batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches, round after round."""

    class Prepared(torch.utils.data.Dataset[tuple[Tensor, int]]):
        def __len__(self) -> int:
            return len(images)

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            image, label = images[index]
            return transform(image), label

    loader = DataLoader(Prepared(), batch_size=batch_size, shuffle=True)
    while True:
        yield from loader
