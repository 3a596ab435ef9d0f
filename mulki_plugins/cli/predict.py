"""`mulki predict`: classify images with a trained model."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mulki_plugins.characters import legible
from mulki_plugins.cli.common import SOME_UNREADABLE, UserPath, echo_note, report_errors
from mulki_plugins.errors import MulkiError

if TYPE_CHECKING:
    from collections.abc import Callable

    from mulki_plugins.deploy.predict import Answer


@click.command()
@click.argument("source", type=UserPath(path_type=Path), metavar="RUN")
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.option(
    "--classes",
    default="seen",
    show_default=True,
    metavar="WHICH",
    help="Choose among the classes of the tasks learned (seen), of all tasks (all), of a task (its name), among any names "
    "(cat,dog,small bird), or among those in the lines of a file (@names.txt).",
)
@click.option(
    "--template",
    "templates",
    multiple=True,
    metavar="TEXT",
    help="Use this sentence, with {} in the class name's place, instead of the tasks' own; repeatable.",
)
@click.option("--top", type=click.IntRange(min=1), default=5, show_default=True, help="Likeliest classes to print.")
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True, help="Images at a time.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, mps, or auto.")
@click.option("--json", "as_json", is_flag=True, help="Print a line of JSON for each image.")
@report_errors
def predict(
    source: Path,
    images: tuple[str, ...],
    classes: str,
    templates: tuple[str, ...],
    top: int,
    batch_size: int,
    device: str,
    as_json: bool,
) -> None:
    """Classify images with the trained model of RUN.

    RUN is the folder of a run, a checkpoint in it, or a folder that `mulki export` wrote. IMAGE is a file, a folder with
    images at any depth, a pattern, or - for standard input: the bytes of one image, or paths, one a line.

    Answers go to stdout in the order of the images, progress to stderr. Images that cannot be read are named on stderr and
    passed over; the exit status is then 3.
    """
    from mulki_plugins.deploy.candidates import check_templates, check_texts, choose_candidates, tasks_in
    from mulki_plugins.deploy.inputs import find_images
    from mulki_plugins.deploy.source import find_source

    found = find_source(source)
    if not found.tasks:  # a run that did not keep its class names
        from mulki_plugins.deploy.streams import with_texts

        found = with_texts(found)
    check_templates(templates)
    tasks_in(found, classes)  # a mistake costs no import of torch
    inputs = find_images(images, lambda: sys.stdin.buffer.read() if sys.stdin else b"", echo_note)
    for notice in found.notices:
        echo_note(f"note: {notice}")
    from mulki_plugins.deploy.quick_import import architecture_of, import_open_clip

    import_open_clip(architecture_of(found))
    from mulki_plugins.deploy.model import choose_device, load_model
    from mulki_plugins.deploy.predict import classify

    model = load_model(found, choose_device(device))
    for warning in check_texts(found, model, classes, templates):
        echo_note(warning)
    candidates = choose_candidates(found, model, classes, templates)
    show: Callable[[Answer, int], None] = _print_json if as_json else _print_text
    unreadable = 0
    with _progress(len(inputs)) as advance:
        for answer in classify(model, candidates, inputs, batch_size=batch_size, top=top):
            if answer.problem:
                unreadable += 1
                echo_note(f"warning: passed over: {answer.name}: {answer.problem}")
            else:
                show(answer, top)
            advance()
    if unreadable == len(inputs):
        raise MulkiError("none of the images can be read")
    if unreadable:
        echo_note(f"warning: {unreadable} of {len(inputs)} images were passed over")
        raise SystemExit(SOME_UNREADABLE)


def _print_json(answer: Answer, top: int) -> None:
    """One line of ASCII, so that no name in it can steer a terminal or break an encoding."""
    predictions = [
        {"class": each.class_name, "task": each.task, "probability": each.probability} for each in answer.predictions
    ]
    click.echo(json.dumps({"path": answer.name, "predictions": predictions}))


def _print_text(answer: Answer, top: int) -> None:
    lines = [
        f"{100 * each.probability:5.1f} %  {legible(each.class_name)}"
        + (f"  ({legible(each.task)})" if each.task else "")
        for each in answer.predictions
    ]
    if top == 1:
        click.echo(f"{legible(answer.name, None)}  {lines[0]}")
    else:
        click.echo("\n".join([legible(answer.name, None), *(f"  {line}" for line in lines)]))


@contextmanager
def _progress(count: int) -> Iterator[Callable[[], None]]:
    """A bar on stderr if that is a terminal on which no answers appear, else nothing."""
    if count < 2 or not sys.stderr.isatty() or sys.stdout.isatty():
        yield lambda: None
        return
    with click.progressbar(length=count, label="images", file=sys.stderr, show_pos=True) as bar:
        yield lambda: bar.update(1)
