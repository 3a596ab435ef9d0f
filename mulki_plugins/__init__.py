"""MulKI: vision-language models that keep learning. Importing this imports neither torch nor Avalanche."""

from mulki_plugins.registry.hookspecs import hookimpl

__version__ = "0.1.0"

__all__ = ["__version__", "hookimpl"]
