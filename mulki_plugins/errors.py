"""A user's mistakes: reported one line each, without a traceback, with exit status 2."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from mulki_plugins.characters import name_lookalikes, printable, simplify

Location = tuple[str | int, ...]
"""The keys and indices that lead to a value."""

UNKNOWN_OPTION = "unknown option"
"""How every message about an unknown key begins."""
MAX_REPORTED = 1000
"""How many mistakes of one sort are reported."""


class MulkiError(Exception):
    """A user's mistake, or something missing on their machine; `hint` says what to type next."""

    status = 2
    """The exit status."""

    def __init__(self, message: str, hint: str = "") -> None:
        message = _original_message(message, f"{type(self).__module__}.{type(self).__qualname__}: ")
        super().__init__(message)
        self.message = message
        self.hint = hint

    def lines(self) -> list[str]:
        """The report, one line per mistake."""
        return [f"{self.message}; {self.hint}" if self.hint else self.message]


class Stopped(MulkiError):
    """A signal stopped a run or a study; `status` is the exit status of the program."""

    def __init__(self, message: str, hint: str, number: int) -> None:
        super().__init__(message, hint)
        self.status = 128 + number


class UnexpectedError(MulkiError):
    """An error that no known mistake explains; the hint says where its traceback is."""

    status = 1


class MissingData(MulkiError):
    """Images, fonts or weights that are not on this machine."""


class UnreadableImage(MulkiError):
    """An image that cannot be decoded; the message names it."""

    def __init__(
        self,
        message: str,
        hint: str = "repair it and resume with --force, or skip it: mulki run RECIPE --resume --set train.unreadable=skip",
    ) -> None:
        super().__init__(message, hint)


class Mistakes(MulkiError):
    """All mistakes in a recipe, located: `file:line: $.path: what is wrong, and what to type`."""

    def __init__(self, lines: Iterable[str]) -> None:
        self._lines = list(lines)
        super().__init__("\n".join(self._lines))

    def lines(self) -> list[str]:
        return self._lines


class OptionError(ValueError):
    """A value that its type does not admit.

    path: leads to the value from where the check began.
    write: what was probably meant, as YAML; empty if that is unclear.
    """

    def __init__(self, message: str, path: Location = (), write: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.path = path
        self.write = write

    def below(self, path: Location) -> OptionError:
        """The same mistake, located from further up."""
        return OptionError(self.message, (*path, *self.path), self.write)

    def __str__(self) -> str:
        return f"{self.message}; write {self.write}" if self.write else self.message


def format_value(value: Any) -> str:
    """A value for an error message: short, on one line."""
    if isinstance(value, Mapping):
        return "a mapping" if value else "an empty mapping"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    if value is None:
        return "nothing"
    text = repr(value).lower() if isinstance(value, bool) else repr(value)
    odd = name_lookalikes(value) if isinstance(value, str) else ""
    return (text if len(text) <= 60 else text[:57] + "...") + (f" with {odd}" if odd else "")


_FROM_WORKER = re.compile(r"Caught (?P<kind>\w+) in .* process \d+\.\nOriginal Traceback")
"""How torch's data loader reports an error of a worker process: with the worker's traceback as the message."""


def _original_message(message: str, label: str) -> str:
    """The message of a MulkiError that a data loader's worker raised, taken out of the worker's traceback."""
    if message.startswith("Caught ") and "\nOriginal Traceback" in message and label in message:
        return message.rpartition(label)[2].strip()
    return message


def describe_error(error: BaseException) -> str:
    """An error on one line, like the last line of its traceback: type and message.

    For an error that a data loader passes on from a worker: the worker's error.
    """
    kind = type(error).__name__
    try:
        text = str(error)
    except Exception:  # an error whose own `__str__` fails
        text = ""
    if match := _FROM_WORKER.match(text):
        kind = match["kind"]
        traceback = text[text.rfind('\n  File "') :]
        last = re.search(rf"^(?:[\w.]+\.)?{re.escape(kind)}(?:: (?P<text>.*))?\Z", traceback, re.MULTILINE | re.DOTALL)
        text = (last["text"] or "") if last else traceback.rstrip().rpartition("\n")[2]
    text = printable(" ".join(text.split()))
    return f"{kind}: {text}" if text else kind


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?`, else the list of known words; empty if there are none."""
    from difflib import get_close_matches

    options = sorted(known)
    odd = name_lookalikes(word)
    note = f" the name holds {odd}" if odd else ""
    key = simplify(word).strip().lower()
    close = get_close_matches(key, [option.lower() for option in options], n=1, cutoff=0.6)
    close = close or [option.lower() for option in options if key and key == option.rpartition(".")[2].lower()]
    if close:  # the second try finds `avalanche.ewc` for `ewc`
        match = next(option for option in options if option.lower() == close[0])
        return f"did you mean {match!r}?{note}"
    if not options:
        return note.strip()
    listed = ", ".join(options[:12]) + (", ..." if len(options) > 12 else "")
    return f"known: {listed}" + (f";{note}" if note else "")
