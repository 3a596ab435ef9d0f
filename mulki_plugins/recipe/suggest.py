"""What the user probably meant: another key, or the value as it is typed. Added to each line of a report."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from typing import Any, get_args, get_origin, get_type_hints

import attrs

from mulki_plugins.characters import simplify
from mulki_plugins.corrections import IN_QUOTES
from mulki_plugins.errors import UNKNOWN_OPTION, MulkiError, OptionError
from mulki_plugins.recipe.layers import get
from mulki_plugins.recipe.schema import Choice, Optimizer, Recipe
from mulki_plugins.recipe.yaml import Origin, Tree, locate
from mulki_plugins.registry.catalog import Kind, signature_of
from mulki_plugins.registry.discovery import catalog

_INDEX = re.compile(r"\[\d+\]")
MAX_SUGGESTED = 50
"""For how many unknown keys a similar one is searched."""

_SYNONYMS = {
    "lr": ("learning_rate", "learningrate", "rate"), "iterations": ("steps", "iters", "max_steps", "max_iters", "num_steps"),
    "epochs": ("num_epochs", "n_epochs", "max_epochs"), "batch_size": ("bs", "batch", "batchsize", "train_mb_size"),
    "weight_decay": ("wd",), "workers": ("num_workers", "n_workers"), "device": ("gpu", "cuda", "gpus"),
    "stream": ("dataset", "datasets", "data", "benchmark"), "seeds": ("random_seed", "random_state"),
    "optimizer": ("optim",), "schedule": ("scheduler", "lr_scheduler"), "warmup": ("warmup_steps", "warm_up"),
    "model": ("architecture", "arch", "backbone"), "pretrained": ("weights", "checkpoint_path"), "metrics": ("metric",),
    "loggers": ("logger",), "gradient_clip": ("grad_clip", "clip", "max_grad_norm"), "precision": ("amp", "dtype"),
}  # fmt: skip
_BY_SYNONYM = {other: name for name, others in _SYNONYMS.items() for other in others}


def report(tree: Tree, mistakes: Iterable[OptionError]) -> list[str]:
    """A located line for each mistake, with the key or the value that was probably meant."""
    lines, unknown = [], 0
    for mistake in mistakes:
        message, origin = str(mistake), tree.origins.get(mistake.path)
        if message.startswith(UNKNOWN_OPTION):
            unknown += 1
            message = _suggest_key(tree, mistake) if unknown <= MAX_SUGGESTED else message
        elif origin and origin.source.startswith("--set "):
            message = _suggest_setting(origin, mistake)
        lines.append(locate(tree.origin(mistake.path), mistake.path, message))
    return lines


def _suggest_key(tree: Tree, mistake: OptionError) -> str:
    """For an unknown key: the key of the same name that belongs elsewhere in a recipe."""
    path, inner = list(mistake.path), get(tree.value, mistake.path)
    while isinstance(inner, dict) and len(inner) == 1:  # `--set optimizer.lr=1` already fails at `optimizer`
        [(key, inner)] = inner.items()
        path.append(key)
    written = [part for part in path if isinstance(part, str)]
    likely = [key for key in suggest_keys(written, tree.value) if _INDEX.sub("", key) != ".".join(written)][:3]
    if "did you mean" in mistake.message and len(path) == len(mistake.path):  # a sibling has almost the same name
        likely = [key for key in likely if _last(key) == written[-1]]
    return f"{UNKNOWN_OPTION} (did you mean {' or '.join(map(repr, likely))}?)" if likely else mistake.message


def _suggest_setting(origin: Origin, mistake: OptionError) -> str:
    """For a wrong value of a `--set`: the whole setting as it is typed, quoted for the shell."""
    key, _, text = origin.source.removeprefix("--set ").partition("=")
    value = f'"{text.strip()}"' if IN_QUOTES in mistake.message else mistake.write
    if not value:
        return mistake.message
    line = f"{mistake.message}; type --set {shlex.quote(f'{key.strip()}={value}')}"
    if mistake.path == ("seeds",):
        line += " or " + " ".join(f"--seed {seed}" for seed in value.strip("[]").split(","))
    return line


def suggest_keys(written: Sequence[str], recipe: Any) -> list[str]:
    """The keys that a written key, given in parts, may stand for: `train.lr` for `train.optimizer.lr`. The likeliest first.

    recipe: a recipe's data, whose stream, model and stack determine the known options.
    """
    parts = [simplify(part).strip().lower().replace("-", "_") for part in written]
    parts = [inner for part in parts for inner in part.split("/") if inner] or [""]
    parts[-1] = _BY_SYNONYM.get(parts[-1], parts[-1])
    known = {key.lower().replace("-", "_"): key for key in dict.fromkeys(_known_keys(recipe))}
    for tail in (".".join(parts), parts[-1]):
        if matches := [key for folded, key in known.items() if folded == tail or folded.endswith(f".{tail}")]:
            return sorted(matches, key=lambda key: (key.count("."), not key.startswith("train.")))
    by_last = {_last(folded): key for folded, key in reversed(known.items())}
    return [by_last[word] for word in get_close_matches(parts[-1], by_last, n=1, cutoff=0.85)]


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _known_keys(recipe: Any) -> Iterator[str]:
    """Every key that this recipe may have."""
    yield from _keys_of_class(Recipe, "")
    kinds: dict[str, Kind] = {"stream": "stream", "model": "model"}
    for key, kind in kinds.items():
        yield f"{key}.name"
        yield from _keys_of_part(kind, get(recipe, (key, "name")) or get(recipe, (key,)), key)
    yield from ("model.train", "model.pretrained")
    yield from _keys_of_part("optimizer", get(recipe, ("train", "optimizer", "name")) or "adamw", "train.optimizer")
    tasks = get(recipe, ("stream", "tasks"))
    for i, task in enumerate(tasks if isinstance(tasks, list) else ()):
        if isinstance(task, dict):
            yield from (f"stream.tasks[{i}].{key}" for key in ("class_names", "templates", *map(str, task)))
    plugins = get(recipe, ("strategy", "plugins"))
    for entry in plugins if isinstance(plugins, list) else ():
        name = next(iter(entry), None) if isinstance(entry, dict) else entry
        yield from _keys_of_part("plugin", name, f"strategy.{name}")


def _keys_of_class(class_: Any, prefix: str) -> Iterator[str]:
    for name, hint in get_type_hints(class_).items():
        yield prefix + name
        for inner in (hint, *(() if get_origin(hint) in (list, dict) else get_args(hint))):
            if inner is Optimizer:
                yield from (f"{prefix}{name}.{key}" for key in ("name", "lr", "weight_decay"))
            elif attrs.has(inner) and inner is not Choice:
                yield from _keys_of_class(inner, f"{prefix}{name}.")


def _keys_of_part(kind: Kind, name: Any, prefix: str) -> Iterator[str]:
    part = catalog().parts.get((kind, name)) if isinstance(name, str) else None
    try:
        yield from (f"{prefix}.{option}" for option in (signature_of(part).options if part else ()))
    except MulkiError:  # the part's source cannot be read
        return
