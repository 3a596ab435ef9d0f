"""Mistakes in the options of a stage that their types do not show. Imports no torch, so `mulki validate` finds them too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mulki_plugins.errors import OptionError


def check_adding(options: Mapping[str, Any]) -> list[OptionError]:
    """Without a relation and without features there is nothing to distil. Divided targets need classes of earlier tasks."""
    if options["targets"] == "divided" and options["classes"] == "task":
        what = "divided gives the previous teacher the classes of earlier tasks, but classes: task has none of them"
        return [OptionError(f"{what}; set classes to seen", ("targets",))]
    if _has_relations(options) or options["features"]:
        return []
    return [OptionError("expected at least one above 0, or features above 0", ("relations",))]


def check_recalling(options: Mapping[str, Any]) -> list[OptionError]:
    """Without a relation there is nothing to distil."""
    return [] if _has_relations(options) else [OptionError("expected at least one above 0", ("relations",))]


def check_preserving(options: Mapping[str, Any]) -> list[OptionError]:
    """Without a factor above 0 nothing is preserved."""
    factors = ("logits", "texts", "orthogonal", "features")
    if any(options[name] for name in factors):
        return []
    return [OptionError("expected at least one of logits, texts, orthogonal and features above 0")]


def check_distinguishing(options: Mapping[str, Any]) -> list[OptionError]:
    """A mixture divides by the sum of both scores, so they must not be negative."""
    if options["weights"] == "mixture" and options["score"] == "margin":
        return [OptionError("a mixture needs scores of at least 0, and a margin may be negative", ("weights",))]
    return []


def check_connecting(options: Mapping[str, Any]) -> list[OptionError]:
    """Importances of the initial weights need importances at all, and a share of these weights."""
    if options["initial_importance"] and not (options["importance"] and options["initial"]):
        return [OptionError("expected importance true and initial above 0", ("initial_importance",))]
    return []


def refuse(stage: object, mistakes: list[OptionError]) -> None:
    """ValueError with the first mistake, for a stage that is created in Python."""
    for mistake in mistakes:
        raise ValueError(": ".join([type(stage).__name__, *map(str, mistake.path), mistake.message]))


def _has_relations(options: Mapping[str, Any]) -> bool:
    """By default every relation counts."""
    return options["relations"] is None or any(options["relations"].values())
