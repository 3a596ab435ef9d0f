"""Class names out of folder names: `001.Black_footed_Albatross` reads `Black footed Albatross`."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence

from mulki_plugins.characters import printable

_INDEX = re.compile(
    r"n\d{8}[-_. ]+(?=\S)"  # WordNet's number, as ImageNet and its kin write it
    r"|\d+\.\s*(?=[^\d\s])"  # 12.dog
    r"|0\d*\s*[-_ ]\s*(?=[^\W\d_])"  # 012_dog
)
"""A number that counts the folders and is no part of the name."""
_COUNTED = re.compile(r"\d+\s*[-_. ]\s*(?=[^\W\d_])")
"""The same without a leading zero: only where every folder of a task has one, for `747-SP` is a name."""
_KEBAB = re.compile(r"[^\W\d_]{3,}(-[^\W\d_]{3,})+")
_JOINED = re.compile(r"(?<=[^\W\d_]{2})\+(?!ve(?![^\W\d_]))(?=[^\W\d_]{2})|_|(?<=[^\W_])--+(?=[^\W_])")
"""What stands for a space. A plus sign does so only between words: `A+`, `C++`, `Disney+` and `AB+ve` keep theirs."""


def readable_names(folders: Sequence[str]) -> list[str]:
    """What the classes in folders of these names are called, in their order.

    A leading index goes, underscores and plus signs between words become spaces, and so do the hyphens of
    `golden-retriever` and the bounds of `GoldenRetriever` where nothing else parts the words. Upper and lower case stay.
    A name may come out empty.
    """
    names = [unicodedata.normalize("NFC", folder).strip() for folder in folders]
    if len(names) > 1 and all(_COUNTED.match(name) or _INDEX.match(name) for name in names):
        counted = [
            _words(_INDEX.sub("", name, count=1) if _INDEX.match(name) else _COUNTED.sub("", name, count=1))
            for name in names
        ]
        if len(set(map(told_apart, counted))) == len(counted):
            return counted
        return [_words(name) for name in names]  # `1_euro` and `2_euro`: the number is the name
    return [_words(name[match.end() :] if (match := _INDEX.match(name)) else name) for name in names]


def _words(name: str) -> str:
    if not re.search(r"[\s_+]", name):
        name = name.replace("-", " ") if _KEBAB.fullmatch(name) else _without_humps(name)
    return " ".join(_JOINED.sub(" ", name).split())


def _without_humps(name: str) -> str:
    """`GoldenRetriever` -> `Golden Retriever`, `DVDPlayer` -> `DVD Player`; `iPhone`, `McDonald` and `F150` stay."""
    if not name.isalpha():
        return name
    parts, start = [], 0
    for i in range(2, len(name) - 1):
        hump = name[i].isupper() and name[i + 1].islower()
        before = name[i - 2 : i]
        if hump and ((before.islower() and before.isalpha()) or before.isupper()):
            parts.append(name[start:i])
            start = i
    return " ".join([*parts, name[start:]])


LONGEST = 200


def names_a_task(name: str) -> bool:
    """Whether a text can name a task, which stands in tables, tags of curves and names of files."""
    fine = bool(name.strip()) and name == name.strip() and printable(name) == name and len(name) <= LONGEST
    return fine and name not in (".", "..") and not any(c in name for c in "/\\")


def same_task(name: str) -> str:
    """A task's name as it is compared with those of the others."""
    return " ".join(unicodedata.normalize("NFC", name).split())


def has_one_place(template: str) -> bool:
    """Whether a template has `{}`, which alone is replaced by a class's name, and no other braces."""
    return "{}" in template and not any(brace in template.replace("{}", "") for brace in "{}")


def told_apart(name: str) -> str:
    """What a CLIP reads of a name, whose tokenizer lowers the case and joins spaces; an underscore counts as a space."""
    return " ".join(unicodedata.normalize("NFC", name).casefold().replace("_", " ").split())


def same_names(folders: Sequence[str], names: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Each name that several folders read, with these folders."""
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for folder, name in zip(folders, names, strict=True):
        found[told_apart(name)].append((folder, name))
    return [(group[0][1], [folder for folder, _ in group]) for group in found.values() if len(group) > 1]
