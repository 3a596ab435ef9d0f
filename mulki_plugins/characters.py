"""How characters look: what is safe to print, how wide a text is on a terminal, which characters pass for others."""

from __future__ import annotations

import re
import unicodedata

_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029]")
_BY_CATEGORY = {"Zs": " ", "Pd": "-", "Pi": "'", "Pf": "'"}
_LOOKALIKES = {
    **dict.fromkeys("\u201a", "'"),
    **dict.fromkeys("\u201c\u201d\u201e\u201f\u00ab\u00bb", '"'),
    "\u2212": "-",
}
CLOSING = "\u2018\u2019\u201c\u201d\u00ab\u00bb\u2039\u203a\uff02\uff07"
OPENING = CLOSING + "\u201a\u201b\u201e\u201f"
"""Typographic quotes; which of them open differs between languages."""


def printable(text: str) -> str:
    """A text from a file or a command line, on one line and without control characters."""
    return _UNPRINTABLE.sub("?", text)


def _ascii_twin(character: str) -> str | None:
    """The ASCII character that this one passes for, empty for an invisible one; None if it passes for none."""
    if character.isascii():
        return None
    if character in _LOOKALIKES:
        return _LOOKALIKES[character]
    if "\uff01" <= character <= "\uff5e":  # fullwidth forms of ASCII
        return unicodedata.normalize("NFKC", character)
    category = unicodedata.category(character)
    return "" if category == "Cf" else _BY_CATEGORY.get(category)


def is_invisible(character: str) -> bool:
    """Whether a character looks like a space or is not visible at all."""
    return not character.isascii() and unicodedata.category(character) in ("Zs", "Cf")


def simplify(text: str) -> str:
    """The text with each lookalike replaced by its ASCII twin."""
    return "".join(c if (twin := _ascii_twin(c)) is None else twin for c in text)


def name_character(character: str) -> str:
    """`a no-break space (U+00A0)`."""
    name = unicodedata.name(character, "control character").lower()
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name} (U+{ord(character):04X})"


def name_lookalikes(text: str) -> str:
    """The first two characters that pass for others: `a no-break space (U+00A0)`; empty if there are none."""
    odd = list(dict.fromkeys(c for c in text if _ascii_twin(c) is not None))
    return " and ".join(map(name_character, odd[:2]))


def width(text: str) -> int:
    """The columns that a text takes on a terminal: two for most East Asian characters, none for an accent."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def pad(text: str, columns: int, right: bool = False) -> str:
    """The text padded with spaces to so many columns; `right` aligns it to the right."""
    fill = " " * (columns - width(text))
    return fill + text if right else text + fill


_DIRECTION = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def legible(text: str, longest: int | None = 80) -> str:
    """A name for a terminal or a page: on one line, without characters that steer or reorder it, cut after `longest`."""
    text = _DIRECTION.sub("", printable(text))
    return text if longest is None or len(text) <= longest else f"{text[: longest - 3]}..."
