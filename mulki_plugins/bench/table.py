"""What was measured, as text for people and as plain data for programs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mulki_plugins.bench.stopwatch import PARTS

if TYPE_CHECKING:  # these import torch, and `duration` is for commands without it
    from mulki_plugins.bench.measure import Learned, Measured
    from mulki_plugins.bench.predict import Prediction

_LABELS = {"student": "student forward"}
_CALLS = {
    "launches": "operators or kernels started",
    "waits": "waits for the device",
    "scalar_reads": "scalars read",
}


def as_text(measured: Measured, prediction: Prediction) -> str:
    """The table that `mulki bench` prints."""
    return "\n".join(
        [
            *_heading(measured),
            "",
            *_steps(measured),
            "",
            *_rest(measured, prediction),
            "",
            *prediction_lines(prediction),
        ]
    )


def prediction_lines(prediction: Prediction) -> list[str]:
    """The predicted time of one run and its parts."""
    lines = [f"one run of the whole recipe on this machine: about {duration(prediction.total)}"]
    parts = {
        "training": prediction.training,
        "evaluations": prediction.evaluation,
        "prototypes, teachers, first and last steps": prediction.preparation,
        "checkpoints": prediction.checkpoints,
        "start-up": prediction.startup,
    }
    lines += [
        f"  {name:44}{duration(seconds):>12}{_share(seconds, prediction.total)}" for name, seconds in parts.items()
    ]
    return lines


def as_plain(measured: Measured, prediction: Prediction) -> dict[str, Any]:
    """The same as plain data; times in seconds."""
    recipe = measured.recipe
    return {
        "recipe": recipe.name,
        "strategy": recipe.strategy.name,
        "device": measured.device,
        "threads": measured.threads,
        "precision": recipe.train.precision,
        "batch_size": recipe.train.batch_size,
        "measured_batch_size": measured.batch_size,
        "notices": measured.notices,
        "peak_flops_per_second": measured.peak_flops,
        "build_seconds": measured.build,
        "tasks": [_task(learned, measured) for learned in measured.tasks],
        "evaluations": [
            {
                "images": each.count, "seconds": each.seconds, "loading_seconds": each.loading,
                "encoding_seconds": each.encoding, "batch_size": measured.eval_batch_size,
            }
            for each in measured.evaluations
        ],
        "checkpoint": {
            "seconds": max((learned.checkpoint for learned in measured.tasks), default=0.0),
            "mib": measured.checkpoint_mib,
        },
        "prediction": {
            "seconds": prediction.total, "training": prediction.training, "evaluation": prediction.evaluation,
            "preparation": prediction.preparation, "checkpoints": prediction.checkpoints, "startup": prediction.startup,
        },
    }  # fmt: skip


def _task(learned: Learned, measured: Measured) -> dict[str, Any]:
    steps = learned.steps
    return {
        "name": learned.name,
        "step_seconds": steps.median,
        "step_seconds_mean": steps.mean,
        "parts_seconds": dict(steps.parts),
        "images_per_second": measured.recipe.train.batch_size / steps.median if steps.seconds else None,
        "timed_steps": len(steps.seconds),
        "flops": steps.flops or None,
        "utilisation": utilisation(learned, measured),
        "calls": steps.calls or None,
        "peak_memory_mib": learned.peak_memory_mib,
        "overhead_seconds": learned.overhead,
        "passes": [{"images": p.images, "read": p.read, "seconds": p.seconds} for p in learned.passes],
    }


def utilisation(learned: Learned, measured: Measured) -> float | None:
    """The operations of a step per second, as a share of what the largest matrix product reaches; None if not counted."""
    if not learned.steps.flops or not measured.peak_flops:
        return None
    return learned.steps.flops / learned.steps.median / measured.peak_flops


def duration(seconds: float) -> str:
    """`950 ms`, `12.3 s`, `4 min 05 s`, `1 h 45 min`."""
    if seconds < 0.9995:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 119.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole if whole else 0:>7.1f} %"


def _heading(measured: Measured) -> Iterator[str]:
    recipe = measured.recipe
    threads = f", {measured.threads} threads" if measured.threads > 1 else ", 1 thread"
    yield f"{recipe.name} / {recipe.strategy.name} on {measured.device}{threads}"
    yield (
        f"batches of {recipe.train.batch_size}, {recipe.train.precision}; the largest matrix product measured here reaches "
        f"{measured.peak_flops / 1e12:.3g} TFLOP/s"
    )
    if measured.batch_size < recipe.train.batch_size:
        compiled = ", without train.compile," if recipe.train.compile else ""
        yield (
            f"This machine is slow for this model. A step of {measured.batch_size} images was measured{compiled} and the time "
            f"of {recipe.train.batch_size} reckoned from it. The memory is that of {measured.batch_size}."
        )


def _steps(measured: Measured) -> Iterator[str]:
    """A column for each task."""
    tasks = measured.tasks
    if not tasks:
        yield "this strategy trains nothing"
        return

    def row(label: str, cells: list[str]) -> str:
        return f"{label:32}" + "".join(f"{cell:>20}" for cell in cells)

    yield row("", ["first task", "second task"] if len(tasks) == 2 else ["the task"])
    yield row("a step", [duration(t.steps.median) for t in tasks])
    for part in PARTS:
        yield row(f"  {_LABELS.get(part, part)}", [duration(t.steps.parts[part]) for t in tasks])
    size = measured.recipe.train.batch_size
    yield row("images per second", [f"{size / t.steps.median:.1f}" if t.steps.seconds else "-" for t in tasks])
    yield row("GFLOP in a step", [f"{t.steps.flops / 1e9:.1f}" if t.steps.flops else "-" for t in tasks])
    shares = [utilisation(t, measured) for t in tasks]
    yield row("utilisation", ["-" if share is None else f"{share:.0%}" for share in shares])
    for name, label in _CALLS.items():
        yield row(label, [str(t.steps.calls.get(name, "-")) for t in tasks])
    yield row("memory at the peak", [f"{t.peak_memory_mib:.0f} MiB" for t in tasks])
    yield row(
        "before the first step and after", [duration(t.overhead + sum(p.seconds for p in t.passes)) for t in tasks]
    )


def _rest(measured: Measured, prediction: Prediction) -> Iterator[str]:
    first_and_last = measured.evaluations[:1] + measured.evaluations[1:][-1:]
    for title, each in zip(("the first evaluation", "a later evaluation"), first_and_last, strict=False):
        loading, encoding = _rate(each.count, each.loading), _rate(each.count, each.encoding)
        rates = f"{_rate(each.count, each.seconds)}: loading {loading}, encoding {encoding}"
        yield f"{f'{title}, {each.count} images':44}{duration(each.seconds):>12}   {rates}"
    if measured.tasks and measured.checkpoint_mib:
        seconds = max(learned.checkpoint for learned in measured.tasks)
        yield f"{'the checkpoint after a task':44}{duration(seconds):>12}   {measured.checkpoint_mib:.1f} MiB"
    yield f"{'start-up':44}{duration(prediction.startup):>12}"


def _rate(images: int, seconds: float) -> str:
    return f"{images / seconds:.0f} images/s" if seconds > 0 else "-"
