"""Fonts for names in any script: matplotlib's own font has no Chinese, Japanese, Korean, Indic letters or emoji."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterable, Sequence

from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

OWN = "DejaVu Sans"
"""The font that comes with matplotlib."""
_FIRST = ("noto sans cjk", "noto sans", "source han", "wenquanyi", "microsoft yahei", "pingfang", "hiragino", "malgun")
_NOT_THESE = ("color", "last resort", "lastresort")
"""Fonts that matplotlib cannot draw, and those that have nothing but boxes."""
_IGNORED = {"Cf", "Mn", "Me", "Cc"}
"""Characters that a font may draw as nothing, or on top of another."""


def families_for(texts: Iterable[str]) -> list[str]:
    """The font families that the texts take together, matplotlib's own first; each glyph comes from the first that has it."""
    missing = {c for text in texts for c in text} - _characters(_own_path())
    families = [OWN]
    for name, path in _installed() if missing else ():
        if here := missing & _characters(path):
            families.append(name)
            missing -= here
        if not missing:
            break
    return families


def drawable(text: str, families: Sequence[str]) -> str:
    """The text with what none of the fonts has in another form: without its accents, or as its number, [U+82B1]."""
    paths = dict(_installed())
    known = _characters(_own_path()).union(*(_characters(paths[name]) for name in families if name in paths))
    return "".join(c if c in known else _otherwise(c, known) for c in text)


def _otherwise(character: str, known: frozenset[str] | set[str]) -> str:
    plain = "".join(c for c in unicodedata.normalize("NFKD", character) if c in known)
    if plain or unicodedata.category(character) in _IGNORED:
        return plain
    return f"[U+{ord(character):04X}]"


def _own_path() -> str:
    return font_manager.findfont(OWN)


@functools.cache
def _installed() -> list[tuple[str, str]]:
    """Families and files of the installed upright fonts of ordinary weight, those with many scripts first."""
    found: dict[str, str] = {}
    for font in font_manager.fontManager.ttflist:
        ordinary = font.style == "normal" and str(font.weight) in ("400", "normal", "regular", "book")
        if ordinary and not any(word in font.name.lower() for word in _NOT_THESE):
            found.setdefault(font.name, font.fname)
    rank = {name: next((i for i, word in enumerate(_FIRST) if word in name.lower()), len(_FIRST)) for name in found}
    return sorted(found.items(), key=lambda item: (rank[item[0]], item[0]))


@functools.lru_cache(maxsize=512)
def _characters(path: str) -> frozenset[str]:
    """The characters of a font; none where it cannot be read."""
    try:
        return frozenset(map(chr, FT2Font(path).get_charmap()))
    except (OSError, RuntimeError, ValueError):
        return frozenset()
