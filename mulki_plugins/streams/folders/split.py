"""A training and a test part out of one folder: for each class alone, by a seed, whatever order files are found in."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence


def split(files: Sequence[str], share: float, seed: int) -> tuple[list[str], list[str]]:
    """The files of one class, at least two, as (train, test), each sorted; test has `share` of them, at least one each.

    A hash of the seed and the file's path, which begins with the class folder, ranks the files, so that the parts depend
    on nothing else: not on other classes, nor on the machine; a new file moves at most one of the others.
    """
    ranked = sorted(files, key=lambda file: (_rank(seed, file), file))
    held_out = min(max(int(share * len(files) + 0.5), 1), len(files) - 1)
    return sorted(ranked[held_out:]), sorted(ranked[:held_out])


def _rank(seed: int, file: str) -> bytes:
    said = unicodedata.normalize("NFC", f"{seed}\0{file}")
    return hashlib.sha256(said.encode("utf-8", "surrogateescape")).digest()
