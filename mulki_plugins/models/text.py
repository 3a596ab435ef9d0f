"""What a model reads about its classes: class names, templates, sentences, and how many tokens of them it takes in.

Imports no torch, so that `mulki validate` can check sentences too.
"""

from __future__ import annotations

import functools
import gzip
import html
import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from attrs import field, frozen

from mulki_plugins.errors import Mistakes
from mulki_plugins.models.check import TINY
from mulki_plugins.registry.builtin import open_clip_config, open_clip_folder

if TYPE_CHECKING:
    from torch import Tensor


class HasPrompts(Protocol):
    """Anything with class names and prompt templates, such as a stream's Task."""

    @property
    def class_names(self) -> Sequence[str]: ...

    @property
    def templates(self) -> Sequence[str]: ...


class NamedPrompts(HasPrompts, Protocol):
    """Class names and templates of a task with a name."""

    @property
    def name(self) -> str: ...


def _as_templates(values: Sequence[str]) -> tuple[str, ...]:
    return (values,) if isinstance(values, str) else tuple(values)


def _as_names(values: Sequence[str]) -> tuple[str, ...]:
    if isinstance(values, str):
        raise ValueError(f"class_names: expected a list of texts, such as [{values!r}], got the text {values!r}")
    return tuple(values)


def _validate_texts(_: object, attribute: object, value: Sequence[str]) -> None:
    name = getattr(attribute, "name", "prompts")
    if not value:
        raise ValueError(f"{name}: expected at least one, got none")
    if wrong := [text for text in value if not isinstance(text, str)]:
        raise ValueError(f"{name}: expected texts, got {wrong[0]!r}")


@frozen
class Prompts:
    """The class names of one task, and the templates that turn a name into a sentence; `{}` stands for the name."""

    class_names: tuple[str, ...] = field(converter=_as_names, validator=_validate_texts)
    templates: tuple[str, ...] = field(
        default=("a photo of a {}.",), converter=_as_templates, validator=_validate_texts
    )


def as_prompts(tasks: HasPrompts | Sequence[HasPrompts]) -> tuple[Prompts, ...]:
    """The prompts of each task; a single task needs no list around it. ValueError for anything else."""
    several: tuple[Any, ...] = (tasks,) if hasattr(tasks, "class_names") else tuple(tasks)
    for task in several:
        if not hasattr(task, "class_names") or not hasattr(task, "templates"):
            raise ValueError(f"tasks: expected a stream's tasks or Prompts([names], [templates]), got {task!r}")
    return tuple(Prompts(task.class_names, task.templates) for task in several)


def sentences(prompts: HasPrompts, all_templates: bool) -> list[list[str]]:
    """One list of sentences per template, in the templates' order: `[templates][classes]`."""
    templates = prompts.templates if all_templates else prompts.templates[:1]
    return [[template.replace("{}", name) for name in prompts.class_names] for template in templates]


@frozen
class Union:
    """The classes of several tasks as one set."""

    places: list[list[int]]
    """For each task, the index of each of its classes in the union."""
    first: list[int]
    """For each class of the union, the index of its first occurrence among the concatenated classes of all tasks."""


def union_of(tasks: Sequence[Sequence[Hashable]]) -> Union:
    """Unite the classes of several tasks, each class given by a description; equal descriptions become one class.

    Two classes of one task stay apart even if their descriptions are equal.
    """
    known: dict[Hashable, int] = {}
    places: list[list[int]] = []
    first: list[int] = []
    counted = 0
    for descriptions in tasks:
        row: list[int] = []
        for description in descriptions:
            place = known.get(description)
            if place is None or place in row:
                place = len(first)
                first.append(counted)
            row.append(place)
            counted += 1
        for description, place in zip(descriptions, row, strict=True):
            known.setdefault(description, place)
        places.append(row)
    return Union(places, first)


# --- The context limit ------------------------------------------------------------------------------------------------


@frozen
class Reading:
    """What a model reads of some sentences."""

    length: int
    """The model's context length in tokens."""
    tokens: Sequence[Hashable]
    """The tokens of each sentence; the model cannot tell apart two sentences with the same tokens."""
    cut: Sequence[bool]
    """Whether each sentence is certainly cut off."""
    full: Sequence[bool]
    """Whether each sentence may be cut off."""


def check_sentences(
    tasks: Sequence[NamedPrompts],
    read: Callable[[Sequence[str]], Reading],
    *,
    across: bool = False,
    called: str = "task {}",
) -> list[str]:
    """Warnings about sentences that are cut off. Mistakes if this leaves two classes indistinguishable.

    Within a task only the first template counts, the one used in training. across: compare classes across tasks too,
    with all their templates. called: what a message calls a task, with {} for its name.
    """
    wrong, warnings, length = [], [], 0
    everywhere: dict[Hashable, list[tuple[str, str, bool]]] = defaultdict(list)
    for task in tasks:
        texts = [text for group in sentences(task, all_templates=True) for text in group]
        reading, classes, place = read(texts), len(task.class_names), called.replace("{}", task.name)
        length = reading.length
        groups: dict[Hashable, list[int]] = defaultdict(list)
        for c, name in enumerate(task.class_names):
            groups[reading.tokens[c]].append(c)
            everywhere[tuple(reading.tokens[c::classes])].append((task.name, name, any(reading.full[c::classes])))
        for group in groups.values():
            names = [task.class_names[c] for c in group]
            if not _differ(names):
                continue
            if any(reading.full[c] for c in group):
                wrong.append(_indistinguishable(place, names, length))
            else:
                warnings.append(f"warning: {place}: the model reads the same for the classes {_listed(names)}")
        if cut := [text for text, is_cut in zip(texts, reading.cut, strict=True) if is_cut]:
            warnings.append(_too_long(place, cut, len(texts), length))
    for same in everywhere.values() if across else ():
        names = [name for _, name, _ in same]
        in_tasks = list(dict.fromkeys(task for task, _, _ in same))
        if len(in_tasks) > 1 and _differ(names) and any(full for _, _, full in same):
            wrong.append(_indistinguishable(f"tasks {', '.join(in_tasks)}", names, length))
    if wrong:
        raise Mistakes(wrong)
    return warnings


def reader_of(tokenizer: Callable[..., Tensor]) -> Callable[[Sequence[str]], Reading]:
    """A function that says what a model with this tokenizer reads.

    If the tokenizer takes no `context_length`, a full row may be cut off or may just fit.
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


def _differ(names: Sequence[str]) -> bool:
    """Whether the names differ in more than case and spaces."""
    return len({" ".join(name.casefold().split()) for name in names}) > 1


def _indistinguishable(where: str, names: Sequence[str], length: int) -> str:
    advice = "write shorter class names, or take a model that reads more"
    if length < 77:
        advice += " (CLIP's own read 77)"
    return (
        f"{where}: {len(names)} classes read the same, since the model reads {length} tokens and cuts their sentences"
        f" there: {_listed(names)}; {advice}"
    )


def _too_long(where: str, texts: Sequence[str], count: int, length: int) -> str:
    are = "is" if len(texts) == 1 else "are"
    return (
        f"warning: {where}: {len(texts)} of {count} sentences {are} longer than the {length} tokens that the model reads, and"
        f" cut: {_listed(texts, 3)}"
    )


def _listed(names: Sequence[str], most: int = 4) -> str:
    """The first few names, and how many more follow."""
    listed = ", ".join(repr(name if len(name) <= 90 else name[:87] + "...") for name in names[:most])
    return listed + (f" and {len(names) - most} more" if len(names) > most else "")


# --- CLIP's tokenizer without torch -----------------------------------------------------------------------------------

_TINY_MERGES = Path(__file__).parent / "tiny" / "mulki-tiny-merges.txt.gz"
_WORDS = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|(?:[^\s\w]|_)+", re.IGNORECASE)
_MERGES = 49152 - 256 - 2


class BytePairs:
    """CLIP's byte-pair encoding, to count tokens where torch is not imported.

    It differs from open_clip's SimpleTokenizer only in broken Unicode, which that one repairs; a run uses the tokenizer
    itself. merges: the file of merges; length: the model's context length.
    """

    def __init__(self, merges: Path, length: int) -> None:
        lines = gzip.decompress(merges.read_bytes()).decode("utf-8").split("\n")[1 : _MERGES + 1]
        self._ranks = {tuple(line.split()): rank for rank, line in enumerate(lines)}
        self._alphabet = _alphabet()
        self.length = length

    def read(self, texts: Sequence[str]) -> Reading:
        """What the model reads of these sentences, between the start and the end token."""
        room = self.length - 2
        tokens = [self.encode(text) for text in texts]
        cut = [len(each) > room for each in tokens]
        return Reading(self.length, [tuple(each[:room]) for each in tokens], cut, cut)

    def encode(self, text: str) -> list[str]:
        """The tokens of a text, as strings."""
        text = " ".join(html.unescape(html.unescape(text)).split()).lower()
        words = ("".join(self._alphabet[byte] for byte in word.encode()) for word in _WORDS.findall(text))
        return [token for word in words for token in self._merged(word)]

    def _merged(self, word: str) -> list[str]:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            rank, best = min((self._ranks.get(pair, _MERGES), pair) for pair in itertools.pairwise(parts))
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
    """The tokenizer of a model by its name, or None if it is not CLIP's byte-pair encoding."""
    if model == TINY:
        return BytePairs(_TINY_MERGES, 16)
    folder, text = open_clip_folder(), open_clip_config(model).get("text_cfg", {})
    if folder is None or not text or {"hf_tokenizer_name", "hf_model_name", "tokenizer_kwargs"} & set(text):
        return None
    return BytePairs(folder / "bpe_simple_vocab_16e6.txt.gz", int(text.get("context_length", 77)))


def _alphabet() -> list[str]:
    """A printable character for each byte, as in GPT-2's encoding."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
