"""Adapters: weights added to a model, whose own weights may stay frozen."""

from mulki_plugins.adapters.lora import LoRA
from mulki_plugins.adapters.null_space import NullSpace
from mulki_plugins.models.adapter import Adapter

__all__ = ["Adapter", "LoRA", "NullSpace"]
