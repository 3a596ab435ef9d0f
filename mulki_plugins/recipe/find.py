"""Recipes and strategies by path or by name."""

from __future__ import annotations

import os
from pathlib import Path

from attrs import frozen

from mulki_plugins.errors import Mistakes, did_you_mean
from mulki_plugins.recipe.source import Origin, located
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.registry.parts import Provenance

SINGULAR = {"recipes": "recipe", "strategies": "strategy"}


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
    stem = path.stem if path.suffix in (".yaml", ".yml") else name.removeprefix(f"{kind}/")
    looks_like_ours = path.parent in (Path("."), Path(kind))
    known = available(kind)
    if looks_like_ours and stem in known:
        found, provenance = known[stem]
        return Found(found, f"{kind}/{found.name}", f"{name}: using the {SINGULAR[kind]} {stem!r} of {provenance}")
    if name and kind == "recipes" and os.path.isdir(path):
        return Found(path, name)
    hint = did_you_mean(stem, known)
    there = f"`mulki list {kind}` shows all{catalog().hint_at_packages()}"
    message = f"no such file, and no {SINGULAR[kind]} of that name ({hint}); {there}"
    raise Mistakes([located(Origin(name, 1), (), message)])


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
