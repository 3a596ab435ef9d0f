"""What is wrong with a recipe's `model`, beyond the types of its options. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mulki_plugins.errors import MulkiError, OptionError, did_you_mean
from mulki_plugins.models.trained_with import TrainedWith
from mulki_plugins.models.weight_files import WeightFile, looks_like_a_path, weight_file
from mulki_plugins.registry.open_clip_names import open_clip_models, open_clip_tags, tags_are_known, twin

RANDOM = "random"
"""What `pretrained` says for a model that begins with random weights."""
TINY = "mulki-tiny"


def check_open_clip(options: Mapping[str, Any]) -> list[OptionError]:
    """Everything that is wrong with the options of an architecture of open_clip; its name is among them."""
    name, pretrained = options["name"], options.get("pretrained")
    wrong: list[OptionError] = []
    if (std := options.get("std")) is not None and min(std) <= 0:
        wrong.append(OptionError(f"expected numbers above 0, got {list(std)}", ("std",)))
    if pretrained is None or not pretrained.strip():
        return [*wrong, OptionError(no_weights(name), ("pretrained",))]
    if pretrained == RANDOM or pretrained in open_clip_tags(name):
        return wrong
    if not looks_like_a_path(pretrained):
        # where open_clip's table cannot be read, the loader asks open_clip itself
        return [*wrong, OptionError(unknown_tag(name, pretrained), ("pretrained",))] if tags_are_known() else wrong
    return wrong + _file(name, pretrained)


def check_tiny(options: Mapping[str, Any]) -> list[OptionError]:
    """The same for the bundled model, which has weights of its own."""
    pretrained = options.get("pretrained")
    return [] if pretrained in (None, RANDOM) else _file(TINY, pretrained)


def _file(name: str, pretrained: str) -> list[OptionError]:
    try:
        refuse_another(weight_file(pretrained), name)
    except MulkiError as error:
        return [OptionError(error.lines()[0], ("pretrained",))]
    return []


def refuse_another(file: WeightFile, name: str) -> None:
    """MulkiError where a file says that its weights are of another architecture."""
    other = file.known.architecture
    if other is not None and other not in (name, twin(name)):
        known = other in open_clip_models() or other == TINY
        hint = f"take them with model.name={other}" if known else ""
        raise MulkiError(f"{file.path}: the weights are those of {other}, and the model is {name}", hint)


def no_weights(name: str) -> str:
    """That an architecture is given no weights, and which there are."""
    tags = list(open_clip_tags(name))
    listed = ", ".join(sorted(tags, key=lambda tag: tag != "openai")[:6]) + (", ..." if len(tags) > 6 else "")
    known = f"a tag of open_clip ({listed}), " if tags else ""
    return f"missing: {name} is an architecture without weights; give {known}a file of weights, or `{RANDOM}` for random ones"


def unknown_tag(name: str, pretrained: str) -> str:
    """That there are no such weights, and what may have been meant."""
    hint = did_you_mean(pretrained, [*open_clip_tags(name), RANDOM])
    return f"open_clip has no weights {pretrained!r} for {name} ({hint}), and there is no such file"


def options_as_known(options: Mapping[str, Any]) -> TrainedWith:
    """The properties of weights that a recipe states."""
    return TrainedWith(
        quickgelu=options.get("quickgelu"),
        mean=tuple(options["mean"]) if options.get("mean") is not None else None,
        std=tuple(options["std"]) if options.get("std") is not None else None,
        interpolation=options.get("interpolation"),
        resize_mode=options.get("resize_mode"),
    )
