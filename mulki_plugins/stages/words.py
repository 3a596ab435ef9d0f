"""Sentences beyond those of the batch: of generic words, which no task teaches, and of classes in each template."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import parametrize

from mulki_plugins.errors import MulkiError
from mulki_plugins.models.classifier import ClipClassifier
from mulki_plugins.models.text_tower import encode_sentences
from mulki_plugins.models.tokens import Tokens

SHORTEST = 4
"""Letters of a word: shorter entries of a vocabulary are mostly parts of words."""


def vocabulary_words(tokenizer: Any) -> list[str]:
    """The words of a tokenizer's own vocabulary, sorted: lower-case entries of at least four letters that end or begin a word.

    tokenizer: one of open_clip's. Entries of byte pairs end in `</w>`, those of sentence pieces begin with a mark, and those
    of word pieces that continue a word begin with `##`. Empty for a tokenizer that shows no vocabulary.
    """
    known: list[str] = list(getattr(tokenizer, "encoder", ()))
    inner: Any = getattr(tokenizer, "tokenizer", None)
    if hasattr(inner, "get_vocab"):
        known = list(inner.get_vocab())
    if any(entry.endswith("</w>") for entry in known):
        known = [entry.removesuffix("</w>") for entry in known if entry.endswith("</w>")]
    elif mark := next((mark for mark in ("▁", "Ġ") if any(entry.startswith(mark) for entry in known)), ""):
        known = [entry.removeprefix(mark) for entry in known if entry.startswith(mark)]
    return sorted({w for w in known if len(w) >= SHORTEST and w.isascii() and w.isalpha() and w.islower()})


def words_of(names: Collection[str]) -> set[str]:
    """The words that class names consist of, in lower case: of `snow_leopard` and `SnowLeopard` both."""
    plain = (re.sub("['’]", "", name) for name in names)
    spaced = (re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name) for name in plain)
    return {word.casefold() for name in spaced for word in re.findall(r"[^\W\d_]+", name)}


def generic_sentences(words: Sequence[str], templates: Sequence[str], count: int, longest: int) -> list[str]:
    """Sentences about made-up names of one to `longest` words, each in a template; all drawn from torch's random numbers.

    templates: with `{}` for the name. MulkiError without words.
    """
    if not words:
        raise MulkiError(
            "preserving: no generic words: the model's tokenizer shows no vocabulary, or the classes use all of it",
            "list some, such as `words: [bridge, ladder, river]`",
        )
    lengths, forms = torch.randint(longest, (count,)) + 1, torch.randint(len(templates), (count,))
    drawn = torch.randint(len(words), (count, longest)).tolist()
    names = [" ".join(words[i] for i in row[:n]) for row, n in zip(drawn, lengths.tolist(), strict=True)]
    return [templates[form].replace("{}", name) for form, name in zip(forms.tolist(), names, strict=True)]


def sentence_features(model: ClipClassifier, tokens: Tensor, length: int) -> Tensor:
    """Unit-norm features [N, d] of sentences that belong to no task, at least in single precision, with their gradient.

    tokens: ids [N, L], on the model's device; length: how many of the L matter, see `length_needed`.
    """
    with parametrize.cached():
        features = encode_sentences(model.clip, tokens, length)
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=1)


class Phrases:
    """The class sentences of a model's tasks in each of their templates."""

    def __init__(self, model: ClipClassifier) -> None:
        self.model = model
        self._tokens = Tokens(model.tokenizer, model.prompts)

    def templates(self, task: int) -> int:
        """The number of templates of a task."""
        return len(self.model.prompts[task].templates)

    def features(self, chosen: Sequence[tuple[int, int]], classes: Tensor | None = None) -> Tensor:
        """Unit-norm text features of the classes of tasks, each (task, template) of those chosen after the other, [N, d].

        classes: [N], on the host, to encode only these of the concatenated classes; None for all. With their gradient.
        """
        device, tasks = self.model.scale.device, [task for task, _ in chosen]
        each = [
            self._tokens.on(device, [task], True).reshape(
                self.templates(task), -1, self._tokens.of(task, True).shape[1]
            )
            for task in tasks
        ]
        length = self._tokens.length(self.model.clip, tasks, True)
        parts = [sentences[template] for sentences, (_, template) in zip(each, chosen, strict=True)]
        tokens = torch.cat(parts)
        tokens = tokens if classes is None else tokens[classes.to(device, non_blocking=True)]
        if self.model.routes.adapter is None:
            return sentence_features(self.model, tokens, length)
        owners = torch.arange(len(parts)).repeat_interleave(torch.tensor([len(part) for part in parts]))
        return self._by_route(tasks, owners if classes is None else owners[classes], tokens, length)

    def _by_route(self, tasks: Sequence[int], owners: Tensor, tokens: Tensor, length: int) -> Tensor:
        """Features of sentences, each by the route of its task; owners: [N], the position of that task, on the host."""
        rows, features = [], []
        for i, task in enumerate(tasks):
            mine = (owners == i).nonzero()[:, 0]
            if len(mine):
                with self.model.routes.taking(self.model.routes.of_texts(task)):
                    features.append(sentence_features(self.model, tokens[mine.to(tokens.device)], length))
                rows.append(mine)
        return torch.cat(features)[torch.cat(rows).argsort().to(tokens.device)]
