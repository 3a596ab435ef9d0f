"""The stream that a trained model is tested on, and the texts of a run that did not keep them. Imports Avalanche."""

from __future__ import annotations

from attrs import evolve

from mulki_plugins.deploy.source import RECIPE, Source
from mulki_plugins.errors import Mistakes, MulkiError
from mulki_plugins.recipe.resolve import Changes, resolve
from mulki_plugins.report.classes import TaskTexts
from mulki_plugins.streams.task import Task, TaskStream
from mulki_plugins.training.build import as_evaluated, make_stream


def build_stream(source: Source, other: str | None = None) -> TaskStream:
    """The stream of the run without its held-out tasks, or another one, as `--stream` names it.

    MulkiError if its data are not on this machine.
    """
    if other is not None:
        setting = f"--set stream={other}: "
        try:
            return make_stream(resolve("mtil", Changes(settings=(f"stream={other}",))).recipe.stream)
        except Mistakes as mistakes:  # of an option that this command does not have
            raise Mistakes([line.replace(setting, "--stream: ") for line in mistakes.lines()]) from None
    if source.recipe is None:
        what = f"{source.folder}: {RECIPE} is missing, so the test images of the run are not known"
        raise MulkiError(what, "name images with --data or --stream")
    return as_evaluated(make_stream(source.recipe.stream), source.recipe.evaluate)


def texts_of(task: Task) -> TaskTexts:
    """The texts of a stream's task."""
    return TaskTexts(
        name=task.name,
        class_names=tuple(task.class_names),
        templates=tuple(task.templates),
        licence=str(getattr(task, "licence", "")),
    )


def with_texts(source: Source) -> Source:
    """The source with the texts of its tasks; of a run that did not keep them, those of its stream as it is now."""
    if source.tasks:
        return source
    tasks = tuple(map(texts_of, build_stream(source).tasks))
    if source.result is not None and [task.name for task in tasks] != source.result.tasks:
        raise MulkiError(f"{source.folder}: the stream's tasks are no longer those of the run")
    return evolve(source, tasks=tasks)


def changed_tasks(source: Source, stream: TaskStream) -> list[str]:
    """The names of a stream's tasks whose class names or templates are not those that the run kept."""
    kept = {(task.name, task.class_names, task.templates) for task in source.tasks}
    texts = map(texts_of, stream.tasks)
    return [task.name for task in texts if (task.name, task.class_names, task.templates) not in kept]
