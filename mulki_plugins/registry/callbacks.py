"""Avalanche's callbacks, and what is wrong with those of a plugin.

Avalanche calls the methods in `CALLBACKS`, and no others, with `strategy` and further keyword arguments.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable, Iterator
from typing import Any

from attrs import frozen

from mulki_plugins.errors import MulkiError, did_you_mean
from mulki_plugins.registry.catalog import Part
from mulki_plugins.registry.static import Definition, Function, find_class, find_definition, walk_bases

CALLBACKS = frozenset(
    f"{when}_{event}"
    for when in ("before", "after")
    for event in (
        "training", "train_dataset_adaptation", "training_exp", "training_epoch", "training_iteration", "forward",
        "backward", "update", "eval", "eval_dataset_adaptation", "eval_exp", "eval_iteration", "eval_forward",
    )
)  # fmt: skip
"""The callbacks of SupervisedPlugin in avalanche-lib 0.6."""

UNFIT: dict[str, tuple[tuple[str, ...], str]] = {
    "der": (
        ("DERPlugin",),
        "Avalanche's DER stores logits of a fixed width; a CLIP has as many logits as the task has classes",
    ),
    "lfl": (("LFLPlugin",), "Avalanche's LFL calls the model's `get_features`, which a CLIP does not have"),
    "feature_distillation": (
        ("FeatureDistillationPlugin",),
        "Avalanche's feature distillation expects the model in Avalanche's own feature wrapper",
    ),
    "gem": (
        ("GEMPlugin",),
        "Avalanche's GEM needs a solver of quadratic programs, which is not installed; use avalanche.agem",
    ),
    "lr_scheduler": (
        ("LRSchedulerPlugin",),
        "Avalanche's scheduler plugin restarts a warm-up wrongly from the second task on; use train.schedule",
    ),
    "early_stopping": (
        ("EarlyStoppingPlugin",),
        "Avalanche's early stopping looks up a metric by a name that does not exist",
    ),
    "cwr_star": (
        ("CWRStarPlugin",),
        "Avalanche's CWR* consolidates the weights of a last linear layer; a CLIP classifies by its texts",
    ),
    "bic": (
        ("BiCPlugin",),
        "Avalanche's BiC corrects a bias per output index, and an index means another class in every task",
    ),
    "cope": (
        ("CoPEPlugin",),
        "Avalanche's CoPE keeps prototypes by class number, and a number means another class in every task",
    ),
    "gss_greedy": (
        ("GSS_greedyPlugin",),
        "Avalanche's GSS calls the model without task labels, so a CLIP answers for every task",
    ),
    "generative_replay": (
        ("GenerativeReplayPlugin", "TrainGeneratorAfterExpPlugin"),
        "Avalanche's generative replay needs a generator of images beside the model, which a recipe cannot declare",
    ),
    "from_scratch_training": (
        ("FromScratchTrainingPlugin",),
        "Avalanche's training from scratch resets the weights before each task, so nothing is learned continually",
    ),
    "ncm": (
        ("CurrentDataNCMUpdate", "MemoryNCMUpdate", "NCMOracle"),
        "Avalanche's NCM updates need a model with an `eval_classifier`, which a CLIP does not have",
    ),
    "fecam": (
        ("CurrentDataFeCAMUpdate", "MemoryFeCAMUpdate", "FeCAMOracle"),
        "Avalanche's FeCAM updates need a model with an `eval_classifier`, which a CLIP does not have",
    ),
}  # fmt: skip
"""Avalanche's plugins that do not work with a task-aware CLIP: by name, their classes and the reason."""

_AVALANCHE = "avalanche"
_OTHER = {"staticmethod", "classmethod", "property", "cached_property", "functools.cached_property"}
"""Decorators of attributes that are no methods."""


@frozen(kw_only=True)
class Method:
    """A method named like a callback. positional: the number of arguments that can be passed by position, with `self`."""

    name: str
    place: str
    positional: int
    open_positional: bool
    open_keywords: bool
    required: tuple[str, ...]
    """Further arguments without a default, which Avalanche does not pass."""
    coroutine: bool


def callback_mistakes(part: Part) -> list[str]:
    """A line for each callback of a plugin that Avalanche would ignore or could not call, and for an unfit base class.

    The class is read without importing it. For a function, the classes that it returns by name are checked.
    """
    if not isinstance(part.target, str):
        return list(wrong_callbacks(methods_of(part.target))) if inspect.isclass(part.target) else []
    module, _, attribute = part.target.partition(":")
    try:
        definition = find_definition(module, attribute)
    except MulkiError:
        return []  # reported with the signature
    mistakes: list[str] = []
    for each in [definition] if isinstance(definition.node, ast.ClassDef) else _returned_classes(definition):
        classes = list(walk_bases(each))
        mistakes += wrong_callbacks(_read_methods(classes))
        bases = {c.node.name for c in classes if _is_avalanche(c.module)}
        mistakes += [reason for names, reason in UNFIT.values() if bases & set(names)][:1]
    return mistakes


def wrong_callbacks(methods: Iterable[Method]) -> Iterator[str]:
    """A line for each method that Avalanche would not call, or not as its author expects."""
    for method in methods:
        where = f"{method.place}: " if method.place else ""
        expected = f"`def {method.name}(self, strategy, **kwargs)`"
        if method.name not in CALLBACKS:
            hint = did_you_mean(method.name, CALLBACKS)
            hint = hint if hint.startswith("did") else "rename it, or begin its name with an underscore"
            yield f"{where}{method.name!r} is no callback of Avalanche, which would never call it ({hint})"
        elif method.coroutine:
            yield f"{where}{method.name!r} is a coroutine, which Avalanche never awaits; write `def`, not `async def`"
        elif not method.open_keywords:
            yield f"{where}{method.name!r} takes no **kwargs, which Avalanche passes; write {expected}"
        elif (method.positional < 2 and not method.open_positional) or method.required:
            yield f"{where}{method.name!r} is called with the strategy and nothing else; write {expected}"


def methods_of(cls: type) -> list[Method]:
    """The methods of an imported class that are named like callbacks, except Avalanche's own."""
    methods = []
    for name in sorted({name for base in cls.__mro__ for name in vars(base) if _looks_like_callback(name)}):
        home = next(base for base in cls.__mro__ if name in vars(base))
        function = vars(home)[name]
        if not _is_avalanche(home.__module__) and inspect.isfunction(function):
            methods.append(_inspect_method(name, function))
    return methods


def _inspect_method(name: str, function: Any) -> Method:
    parameters = list(inspect.signature(function).parameters.values())
    by_position = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    keyword_only = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    code = inspect.unwrap(function).__code__
    return Method(
        name=name,
        place=f"{code.co_filename}:{code.co_firstlineno}",
        positional=len(by_position),
        open_positional=any(p.kind is p.VAR_POSITIONAL for p in parameters),
        open_keywords=any(p.kind is p.VAR_KEYWORD for p in parameters),
        required=tuple(p.name for p in (*by_position[2:], *keyword_only) if p.default is p.empty),
        coroutine=inspect.iscoroutinefunction(function),
    )


def _read_methods(classes: list[Definition]) -> Iterator[Method]:
    """The same, read from the syntax trees of a class and its bases."""
    seen = set()
    for each in classes:
        for node in () if _is_avalanche(each.module) else reversed(each.node.body):  # the last of a name counts
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and _looks_like_callback(node.name):
                decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
                if node.name not in seen and not decorators & _OTHER:
                    yield _read_method(node, each.place(node))
                seen.add(node.name)


def _read_method(node: Function, place: str) -> Method:
    arguments = node.args
    by_position = [*arguments.posonlyargs, *arguments.args]
    without_default = by_position[: len(by_position) - len(arguments.defaults)][2:]
    without_default += [
        a for a, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if not default
    ]
    return Method(
        name=node.name,
        place=place,
        positional=len(by_position),
        open_positional=arguments.vararg is not None,
        open_keywords=arguments.kwarg is not None,
        required=tuple(argument.arg for argument in without_default),
        coroutine=isinstance(node, ast.AsyncFunctionDef),
    )


def _returned_classes(function: Definition) -> list[Definition]:
    returned = [node.value for node in ast.walk(function.node) if isinstance(node, ast.Return)]
    calls = [value.func for value in returned if isinstance(value, ast.Call)]
    classes = (find_class(call, function.module) for call in calls if isinstance(call, (ast.Name, ast.Attribute)))
    return [each for each in classes if each is not None]


def _looks_like_callback(name: str) -> bool:
    return name.startswith(("before_", "after_"))


def _is_avalanche(module: str) -> bool:
    return module.partition(".")[0] == _AVALANCHE
