"""The model card of an export: README.md, with what the model has learned, how well, from what data, and how to use it."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from attrs import evolve

from mulki_plugins import __version__
from mulki_plugins.characters import legible
from mulki_plugins.deploy.model import MERGES
from mulki_plugins.deploy.source import Source, steps_into
from mulki_plugins.files import write_text
from mulki_plugins.models.check import TINY
from mulki_plugins.recipe.schema import Recipe
from mulki_plugins.report.result import Result
from mulki_plugins.report.tables import labelled_rows

FILE = "README.md"
NOT_DECLARED = "not declared"
_TINY_LICENCE = "MIT, see the model card of mulki-tiny"
_HEAD = """\
---
library_name: open_clip
pipeline_tag: zero-shot-image-classification
tags:
- clip
- continual-learning
---
"""
_USE = """\
## Use it
```python
import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:DIR")
tokenizer = open_clip.get_tokenizer("local-dir:DIR")
```

DIR is this folder. `python classify.py photo.jpg` classifies images among the classes that the model has learned; it needs
open_clip alone. `text_features.safetensors` holds the unit-norm features of all classes, averaged over the templates of their
task: `text.0` [classes, width] for the first task in `classes.json`.
"""
_MERGES = f"""
The tokenizer has a vocabulary of its own, `{MERGES}`, and open_clip needs its whole path. `open_clip_config.json` holds the path
of the folder that was exported. After a move, pass the new one:
`open_clip.get_tokenizer("local-dir:DIR", bpe_path="DIR/{MERGES}")`.
"""
_HEADED = """
The accuracies are those of the model with its head, which `classify.py` uses and open_clip does not know. `head.safetensors`
holds what the head has learned, `head.json` its options, and `head.py` answers with torch alone.
"""
_ONNX = """
`image.onnx` turns prepared images [N, 3, H, W] into unit-norm features, `text.onnx` token ids [N, length] likewise. The logits of
an image are the cosines with the text features times `exp(logit_scale)`, {scale:.6g}.
"""
_LIMITS = """\
## Intended use and limits
The model classifies images among class names. It is meant for the classes below, on images like those of its tasks, and for
comparing methods of continual learning.

- The accuracies below were measured on the test images of the tasks. On other images, such as yours, expect less: measure it
  with `mulki evaluate`.
- The model always picks one of the classes it is given. The probabilities add up to 1 even if an image shows none of them.
- Other class names work as with any CLIP, though what the model knew before its training may have faded.
- It has inherited the biases of its pre-training data and of the tasks' images. Do not use it to judge people, or where a wrong
  answer does harm, without a test of your own.
"""


def write_card(folder: Path, source: Source, to: str, *, onnx: float | None = None) -> None:
    """Write README.md. onnx: the factor of the cosines if the folder holds ONNX files.

    Names of classes and tasks cannot add markup to it.
    """
    write_text(folder / FILE, "\n".join(_lines(source, to, (folder / MERGES).is_file(), onnx)) + "\n")


def _lines(source: Source, to: str, merges: bool, onnx: float | None) -> Iterator[str]:
    assert source.result is not None
    assert source.recipe is not None
    result, recipe = _until_then(source, source.result), source.recipe
    yield f"{_HEAD}# {escape(result.recipe)} / {escape(result.strategy)} / seed {result.seed}"
    yield ""
    order = "together" if recipe.strategy.base == "joint" else "one after another"
    tasks = "one task" if len(source.learned) == 1 else f"{len(source.learned)} tasks, {order}"
    how = "It was not trained further" if recipe.strategy.base == "none" else f"It has learned {tasks}"
    pretrained = recipe.model.options.get("pretrained")
    weights = f", with the weights {escape(str(pretrained))}" if pretrained else ""
    yield f"A CLIP of the architecture {escape(recipe.model.name)}{weights}. {how}, with the strategy"
    yield f"{escape(result.strategy)} of [MulKI](https://arxiv.org/abs/2411.06764). It loads with open_clip, without MulKI."
    if not source.complete:
        yield ""
        what = "An intermediate checkpoint" if result.status == "complete" else "The run was not complete"
        begun = steps_into(result, source.learned, source.steps)
        more = f", and {escape(begun)}" if begun else ""
        yield f"**{what}**: this is the model after {len(source.learned)} of {len(result.tasks)} tasks{more}."
    yield ""
    headed = bool(recipe.model.options.get("head"))
    yield (
        _USE
        + (_MERGES if merges else "")
        + (_HEADED if headed else "")
        + ("" if onnx is None else _ONNX.format(scale=onnx))
    )
    yield _LIMITS
    yield "## What it has learned"
    yield f"Accuracy in percent on the test images of each task, among {_scope(recipe.evaluate.classes)}."
    yield ""
    yield from _task_table(source, result)
    yield ""
    yield "The accuracy matrix: a row for each moment, a column for each task's test images."
    yield ""
    yield from _matrix(result)
    if result.metrics:
        shown = [f"{escape(name)} {'-' if value is None else f'{value:.2f}'}" for name, value in result.metrics.items()]
        yield f"\n{', '.join(shown)}."
    for reason in result.incomparable:
        yield f"\nNot comparable with published numbers: {escape(reason)}."
    yield ""
    yield from _licences(source, recipe)
    yield "## How it was made"
    yield from _made(source, result, to, onnx is not None)


def _until_then(source: Source, result: Result) -> Result:
    """The result without the rows that the run measured after these weights."""
    if source.complete:
        return result
    return evolve(result, matrix=result.matrix[: len(source.learned)], metrics={})


def _measured(source: Source, result: Result) -> list[float]:
    """The accuracies of these weights; empty if the run was not that far, or went on from them before it measured them."""
    if source.complete:  # joint training has one row for all tasks
        return result.matrix[-1] if result.matrix else result.zero_shot
    rows = [result.zero_shot, *result.matrix]
    return rows[len(source.learned)] if not source.steps and len(rows) > len(source.learned) else []


def _scope(classes: str) -> str:
    return {
        "task": "the classes of the image's own task",
        "seen": "the classes of all tasks learned by then",
        "all": "the classes of all tasks",
    }[classes]


def _task_table(source: Source, result: Result) -> Iterator[str]:
    row = _measured(source, result)
    rows = [["task", "classes", "such as", "templates", "zero-shot", "just learned", "at the end"]]
    for i, task in enumerate(source.tasks):
        names = ", ".join(escape(name, 40) for name in task.class_names[:3])
        more = ", ..." if len(task.class_names) > 3 else ""
        just = result.matrix[i][i] if i < len(result.matrix) and i in source.learned else None
        rows.append(
            [
                escape(task.name) + ("" if i in source.learned else " (not learned)"), str(len(task.class_names)),
                names + more, str(len(task.templates)), _number(result.zero_shot[i] if result.zero_shot else None),
                _number(just), _number(row[i] if row else None),
            ]
        )  # fmt: skip
    yield from _table(rows)


def _matrix(result: Result) -> Iterator[str]:
    rows = [["after", *map(escape, result.tasks), "mean"]]
    for name, values in labelled_rows(result):
        rows.append([escape(name), *map(_number, values), _number(sum(values) / len(values))])
    yield from _table(rows)


def _number(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.1f}"


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    head, *body = rows
    yield f"| {' | '.join(head)} |"
    yield f"| {' | '.join('---' for _ in head)} |"
    for row in body:
        yield f"| {' | '.join(row)} |"


def _licences(source: Source, recipe: Recipe) -> Iterator[str]:
    yield "## Licences"
    yield "| part | licence |"
    yield "| --- | --- |"
    for task in source.tasks:
        yield f"| data of {escape(task.name)} | {escape(task.licence, 200) or NOT_DECLARED} |"
    yield f"| pre-trained weights | {_TINY_LICENCE if recipe.model.name == TINY else NOT_DECLARED} |"
    yield ""
    yield "Whether a model may be passed on can depend on the licences of its weights and of its training images."
    yield ""


def _made(source: Source, result: Result, to: str, onnx: bool) -> Iterator[str]:
    exported = source.folder if source.checkpoint is None else source.checkpoint
    yield "`recipe.yaml` is the recipe of the run, with all defaults written out:"
    yield ""
    yield "```"
    yield f"mulki run recipe.yaml --seed {result.seed}"
    yield f"mulki export {_command(str(exported))} --to {_command(to)}{' --onnx' if onnx else ''}"
    yield "```"
    yield ""
    yield from _table([["", "version"], ["mulki (export)", __version__], *map(list, sorted(result.versions.items()))])
    yield ""
    device = result.device.get("name") or result.device.get("type", "")
    yield f"The run began {escape(result.started)} on {escape(str(device))} and computed in {escape(source.precision)}."


def _command(path: str) -> str:
    return legible(shlex.quote(path), None).replace("`", "?")


_MARKUP = re.compile(r"[\\`*_{}\[\]()#!|~$^:@]|(?<=www)\.", re.IGNORECASE)


def escape(text: str, longest: int = 80) -> str:
    """A name as plain text in Markdown: nothing in it is markup, HTML, a link or a new line."""
    text = legible(text, longest).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKUP.sub(lambda match: f"\\{match[0]}", text).replace('"', "&quot;")
