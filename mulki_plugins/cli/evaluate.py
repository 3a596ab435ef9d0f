"""`mulki evaluate`: the accuracy of a trained model in another scope, on other images or another stream."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mulki_plugins.characters import legible
from mulki_plugins.cli.common import SOME_UNREADABLE, UserPath, echo_json, echo_note, report_errors
from mulki_plugins.errors import MulkiError

if TYPE_CHECKING:
    from collections.abc import Callable

    from mulki_plugins.deploy.score import Score
    from mulki_plugins.deploy.source import Source

_NAMED = 10


@click.command()
@click.argument("source", type=UserPath(path_type=Path), metavar="RUN")
@click.option(
    "--classes",
    metavar="WHICH",
    help="Choose among the classes of the image's own task (task), of the tasks learned (seen), of all tasks (all), or, with "
    "--data, of a task (its name). By default as in the run; seen with --data.",
)
@click.option("--data", metavar="DIR", help="Test on the images in DIR, in folders named as the classes.")
@click.option(
    "--stream", metavar="NAME", help="Test on another stream, such as mtil-mini or '{name: mtil, root: data}'."
)
@click.option("--batch-size", type=click.IntRange(min=1), help="Images at a time; by default as in the run.")
@click.option(
    "--workers",
    type=click.IntRange(min=0),
    help="Processes that read images; by default as in the run, 0 if it has auto.",
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, mps, or auto.")
@click.option("--skip-unreadable", is_flag=True, help="Leave images out that cannot be read, and name them.")
@click.option("--json", "as_json", is_flag=True, help="Print {tasks, mean, ...} as JSON.")
@report_errors
def evaluate(
    source: Path,
    classes: str | None,
    data: str | None,
    stream: str | None,
    batch_size: int | None,
    workers: int | None,
    device: str,
    skip_unreadable: bool,
    as_json: bool,
) -> None:
    """Measure the trained model of RUN on test images, without training.

    RUN is the folder of a run, a checkpoint in it, or a folder that `mulki export` wrote. The test images are those of the
    run's own stream, of another stream (--stream), or your own (--data). The table shows for each task the accuracy, its
    95 % confidence interval (Wilson's), and the number of images.
    """
    from mulki_plugins.deploy.source import find_source

    if data is not None and stream is not None:
        raise MulkiError("--data and --stream exclude each other")
    for option, text in (("--data", data), ("--stream", stream), ("--classes", classes)):
        if text is not None and not text.strip():
            raise MulkiError(f"{option}: the text is empty", "leave the option out, or name what it means")
    found = find_source(source)
    for notice in found.notices:
        echo_note(f"note: {notice}")
    own = found.recipe.evaluate.classes if found.recipe else "task"
    scope = classes or ("seen" if data else "task" if stream else own)
    if not data and scope not in ("task", "seen", "all"):
        raise MulkiError(f"--classes: expected task, seen or all, got {scope!r}", "the name of a task goes with --data")
    with contextlib.redirect_stdout(sys.stderr):  # output of other packages is no result
        scores, unknown = _evaluate(found, scope, data, stream, batch_size, workers, device, skip_unreadable)
    for line in unknown[:_NAMED]:
        echo_note(f"warning: left out: {line}")
    if len(unknown) > _NAMED:
        echo_note(f"warning: left out: {len(unknown) - _NAMED} more classes whose names the run does not know")
    _print(found, scope, scores, unknown, as_json)
    left_out = [name for each in scores for name in each.left_out]
    for name in left_out[:_NAMED]:
        echo_note(f"warning: left out: {name}: this image cannot be read")
    if len(left_out) > _NAMED:
        echo_note(f"warning: left out: {len(left_out) - _NAMED} more images that cannot be read")
    if left_out:
        raise SystemExit(SOME_UNREADABLE)


def _evaluate(
    source: Source, scope: str, data: str | None, stream: str | None, batch_size: int | None, workers: int | None,
    device: str, skip: bool,
) -> tuple[list[Score], list[str]]:  # fmt: skip
    """The scores, and a line for each class of the images that the run does not know."""
    from mulki_plugins.libraries import import_libraries

    import_libraries()
    from mulki_plugins.deploy.evaluate import plan_folder, plan_stream
    from mulki_plugins.deploy.model import choose_device, load_model
    from mulki_plugins.deploy.score import score
    from mulki_plugins.deploy.streams import build_stream, changed_tasks, with_texts

    source = with_texts(source)
    tested = None if data else build_stream(source, stream)
    for name in changed_tasks(source, tested) if tested is not None and not stream else ():
        echo_note(f"warning: {name}: its class names or templates are no longer those of the run")
    model = load_model(source, choose_device(device))
    plan = plan_folder(source, model, str(data), scope) if tested is None else plan_stream(source, model, tested, scope)
    for line in plan.ignored:
        echo_note(f"note: {line}")
    if not plan.questions:
        raise MulkiError("no class of these images has a name that the run knows", "use --classes task")
    settings = source.recipe.train if source.recipe else None
    if workers is None:
        workers = settings.workers if settings and settings.workers != "auto" else 0
    skip = skip or bool(data) or (settings is not None and settings.unreadable == "skip")
    scores = []
    with _progress(sum(len(question.images) for question in plan.questions)) as advance:
        for q in plan.questions:
            result = score(
                model, q.candidates, q.task, q.images, q.answers,
                batch_size=batch_size or source.batch_size, workers=workers, skip=skip, advance=advance,
            )  # fmt: skip
            if not result.images:
                raise MulkiError(f"{q.task}: none of its test images can be read")
            scores.append(result)
    return scores, plan.unknown


def _print(source: Source, scope: str, scores: list[Score], unknown: list[str], as_json: bool) -> None:
    from mulki_plugins.deploy.score import Score
    from mulki_plugins.report.tables import columns

    left_out = tuple(name for each in scores for name in each.left_out)
    total = Score("all images", sum(each.right for each in scores), sum(each.images for each in scores), left_out)
    mean = sum(each.accuracy for each in scores) / len(scores)
    if as_json:
        echo_json(
            {
                "model": str(source.folder), "classes": scope, "tasks": list(map(_as_data, scores)), "mean": mean,
                "all": _as_data(total), "unknown": unknown,
            }
        )  # fmt: skip
        return
    rows = [["task", "accuracy", "95 % interval", "images"]]
    rows += [_row(each) for each in ([*scores, total] if len(scores) > 1 else scores)]
    if len(scores) > 1:
        rows.append(["mean of the tasks", f"{mean:.1f}"])
    click.echo("\n".join(columns(rows, "<>")))


def _row(score: Score) -> list[str]:
    low, high = score.interval
    return [legible(score.task), f"{score.accuracy:.1f}", f"{low:.1f} to {high:.1f}", f"{score.images:,}"]


def _as_data(score: Score) -> dict[str, Any]:
    return {
        "task": score.task, "accuracy": score.accuracy, "interval": list(score.interval), "right": score.right,
        "images": score.images, "left_out": list(score.left_out),
    }  # fmt: skip


@contextlib.contextmanager
def _progress(count: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr if that is a terminal, else nothing."""
    if not sys.stderr.isatty():
        yield lambda images: None
        return
    with click.progressbar(length=count, label="images", file=sys.stderr, show_pos=True) as bar:
        yield bar.update
