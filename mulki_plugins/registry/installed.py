"""The packages that declare an entry point for MulKI, and what their metadata say, without importing them."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import Distribution, EntryPoint, distributions, entry_points

from attrs import frozen

from mulki_plugins.registry.guard import cause_of
from mulki_plugins.registry.hookspecs import PROJECT
from mulki_plugins.registry.parts import Provenance


@frozen(kw_only=True)
class Installed:
    """One entry point. `cause`: why it cannot be used, where that shows already."""

    name: str
    entry: EntryPoint | None
    provenance: Provenance
    summary: str = ""
    cause: str = ""


def installed() -> list[Installed]:
    """Every entry point of the group `mulki`, in the order of their names."""
    found, broken = _entries()
    return sorted((*map(_described, found), *broken), key=lambda each: (each.name, str(each.provenance)))


def _entries() -> tuple[list[EntryPoint], list[Installed]]:
    """The entry points, and the distributions whose list of them cannot be read."""
    try:
        return list(entry_points(group=PROJECT)), []
    except Exception:  # of any package at all, be it MulKI's or not
        found: list[EntryPoint] = []
        broken: list[Installed] = []
        for distribution in distributions():
            try:
                found += distribution.entry_points.select(group=PROJECT)
            except Exception as error:
                provenance = _provenance(distribution)
                name, cause = provenance.distribution, f"its entry_points.txt cannot be read: {cause_of(error)}"
                broken.append(Installed(name=name, entry=None, provenance=provenance, cause=cause))
        return found, broken


def _provenance(distribution: Distribution) -> Provenance:
    try:
        return Provenance(distribution=str(distribution.metadata["Name"]), version=str(distribution.version))
    except Exception:  # metadata that cannot be read
        return Provenance(distribution="an unnamed package", version="")


def _described(entry: EntryPoint) -> Installed:
    provenance, summary, cause = Provenance(distribution=entry.name, version=""), "", ""
    try:
        metadata = entry.dist.metadata if entry.dist is not None else None
        if metadata is not None:
            name, version = metadata["Name"] or entry.name, metadata["Version"] or ""
            provenance, summary = Provenance(distribution=name, version=version), metadata["Summary"] or ""
            cause = next(_unmet(metadata.get_all("Requires-Dist") or [], metadata["Requires-Python"] or ""), "")
    except Exception as error:  # metadata that cannot be read
        cause = f"its metadata cannot be read: {cause_of(error)}"
    if not cause and EntryPoint.pattern.match(entry.value) is None:
        cause = f"its entry point is {entry.value!r}, expected `package.module`"
    return Installed(name=entry.name, entry=entry, provenance=provenance, summary=summary, cause=cause)


def _unmet(requirements: list[str], python: str) -> Iterator[str]:
    """What a package's own metadata demand of MulKI and of Python, and do not get.

    Read with `packaging`, which several of MulKI's dependencies bring; where it is missing nothing is checked.
    """
    ours = [text for text in requirements if text[: len(PROJECT)].lower() == PROJECT]
    if not ours and not python:
        return
    try:
        from packaging.requirements import Requirement
        from packaging.specifiers import SpecifierSet
    except ImportError:
        return
    from mulki_plugins import __version__

    for requirement in map(Requirement, ours):
        applies = requirement.name.lower() == PROJECT and (
            requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        )
        if applies and not requirement.specifier.contains(__version__, prereleases=True):
            yield f"it needs mulki {requirement.specifier}, this is mulki {__version__}"
    if python and not SpecifierSet(python).contains(platform.python_version(), prereleases=True):
        yield f"it needs Python {python}, this is Python {platform.python_version()}"
