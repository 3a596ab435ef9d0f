"""CLIP's byte-pair encoding, for counting tokens where torch is not imported: what `mulki validate` knows of a tokenizer.

It differs from open_clip's SimpleTokenizer only where that mends broken Unicode. A run goes by the tokenizer itself.
"""

from __future__ import annotations

import functools
import gzip
import html
import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from mulki_plugins.models.check import TINY
from mulki_plugins.models.context import Reading
from mulki_plugins.registry.open_clip_names import open_clip_config, open_clip_folder

_HERE = Path(__file__).parent
_WORDS = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|(?:[^\s\w]|_)+", re.IGNORECASE)
_MERGES = 49152 - 256 - 2


class BytePairs:
    """A tokenizer by its file of merges, and how many tokens the model reads."""

    def __init__(self, merges: Path, length: int) -> None:
        lines = gzip.decompress(merges.read_bytes()).decode("utf-8").split("\n")[1 : _MERGES + 1]
        self._ranks = {tuple(line.split()): rank for rank, line in enumerate(lines)}
        self._alphabet = _alphabet()
        self.length = length

    def read(self, texts: Sequence[str]) -> Reading:
        """What the model reads of sentences, between the tokens of the start and the end."""
        tokens = [self.encode(text) for text in texts]
        cut = [len(found) > self.length - 2 for found in tokens]
        return Reading(self.length, [tuple(found[: self.length - 2]) for found in tokens], cut, cut)

    def encode(self, text: str) -> list[str]:
        """The tokens of a text, each as what it stands for."""
        text = " ".join(html.unescape(html.unescape(text)).split()).lower()
        words = ("".join(self._alphabet[byte] for byte in word.encode()) for word in _WORDS.findall(text))
        return [token for word in words for token in self._merged(word)]

    def _merged(self, word: str) -> list[str]:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pairs = [(self._ranks.get(pair, _MERGES), pair) for pair in itertools.pairwise(parts)]
            rank, best = min(pairs)
            if rank == _MERGES:
                break
            merged: list[str] = []
            for part in parts:
                if merged and (merged[-1], part) == best:
                    merged[-1] += part
                else:
                    merged.append(part)
            parts = merged
        return parts


@functools.cache
def byte_pairs_of(model: str) -> BytePairs | None:
    """The tokenizer of a model by its name; None where it has another kind, which only its own package can count with."""
    if model == TINY:
        return BytePairs(_HERE / "tiny" / "mulki-tiny-merges.txt.gz", 16)
    folder, text = open_clip_folder(), open_clip_config(model).get("text_cfg", {})
    if folder is None or not text or {"hf_tokenizer_name", "hf_model_name", "tokenizer_kwargs"} & set(text):
        return None
    return BytePairs(folder / "bpe_simple_vocab_16e6.txt.gz", int(text.get("context_length", 77)))


def _alphabet() -> list[str]:
    """A printable letter for each byte, as GPT-2's encoding has it."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
