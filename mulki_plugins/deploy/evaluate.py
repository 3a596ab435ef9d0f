"""What is evaluated: the stream of the run, another stream, or a folder of the user's; against which classes."""

from __future__ import annotations

import os
import shlex
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from attrs import field, frozen

from mulki_plugins.deploy.candidates import Candidates, choose_candidates, tasks_in, unite
from mulki_plugins.deploy.features import TextFeatures, compute_features, text_features
from mulki_plugins.deploy.model import DeployedClip
from mulki_plugins.deploy.source import Source
from mulki_plugins.deploy.streams import texts_of
from mulki_plugins.errors import MulkiError, did_you_mean, format_value
from mulki_plugins.models.text import union_of
from mulki_plugins.report.classes import TaskTexts
from mulki_plugins.streams.entries import describe_others
from mulki_plugins.streams.folders.classes import (
    class_folders,
    holds_images,
    images_below,
    others_below,
    readable_names,
    without_count,
)
from mulki_plugins.streams.folders.tasks import quote_names
from mulki_plugins.streams.images import FileImages, open_picture
from mulki_plugins.streams.names import class_key
from mulki_plugins.streams.selection import select_images
from mulki_plugins.streams.task import LabelledImages, Task, TaskStream


@frozen(eq=False)
class Question:
    """Labelled images, and the candidates among which each is classified."""

    task: str
    images: LabelledImages
    candidates: Candidates
    answers: list[list[int]]
    """For each label the candidates that are right."""


@frozen(eq=False)
class Plan:
    """Everything to evaluate, and the class names of the images that the model was not taught."""

    questions: list[Question]
    unknown: list[str] = field(factory=list)
    """What could not be matched, a line each."""
    ignored: list[str] = field(factory=list)
    """What lies in the class folders and is not evaluated, a line each."""


def plan_stream(source: Source, model: DeployedClip, stream: TaskStream, scope: str) -> Plan:
    """The test images of a stream's tasks.

    task: among the classes of the image's own task. seen, all: among those of the run's tasks; a task that the run has not
    learned (seen) or does not know (all) is classified among its own, as in a run.
    """
    plan = Plan([])
    features = text_features(source, model, range(len(source.tasks)))
    several = None if scope == "task" else choose_candidates(source, model, scope)
    for task in stream.tasks:
        texts = texts_of(task)
        index = _index_of(source, texts)
        if several is not None and index in several.places:
            answers = [[place] for place in several.places[index]]
            plan.questions.append(Question(task.name, task.test, several, answers))
        elif several is None or index is not None:
            if index is None:
                own = _unite_unknown(texts, compute_features(model, texts))
            else:
                own = unite(source, {index: features[index]})
            [places] = own.places.values()
            plan.questions.append(Question(task.name, task.test, own, [[place] for place in places]))
        else:
            _match_task(plan, several, task)
    return plan


def _index_of(source: Source, texts: TaskTexts) -> int | None:
    """The run's task with these class names and templates; of several the one of the same name."""
    alike = [
        i
        for i, task in enumerate(source.tasks)
        if (task.class_names, task.templates) == (texts.class_names, texts.templates)
    ]
    return max(alike, key=lambda i: (source.tasks[i].name == texts.name, -i), default=None)


def _unite_unknown(task: TaskTexts, features: TextFeatures) -> Candidates:
    """The classes of a task that the run does not know as candidates."""
    [places] = union_of([features.keys]).places
    return Candidates(
        task.class_names, (task.name,) * len(places), features.text, {-1: places}, (task,), tuple(range(len(places)))
    )


def _match_task(plan: Plan, candidates: Candidates, task: Task) -> None:
    """Add a task that the run does not know: its classes are matched by their names, and images of others left out."""
    answers = [candidates.named(name) for name in task.class_names]
    missing = [name for name, places in zip(task.class_names, answers, strict=True) if not places]
    plan.unknown.extend(_unknown(f"{task.name}: {name}", name, candidates) for name in missing)
    labels = np.asarray(task.test.targets, dtype=np.int64)
    keep = np.flatnonzero([bool(answers[label]) for label in labels])
    if len(keep):
        plan.questions.append(Question(task.name, select_images(task.test, keep, labels[keep]), candidates, answers))


def plan_folder(source: Source, model: DeployedClip, root: str, scope: str) -> Plan:
    """The images in the class folders of a folder, matched with the run's classes by name. MulkiError if none matches.

    scope: seen or all, the name of a task, or `task`: then each image among the classes of the task that its class is of.
    """
    folders = list_class_folders(root)
    indices = tasks_in(source, "all" if scope == "task" else scope)
    if indices is None:
        raise MulkiError(f"--classes: {format_value(scope)}: expected task, seen, all or tasks of the run")
    features = text_features(source, model, range(len(source.tasks)))
    whole = unite(source, {i: features[i] for i in indices})
    matched: dict[str, dict[str, list[int]]] = defaultdict(dict)
    plan = Plan([])
    readable = dict(zip(folders, readable_names(folders), strict=True))
    for folder, name in readable.items():
        places = _places(whole, folder, name)
        tasks = list(dict.fromkeys(str(whole.tasks[place]) for place in places))
        if not places:
            plan.unknown.append(_unknown(folder, name, whole))
        elif scope == "task" and len(tasks) > 1:
            hint = f"name one: --classes {tasks[0]}, or use --classes seen"
            raise MulkiError(f"{folder}: a class of the tasks {', '.join(tasks)}", hint)
        else:
            matched[tasks[0]][folder] = places
    if not matched:
        hint = _deeper(root, folders, whole) or plan.unknown[0]
        raise MulkiError(f"{root}: none of its {len(folders)} folders has the name of a class", hint)
    for task, places_of in matched.items():
        candidates, answers = whole, list(places_of.values())
        if scope == "task":
            index = next(i for i, each in enumerate(source.tasks) if each.name == task)
            candidates = unite(source, {index: features[index]})
            answers = [_places(candidates, folder, readable[folder]) for folder in places_of]
        plan.ignored.extend(_ignored(root, list(places_of)))
        if images := _images_of(root, list(places_of)):
            plan.questions.append(Question(task, images, candidates, answers))
    if not plan.questions:
        raise MulkiError(f"{root}: no image in its class folders")
    return plan


def _places(candidates: Candidates, folder: str, name: str) -> list[int]:
    """The candidates that a class folder is named as. name: how it reads among the folders beside it."""
    return candidates.named(folder) or candidates.named(name) or candidates.named(without_count(folder))


def _ignored(root: str, folders: Sequence[str]) -> Iterator[str]:
    below = {folder: os.path.join(os.path.expanduser(root), folder) for folder in folders}
    if others := [f"{folder}/{file}" for folder, path in below.items() for file in sorted(others_below(path))]:
        yield f"{root}: ignored, since Pillow cannot read them: {describe_others(others)}"
    if empty := [folder for folder, path in below.items() if not any(images_below(path, broken_links=True))]:
        yield f"{root}: no image in the class folders {quote_names(empty)}"


def list_class_folders(root: str) -> list[str]:
    """The class folders in a folder. MulkiError if there are none."""
    root = os.path.expanduser(root)
    if not os.path.isdir(root):
        raise MulkiError(f"--data {root}: no such folder", "relative paths start in the current folder")
    folders = class_folders(root)
    if not folders:
        what = "images lie in it, but no folder" if holds_images(root) else "there is no folder in it"
        raise MulkiError(f"--data {root}: {what}", "it needs a folder of images for each class, named as the class")
    return folders


def _deeper(root: str, folders: Sequence[str], candidates: Candidates) -> str:
    """What to type if the class folders lie one level deeper; empty if they do not."""
    for folder in folders:
        below = os.path.join(root, folder)
        names = class_folders(os.path.expanduser(below))
        if any(candidates.named(name) for name in (*names, *readable_names(names))):
            return f"the class folders lie deeper; type --data {shlex.quote(below)}"
    return ""


def _images_of(root: str, folders: Sequence[str]) -> FileImages | None:
    """The images in class folders, broken links among them; a file's label is the index of its folder."""
    pairs = list(_labelled(os.path.expanduser(root), folders))
    if not pairs:
        return None
    return FileImages.of(
        os.path.expanduser(root), [file for file, _ in pairs], [label for _, label in pairs], open_picture
    )


def _labelled(root: str, folders: Sequence[str]) -> Iterator[tuple[str, int]]:
    for label, folder in enumerate(folders):
        for file in sorted(images_below(os.path.join(root, folder), broken_links=True)):
            yield f"{folder}/{file}", label


def _unknown(what: str, name: str, candidates: Candidates) -> str:
    hint = did_you_mean(class_key(name), candidates.names)
    return f"{what}: no class has this name" + (f" ({hint})" if hint.startswith("did") else "")
