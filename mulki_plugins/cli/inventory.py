"""Everything that is registered, and its state: what `mulki plugins` prints and `mulki doctor` looks through."""

from __future__ import annotations

from typing import Any

from mulki_plugins.errors import Mistakes, MulkiError
from mulki_plugins.recipe.files import SINGULAR, YamlFile
from mulki_plugins.registry.callbacks import callback_mistakes
from mulki_plugins.registry.catalog import Package, Part, Provenance, signature_of
from mulki_plugins.registry.discovery import catalog, unmet_requirements

OURS = "mulki"


def inventory() -> list[dict[str, Any]]:
    """A row for each package, part, recipe and strategy; MulKI's own first, then package by package."""
    found = catalog()
    rows = [_package(package) for package in found.packages]
    rows += [_part(part) for part in found.parts.values()]
    rows += [
        _row(part.kind, part.name, part.provenance, part.summary, "left out", cause) for part, cause in found.left_out
    ]
    for kind, files in found.files.items():
        for name, (path, provenance) in files.items():
            rows.append(_file(SINGULAR[kind], name, YamlFile(path, f"{kind}/{path.name}"), provenance))
    return sorted(
        rows, key=lambda row: (row["distribution"] != OURS, row["distribution"].lower(), _ORDER.index(row["kind"]))
    )


_ORDER = ["package", "recipe", "strategy", "plugin", "stream", "model", "metric", "logger", "command"]


def loose_ends() -> list[str]:
    """What is said of packages that are not there."""
    return list(catalog().unknown)


def _row(
    kind: str, name: str, provenance: Provenance, summary: str, state: str = "ok", cause: str = "", notes: Any = ()
) -> dict[str, Any]:
    return {
        "name": name, "kind": kind, "distribution": provenance.distribution, "version": provenance.version,
        "summary": summary, "state": state, "cause": cause, "notes": list(notes),
    }  # fmt: skip


def _package(package: Package) -> dict[str, Any]:
    missing = unmet_requirements(package.provenance.distribution) if package.state != "switched off" else []
    notes = [*package.notes, *(f"{what}; {hint}" for what, hint in missing)]
    return _row("package", package.name, package.provenance, package.summary, package.state, package.cause, notes)


def _part(part: Part) -> dict[str, Any]:
    cause = ""
    if part.provenance.distribution != OURS and part.kind in ("plugin", "stream", "model"):
        try:
            signature_of(part)
            cause = "; ".join(callback_mistakes(part)) if part.kind == "plugin" else ""
        except MulkiError as error:
            cause = error.lines()[0]
    return _row(part.kind, part.name, part.provenance, part.summary, "broken" if cause else "ok", cause)


def _file(kind: str, name: str, found: YamlFile, provenance: Provenance) -> dict[str, Any]:
    """A recipe or strategy; another package's is checked as `mulki validate` would."""
    from mulki_plugins.recipe.files import check_strategy
    from mulki_plugins.recipe.resolve import resolve
    from mulki_plugins.recipe.yaml import read_yaml

    summary, cause = "", ""
    try:
        said = read_yaml(found.path, found.shown).value.get("summary", "")
        summary = said if isinstance(said, str) else ""
        if provenance.distribution != OURS:
            check_strategy(found) if kind == "strategy" else resolve(str(found.path))
    except Mistakes as mistakes:
        cause = "; ".join(mistakes.lines())
    return _row(kind, name, provenance, summary, "broken" if cause else "ok", cause)
