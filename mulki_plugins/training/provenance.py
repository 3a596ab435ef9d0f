"""Where a run's numbers come from: recipe, data, weights, code and machine; and what of it differs from another time."""

from __future__ import annotations

import datetime
import functools
import hashlib
import importlib
import json
import os
import platform
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from mulki_plugins.recipe.files import find_strategy_provenance, warn_of_borrowed_name
from mulki_plugins.recipe.schema import Recipe
from mulki_plugins.recipe.settings import fingerprint, flatten, select_decisive
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.registry.open_clip_names import open_clip_models
from mulki_plugins.registry.parts import OURS, Part, Provenance
from mulki_plugins.registry.requirements import unmet
from mulki_plugins.report.result import Result
from mulki_plugins.streams.task import TaskStream
from mulki_plugins.training import data_identity
from mulki_plugins.training.blame import parts_of
from mulki_plugins.training.build import Built
from mulki_plugins.training.checkpoints import digest

_CODE = ("losses.py", "baselines", "models", "stages", "streams", "training")
"""What of this package moves numbers."""


def new_result(recipe: Recipe, built: Built, seed: int, folder: Path) -> Result:
    """A result that has found nothing yet."""
    parts = [{"kind": p.kind, "name": p.name, **_brought(p.provenance)} for p in parts_of(recipe)]
    if recipe.model.name in open_clip_models():
        brought = {"distribution": "open_clip_torch", "version": _versions()["open_clip_torch"]}
        parts.append({"kind": "model", "name": recipe.model.name, **brought})
    if (strategy := _strategy(recipe)) is not None:
        parts.append({"kind": "strategy", "name": recipe.strategy.name, **_brought(strategy)})
    parts += [{"kind": "hook", "name": hook, **_brought(p.provenance)} for p in catalog().packages for hook in p.hooks]
    plugins = []
    for entry in recipe.strategy.plugins:
        part = catalog().find("plugin", entry.name)
        plugins.append({"name": entry.name, **_brought(part.provenance), "options": entry.options})
    return Result(
        recipe=recipe.name,
        strategy=recipe.strategy.name,
        seed=seed,
        tasks=[task.name for task in built.stream.tasks],
        base=recipe.strategy.base,
        protocol=_protocol(recipe),
        budget=_budget(recipe),
        settings=fingerprint(recipe),
        plugins=plugins,
        parts=parts,
        incomparable=list(built.stream.incomparable),
        versions={"python": platform.python_version(), **_versions()},
        device={
            "type": built.device.type,
            "name": _device_name(built.device),
            "platform": platform.platform(),
            "threads": torch.get_num_threads(),
            "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        },
        started=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        folder=str(folder),
    )


def _brought(provenance: Provenance) -> dict[str, str]:
    return {"distribution": provenance.distribution, "version": provenance.version}


def _strategy(recipe: Recipe) -> Provenance | None:
    """The package whose strategy the recipe uses."""
    borrowed = warn_of_borrowed_name(recipe.strategy.name, [entry.name for entry in recipe.strategy.plugins])
    return None if borrowed else find_strategy_provenance(recipe.strategy.name)


def unmet_of(recipe: Recipe) -> list[str]:
    """A line for each unmet requirement of the packages whose parts a recipe uses."""
    used = {part.provenance.distribution for part in parts_of(recipe) if not part.is_ours}
    if (strategy := _strategy(recipe)) is not None and strategy.distribution != OURS:
        used.add(strategy.distribution)
    return [f"{what}; {hint}" for package in sorted(used) for what, hint in unmet(package)]


def _protocol(recipe: Recipe) -> dict[str, Any]:
    """What must be the same of two runs whose numbers are compared; what a stream or a model has no say in is left out."""
    stream, model = recipe.stream.options, recipe.model.options
    said = {"split": stream.get("split"), "shots": stream.get("shots"), "pretrained": model.get("pretrained")}
    if (images := stream.get("evaluate_on", "test")) != "test":
        said["images"] = images
    named = {"stream": recipe.stream.name, "model": recipe.model.name, "classes": recipe.evaluate.classes}
    return named | {key: value for key, value in said.items() if value is not None}


def _budget(recipe: Recipe) -> dict[str, Any]:
    if recipe.strategy.base == "none":
        return {}
    key = "iterations" if recipe.train.iterations else "epochs"
    return {key: getattr(recipe.train, key), "batch_size": recipe.train.batch_size}


def identity(recipe: Recipe, built: Built, seed: int) -> dict[str, Any]:
    """Everything that a run must share with its first part to end as if it had never been stopped, as plain data."""
    weights = built.model.state_dict()
    return {
        "recipe": {**select_decisive(recipe), "workers": recipe.train.workers, "seed": seed},
        "data": _data(built.stream),
        "files": data_identity.marks_of(built.stream),
        "weights": digest(weights, weights.__getitem__),
        "code": {"mulki": _hash(_own_code()), **_others_code(recipe)},
        "versions": {"python": ".".join(platform.python_version_tuple()[:2]), **_versions()},
        "device": built.device.type,
        "threads": torch.get_num_threads(),
    }


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What has changed, a line each: where, what it was, what it is. What was not noted before is no change."""
    apart = ("files", "threads")
    old, new = (
        dict(flatten({key: item for key, item in which.items() if key not in apart})) for which in (before, now)
    )
    paths = [*old, *(path for path in new if path not in old and not path.startswith("versions."))]
    found = [
        f"{path} was {old.get(path, 'not there')}, is {new.get(path, 'not there')}"
        for path in paths
        if old.get(path) != new.get(path)
    ]
    return found + data_identity.changes(before.get("files", {}), now.get("files", {}))


def other_threads(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What to tell the user where a run goes on with another number of threads; empty where that is not known."""
    was, threads = before.get("threads"), now["threads"]
    if was in (None, threads):
        return ""
    return f"warning: the run began with {was} threads and goes on with {threads}: its last digits may differ for that"


def peak_memory(device: torch.device) -> float:
    """MiB: on a GPU the most that tensors took, else the most that the process ever held."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    try:
        import resource
    except ImportError:  # Windows has none
        return 0.0
    unit = 1 if platform.system() == "Darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)


def _data(stream: TaskStream) -> dict[str, str]:
    """Of each task's names and labels, which are known without opening an image."""
    found = {}
    for task in stream.tasks:
        text = hashlib.sha256(json.dumps([task.class_names, task.templates]).encode())
        for images in (task.train, task.test):
            text.update(json.dumps([int(label) for label in images.targets]).encode())
        found[task.name] = f"{len(task.train)} + {len(task.test)} images, {text.hexdigest()[:12]}"
    return found


def _own_code() -> Iterator[Path]:
    package = Path(__file__).parent.parent
    for name in _CODE:
        place = package / name
        yield from sorted(place.rglob("*.py")) if place.is_dir() else [place]


def _others_code(recipe: Recipe) -> dict[str, str]:
    """The modules of the parts that other packages brought."""
    parts = [catalog().find("plugin", entry.name) for entry in recipe.strategy.plugins]
    for kind, choice in (("stream", recipe.stream), ("stream", recipe.reference), ("model", recipe.model)):
        if choice is not None and (kind, choice.name) in catalog().parts:
            parts.append(catalog().find(kind, choice.name))  # type: ignore[arg-type]
    others = [part for part in parts if part.provenance.distribution != "mulki"]
    return {f"{part.kind} {part.name}": f"{part.provenance} {_hash(_module(part))}" for part in others}


def _module(part: Part) -> list[Path]:
    name = part.target.split(":")[0] if isinstance(part.target, str) else getattr(part.target, "__module__", "")
    file = getattr(importlib.import_module(name), "__file__", None) if name else None
    return [Path(file)] if file else []


def _hash(files: Iterable[Path]) -> str:
    text = hashlib.sha256()
    for path in files:
        text.update(path.name.encode() + path.read_bytes())
    return text.hexdigest()[:12]


@functools.cache
def _versions() -> dict[str, str]:
    found = {}
    for package in ("mulki", "torch", "torchvision", "numpy", "pillow", "avalanche-lib", "open_clip_torch"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # a checkout that was never installed
            found[package] = ""
    return found


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {os.cpu_count()} cores"
