"""What a shell offers after Tab: recipes, strategies, plugins, and the keys and values after `--set`. Imports no torch."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import click
from click.shell_completion import BashComplete, CompletionItem, add_completion_class, split_arg_string

from mulki_plugins.errors import MulkiError

if TYPE_CHECKING:
    from mulki_plugins.registry.catalog import Kind
    from mulki_plugins.types import Schema

Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]
_STACK = re.compile(r"^strategy\.plugins\[\d+\]\.")


@add_completion_class
class BashWords(BashComplete):
    """Completion in bash, which by default splits words at `=`: `key`, `=`, `value`, and replaces only the last of them."""

    source_template = BashComplete.source_template.replace(
        "COMPREPLY+=($value)", 'COMPREPLY+=("$value"); [[ $value == *= ]] && compopt -o nospace'
    )

    def get_completion_args(self) -> tuple[list[str], str]:
        """The words before the one to complete, and that one, each put together again."""
        words, at = split_arg_string(os.environ["COMP_WORDS"]), int(os.environ["COMP_CWORD"])
        pieces = [*words, *[""] * (at + 1 - len(words))][1 : at + 1]
        joined: list[str] = []
        for before, piece in zip(["", *pieces], pieces, strict=False):
            self._split = bool(joined) and "=" in (before, piece)
            joined = [*joined[:-1], joined[-1] + piece] if self._split else [*joined, piece]
        return joined[:-1], joined[-1]

    _split = False
    """Whether the word to complete was in several pieces."""

    def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem]:
        items = super().get_completions(args, incomplete)
        start = incomplete[: incomplete.rfind("=") + 1] if self._split else ""
        for item in items:
            item.value = str(item.value).removeprefix(start)
        return items


def _silently(function: Complete) -> Complete:
    """Offer nothing if anything goes wrong: a shell that waits for Tab has no place for an error."""

    @functools.wraps(function)
    def wrapper(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        try:
            return function(ctx, parameter, incomplete)
        except (Exception, SystemExit):
            return []

    return wrapper


@_silently
def complete_recipes(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Installed recipes, and files."""
    return [*_files_of("recipes", incomplete), CompletionItem(incomplete, type="file")]


@_silently
def complete_strategies(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return _files_of("strategies", incomplete)


@_silently
def complete_studies(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Installed studies, and files."""
    return [*_files_of("studies", incomplete), CompletionItem(incomplete, type="file")]


@_silently
def complete_plugins(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from mulki_plugins.registry.discovery import catalog

    parts = sorted(catalog().of_kind("plugin"), key=lambda part: part.name)
    return [CompletionItem(part.name, help=part.summary) for part in parts if part.name.startswith(incomplete)]


@_silently
def complete_settings(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The keys of the recipe on the command line with `=`, or the values of a key that has a few."""
    key, equals, start = incomplete.partition("=")
    if equals:
        return [CompletionItem(f"{key}={v}") for v in values_of(key) if v.startswith(start)]
    keys = settable_keys(*_recipe_of(ctx))
    return [CompletionItem(f"{key}=", help=text) for key, text in keys.items() if key.startswith(incomplete)]


def _recipe_of(ctx: click.Context) -> tuple[str | None, str | None]:
    """The recipe and the strategy on the command line, without the option at its end, which has no value yet."""
    from mulki_plugins.cli.usage import WORDS

    words = ctx.meta.get(WORDS, [])
    complete = ctx.command.make_context(ctx.info_name, words[1:-1], resilient_parsing=True)
    return complete.params.get("recipe"), next(iter(complete.params.get("strategies") or ()), None)


def settable_keys(recipe: str | None, strategy: str | None = None) -> dict[str, str]:
    """The keys that `--set` takes, with a description or an empty text.

    Those of every recipe; and of this one its stream's and model's options, and its plugins' as `strategy.<plugin>.<option>`.
    """
    keys = dict(_schema_keys(_schema(), ""))
    if recipe is not None:
        from mulki_plugins.recipe.resolve import Changes, resolve
        from mulki_plugins.recipe.settings import flatten

        with contextlib.suppress(MulkiError):  # a recipe that is not there, or is wrong
            for path, _ in flatten(resolve(recipe, Changes(strategy=strategy)).tree.value):
                keys.setdefault(_STACK.sub("strategy.", path).removesuffix(".name"), "")
    return dict(sorted(keys.items()))


def values_of(key: str) -> list[str]:
    """The values of a key that has only a few; else none."""
    schema: Schema = _schema()
    for name in key.split("."):
        schema = _properties(schema).get(name, {})
    if key in _KINDS:
        from mulki_plugins.registry.discovery import catalog

        return sorted(part.name for part in catalog().of_kind(_KINDS[key]))
    return list(dict.fromkeys(_values(schema)))


_KINDS: dict[str, Kind] = {
    "stream": "stream", "stream.name": "stream", "reference": "stream", "model": "model", "model.name": "model",
    "model.head": "head",
    "train.optimizer": "optimizer", "train.optimizer.name": "optimizer",
}  # fmt: skip


@functools.cache
def _schema() -> Schema:
    from mulki_plugins.recipe.json_schema import recipe_schema

    return recipe_schema(None)


def _schema_keys(schema: Schema, path: str) -> Iterator[tuple[str, str]]:
    """The keys that every recipe may have; not those of a stream, a model or a stack, which depend on the recipe."""
    for name, inner in _properties(schema).items():
        below = f"{path}{name}"
        nested = below not in ("stream", "reference", "model", "strategy") and _properties(inner)
        if nested:
            yield from _schema_keys(inner, f"{below}.")
        if not nested or "anyOf" in inner:  # `train.schedule=linear` is short for its name
            yield below, str(inner.get("description", ""))


def _properties(schema: Schema) -> dict[str, Schema]:
    properties: dict[str, Schema] = dict(schema.get("properties", {}))
    for variant in schema.get("anyOf", ()):
        properties |= variant.get("properties", {})
    return properties


def _values(schema: Schema) -> Iterator[str]:
    for variant in schema.get("anyOf", ()):
        yield from _values(variant)
    yield from (str(value) for value in schema.get("enum", ()) if isinstance(value, str))
    if schema.get("type") == "boolean":
        yield from ("true", "false")
    if schema.get("type") == "null":
        yield "null"


def _files_of(kind: str, incomplete: str) -> list[CompletionItem]:
    from mulki_plugins.recipe.files import list_registered

    return [CompletionItem(name) for name in sorted(list_registered(kind)) if name.startswith(incomplete)]
