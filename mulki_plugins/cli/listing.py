"""`mulki list`: what there is to put into a recipe, and who brought it."""

from __future__ import annotations

from typing import Any

import click

from mulki_plugins.characters import pad, printable, width
from mulki_plugins.cli.common import echo_json, reports_mistakes
from mulki_plugins.errors import did_you_mean

NOTES = {"keeps_images": "past images", "needs_reference": "reference data"}
"""What somebody who compares methods must know of a strategy: what it keeps, and what it needs."""

KINDS = ("recipes", "strategies", "plugins", "streams", "models", "metrics", "loggers")


ALSO_CALLED = {
    "stage": "plugins", "stages": "plugins", "dataset": "streams", "datasets": "streams", "benchmarks": "streams",
    "methods": "strategies", "architectures": "models", "experiments": "recipes",
}  # fmt: skip


class Kind(click.Choice):  # type: ignore[type-arg]
    """One of KINDS, in the singular too."""

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        word = value.lower()
        kind = next((k for k in KINDS if word in (k, "strategy" if k == "strategies" else k.removesuffix("s"))), None)
        if kind is None:
            hint = f"did you mean {ALSO_CALLED[word]!r}?" if word in ALSO_CALLED else did_you_mean(word, KINDS)
            self.fail(f"{value!r} is no kind of part ({hint})", param, ctx)
        return kind


@click.command("list")
@click.argument("kind", required=False, type=Kind(KINDS))
@click.argument("text", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print {kind: [entries]} as JSON.")
@reports_mistakes
def list_command(kind: str | None, text: str | None, as_json: bool) -> None:
    """List what is installed: recipes, strategies, plugins, streams, models, metrics and loggers.

    With KIND only these, and with TEXT only those that have it in their name, such as `mulki list models ViT-B`.
    """
    from mulki_plugins.registry.discovery import catalog

    kinds = (kind,) if kind else KINDS
    found = {k: _entries(k) for k in kinds}
    if kind == "models":
        found[kind] += _architectures()
    if kind and text:
        found[kind] = _with_text(kind, text, found[kind])
    if as_json:
        echo_json(found)
        return
    for k, entries in found.items():
        click.echo(f"{k}:")
        columns = max((width(e["name"]) for e in entries), default=0)
        notes = NOTES if k == "strategies" else {}
        if notes:
            click.echo("  ".join(["", " " * columns, *notes.values()]))
        for entry in entries:
            source = f" [{entry['source']}]" if entry.get("source") else ""
            ours = entry["distribution"] in ("mulki", OPEN_CLIP)
            brought = "" if ours else f" (from {entry['distribution']})"
            marks = "".join(f"{'yes' if entry.get(key) else 'no':<{len(words)}}  " for key, words in notes.items())
            click.echo(
                printable(f"  {pad(entry['name'], columns)}  {marks}{entry['summary']}{source}{brought}").rstrip()
            )
        if k == "models" and not text:
            _more_models(listed=kind is not None)
        click.echo()
    for problem in catalog().problems:
        click.echo(printable(f"warning: {problem}"), err=True)


OPEN_CLIP = "open_clip_torch"


def _architectures() -> list[dict[str, Any]]:
    """open_clip's models, each with the tags of its weights."""
    from mulki_plugins.registry.builtin import open_clip_models, open_clip_tags

    entries = []
    for name in open_clip_models():
        tags = list(open_clip_tags(name))
        summary = f"pretrained: {', '.join(tags)}" if tags else "no weights to download"
        entry = {"name": name, "summary": summary, "source": "", "distribution": OPEN_CLIP, "version": ""}
        entries.append({**entry, "pretrained": tags})
    return entries


def _with_text(kind: str, text: str, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries that have a text in their name; MulkiError where none has."""
    from mulki_plugins.errors import MulkiError

    found = [entry for entry in entries if text.lower() in entry["name"].lower()]
    if not found:
        hint = did_you_mean(text, [entry["name"] for entry in entries])
        raise MulkiError(f"none of the {kind} has {text!r} in its name", hint)
    return found


def _more_models(listed: bool) -> None:
    """What there is beside the registered models; `listed` where open_clip's stand above."""
    from mulki_plugins.registry.builtin import open_clip_models

    names = open_clip_models()
    some = [name for name in ("RN50", "ViT-B-32", "ViT-B-16", "ViT-L-14") if name in names]
    if listed:
        click.echo(f"  with the {len(names)} architectures of open_clip; a file of weights stands for a tag too")
        return
    click.echo(f"  and the {len(names)} architectures of open_clip by their names there, such as {', '.join(some)};")
    click.echo("  `mulki list models` shows all with the tags of their weights, `mulki list models ViT-B` only these")


def _entries(kind: str) -> list[dict[str, Any]]:
    from mulki_plugins.registry.discovery import catalog

    if kind in ("recipes", "strategies"):
        return _files(kind)
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
            }  # fmt: skip
        entries.append(entry)
    return entries


def _of_stack(strategy: Any) -> dict[str, bool]:
    """Whether a strategy keeps images of earlier tasks, and whether it needs reference data: what its base and plugins do."""
    from mulki_plugins.registry.discovery import catalog

    plugins = strategy.get("plugins")
    names = [next(iter(e), "") if isinstance(e, dict) else e for e in (plugins if isinstance(plugins, list) else ())]
    parts = [part for name in names if (part := catalog().parts.get(("plugin", str(name))))]
    return {
        "keeps_images": strategy.get("base") in ("cumulative", "joint") or any(part.keeps_images for part in parts),
        "needs_reference": any(part.needs_reference for part in parts),
    }


def _files(kind: str) -> list[dict[str, Any]]:
    """Recipes and strategies; one that cannot be read is listed with what is wrong with it."""
    from mulki_plugins.errors import Mistakes
    from mulki_plugins.recipe.files import list_registered
    from mulki_plugins.recipe.yaml import read_yaml

    entries = []
    for name, (path, provenance) in list_registered(kind).items():
        entry: dict[str, Any] = {"name": name, "summary": "", "source": ""}
        try:
            value = read_yaml(path, f"{kind}/{path.name}").value
            entry |= {"summary": str(value.get("summary", "")), "source": str(value.get("paper", ""))}
            entry |= _of_stack(value) if kind == "strategies" else {}
        except Mistakes as mistakes:
            entry["summary"] = f"cannot be read: {mistakes.lines()[0]}"
        entries.append(entry | {"distribution": provenance.distribution, "version": provenance.version})
    return entries
