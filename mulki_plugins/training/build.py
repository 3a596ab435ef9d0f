"""Builds a validated recipe into objects: the stream, the model, the stack of plugins, the device."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from attrs import evolve, frozen
from avalanche.benchmarks.scenarios import CLScenario
from avalanche.core import BasePlugin
from torch.nn.modules.batchnorm import _BatchNorm

from mulki_plugins.cores import usable_cores
from mulki_plugins.errors import MulkiError, describe_error, did_you_mean
from mulki_plugins.models.adapter import Adapter
from mulki_plugins.models.classifier import ClipClassifier
from mulki_plugins.models.head import Head
from mulki_plugins.models.load import load_clip
from mulki_plugins.models.text import check_sentences, reader_of
from mulki_plugins.ranks.session import place
from mulki_plugins.recipe.schema import Choice, Evaluate, Recipe
from mulki_plugins.recipe.settings import needs_reference
from mulki_plugins.registry.callbacks import methods_of, wrong_callbacks
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.registry.guard import guarded_call
from mulki_plugins.streams.benchmark import Reference, as_benchmark, as_reference
from mulki_plugins.streams.cache import IN_MEMORY, PixelCache
from mulki_plugins.streams.check import check_stream
from mulki_plugins.streams.task import TaskStream, hold_out, with_template
from mulki_plugins.training.explain import blame_part
from mulki_plugins.training.groups import Grouping
from mulki_plugins.training.rng import seed_everything

MOST_WORKERS = 32
"""Workers that `auto` chooses at most: each takes memory, and one GPU trains on what fewer deliver."""


@frozen(kw_only=True, eq=False)
class Built:
    """The objects that a recipe declares."""

    stream: TaskStream
    reference: TaskStream | None
    """The stream of the reference data, if a plugin needs them."""
    benchmark: CLScenario
    model: ClipClassifier
    notices: list[str]
    """What the user should know about the weights and the sentences."""
    plugins: list[Any]
    device: torch.device
    cache: PixelCache | None
    """Where test images are kept once they are prepared."""
    workers: int
    """Processes that read images."""

    @property
    def tested(self) -> list[Any]:
        """The experiences that are evaluated after each task: every task's test set, then those of held-out tasks."""
        return [*self.benchmark.test_stream, *self.benchmark.held_out_stream]


Thin = Callable[[TaskStream, ClipClassifier, int], TaskStream]
"""(stream, model on its device, size of its images) -> the stream with fewer images."""


def build_seeded(recipe: Recipe, seed: int) -> Built:
    """Build a recipe after seeding. MulkiError that names the part whose code failed."""
    seed_everything(seed)
    try:
        return build(recipe)
    except MulkiError:
        raise
    except BaseException as error:
        if (blame := blame_part(error, recipe)) is None:
            raise
        raise MulkiError(blame) from error


def build(recipe: Recipe, *, stream: TaskStream | None = None, thin: Thin | None = None) -> Built:
    """Make everything that a recipe declares. MulkiError if data or weights are missing, or a part cannot be made.

    stream: in place of the recipe's own. thin: leaves out images, for a measurement.
    """
    device = choose_device(recipe.device)
    stream = as_evaluated(stream or make_stream(recipe.stream), recipe.evaluate)
    _check_tasks(recipe, stream)
    options = dict(recipe.model.options)
    train, entries = options.pop("train", "all"), options.pop("adapters", [])
    heads = options.pop("head", {})
    loaded = load_clip(recipe.model.name, **options)
    adapters = [_make("adapter", name, chosen) for entry in entries for name, chosen in entry.items()]
    head = next((_make("head", name, chosen) for name, chosen in heads.items()), None)
    every = (*stream.tasks, *stream.held_out)
    model = ClipClassifier(loaded.clip, loaded.tokenizer, every, train=train, adapters=adapters, head=head)
    _check_head(recipe, model, device)
    model.weights_metadata = loaded.trained_with(recipe.model.name).metadata()
    across = recipe.evaluate.classes != "task"
    notices = [*loaded.notices, *check_sentences(every, reader_of(loaded.tokenizer), across=across)]
    reference, reference_stream = None, _reference_stream(recipe)
    if reference_stream is not None:
        reference = as_reference(reference_stream, loaded.transform(train=False), unreadable=recipe.train.unreadable)
    _check_batch_norm(recipe, model)
    plugins = [_make("plugin", e.name, e.options, **_extras(e.name, reference)) for e in recipe.strategy.plugins]
    _check_groups(recipe, model)
    if thin is not None:
        stream = thin(stream, model.to(device), loaded.image_size)
    transforms = loaded.transform(train=True), loaded.transform(train=False)
    cache = _make_cache(recipe.evaluate.cache)
    benchmark = as_benchmark(stream, *transforms, unreadable=recipe.train.unreadable, cache=cache)
    return Built(
        stream=stream,
        reference=reference_stream,
        benchmark=benchmark,
        model=model.to(device),
        notices=notices,
        plugins=plugins,
        device=device,
        cache=cache,
        workers=choose_workers(recipe.train.workers, stream, loaded.image_size),
    )


def _check_head(recipe: Recipe, model: ClipClassifier, device: torch.device) -> None:
    """MulkiError for a head that does not go with the device."""
    if device.type == "mps" and model.head.learns_from_images():
        name = next(iter(recipe.model.options["head"]))
        raise MulkiError(
            f"$.device: the head {name} needs sums in double precision, which mps does not have", "use --set device=cpu"
        )


def _check_groups(recipe: Recipe, model: ClipClassifier) -> None:
    """MulkiError if a group of weights is empty. What other packages' parts add is known only when a task begins."""
    parts = [catalog().find("plugin", entry.name) for entry in recipe.strategy.plugins]
    parts += [catalog().find("adapter", name) for entry in recipe.model.options.get("adapters", []) for name in entry]
    if recipe.train.groups and all(part.is_ours for part in parts):
        weights = dict(model.named_parameters())
        learning = {name for name, p in weights.items() if p.requires_grad}
        Grouping(recipe.train.groups, model).check(weights, learning)


def _check_batch_norm(recipe: Recipe, model: ClipClassifier) -> None:
    """MulkiError if several ranks would each normalise by the statistics of their own share of the batch."""
    if place() is None or recipe.strategy.base == "none":
        return
    learning = [part for part in model.clip.children() if any(p.requires_grad for p in part.parameters())]
    if any(isinstance(module, _BatchNorm) for part in learning for module in part.modules()):
        raise MulkiError(
            f"the model {recipe.model.name} normalises over the batch (BatchNorm), and each rank has only its share of it",
            "use a model without BatchNorm, such as a ViT, freeze its tower (model.train=text), or use one process",
        )


def as_evaluated(stream: TaskStream, evaluate: Evaluate) -> TaskStream:
    """The stream with the held-out tasks and the template that a recipe's `evaluate` names. MulkiError if it cannot be."""
    if evaluate.held_out:
        stream = hold_out(stream, evaluate.held_out)
    return stream if evaluate.template is None else with_template(stream, evaluate.template)


def _make_cache(choice: str) -> PixelCache | None:
    """The cache of `evaluate.cache`; a limit of 0 turns it off without a word."""
    if choice == "off":
        return None
    cache = PixelCache(None if choice == "auto" else Path(choice).expanduser())
    return cache if cache.limit else None


def choose_workers(setting: int | Literal["auto"], stream: TaskStream, image_size: int) -> int:
    """Processes that read images: for `auto` one for each core that the process may use but one, at most MOST_WORKERS.

    0 if all images are in memory and small: they are prepared faster than another process hands them over.
    """
    if setting != "auto":
        return setting
    parts = [part for task in stream.tasks for part in (task.train, task.test)]
    parts += [task.test for task in stream.held_out]
    if not any(hasattr(part, "path") for part in parts) and sum(map(len, parts)) * 3 * image_size**2 <= IN_MEMORY:
        return 0
    return min(usable_cores() - 1, MOST_WORKERS)


def make_stream(choice: Choice, *, reference: bool = False) -> TaskStream:
    """A stream that was checked, with notes on why its numbers are not comparable. Mistakes if they would be wrong."""
    stream: TaskStream = _make("stream", choice.name, choice.options)
    origin = f"the stream {choice.name!r} of {catalog().find('stream', choice.name).provenance}"
    warnings = check_stream(stream, origin, reference=reference)
    return evolve(stream, incomparable=(*stream.incomparable, *warnings)) if warnings else stream


def _reference_stream(recipe: Recipe) -> TaskStream | None:
    """The stream of the recipe's reference data, if a plugin needs it."""
    if recipe.reference is None or not needs_reference(recipe):
        return None
    return make_stream(recipe.reference, reference=True)


def _extras(plugin: str, reference: Reference | None) -> dict[str, Any]:
    """The arguments of a plugin besides its options."""
    return {"reference": reference} if catalog().find("plugin", plugin).needs_reference else {}


def choose_device(name: str) -> torch.device:
    """The device of that name; `auto` is a CUDA GPU if the machine has one, else the CPU. MulkiError if it is missing."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (rank := place()) is not None:
        return torch.device("cuda", rank.local_rank)
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available[device.type]:
        raise MulkiError(f"$.device: {name} is not on this machine", "use --set device=auto")
    return device


def _make(kind: Any, name: str, options: dict[str, Any], **given: Any) -> Any:
    """Call a registered part with a copy of its options. MulkiError if it raises, or returns an object of another kind."""
    part = catalog().find(kind, name)
    factory = part.load()
    options = copy.deepcopy(options) | given
    what = f"the {kind} {name!r} of {part.provenance} cannot be made"
    if part.is_ours:  # the traceback shows best what is wrong with our own
        try:
            made = factory(**options)
        except (TypeError, ValueError, AssertionError) as error:  # Avalanche asserts
            raise MulkiError(f"{what}: {describe_error(error)}") from error
    else:
        made = guarded_call(what, factory, **options)
    if not isinstance(made, _CLASSES[kind]):
        what = f"returned a {type(made).__name__}, expected a {_CLASSES[kind].__name__}"
        raise MulkiError(f"the {kind} {name!r} of {part.provenance} cannot be used: {what}")
    if kind == "plugin" and (wrong := [*wrong_callbacks(methods_of(type(made)))]):
        raise MulkiError(f"the plugin {name!r} of {part.provenance} cannot be used: {wrong[0]}")
    return made


_CLASSES: dict[str, type] = {"stream": TaskStream, "plugin": BasePlugin, "adapter": Adapter, "head": Head}


def _check_tasks(recipe: Recipe, stream: TaskStream) -> None:
    """Check what only the stream itself can answer."""
    names = [task.name for task in stream.tasks]
    for name in recipe.train.per_task:
        if name not in names:
            part = catalog().find("stream", stream.name) if ("stream", stream.name) in catalog().parts else None
            if part is None or name not in part.tasks:
                raise MulkiError(f"$.train.per_task.{name}: the stream has no such task ({did_you_mean(name, names)})")
