"""docs/authors.md: what the author of a plugin writes with, from the code's own docstrings, and the order of callbacks."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

from mulki_plugins.adapters import Adapter
from mulki_plugins.models import ClipClassifier
from mulki_plugins.models.features import Features
from mulki_plugins.registry.callbacks import CALLBACKS
from mulki_plugins.stages.stage import Part, Stage, by_task, classifier_of, features_of, tasks_of
from mulki_plugins.stages.teachers import Teacher, Teachers, View
from mulki_plugins.streams.benchmark import Reference
from mulki_plugins.types import OPTION_TYPES, describe

HEAD = """# What an author writes with

Generated from the code by `python tools/reference.py`; do not edit. [Write a plugin](write-a-plugin.md) is the tutorial, the
[reference](reference.md) lists hooks, parts and commands, and [plugins](plugins.md#kinds-of-methods) says which kind of method
needs which of these.
"""
Row = tuple[str, str, str, str, str]
TASK: list[Row] = [
    ("before_training", "`train` is called, once per task; a run resumed after a task calls it once more, with the pre-trained "
     "weights",
     "of before", "the last task's", "earlier"),
    ("before_train_dataset_adaptation", "adapters have grown (`before_task`)", "of before", "the last task's", "earlier"),
    ("after_train_dataset_adaptation", "`strategy.adapted_dataset` is the task's training set", "of before", "the last task's",
     "earlier"),
    ("before_training_exp", "the task begins; a data loader set here is used. The last place to add weights: they join the "
     "optimizer", "of before", "new", "earlier"),
    ("before_training_epoch", "once if the recipe counts iterations", "of before", "complete", "earlier"),
    ("before_training_iteration", "the batch is on the device, the learning rate is set", "0", "complete", "earlier"),
    ("before_forward", "a new list in `strategy.mbatch` replaces the batch", "0", "complete", "earlier"),
    ("after_forward", "`mb_output` are the logits [B, C]. Stages add their terms; the criterion is still to come",
     "terms so far", "complete", "this batch"),
    ("before_backward", "the cross-entropy has joined", "all terms", "complete", "this batch"),
    ("after_backward", "`p.grad` are true gradients, unscaled and clipped", "all terms", "complete", "this batch"),
    ("before_update", "the last moment to change gradients; a NaN or an infinity ends the run", "all terms", "complete",
     "this batch"),
    ("after_update", "the weights have moved", "all terms", "stepped", "this batch"),
    ("after_training_iteration", "values go to the loggers, then a checkpoint is written if one is due", "all terms", "stepped",
     "this batch"),
    ("after_training_epoch", "", "all terms", "stepped", "this batch"),
    ("after_training_exp", "the task ends: merge weights, gather statistics; then adapters get `after_task`",
     "all terms", "stepped", "this batch"),
    ("after_training", "then the checkpoint of the task's end is written, and every task is evaluated", "all terms", "stepped",
     "this batch"),
]  # fmt: skip
"""Callbacks of a training in their order: the moment, and what `strategy.loss`, the optimizer and `model.features` are then."""
EVALUATION = [
    ("before_eval", "an evaluation begins; the first one comes before any training"),
    ("before_eval_dataset_adaptation", ""),
    ("after_eval_dataset_adaptation", ""),
    ("before_eval_exp", "a task's test set begins: `strategy.experience.task_label`"),
    ("before_eval_iteration", "a batch of test images is on the device"),
    ("before_eval_forward", ""),
    ("after_eval_forward", "`mb_output` are the logits over the classes of the scope; no gradients"),
    ("after_eval_iteration", "`strategy.loss` is the cross-entropy"),
    ("after_eval_exp", ""),
    ("after_eval", ""),
]
"""Callbacks of an evaluation. A plugin reads there and changes nothing."""


def authors() -> str:
    """The page."""
    sections = {
        "The order of callbacks": _callbacks(), "Features of a batch": _classes(Features, Part),
        "A stage": _classes(Stage), "Teachers": _classes(Teachers, Teacher, View), "The model": _classes(ClipClassifier),
        "Adapters": _classes(Adapter), "Reference data": _classes(Reference), "Functions of a strategy": _functions(),
        "Targets and scopes": _scopes(), "Metrics and loggers": _metrics(), "Types of options": _types(),
    }  # fmt: skip
    texts = [HEAD, *(text for title, section in sections.items() for text in (f"## {title}", *section))]
    return "\n\n".join(text.strip() for text in texts) + "\n"


def undocumented() -> list[str]:
    """A line for each public method or field on this page without a docstring, and each callback that is left out."""
    listed = {row[0] for row in TASK} | {row[0] for row in EVALUATION}
    missing = [f"docs/authors.md: the callback {name} is not listed" for name in sorted(CALLBACKS - listed)]
    for cls in (Features, Part, Stage, Teachers, Teacher, View, ClipClassifier, Adapter, Reference):
        for name, method in _methods(cls):
            missing += [f"{cls.__name__}.{name} has no docstring"] * (not _doc_of(cls, name, method))
    return missing


def _callbacks() -> Iterator[str]:
    yield (
        "Avalanche calls these with the strategy, plugin after plugin in the order of the stack. The columns say what "
        "`strategy.loss`, `strategy.optimizer` and `strategy.model.features` are at that moment. "
        "With `train.accumulate: n`, those from `before_forward` to `before_backward` happen n times a step."
    )
    yield _table(["callback", "moment", "loss", "optimizer", "features"], [[f"`{r[0]}`", *r[1:]] for r in TASK])
    yield "In an evaluation there are no features, and the optimizer is not used:"
    yield _table(["callback", "moment"], [[f"`{name}`", moment] for name, moment in EVALUATION])
    yield (
        "Weights may be added to the model by an adapter (`apply`, `before_task`), or by a plugin in `before_training` and "
        "`before_training_exp`. A plugin may also hold weights itself, as attributes that are `nn.Parameter`s: they learn, and "
        "its `state_dict` must return them. Only what is in the model is part of the final weights."
    )


def _classes(*classes: type) -> Iterator[str]:
    for cls in classes:
        yield f"### `{cls.__name__}`\n\n`{cls.__module__}.{cls.__name__}`\n\n{_text(cls)}"
        rows = [[f"`{name}`", text] for name, text in _attribute_docs(cls).items() if not name.startswith("_")]
        for name, method in _methods(cls):
            rows.append([f"`{name}{_signature(method)}`", _doc_of(cls, name, method)])
        if rows:
            yield _table(["", ""], rows)


def _methods(cls: type) -> Iterator[tuple[str, Any]]:
    """The public methods and properties that a class itself defines and that are no callbacks of Avalanche or torch."""
    for name, value in vars(cls).items():
        function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        wrapped = inspect.isfunction(function) or isinstance(value, property)
        if not wrapped or name.startswith("_") or name in CALLBACKS or name in ("train", "adaptation", "forward"):
            continue
        yield name, value


def _signature(method: Any) -> str:
    if isinstance(method, property):
        return ""
    parameters = inspect.signature(getattr(method, "__func__", method)).parameters.values()
    named = [p for p in parameters if p.name != "self"]
    return f"({', '.join(re.sub(r': .*?(?= = |$)', '', str(p)).replace(' = ', '=') for p in named)})"


def _doc_of(cls: type, name: str, method: Any) -> str:
    """A docstring on one line; a callback of an interface takes that of its base."""
    doc = inspect.getdoc(method.fget if isinstance(method, property) else getattr(cls, name)) or ""
    return " ".join(doc.split())


def _functions() -> Iterator[str]:
    yield "From `mulki_plugins.stages.stage`:"
    rows = [[f"`{f.__name__}{_signature(f)}`", " ".join((f.__doc__ or "").split())] for f in _FUNCTIONS]
    yield _table(["function", ""], rows)


_FUNCTIONS = (features_of, classifier_of, by_task, tasks_of)


def _scopes() -> Iterator[str]:
    yield (
        "`strategy.mb_y` are classes of the sample's own task, counted from 0; `strategy.mb_task_id` are the tasks. In training, "
        "logits are over the classes of each sample's task, and places beyond them hold a large negative value. In an evaluation "
        "`evaluate.classes` decides: `task` is the sample's own task, `seen` all classes of the tasks learned so far, `all` "
        "those of the whole stream. Classes of two tasks whose sentences are the same are one class."
    )


def _metrics() -> Iterator[str]:
    yield (
        "A metric is handed a copy of the accuracy matrix [T, T] in percent: row i after task i, column j on task j. It returns "
        "one finite number; if it cannot, it is left out and the run goes on. A logger is an Avalanche `BaseLogger` that is made "
        "from the run's folder. It gets `log_single_metric(name, value, x_plot)`, with tags such as `train/loss/<term>`, "
        "`train/lr`, `train/lr/<group>`, `eval/accuracy/<task>` and `metrics/transfer`; values are numbers or figures. x_plot "
        "is the number of training iterations so far for `train/...`, and that of learned tasks for `eval/accuracy/...`. It may "
        "have `state_dict` and `load_state_dict`, of data that JSON can hold, and `close`."
    )


def _types() -> Iterator[str]:
    yield (
        "A plugin's keyword arguments are its options. Their annotations are checked before anything is imported: `bool`, `int`, "
        "`float`, `str`, `Literal[...]`, `X | None`, `list[X]`, `tuple[X, Y]`, `dict[str, X]`, and these from "
        "`mulki_plugins.types`. `@checked` on `__init__` checks them in Python as well."
    )
    yield _table(["type", "admits"], [[f"`{name}`", describe(kind)] for name, kind in OPTION_TYPES.items()])


def _attribute_docs(cls: type) -> dict[str, str]:
    """The docstrings below a class's fields."""
    docs = re.findall(r'^    (\w+): [^\n]*\n    """(.*?)"""', inspect.getsource(cls), re.S | re.M)
    return {name: " ".join(text.split()) for name, text in docs}


def _text(thing: Any) -> str:
    return inspect.cleandoc(thing.__doc__ or "")


def _table(head: list[str], rows: list[list[str]]) -> str:
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *cells))
