"""The former name of `mulki_plugins.types`, kept for packages that import from it."""

from mulki_plugins.types import BelowOne, Count, Fraction, Natural, Positive, Range, Weight, checked

__all__ = ["BelowOne", "Count", "Fraction", "Natural", "Positive", "Range", "Weight", "checked"]
