"""Mistakes in a recipe's `model` that the types of its options do not show. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mulki_plugins.errors import MulkiError, OptionError, did_you_mean
from mulki_plugins.models.weights import WeightFile, looks_like_a_path, weight_file
from mulki_plugins.registry.builtin import open_clip_models, open_clip_tags, tags_are_known, twin

RANDOM = "random"
"""The value of `pretrained` for random weights."""
TINY = "mulki-tiny"


def check_open_clip(options: Mapping[str, Any]) -> list[OptionError]:
    """All mistakes in the options of an open_clip architecture; `options` includes its name."""
    name, pretrained = options["name"], options.get("pretrained")
    wrong: list[OptionError] = []
    if (std := options.get("std")) is not None and min(std) <= 0:
        wrong.append(OptionError(f"expected numbers above 0, got {list(std)}", ("std",)))
    if pretrained is None or not pretrained.strip():
        return [*wrong, OptionError(no_weights(name), ("pretrained",))]
    if pretrained == RANDOM or pretrained in open_clip_tags(name):
        return wrong
    if not looks_like_a_path(pretrained):
        # if open_clip's table cannot be read, the loader asks open_clip itself
        return [*wrong, OptionError(unknown_tag(name, pretrained), ("pretrained",))] if tags_are_known() else wrong
    return wrong + _check_file(name, pretrained)


def check_tiny(options: Mapping[str, Any]) -> list[OptionError]:
    """All mistakes in the options of the bundled model, which brings its own weights."""
    pretrained = options.get("pretrained")
    return [] if pretrained in (None, RANDOM) else _check_file(TINY, pretrained)


def _check_file(name: str, pretrained: str) -> list[OptionError]:
    try:
        refuse_another(weight_file(pretrained), name)
    except MulkiError as error:
        return [OptionError(error.lines()[0], ("pretrained",))]
    return []


def refuse_another(file: WeightFile, name: str) -> None:
    """MulkiError if a file says that its weights belong to another architecture than `name`."""
    other = file.known.architecture
    if other is not None and other not in (name, twin(name)):
        known = other in open_clip_models() or other == TINY
        hint = f"take them with model.name={other}" if known else ""
        raise MulkiError(f"{file.path}: the weights are those of {other}, and the model is {name}", hint)


def no_weights(name: str) -> str:
    """The message for an architecture without weights, with the weights to choose from."""
    tags = list(open_clip_tags(name))
    listed = ", ".join(sorted(tags, key=lambda tag: tag != "openai")[:6]) + (", ..." if len(tags) > 6 else "")
    known = f"a tag of open_clip ({listed}), " if tags else ""
    return f"missing: {name} is an architecture without weights; give {known}a file of weights, or `{RANDOM}` for random ones"


def unknown_tag(name: str, pretrained: str) -> str:
    """The message for weights that do not exist, with a suggestion."""
    hint = did_you_mean(pretrained, [*open_clip_tags(name), RANDOM])
    return f"open_clip has no weights {pretrained!r} for {name} ({hint}), and there is no such file"
