"""YAML text as plain data in which every value knows its line; hostile or careless text is an error, never a crash.

The text is read event by event (the parser's events need no recursion), so that depth, size and aliases have limits of
ours. Scalars follow YAML 1.2: `1e-4` is a number, `no` is a text. Tags that would make objects are refused.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator
from pathlib import Path as FilePath
from typing import Any

import yaml
from attrs import define, field, frozen

from mulki_plugins.characters import CLOSING, OPENING, is_invisible, name_character, name_lookalikes
from mulki_plugins.errors import Mistakes
from mulki_plugins.recipe.yaml_errors import explain
from mulki_plugins.types import Path

MAX_BYTES = 256 * 1024
MAX_DEPTH = 40
MAX_VALUES = 50_000
"""Values after aliases are followed: what a text may unfold to."""

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@frozen
class Origin:
    """Where a value was written: a file and its line, or the command line."""

    source: str
    line: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


@define
class Tree:
    """A nested value, and the origin of each of its parts by path."""

    value: Any
    origins: dict[Path, Origin] = field(factory=dict)

    def origin(self, path: Path) -> Origin:
        """Where the value at a path was written, or else the nearest thing around it."""
        while path and path not in self.origins:
            path = path[:-1]
        return self.origins.get(path, Origin("default"))


def dotted(path: Path) -> str:
    """A path as users see it: `$.strategy.plugins[1].adding`."""
    return "$" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)


def located(origin: Origin, path: Path, message: str) -> str:
    """One line of a report."""
    return f"{origin}: {dotted(path)}: {message}"


def in_order(lines: Iterable[str]) -> list[str]:
    """By file and line, as a reader goes through them."""

    def place(line: str) -> tuple[str, int]:
        match = re.match(r"(.*?):(\d+): \$", line)
        return (match[1], int(match[2])) if match else (line, 0)

    return sorted(lines, key=place)


def read_yaml(path: FilePath, name: str | None = None) -> Tree:
    """The YAML mapping in a file; Mistakes where it cannot be read or is not one."""
    shown = name or str(path)

    def fail(message: str, line: int = 1) -> Mistakes:
        return Mistakes([located(Origin(shown, line), (), message)])

    try:
        if path.is_dir():
            raise fail("this is a folder, expected a YAML file")
        if path.is_fifo() or path.is_socket():  # which may never answer
            raise fail("this is no regular file, expected a YAML file")
        with path.open("rb") as file:  # one read, so that a file that grows or never ends cannot fill the memory
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise fail(f"cannot be read: {error.strerror or error}") from error
    if len(data) > MAX_BYTES:
        raise fail(f"the file is larger than {MAX_BYTES // 1024} KB, which no recipe needs to be")
    try:
        text = decoded(data)
    except UnicodeDecodeError as error:
        what = "this is no UTF-8 text, expected a YAML file; save it again with the encoding UTF-8"
        raise fail(what, data.count(b"\n", 0, error.start) + 1) from error
    return parse_yaml(text, shown)


def decoded(data: bytes) -> str:
    """The text of a file in UTF-8, or in the UTF-16 or UTF-32 that some shells and editors write. UnicodeDecodeError."""
    if data.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return data.decode("utf-32")
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16")
    even, odd = data[:8:2], data[1:8:2]  # without a mark: a recipe begins with letters, or a # and letters
    if any(odd) != any(even) and 0 not in (odd if any(odd) else even):
        return data.decode("utf-16-be" if any(odd) else "utf-16-le")
    return data.decode("utf-8-sig")


def parse_yaml(text: str, source: str) -> Tree:
    """YAML text whose top is a mapping."""
    tree = parse_value(text, source)
    if not isinstance(tree.value, dict):
        what = "the file is empty" if tree.value is None else f"expected a mapping, got a {type(tree.value).__name__}"
        raise Mistakes([located(Origin(source, 1), (), f"{what}; `mulki show mtil` prints a recipe to start from")])
    return tree


def parse_value(text: str, source: str) -> Tree:
    """Any YAML value, with the line of each of its parts."""
    reader = _Reader(source)
    try:
        reader.read(yaml.parse(text, Loader=_Loader))
    except (yaml.YAMLError, UnicodeError) as error:
        line, message = explain(text, error, MAX_DEPTH)
        raise Mistakes([*reader.mistakes, located(Origin(source, line), (), message)]) from error
    if reader.mistakes:
        raise Mistakes(reader.mistakes)
    return Tree(reader.value, reader.origins)


@define
class _Level:
    """A mapping or list that is being read."""

    container: dict[Any, Any] | list[Any]
    path: Path
    key: Any = None
    awaits_value: bool = False
    anchor: str | None = None


@define
class _Reader:
    source: str
    value: Any = None
    origins: dict[Path, Origin] = field(factory=dict)
    mistakes: list[str] = field(factory=list)
    levels: list[_Level] = field(factory=list)
    anchors: dict[str, Any] = field(factory=dict)
    count: int = 0

    def read(self, events: Iterator[Any]) -> None:
        documents = 0
        for event in events:
            line = event.start_mark.line + 1
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    return self._wrong(line, (), "a second document begins here, expected one")
            elif isinstance(event, yaml.ScalarEvent):
                self._add(self._scalar(event, line), event, line)
            elif isinstance(event, yaml.AliasEvent):
                self._alias(event, line)
            elif isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
                self._open(event, line)
            elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
                level = self.levels.pop()
                if level.anchor:
                    self.anchors[level.anchor] = level.container
            if self.count > MAX_VALUES:
                return self._wrong(line, (), f"more than {MAX_VALUES} values (are there aliases within aliases?)")
            if len(self.levels) > MAX_DEPTH:
                return self._wrong(line, (), f"nested more than {MAX_DEPTH} deep")
        return None

    def _wrong(self, line: int, path: Path, message: str) -> None:
        self.mistakes.append(located(Origin(self.source, line), path, message))

    def _here(self) -> Path:
        """The path of the value that comes next."""
        if not self.levels:
            return ()
        level = self.levels[-1]
        return (*level.path, len(level.container) if isinstance(level.container, list) else level.key)

    def _open(self, event: Any, line: int) -> None:
        level = self.levels[-1] if self.levels else None
        path = self._here()
        if level and isinstance(level.container, dict) and not level.awaits_value:
            path = level.path
            self._wrong(line, path, "expected a text as key, got a list or a mapping")
        sort = "map" if isinstance(event, yaml.MappingStartEvent) else "seq"
        if event.tag not in (None, "!", f"tag:yaml.org,2002:{sort}"):
            self._wrong(line, path, f"the tag {event.tag!r} is not allowed")
        container: dict[Any, Any] | list[Any] = {} if isinstance(event, yaml.MappingStartEvent) else []
        self._add(container, None, line)
        self.levels.append(_Level(container, path, anchor=event.anchor))
        if event.anchor:
            self.anchors[event.anchor] = _UNFINISHED

    def _alias(self, event: Any, line: int) -> None:
        found = self.anchors.get(event.anchor, _UNKNOWN)
        if found is _UNFINISHED or found is _UNKNOWN:
            what = "refers to itself" if found is _UNFINISHED else "names no anchor before it"
            self._wrong(line, self._here(), f"the alias *{event.anchor} {what}")
            found = None
        self.count += _size(found)
        if self.count <= MAX_VALUES:
            self._add(_copied(found), None, line)

    def _add(self, value: Any, event: Any, line: int) -> None:
        """Put a value, or a mapping's key, where the reader stands."""
        self.count += 1
        if event is not None and event.anchor:
            self.anchors[event.anchor] = value
        if not self.levels:
            self.value = value
            self.origins[()] = Origin(self.source, line)
            return
        level = self.levels[-1]
        if isinstance(level.container, list):
            self.origins[level.path + (len(level.container),)] = Origin(self.source, line)
            level.container.append(value)
        elif level.awaits_value:
            level.container[level.key] = value
            level.awaits_value = False
        else:
            self._key(level, value, line)

    def _key(self, level: _Level, key: Any, line: int) -> None:
        assert isinstance(level.container, dict)
        if isinstance(key, (dict, list)):
            key = "?"
        elif not isinstance(key, str):
            self._wrong(line, level.path, f"expected a text as key, got {key!r}; put it in quotes")
            key = str(key)
        elif key == "<<":
            self._wrong(line, level.path, "merge keys (<<) are not part of YAML 1.2; write the values out")
        path = (*level.path, key)
        if key in level.container:
            first = self.origins[path].line
            self._wrong(line, path, f"written twice, first on line {first}")
        self.origins[path] = Origin(self.source, line)
        level.key, level.awaits_value = key, True

    def _scalar(self, event: Any, line: int) -> Any:
        tag = event.tag
        if tag in (None, "!"):
            if not event.implicit[0]:
                return event.value
            if problem := _mistaken(event.value):
                self._wrong(line, self._here(), problem)
            return _plain(event.value)
        if tag == "tag:yaml.org,2002:str":
            return event.value
        self._wrong(line, self._here(), f"the tag {tag!r} is not allowed")
        return event.value


_UNFINISHED, _UNKNOWN = object(), object()

_WORDS = {
    "": None, "~": None, "null": None, "Null": None, "NULL": None,
    "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False,
}  # fmt: skip
_INTEGER = re.compile(r"[-+]?[0-9]{1,18}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = re.compile(r"([-+]?)\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


def _plain(text: str) -> Any:
    """An unquoted scalar by YAML 1.2's core schema."""
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    if match := _SPECIAL.fullmatch(text):
        return float("nan") if match[3] else float(f"{match[1]}inf")
    return text


def _mistaken(text: str) -> str:
    """What is wrong with the ends of an unquoted text: a character that looks like a space, like nothing or like a quote."""
    if len(text) > 1 and text[0] in OPENING and text[-1] in CLOSING:
        return f"{name_lookalikes(text[0] + text[-1])} stand around a text; type \" or ' instead"
    for character in (text[:1], text[-1:]):
        if character and is_invisible(character):
            return f"{name_character(character)} stands at an end of {text!r}; remove it, or put the text in quotes"
    return ""


def _size(value: Any) -> int:
    """How many values there are in a value; it is finite, since aliases are copied when they are read."""
    total, stack = 0, [value]
    while stack and total <= MAX_VALUES:
        item = stack.pop()
        total += 1
        stack += item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
    return total


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value
