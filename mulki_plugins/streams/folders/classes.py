"""The class folders of a task: which they are, the images in them, and the class names that their names give."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import groupby

from mulki_plugins.errors import MulkiError
from mulki_plugins.streams.entries import is_image, is_system, walk
from mulki_plugins.streams.names import class_key


def class_folders(root: str, leave_out: Collection[str] = ()) -> list[str]:
    """The names of the folders in a folder, sorted, without system folders and those of `leave_out`. MulkiError."""
    unwanted = {same_spelling(name) for name in leave_out}
    return [name for name in all_folders(root) if not is_system(name) and same_spelling(name) not in unwanted]


def all_folders(root: str) -> list[str]:
    """The names of all folders in a folder, sorted. MulkiError if it cannot be read."""
    return _list(root, lambda entry: entry.is_dir())


def files_in(root: str) -> list[str]:
    """The names of the files directly in a folder, sorted, without system files. MulkiError if it cannot be read."""
    return _list(root, lambda entry: not is_system(entry.name) and not entry.is_dir())


def holds_images(root: str) -> bool:
    """Whether an image lies directly in a folder. MulkiError if it cannot be read."""
    return any(map(is_image, files_in(root)))


def _list(root: str, wanted: Callable[[os.DirEntry[str]], bool]) -> list[str]:
    try:
        with os.scandir(root) as entries:
            return sorted(entry.name for entry in entries if wanted(entry))
    except OSError as error:
        raise _unreadable(root, error) from error


def images_below(folder: str, *, broken_links: bool = False) -> Iterator[str]:
    """The image files below a folder as paths relative to it, unsorted, without system files.

    MulkiError if a folder cannot be read, or an image is no file or, unless they are asked for, a broken link.
    """
    return _files_below(folder, is_image, broken_links)


def others_below(folder: str) -> Iterator[str]:
    """The files below a folder that are not images, likewise."""
    return _files_below(folder, lambda name: not is_image(name))


def _files_below(folder: str, wanted: Callable[[str], bool], broken_links: bool = False) -> Iterator[str]:
    try:
        for path, entry in walk(folder):
            if entry.is_dir() or not wanted(entry.name):
                continue
            broken = broken_links and entry.is_symlink() and not os.path.exists(entry.path)
            if not entry.is_file() and is_image(entry.name) and not broken:
                raise MulkiError(f"{entry.path}: this is no file, or a link that leads nowhere")
            yield path
    except OSError as error:
        raise _unreadable(folder, error) from error


def _unreadable(path: str, error: OSError) -> MulkiError:
    return MulkiError(f"{error.filename or path}: cannot be read: {error.strerror or error}")


def same_spelling(folder: str) -> str:
    """Equal for names that differ only in how a file system encodes accents."""
    return unicodedata.normalize("NFC", folder)


def match_folders(names: Sequence[str], others: Sequence[str]) -> dict[str, str]:
    """For each class folder its counterpart in the other part: spelt alike, or the only one that differs only in case."""
    matches: dict[str, str] = {}
    for spell in (str, same_spelling, lambda name: same_spelling(name).casefold()):
        left = [[name for name in names if name not in matches], sorted({*others}.difference(matches.values()))]
        mine, theirs = ({key: list(group) for key, group in groupby(sorted(part, key=spell), spell)} for part in left)
        for key, alike in mine.items():
            if len(alike) == 1 and len(theirs.get(key, ())) == 1:
                matches[alike[0]] = theirs[key][0]
    return matches


_INDEX = re.compile(
    r"n\d{8}[-_. ]+(?=\S)"  # WordNet's number, as in ImageNet
    r"|\d+\.\s*(?=[^\d\s])"  # 12.dog
    r"|0\d*\s*[-_ ]\s*(?=[^\W\d_])"  # 012_dog
)
"""A number that counts the folders and is not part of the name."""
_COUNTED = re.compile(r"\d+\s*[-_. ]\s*(?=[^\W\d_])")
"""The same without a leading zero: an index only if every folder of a task has one, since `747-SP` is a name."""
_KEBAB = re.compile(r"[^\W\d_]{3,}(-[^\W\d_]{3,})+")
_JOINED = re.compile(r"(?<=[^\W\d_]{2})\+(?!ve(?![^\W\d_]))(?=[^\W\d_]{2})|_|(?<=[^\W_])--+(?=[^\W_])")
"""Characters that stand for a space. A plus sign does so only between words: `A+`, `C++`, `Disney+` and `AB+ve` keep theirs."""


def readable_names(folders: Sequence[str]) -> list[str]:
    """The class names of class folders: `001.Black_footed_Albatross` gives `Black footed Albatross`.

    A leading index is dropped; underscores and plus signs between words become spaces. So do the hyphens of
    `golden-retriever` and the bounds of `GoldenRetriever` if nothing else separates the words. Case is kept.
    A name may become empty.
    """
    names = [same_spelling(folder).strip() for folder in folders]
    if len(names) > 1 and all(_COUNTED.match(name) or _INDEX.match(name) for name in names):
        uncounted = [
            _words(_INDEX.sub("", name, count=1) if _INDEX.match(name) else _COUNTED.sub("", name, count=1))
            for name in names
        ]
        if len(set(map(class_key, uncounted))) == len(uncounted):
            return uncounted
        return [_words(name) for name in names]  # `1_euro` and `2_euro`: the number is the name
    return [_words(name[match.end() :] if (match := _INDEX.match(name)) else name) for name in names]


def without_count(folder: str) -> str:
    """The class name of a folder whose leading number counts the folders: `1_red_fox` gives `red fox`."""
    return _words(_COUNTED.sub("", same_spelling(folder).strip(), count=1))


def _words(name: str) -> str:
    if not re.search(r"[\s_+]", name):
        name = name.replace("-", " ") if _KEBAB.fullmatch(name) else _split_humps(name)
    return " ".join(_JOINED.sub(" ", name).split())


def _split_humps(name: str) -> str:
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
