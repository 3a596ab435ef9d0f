"""What characters look like: how wide a text is on a terminal, and which of its characters are easily mistaken."""

from __future__ import annotations

import unicodedata

_ORDINARY = {"Zs": " ", "Pd": "-", "Pi": "'", "Pf": "'"}
_LOOKALIKES = {
    **dict.fromkeys("\u201a", "'"),
    **dict.fromkeys("\u201c\u201d\u201e\u201f\u00ab\u00bb", '"'),
    "\u2212": "-",
}
CLOSING = "\u2018\u2019\u201c\u201d\u00ab\u00bb\u2039\u203a\uff02\uff07"
OPENING = CLOSING + "\u201a\u201b\u201e\u201f"
"""Typographic quotes; which one opens differs from language to language."""


def ordinary(character: str) -> str | None:
    """What a character is easily mistaken for: a space, a hyphen, a quote, nothing at all. None for any other."""
    if character.isascii():
        return None
    if character in _LOOKALIKES:
        return _LOOKALIKES[character]
    if "\uff01" <= character <= "\uff5e":  # fullwidth forms of ASCII
        return unicodedata.normalize("NFKC", character)
    category = unicodedata.category(character)
    return "" if category == "Cf" else _ORDINARY.get(category)


def is_invisible(character: str) -> bool:
    """Whether a character looks like a space, or like nothing."""
    return not character.isascii() and unicodedata.category(character) in ("Zs", "Cf")


def simplified(text: str) -> str:
    """The text with ordinary characters in place of those that are mistaken for them."""
    return "".join(c if (plain := ordinary(c)) is None else plain for c in text)


def name_of(character: str) -> str:
    """`a no-break space (U+00A0)`."""
    name = unicodedata.name(character, "control character").lower()
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name} (U+{ord(character):04X})"


def mistakable(text: str) -> str:
    """Names the first characters that are easily mistaken for others: `a no-break space (U+00A0)`; empty without any."""
    odd = list(dict.fromkeys(c for c in text if ordinary(c) is not None))
    return " and ".join(map(name_of, odd[:2]))


def width(text: str) -> int:
    """How many columns a terminal takes for a text: two for most of the characters of East Asia, none for an accent."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def padded(text: str, columns: int, right: bool = False) -> str:
    """The text filled up with spaces to so many columns; `right` puts them before it."""
    fill = " " * (columns - width(text))
    return fill + text if right else text + fill
