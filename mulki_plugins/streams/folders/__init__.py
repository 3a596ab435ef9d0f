"""A stream of the user's own images: a folder for each class. Its names are loaded when they are used."""

from mulki_plugins.libraries import load_lazily

__all__ = ["folders"]

__getattr__ = load_lazily(__name__, {"folders": "stream"})
