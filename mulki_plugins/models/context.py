"""Whether a model reads the sentences of its classes to their end: what follows its last token is cut off.

Imports no torch, so that `mulki validate` can ask the same of the tokenizers that it knows (models/byte_pairs.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Protocol

from attrs import frozen

from mulki_plugins.errors import Mistakes
from mulki_plugins.models.prompts import HasPrompts, sentences

if TYPE_CHECKING:
    from torch import Tensor


@frozen
class Reading:
    """What a model reads of sentences."""

    length: int
    """Tokens at most."""
    tokens: Sequence[Hashable]
    """Of each sentence; two of the same are one sentence to the model."""
    cut: Sequence[bool]
    """Whether it is certainly cut."""
    full: Sequence[bool]
    """Whether it may be."""


class NamedPrompts(HasPrompts, Protocol):
    """Class names and templates with the name of their task."""

    @property
    def name(self) -> str: ...


def check_sentences(
    tasks: Sequence[NamedPrompts], read: Callable[[Sequence[str]], Reading], *, across: bool = False
) -> list[str]:
    """Warnings of sentences that are cut. Mistakes where two classes read the same since they are cut.

    These are two classes of one task, whose first template's sentences training goes by; and where `across` says that the
    classes of several tasks are told apart, two of any tasks.
    """
    wrong, warnings, length = [], [], 0
    everywhere: dict[Hashable, list[tuple[str, str, bool]]] = defaultdict(list)
    for task in tasks:
        texts = [text for group in sentences(task, all_templates=True) for text in group]
        reading, classes = read(texts), len(task.class_names)
        length = reading.length
        groups: dict[Hashable, list[int]] = defaultdict(list)
        for place, name in enumerate(task.class_names):
            groups[reading.tokens[place]].append(place)
            everywhere[tuple(reading.tokens[place::classes])].append(
                (task.name, name, any(reading.full[place::classes]))
            )
        for places in groups.values():
            names = [task.class_names[place] for place in places]
            if not _several(names):
                continue
            if any(reading.full[place] for place in places):
                wrong.append(_collapsed(f"task {task.name}", names, length))
            else:
                warnings.append(f"warning: task {task.name}: the model reads the same for the classes {_listed(names)}")
        if cut := [text for text, is_cut in zip(texts, reading.cut, strict=True) if is_cut]:
            warnings.append(_too_long(task.name, cut, len(texts), length))
    for found in everywhere.values() if across else ():
        names = [name for _, name, _ in found]
        of_tasks = list(dict.fromkeys(task for task, _, _ in found))
        if len(of_tasks) > 1 and _several(names) and any(is_full for _, _, is_full in found):
            wrong.append(_collapsed(f"tasks {', '.join(of_tasks)}", names, length))
    if wrong:
        raise Mistakes(wrong)
    return warnings


def reader_of(tokenizer: Callable[..., Tensor]) -> Callable[[Sequence[str]], Reading]:
    """What a model with this tokenizer reads.

    Of a tokenizer that takes no `context_length`, nobody knows whether a full row just fits or is cut.
    """

    def read(texts: Sequence[str]) -> Reading:
        tokens = tokenizer(list(texts)).cpu()
        length = tokens.shape[1]
        try:
            longer = tokenizer(list(texts), context_length=2 * length).cpu()
        except TypeError:
            longer = tokens
        keys = [row.contiguous().numpy().tobytes() for row in tokens]
        if longer.shape[1] < 2 * length:
            return Reading(length, keys, [False] * len(texts), (tokens[:, -1] != 0).tolist())
        rest = longer[:, length:]
        cut = ((longer[:, :length] != tokens).any(1) | (rest != rest[:, -1:]).any(1)).tolist()
        return Reading(length, keys, cut, cut)

    return read


def _several(names: Sequence[str]) -> bool:
    """Whether these are different names, and not one that is written in several ways."""
    return len({" ".join(name.casefold().split()) for name in names}) > 1


def _collapsed(where: str, names: Sequence[str], length: int) -> str:
    """That classes cannot be told apart, and what to do."""
    advice = "write shorter class_names, or take a model that reads more"
    if length < 77:
        advice += " (CLIP's own read 77)"
    return (
        f"{where}: {len(names)} classes read the same, since the model reads {length} tokens and cuts their sentences"
        f" there: {_listed(names)}; {advice}"
    )


def _too_long(task: str, texts: Sequence[str], count: int, length: int) -> str:
    """That sentences are cut, and which."""
    are = "sentence is" if len(texts) == 1 else "sentences are"
    return (
        f"warning: task {task}: {len(texts)} of {count} {are} longer than the {length} tokens that the model reads, and cut:"
        f" {_listed(texts, 3)}"
    )


def _listed(names: Sequence[str], most: int = 4) -> str:
    """A few names, and how many more there are."""
    some = ", ".join(repr(name if len(name) <= 90 else name[:87] + "...") for name in names[:most])
    return some + (f" and {len(names) - most} more" if len(names) > most else "")
