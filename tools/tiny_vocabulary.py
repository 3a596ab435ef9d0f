"""Byte-pair merges for mulki-tiny's tokenizer, in the format that open_clip's SimpleTokenizer reads."""

from __future__ import annotations

import gzip
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import regex
from open_clip.tokenizer import bytes_to_unicode

_WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")


def learn_merges(texts: Iterable[str], count: int) -> list[tuple[str, str]]:
    """The `count` most frequent pairs, merged one after another (Sennrich et al., 2016, arXiv 1508.07909).

    Ties go to the pair that comes first in alphabetical order, so that the result depends on nothing else.
    """
    alphabet = bytes_to_unicode()
    words: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        for word in _WORDS.findall(text.lower()):
            symbols = [alphabet[b] for b in word.encode()]
            words[(*symbols[:-1], symbols[-1] + "</w>")] += 1
    merges = []
    for _ in range(count):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, n in words.items():
            for pair in pairwise(word):
                pairs[pair] += n
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = Counter({_merged(word, best): n for word, n in words.items()})
    return merges


def _merged(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    out, i = [], 0
    while i < len(word):
        if word[i : i + 2] == pair:
            out.append(word[i] + word[i + 1])
            i += 2
        else:
            out.append(word[i])
            i += 1
    return tuple(out)


def write_merges(merges: list[tuple[str, str]], path: Path) -> None:
    """One pair a line below a header, gzipped without a time stamp: the same merges give the same bytes."""
    text = "\n".join(["#version: mulki-tiny", *(" ".join(pair) for pair in merges)])
    path.write_bytes(gzip.compress(text.encode(), mtime=0))
