"""Heads: what turns the features of images into logits."""

from mulki_plugins.heads.rail import Rail
from mulki_plugins.models.head import Head, Scope, TextHead, TrainingImages

__all__ = ["Head", "Rail", "Scope", "TextHead", "TrainingImages"]
