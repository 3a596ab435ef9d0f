"""`mulki list`: the installed parts of recipes, and the packages they come from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from mulki_plugins.cli.common import echo_json, echo_note, report_errors
from mulki_plugins.errors import Mistakes, MulkiError, did_you_mean
from mulki_plugins.recipe.files import SINGULAR, list_registered
from mulki_plugins.recipe.yaml import read_yaml
from mulki_plugins.registry.builtin import open_clip_models, open_clip_tags
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.report.tables import columns

KINDS = (
    "recipes", "strategies", "studies", "plugins", "adapters", "heads", "optimizers", "streams", "models", "metrics",
    "loggers",
)  # fmt: skip
SYNONYMS = {
    "stage": "plugins", "stages": "plugins", "dataset": "streams", "datasets": "streams", "benchmarks": "streams",
    "methods": "strategies", "architectures": "models", "experiments": "recipes",
}  # fmt: skip
FACTS = {"keeps_images": "past images", "needs_reference": "reference data"}
"""Facts about strategies that matter when methods are compared: what they keep, and what they need."""
OPEN_CLIP = "open_clip_torch"


class Kind(click.Choice):  # type: ignore[type-arg]  # generic only in newer versions of click
    """One of KINDS, singular or plural."""

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        word = value.lower()
        for kind in KINDS:
            if word in (kind, SINGULAR.get(kind, kind.removesuffix("s"))):
                return kind
        hint = f"did you mean {SYNONYMS[word]!r}?" if word in SYNONYMS else did_you_mean(word, KINDS)
        self.fail(f"unknown kind of part {value!r} ({hint})", param, ctx)


@click.command("list")
@click.argument("kind", required=False, type=Kind(KINDS))
@click.argument("text", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print {kind: [entries]} as JSON.")
@report_errors
def list_command(kind: str | None, text: str | None, as_json: bool) -> None:
    """List the installed parts of recipes.

    These are recipes, strategies, studies, plugins, adapters, heads, optimizers, streams, models, metrics and loggers. With
    KIND only these, and with TEXT only those with TEXT in their name: `mulki list models ViT-B`.
    """
    entries = {each: _entries(each) for each in ((kind,) if kind else KINDS)}
    if kind == "models":
        entries[kind] += _open_clip_entries()
    if kind and text:
        entries[kind] = _filter(kind, text, entries[kind])
    if as_json:
        echo_json(entries)
        return
    for each, listed in entries.items():
        click.echo(f"{each}:")
        for line in _table(each, listed):
            click.echo(f"  {line}".rstrip())
        if each == "models" and not text:
            _mention_open_clip(listed=kind is not None)
        click.echo()
    for problem in catalog().problems:
        echo_note(f"warning: {problem}")


def _table(kind: str, entries: list[dict[str, Any]]) -> list[str]:
    facts = FACTS if kind == "strategies" else {}
    rows = [["", *facts.values()]] if facts else []
    for entry in entries:
        source = f" [{entry['source']}]" if entry.get("source") else ""
        package = "" if entry["distribution"] in ("mulki", OPEN_CLIP) else f" (from {entry['distribution']})"
        answers = ["yes" if entry.get(fact) else "no" for fact in facts]
        alone = f" (one process only: {entry['one_process']})" if entry.get("one_process") else ""
        rows.append([entry["name"], *answers, f"{entry['summary']}{source}{package}{alone}"])
    return columns(rows)


def _filter(kind: str, text: str, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries with a text in their name. MulkiError if there are none."""
    matching = [entry for entry in entries if text.lower() in entry["name"].lower()]
    if not matching:
        raise MulkiError(f"no {kind} with {text!r} in their name", did_you_mean(text, [e["name"] for e in entries]))
    return matching


def _mention_open_clip(listed: bool) -> None:
    """Add open_clip's models to the registered ones; `listed` if they are in the list above."""
    names = open_clip_models()
    if listed:
        click.echo(
            f"  including the {len(names)} architectures of open_clip; `pretrained` may also be a file of weights"
        )
        return
    examples = ", ".join(name for name in ("RN50", "ViT-B-32", "ViT-B-16", "ViT-L-14") if name in names)
    click.echo(f"  and the {len(names)} architectures of open_clip by their names there, such as {examples};")
    click.echo("  `mulki list models` lists them with the tags of their weights, `mulki list models ViT-B` only some")


def _entries(kind: str) -> list[dict[str, Any]]:
    if kind in SINGULAR:
        return _yaml_entries(kind)
    singular: Any = kind.removesuffix("s")
    entries = []
    for part in catalog().of_kind(singular):
        entry: dict[str, Any] = {
            "name": part.name, "summary": part.summary, "source": part.source,
            "distribution": part.provenance.distribution, "version": part.provenance.version,
        }  # fmt: skip
        if kind == "plugins":
            entry |= {
                "requires": list(part.requires), "keeps_images": part.keeps_images,
                "needs_reference": part.needs_reference, "adds_parameters": part.adds_parameters,
                "one_process": part.one_process,
            }  # fmt: skip
        entries.append(entry)
    return entries


def _open_clip_entries() -> list[dict[str, Any]]:
    """open_clip's models, each with the tags of its weights."""
    entries = []
    for name in open_clip_models():
        tags = list(open_clip_tags(name))
        summary = f"pretrained: {', '.join(tags)}" if tags else "no weights to download"
        entry = {"name": name, "summary": summary, "source": "", "distribution": OPEN_CLIP, "version": ""}
        entries.append({**entry, "pretrained": tags})
    return entries


def _yaml_entries(kind: str) -> list[dict[str, Any]]:
    """Recipes, strategies or studies. The summary of an unreadable one is its error."""
    entries = []
    for name, (path, provenance) in list_registered(kind).items():
        entry: dict[str, Any] = {"name": name, "summary": "", "source": ""}
        try:
            value = read_yaml(path, f"{kind}/{path.name}").value
            entry |= {"summary": str(value.get("summary", "")), "source": str(value.get("paper", ""))}
            entry |= _strategy_facts(value) if kind == "strategies" else {}
        except Mistakes as mistakes:
            entry["summary"] = f"cannot be read: {mistakes.lines()[0]}"
        entries.append(entry | {"distribution": provenance.distribution, "version": provenance.version})
    return entries


def _strategy_facts(strategy: Mapping[str, Any]) -> dict[str, bool]:
    """Whether a strategy's base or plugins keep images of earlier tasks or need reference data."""
    stack = strategy.get("plugins")
    names = [next(iter(e), "") if isinstance(e, dict) else e for e in (stack if isinstance(stack, list) else ())]
    parts = [part for name in names if (part := catalog().parts.get(("plugin", str(name))))]
    return {
        "keeps_images": strategy.get("base") in ("cumulative", "joint") or any(part.keeps_images for part in parts),
        "needs_reference": any(part.needs_reference for part in parts),
    }
