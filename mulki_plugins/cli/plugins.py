"""`mulki plugins`: list the packages that extend MulKI, their parts, and why one cannot be used."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import click

from mulki_plugins.characters import printable
from mulki_plugins.cli.common import echo_json, echo_note, report_errors
from mulki_plugins.errors import Mistakes
from mulki_plugins.recipe.files import SINGULAR, YamlFile, check_strategy
from mulki_plugins.recipe.resolve import resolve
from mulki_plugins.recipe.yaml import read_yaml
from mulki_plugins.registry.callbacks import callback_mistakes
from mulki_plugins.registry.catalog import OURS, Package, Part, Provenance, signature_of
from mulki_plugins.registry.discovery import catalog, unmet_requirements
from mulki_plugins.registry.guard import cause_of
from mulki_plugins.registry.static import find_source
from mulki_plugins.report.tables import columns
from mulki_plugins.study.read import read_study

_ORDER = [
    "package", "recipe", "strategy", "study", "plugin", "adapter", "head", "optimizer", "stream", "model", "metric", "logger",
    "command",
]  # fmt: skip


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print a list of mappings as JSON, one for each part.")
@report_errors
def plugins(as_json: bool) -> None:
    """List the packages that extend MulKI, with the state of each part.

    The state is `ok`; `switched off` by --no-plugin or MULKI_PLUGINS; `left out`: unusable, since the package failed or
    the part requires a missing one; or `broken`: listed, but recipes that use it are refused.
    """
    entries = inventory()
    if as_json:
        echo_json(entries)
        return
    for (distribution, version), group in groupby(entries, key=lambda entry: (entry["distribution"], entry["version"])):
        click.echo(printable(f"{distribution} {version}".rstrip() + ":"))
        rows = []
        for entry in group:
            state = entry["state"] + (f": {entry['cause']}" if entry["cause"] else "")
            rows.append([entry["kind"], entry["name"], f"{state}  {entry['summary']}"])
            rows += [["", "", f"note: {note}"] for note in entry["notes"]]
        for line in columns(rows):
            click.echo(f"  {line}")
        click.echo()
    for line in catalog().unknown:
        echo_note(f"warning: {line}")


def inventory() -> list[dict[str, Any]]:
    """An entry for each package, part, recipe and strategy; MulKI's own first, then package by package."""
    entries = [_package_entry(package) for package in catalog().packages]
    entries += [_part_entry(part) for part in catalog().parts.values()]
    for part, cause in catalog().left_out:
        entries.append(_entry(part.kind, part.name, part.provenance, part.summary, "left out", cause))
    for kind, files in catalog().files.items():
        for name, (path, provenance) in files.items():
            entries.append(_file_entry(SINGULAR[kind], name, YamlFile(path, f"{kind}/{path.name}"), provenance))
    return sorted(
        entries, key=lambda e: (e["distribution"] != OURS, e["distribution"].lower(), _ORDER.index(e["kind"]))
    )


def _entry(
    kind: str, name: str, provenance: Provenance, summary: str, state: str = "ok", cause: str = "", notes: Any = ()
) -> dict[str, Any]:
    return {
        "name": name, "kind": kind, "distribution": provenance.distribution, "version": provenance.version,
        "summary": summary, "state": state, "cause": cause, "notes": list(notes),
    }  # fmt: skip


def _package_entry(package: Package) -> dict[str, Any]:
    missing = unmet_requirements(package.provenance.distribution) if package.state != "switched off" else []
    notes = [*package.notes, *(f"{problem}; {hint}" for problem, hint in missing)]
    return _entry("package", package.name, package.provenance, package.summary, package.state, package.cause, notes)


def _part_entry(part: Part) -> dict[str, Any]:
    cause = ""
    if part.provenance.distribution != OURS:
        try:
            if part.kind not in ("metric", "logger", "command"):  # those have no options that a recipe could check
                signature_of(part)
            elif isinstance(part.target, str):
                find_source(part.target.partition(":")[0])
            cause = "; ".join(callback_mistakes(part)) if part.kind == "plugin" else ""
        except Exception as error:  # one part must not hide the others
            cause = cause_of(error)
    return _entry(part.kind, part.name, part.provenance, part.summary, "broken" if cause else "ok", cause)


def _file_entry(kind: str, name: str, file: YamlFile, provenance: Provenance) -> dict[str, Any]:
    """A recipe, strategy or study. Other packages' files are validated."""
    summary, cause = "", ""
    try:
        value = read_yaml(file.path, file.shown).value.get("summary", "")
        summary = value if isinstance(value, str) else ""
        if provenance.distribution != OURS:
            if kind == "strategy":
                check_strategy(file)
            elif kind == "study":
                read_study(str(file.path))
            else:
                resolve(str(file.path))
    except Mistakes as mistakes:
        cause = "; ".join(mistakes.lines())
    except Exception as error:  # one file must not hide the others
        cause = cause_of(error)
    return _entry(kind, name, provenance, summary, "broken" if cause else "ok", cause)
