"""Recipes and strategies by path or by name."""

from __future__ import annotations

import os
import shlex
from difflib import get_close_matches
from pathlib import Path

from attrs import frozen

from mulki_plugins.characters import simplify
from mulki_plugins.errors import Mistakes, did_you_mean
from mulki_plugins.recipe.yaml import Origin, locate
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.registry.parts import Provenance

SINGULAR = {"recipes": "recipe", "strategies": "strategy"}
SUFFIXES = (".yaml", ".yml")
MANY = 10_000
"""How many files of a folder are looked at for one that was meant."""


@frozen
class Found:
    """A YAML file, how to call it in messages, and a notice where it is not the path that was typed."""

    path: Path
    shown: str
    notice: str = ""


def find(kind: str, name: str) -> Found:
    """A file of `recipes` or `strategies`. An existing path wins; else a registered name, with or without the folder.

    Raises Mistakes where there is neither.
    """
    path = Path(name)
    if name and _may_be_file(path):
        return Found(path, name)
    stem = path.stem if path.suffix in SUFFIXES else name.removeprefix(f"{kind}/")
    looks_like_ours = path.parent in (Path("."), Path(kind))
    known = available(kind)
    beside = _beside(path) if path.suffix in SUFFIXES else []
    if looks_like_ours and stem in known and not any(Path(file).stem == stem for file in beside):
        found, provenance = known[stem]
        return Found(found, f"{kind}/{found.name}", f"{name}: using the {SINGULAR[kind]} {stem!r} of {provenance}")
    if name and kind == "recipes" and os.path.isdir(path):
        raise Mistakes([locate(Origin(name, 1), (), f"this is a folder, expected a YAML file{_in_folder(path)}")])
    there = f"`mulki list {kind}` shows all{catalog().hint_at_packages()}"
    message = f"no such file, and no {SINGULAR[kind]} of that name ({instead(kind, name)}); {there}"
    raise Mistakes([locate(Origin(name, 1), (), message)])


def instead(kind: str, name: str) -> str:
    """What may have been meant by the name of a recipe or strategy that is not there."""
    path = Path(name)
    stem = path.stem if path.suffix in SUFFIXES else name.removeprefix(f"{kind}/")
    if beside := _beside(path):
        return f"did you mean {beside[0]!r}?"
    if answer := _of_another_kind(kind, stem):
        return answer
    hint = did_you_mean(stem, available(kind))
    if not hint.startswith("did") and (path.suffix in SUFFIXES or len(path.parts) > 1):
        missing = next((str(p) for p in reversed(path.parents) if not os.path.isdir(p)), "")
        gone = f"there is no folder {missing!r} here" if missing else "there is no such file"
        hint += f"; {gone}, and a path begins in the current folder"
    return hint


def _beside(path: Path) -> list[str]:
    """YAML files in the same folder whose names are close to a path, the closest first."""
    try:
        files = [entry.name for entry in os.scandir(path.parent) if entry.name.endswith(SUFFIXES)][:MANY]
    except (OSError, ValueError):
        return []
    stems = {Path(file).stem.lower(): file for file in sorted(files, reverse=True)}
    word = (path.stem if path.suffix in SUFFIXES else path.name).lower()
    cutoff = 0.7 if path.suffix in SUFFIXES or len(path.parts) > 1 else 1.0
    close = get_close_matches(simplify(word), stems, n=1, cutoff=cutoff)
    return [str(path.parent / stems[stem]) for stem in close]


def _of_another_kind(kind: str, name: str) -> str:
    """How something that is no recipe, or no strategy, is used in one."""
    if kind == "recipes" and name in available("strategies"):
        return f"{name!r} is a strategy; type `mtil --strategy {name}`, or another recipe in place of mtil"
    if kind == "strategies" and name in available("recipes"):
        return f"{name!r} is a recipe, and stands without --strategy"
    parts = catalog()
    plugins = [part.name for part in parts.of_kind("plugin")]
    plugin = name if name in plugins else next((p for p in plugins if p.rpartition(".")[2] == name), None)
    if plugin:
        recipe = "mtil " if kind == "recipes" else ""
        return f"{plugin!r} is a plugin; type `{recipe}--with {plugin}`"
    for other, key in (("stream", "stream"), ("model", "model"), ("metric", "evaluate.metrics"), ("logger", "loggers")):
        if (other, name) in parts.parts:
            value = f"{key}=[{name}]" if key in ("evaluate.metrics", "loggers") else f"{key}={name}"
            return f"{name!r} is a {other}; a recipe names it: `mtil --set {shlex.quote(value)}`"
    return ""


def _in_folder(path: Path) -> str:
    """What to type in place of a folder."""
    if os.path.isfile(path / "recipe.yaml"):
        return f"; a run's recipe is {path / 'recipe.yaml'}, and `mulki resume {path}` goes on with the run"
    try:
        entries = sorted(os.scandir(path), key=lambda entry: entry.name)[:MANY]
    except OSError:
        return ""
    if files := [str(path / entry.name) for entry in entries if entry.name.endswith(SUFFIXES)]:
        return f", such as {', '.join(files[:3])}"
    return "; `mulki new recipe` makes a recipe of folders of images" if any(e.is_dir() for e in entries) else ""


def _may_be_file(path: Path) -> bool:
    """Whether something other than a folder is there, or may be: where the system refuses to say, reading tells why."""
    try:
        os.stat(path)
    except PermissionError:
        return True
    except (OSError, ValueError):  # nothing there, or a name that no file can have
        return False
    return not os.path.isdir(path)


def registered_as(kind: str, path: Path) -> str | None:
    """The name under which this very file is registered."""
    for name, (registered, _) in available(kind).items():
        try:
            if os.path.samefile(registered, path):
                return name
        except (OSError, ValueError):
            continue
    return None


def available(kind: str) -> dict[str, tuple[Path, Provenance]]:
    """Every registered YAML file of a kind by its name."""
    return catalog().files[kind]  # type: ignore[index]
