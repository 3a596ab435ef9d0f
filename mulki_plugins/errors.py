"""What a user can do wrong: reported on one line each, without a traceback, with exit status 2."""

from __future__ import annotations

import re
from collections.abc import Iterable

from mulki_plugins.characters import name_lookalikes, simplify

_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029]")


def plain(text: str) -> str:
    """On one line, and without what steers a terminal: for a word that comes from a file or a command line."""
    return _UNPRINTABLE.sub("?", text)


def in_one_line(error: BaseException) -> str:
    """An error of others on one line, as the last line of its traceback: its type, and its whole text.

    Where a data loader handed it on from a worker, whose traceback is then its text: the error that the worker had.
    """
    kind = type(error).__name__
    try:
        text = str(error)
    except Exception:  # an error whose own text fails
        text = ""
    if found := _FROM_WORKER.match(text):
        kind = found["kind"]
        traceback = text[text.rfind('\n  File "') :]
        last = re.search(rf"^(?:[\w.]+\.)?{re.escape(kind)}(?:: (?P<text>.*))?\Z", traceback, re.MULTILINE | re.DOTALL)
        text = (last["text"] or "") if last else traceback.rstrip().rpartition("\n")[2]
    text = plain(" ".join(text.split()))
    return f"{kind}: {text}" if text else kind


_FROM_WORKER = re.compile(r"Caught (?P<kind>\w+) in .* process \d+\.\nOriginal Traceback")


class MulkiError(Exception):
    """A mistake of the user's, or something of theirs that is missing; `hint` says what to type next."""

    status = 2
    """What a program ends with."""

    def __init__(self, message: str, hint: str = "") -> None:
        message = _as_it_was(message, f"{type(self).__module__}.{type(self).__qualname__}: ")
        super().__init__(message)
        self.message = message
        self.hint = hint

    def lines(self) -> list[str]:
        """The report, a line for each mistake."""
        return [f"{self.message}; {self.hint}" if self.hint else self.message]


def _as_it_was(message: str, label: str) -> str:
    """The message of an error that torch's data loader hands on from a worker, out of the traceback that it makes of it."""
    if message.startswith("Caught ") and "\nOriginal Traceback" in message and label in message:
        return message.rpartition(label)[2].strip()
    return message


class Unforeseen(MulkiError):
    """An error that is nobody's known mistake; the hint says where its traceback is."""

    status = 1


class MissingData(MulkiError):
    """Images, fonts or weights that are not on this machine."""


class UnreadableImage(MulkiError):
    """An image that cannot be decoded; the message names it."""

    def __init__(
        self,
        message: str,
        hint: str = "mend it and go on with --force, or without it: --resume --set train.unreadable=skip",
    ) -> None:
        super().__init__(message, hint)


class Mistakes(MulkiError):
    """Everything that is wrong with a recipe, each line with its place: `file:line: $.path: what, and what to type`."""

    def __init__(self, lines: Iterable[str]) -> None:
        self._lines = list(lines)
        super().__init__("\n".join(self._lines))

    def lines(self) -> list[str]:
        return self._lines


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?`, or the list of what there is; empty where there is nothing."""
    from difflib import get_close_matches

    options = sorted(known)
    odd = name_lookalikes(word)
    note = f" the name holds {odd}" if odd else ""
    plain_word = simplify(word).strip().lower()
    close = get_close_matches(plain_word, [option.lower() for option in options], n=1, cutoff=0.6)
    close = close or [option.lower() for option in options if plain_word and plain_word == _last(option)]
    if close:
        match = next(option for option in options if option.lower() == close[0])
        return f"did you mean {match!r}?{note}"
    if not options:
        return note.strip()
    shown = ", ".join(options[:12]) + (", ..." if len(options) > 12 else "")
    return f"there is {shown}" + (f";{note}" if note else "")


def _last(name: str) -> str:
    """`avalanche.ewc` is often called `ewc`."""
    return name.rpartition(".")[2].lower()
