"""The kit with which an author tests a plugin or a stream. Names are loaded when they are used, since they bring torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mulki_plugins.libraries import load_lazily
from mulki_plugins.testing.names import PLUGIN_CHECKS, STREAM_CHECKS

if TYPE_CHECKING:
    from mulki_plugins.testing.kit import CheckFailed, check_plugin, check_stream
    from mulki_plugins.testing.trial import Trial, train_two_tasks
    from mulki_plugins.testing.world import small_model, small_stream

__all__ = [
    "PLUGIN_CHECKS",
    "STREAM_CHECKS",
    "CheckFailed",
    "Trial",
    "check_plugin",
    "check_stream",
    "small_model",
    "small_stream",
    "train_two_tasks",
]

__getattr__ = load_lazily(
    __name__,
    {
        "CheckFailed": "kit",
        "Trial": "trial",
        "check_plugin": "kit",
        "check_stream": "kit",
        "small_model": "world",
        "small_stream": "world",
        "train_two_tasks": "trial",
    },
)
