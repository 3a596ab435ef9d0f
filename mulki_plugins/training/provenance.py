"""Where a run's numbers come from: recipe, data, weights, code and machine; and what has changed since another run."""

from __future__ import annotations

import datetime
import functools
import hashlib
import importlib
import json
import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from mulki_plugins.models.classifier import ClipClassifier
from mulki_plugins.ranks import collectives
from mulki_plugins.recipe.files import find_strategy_provenance, warn_of_borrowed_name
from mulki_plugins.recipe.layers import get
from mulki_plugins.recipe.schema import Recipe
from mulki_plugins.recipe.settings import fingerprint, flatten, select_decisive
from mulki_plugins.recipe.tasks import known_tasks
from mulki_plugins.registry.builtin import open_clip_models
from mulki_plugins.registry.catalog import OURS, Part, Provenance
from mulki_plugins.registry.discovery import catalog, unmet_requirements
from mulki_plugins.report.result import Result
from mulki_plugins.streams.nested import innermost
from mulki_plugins.streams.task import Task
from mulki_plugins.training.build import Built
from mulki_plugins.training.checksums import digest
from mulki_plugins.training.explain import parts_of
from mulki_plugins.training.marks import image_changes, marks_of, marks_of_reference

_CODE = ("losses.py", "adapters", "baselines", "heads", "models", "stages", "streams", "training")
"""The code of this package that affects the numbers."""


def new_result(recipe: Recipe, built: Built, seed: int, folder: Path) -> Result:
    """The result of a run that has not measured anything yet."""
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
        held_out={task.name: [] for task in built.stream.held_out},
        test_images=[len(task.test) for task in built.stream.tasks],
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
            **({"ranks": collectives.world()} if collectives.several() else {}),
            "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        },
        started=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        folder=str(folder),
    )


def _brought(provenance: Provenance) -> dict[str, str]:
    return {"distribution": provenance.distribution, "version": provenance.version}


def _strategy(recipe: Recipe) -> Provenance | None:
    """The package that brought the recipe's strategy, if any did."""
    borrowed = warn_of_borrowed_name(recipe.strategy.name, [entry.name for entry in recipe.strategy.plugins])
    return None if borrowed else find_strategy_provenance(recipe.strategy.name)


def unmet_of(recipe: Recipe) -> list[str]:
    """A line for each unmet requirement of the packages whose parts a recipe uses."""
    used = {part.provenance.distribution for part in parts_of(recipe) if not part.is_ours}
    if (strategy := _strategy(recipe)) is not None and strategy.distribution != OURS:
        used.add(strategy.distribution)
    return [f"{what}; {hint}" for package in sorted(used) for what, hint in unmet_requirements(package)]


def _protocol(recipe: Recipe) -> dict[str, Any]:
    """The settings two runs must share for their numbers to be comparable.

    Options that the stream or model lacks are omitted.
    """
    stream, model = recipe.stream.options, recipe.model.options
    whole = stream if recipe.stream.name != "split" else get(stream, ("of",))
    split, shots, images = (_in_stream(recipe.stream.name, whole, key) for key in ("split", "shots", "evaluate_on"))
    options = {
        "split": split,
        "shots": shots,
        "pretrained": model.get("pretrained"),
        "template": recipe.evaluate.template,
    }
    if images not in (None, "test"):
        options["images"] = images
    if recipe.stream.name == "split":
        inner = whole if isinstance(whole, str) else get(whole, ("name",))
        options |= {
            "of": " ".join([str(inner), *known_tasks(whole)]),
            **{key: stream.get(key) for key in ("base", "increment", "class_order")},
        }
    names = {"stream": recipe.stream.name, "model": recipe.model.name, "classes": recipe.evaluate.classes}
    return names | {key: value for key, value in options.items() if value is not None}


def _in_stream(name: str, stream: Any, key: str) -> Any:
    """An option of a stream. For `mixed`, the value that its streams agree on, or all their values; not all have the option."""
    if name != "mixed" or stream.get(key) not in (None, "test"):
        return get(stream, (key,))
    values = [part[key] for part in innermost({"name": name, **stream}) if key in part]
    return values if any(value != values[0] for value in values) else next(iter(values), None)


def _budget(recipe: Recipe) -> dict[str, Any]:
    if recipe.strategy.base == "none":
        return {}
    key = "iterations" if recipe.train.iterations else "epochs"
    return {key: getattr(recipe.train, key), "batch_size": recipe.train.batch_size}


def identity(recipe: Recipe, built: Built, seed: int) -> dict[str, Any]:
    """Everything that must stay the same for a resumed run to end as if it had never stopped, as plain data."""
    weights = built.model.state_dict()
    held_out = {"held_out": _data(built.stream.held_out)} if built.stream.held_out else {}
    return {
        "recipe": {**select_decisive(recipe), "workers": built.workers, "seed": seed},
        "data": _data(built.stream.tasks),
        **held_out,
        **({"reference": _data(built.reference.tasks)} if built.reference is not None else {}),
        "files": marks_of(built.stream) | marks_of_reference(built.reference),
        "weights": digest(weights, weights.__getitem__),
        "code": {"mulki": _hash(_package_code()), **_third_party_code(recipe)},
        "versions": {"python": ".".join(platform.python_version_tuple()[:2]), **_versions()},
        "device": built.device.type,
        "threads": torch.get_num_threads(),
        "ranks": collectives.world(),
    }


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A line for each change: where, the value before, the value now. A value that was not recorded before is no change."""
    separate = ("files", "threads", "ranks")
    old, new = (
        dict(flatten({key: item for key, item in each.items() if key not in separate})) for each in (before, now)
    )
    paths = [*old, *(path for path in new if path not in old and not path.startswith("versions."))]
    changed = [
        f"{path} was {old.get(path, 'not there')}, is {new.get(path, 'not there')}"
        for path in paths
        if old.get(path) != new.get(path)
    ]
    return changed + image_changes(before.get("files", {}), now.get("files", {}))


def other_threads(before: dict[str, Any], now: dict[str, Any]) -> str:
    """A warning if a run is resumed with another number of threads or ranks; empty if it is not, or if that is unknown."""
    for what in ("ranks", "threads"):
        was = before.get(what, 1 if what == "ranks" else None)
        if was not in (None, now[what]):
            return f"warning: the run began with {was} {what} and resumes with {now[what]}: its last digits may differ"
    return ""


def peak_memory(device: torch.device) -> float:
    """MiB: on a GPU the peak of what tensors took, else the peak of the process."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 1 if platform.system() == "Darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)


def count_parameters(recipe: Recipe, model: ClipClassifier) -> dict[str, int]:
    """The number of weights that the last task's training changes, and of all."""
    parameters = list(model.parameters())
    trained = 0 if recipe.strategy.base == "none" else sum(p.numel() for p in parameters if p.requires_grad)
    return {"trained": trained, "all": sum(p.numel() for p in parameters)}


def _data(tasks: Sequence[Task]) -> dict[str, str]:
    """A hash of each task's names and labels, which are known without opening an image."""
    hashes = {}
    for task in tasks:
        text = hashlib.sha256(json.dumps([task.class_names, task.templates]).encode())
        for images in (task.train, task.test):
            text.update(json.dumps([int(label) for label in images.targets]).encode())
        hashes[task.name] = f"{len(task.train)} + {len(task.test)} images, {text.hexdigest()[:12]}"
    return hashes


def _package_code() -> Iterator[Path]:
    package = Path(__file__).parent.parent
    for name in _CODE:
        path = package / name
        yield from sorted(path.rglob("*.py")) if path.is_dir() else [path]


def _third_party_code(recipe: Recipe) -> dict[str, str]:
    """The packages, versions and module hashes of the third-party parts that affect the numbers."""
    parts = [part for part in parts_of(recipe) if part.kind in ("plugin", "adapter", "head", "optimizer")]
    for kind, choice in (("stream", recipe.stream), ("stream", recipe.reference), ("model", recipe.model)):
        if choice is not None and (kind, choice.name) in catalog().parts:
            parts.append(catalog().parts[kind, choice.name])  # type: ignore[index]  # mypy widens the kind to str
    return {f"{p.kind} {p.name}": f"{p.provenance} {_hash(_module(p))}" for p in parts if not p.is_ours}


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
    versions = {}
    for package in ("mulki", "torch", "torchvision", "numpy", "pillow", "avalanche-lib", "open_clip_torch"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # a checkout that was never installed
            versions[package] = ""
    return versions


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {os.cpu_count()} cores"
