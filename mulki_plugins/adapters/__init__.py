"""Adapters: weights added to a model, whose own weights may stay frozen."""

from mulki_plugins.adapters.experts import Experts
from mulki_plugins.adapters.lora import LoRA
from mulki_plugins.adapters.null_space import NullSpace
from mulki_plugins.adapters.prompts import ContextPrompts
from mulki_plugins.models.adapter import Adapter, RoutedAdapter

__all__ = ["Adapter", "ContextPrompts", "Experts", "LoRA", "NullSpace", "RoutedAdapter"]
