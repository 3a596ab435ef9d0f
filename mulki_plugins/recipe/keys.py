"""Every key that a recipe may have, for answers to those that it may not: `train.lr` is called `train.optimizer.lr`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any, get_args, get_origin, get_type_hints

from mulki_plugins.characters import simplify
from mulki_plugins.errors import MulkiError
from mulki_plugins.recipe.layers import get
from mulki_plugins.recipe.schema import Choice, Recipe
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.registry.parts import Kind
from mulki_plugins.registry.signature import signature_of

_ALSO_CALLED = {
    "lr": ("learning_rate", "learningrate", "rate"), "iterations": ("steps", "iters", "max_steps", "max_iters", "num_steps"),
    "epochs": ("num_epochs", "n_epochs", "max_epochs"), "batch_size": ("bs", "batch", "batchsize", "train_mb_size"),
    "weight_decay": ("wd",), "workers": ("num_workers", "n_workers"), "device": ("gpu", "cuda", "gpus"),
    "stream": ("dataset", "datasets", "data", "benchmark"), "seeds": ("random_seed", "random_state"),
    "optimizer": ("optim",), "schedule": ("scheduler", "lr_scheduler"), "warmup": ("warmup_steps", "warm_up"),
    "model": ("architecture", "arch", "backbone"), "pretrained": ("weights", "checkpoint_path"), "metrics": ("metric",),
    "loggers": ("logger",), "gradient_clip": ("grad_clip", "clip", "max_grad_norm"), "precision": ("amp", "dtype"),
}  # fmt: skip
_MEANT = {other: name for name, others in _ALSO_CALLED.items() for other in others}


def keys_like(written: Sequence[str], recipe: Any) -> list[str]:
    """The keys that `written` (a key in parts) may stand for, the likeliest first; empty where there is none.

    recipe: the data of a recipe, whose stream, model and stack say which options there are.
    """
    parts = [simplify(part).strip().lower().replace("-", "_") for part in written]
    parts = [inner for part in parts for inner in part.split("/") if inner] or [""]
    parts[-1] = _MEANT.get(parts[-1], parts[-1])
    known = list(dict.fromkeys(_known(recipe)))
    lower = {key.lower().replace("-", "_"): key for key in known}
    tails = (".".join(parts), parts[-1])
    for tail in tails:
        if fits := [key for plain, key in lower.items() if plain == tail or plain.endswith(f".{tail}")]:
            return sorted(fits, key=lambda key: (key.count("."), not key.startswith("train.")))
    last = {plain.rpartition(".")[2]: key for plain, key in reversed(lower.items())}
    return [last[word] for word in get_close_matches(parts[-1], last, n=1, cutoff=0.85)]


def _known(recipe: Any) -> Iterator[str]:
    yield from _of_class(Recipe, "")
    kinds: dict[str, Kind] = {"stream": "stream", "model": "model"}
    for key, kind in kinds.items():
        yield f"{key}.name"
        yield from _options(kind, get(recipe, (key, "name")) or get(recipe, (key,)), key)
    yield from ("model.train", "model.pretrained")
    tasks = get(recipe, ("stream", "tasks"))
    for i, task in enumerate(tasks if isinstance(tasks, list) else ()):
        if isinstance(task, dict):
            yield from (f"stream.tasks[{i}].{key}" for key in ("class_names", "templates", *map(str, task)))
    plugins = get(recipe, ("strategy", "plugins"))
    for entry in plugins if isinstance(plugins, list) else ():
        name = next(iter(entry), None) if isinstance(entry, dict) else entry
        yield from _options("plugin", name, f"strategy.{name}")


def _of_class(kind: Any, prefix: str) -> Iterator[str]:
    for name, hint in get_type_hints(kind).items():
        yield prefix + name
        for inner in (hint, *(() if get_origin(hint) in (list, dict) else get_args(hint))):
            if hasattr(inner, "__attrs_attrs__") and inner is not Choice:
                yield from _of_class(inner, f"{prefix}{name}.")


def _options(kind: Kind, name: Any, prefix: str) -> Iterator[str]:
    part = catalog().parts.get((kind, name)) if isinstance(name, str) else None
    try:
        yield from (f"{prefix}.{option}" for option in (signature_of(part).options if part else ()))
    except MulkiError:  # a part that cannot be read has no known options
        return
