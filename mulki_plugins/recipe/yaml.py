"""YAML as plain data whose every value knows its line. Hostile or careless text gives an error, never a crash.

`yaml.compose` parses the text into nodes with marks; the nodes become values here. Scalars follow YAML 1.2: `1e-4` is a
number, `no` is a text. Depth, size and aliases are limited, and tags that would create objects are refused.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from attrs import define, field, frozen

from mulki_plugins.characters import CLOSING, OPENING, is_invisible, name_character, name_lookalikes
from mulki_plugins.errors import Location, Mistakes
from mulki_plugins.recipe.yaml_errors import explain

MAX_BYTES = 256 * 1024
MAX_DEPTH = 40
MAX_VALUES = 50_000
"""Values once aliases are expanded."""


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
    origins: dict[Location, Origin] = field(factory=dict)

    def origin(self, path: Location) -> Origin:
        """Where the value at a path was written, or else the innermost value around it."""
        while path and path not in self.origins:
            path = path[:-1]
        return self.origins.get(path, Origin("default"))


def format_path(path: Location) -> str:
    """A path as users see it: `$.strategy.plugins[1].adding`."""
    return "$" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)


def locate(origin: Origin, path: Location, message: str) -> str:
    """One line of a report: `file:line: $.path: message`."""
    return f"{origin}: {format_path(path)}: {message}"


def sort_by_line(lines: Iterable[str]) -> list[str]:
    """The lines of a report by file and line number."""

    def key(line: str) -> tuple[str, int]:
        match = re.match(r"(.*?):(\d+): \$", line)
        return (match[1], int(match[2])) if match else (line, 0)

    return sorted(lines, key=key)


def read_yaml(path: Path, name: str | None = None) -> Tree:
    """The YAML mapping in a file. Raises Mistakes if it cannot be read or is no mapping. name: the file's name in messages."""
    source = name or str(path)

    def mistake(message: str) -> Mistakes:
        return Mistakes([f"{source}: {message}"])

    try:
        if path.is_dir():
            raise mistake("this is a folder, expected a YAML file")
        if path.is_fifo() or path.is_socket():  # reading one may block for ever
            raise mistake("this is no regular file, expected a YAML file")
        with path.open("rb") as file:  # bounded, so that a growing or endless file cannot fill the memory
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise mistake(f"cannot be read: {error.strerror or error}") from error
    if len(data) > MAX_BYTES:
        raise mistake(f"the file is larger than {MAX_BYTES // 1024} KB, too large for a recipe")
    try:
        text = _decode(data)
    except UnicodeDecodeError as error:
        message = "this is no UTF-8 text, expected a YAML file; save it again with the encoding UTF-8"
        line = data.count(b"\n", 0, error.start) + 1
        raise Mistakes([locate(Origin(source, line), (), message)]) from error
    return parse_yaml(text, source)


def _decode(data: bytes) -> str:
    """The text of a file in UTF-8, or in the UTF-16 or UTF-32 that some shells and editors write. UnicodeDecodeError."""
    if data.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return data.decode("utf-32")
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16")
    even, odd = data[:8:2], data[1:8:2]  # UTF-16 without a mark: a recipe begins with ASCII characters
    if any(odd) != any(even) and 0 not in (odd if any(odd) else even):
        return data.decode("utf-16-be" if any(odd) else "utf-16-le")
    return data.decode("utf-8-sig")


def parse_yaml(text: str, source: str) -> Tree:
    """YAML text whose top level is a mapping. Raises Mistakes."""
    tree = parse_value(text, source)
    if not isinstance(tree.value, dict):
        what = "the file is empty" if tree.value is None else f"expected a mapping, got a {type(tree.value).__name__}"
        raise Mistakes([locate(Origin(source, 1), (), f"{what}; `mulki show mtil` prints a recipe to start from")])
    return tree


def parse_value(text: str, source: str) -> Tree:
    """Any YAML value, with the line of each of its parts. Raises Mistakes."""
    reader = _Reader(text, source)
    if line := _line_too_deep(text):
        raise reader.stop(line, (), f"nested more than {MAX_DEPTH} deep")
    try:
        root = yaml.compose(text, Loader=_Loader)
    except RecursionError as error:  # deep indentation, in the parser that is written in Python
        raise reader.stop(1, (), f"nested more than {MAX_DEPTH} deep") from error
    except (yaml.YAMLError, UnicodeError) as error:
        line, message = explain(text, error)
        raise reader.stop(line, (), message) from error
    value = None if root is None else reader.read(root, (), root.start_mark.line + 1)
    if reader.mistakes:
        raise Mistakes(reader.mistakes)
    return Tree(value, reader.origins)


def _line_too_deep(text: str, limit: int = 5 * MAX_DEPTH) -> int | None:
    """The line on which brackets, or the dashes of one line, nest deeper than any parser should recurse."""
    depth = 0
    for match in re.finditer(r"[\[\]{}]|^ *(?:[-?:][ \t]+)+", text, re.MULTILINE):
        depth = max(0, depth + (match[0] in "[{") - (match[0] in "]}"))
        if max(depth, len(match[0]) // 2 if match[0].strip(" []{}") else 0) > limit:
            return text.count("\n", 0, match.start()) + 1
    return None


_PLAIN, _TEXT, _MAPPING, _LIST = "plain", *(f"tag:yaml.org,2002:{name}" for name in ("str", "map", "seq"))


class CoreTags:
    """Mixed into a loader of PyYAML, leaves the type of unquoted scalars to `_Reader` instead of YAML 1.1's rules."""

    def resolve(self, kind: type, value: Any, implicit: Any) -> str:
        if kind is yaml.ScalarNode:
            return _PLAIN if implicit[0] else _TEXT
        return _MAPPING if kind is yaml.MappingNode else _LIST


_Loader: Any = type("_Loader", (CoreTags, getattr(yaml, "CSafeLoader", yaml.SafeLoader)), {})


@define
class _Reader:
    """Turns nodes into values, and collects origins and mistakes."""

    text: str
    source: str
    origins: dict[Location, Origin] = field(factory=dict)
    mistakes: list[str] = field(factory=list)
    count: int = 0
    open: list[yaml.Node] = field(factory=list)
    """The collections around the current node."""
    seen: set[int] = field(factory=set)
    """The ids of nodes that were read before: such a node is the target of an alias."""

    def stop(self, line: int, path: Location, message: str) -> Mistakes:
        return Mistakes([*self.mistakes, locate(Origin(self.source, line), path, message)])

    def complain(self, line: int, path: Location, message: str) -> None:
        self.mistakes.append(locate(Origin(self.source, line), path, message))

    def read(self, node: yaml.Node, path: Location, line: int) -> Any:
        """The value of a node. line: of the key or list around it, for a node that stands elsewhere (an alias)."""
        if id(node) not in self.seen:
            self.seen.add(id(node))
            line = node.start_mark.line + 1
        self.count += 1
        self.origins.setdefault(path, Origin(self.source, line))
        if self.count > MAX_VALUES:
            raise self.stop(line, path, f"more than {MAX_VALUES} values (are there aliases within aliases?)")
        if isinstance(node, yaml.ScalarNode):
            return self.read_scalar(node, path, line)
        if any(node is other for other in self.open):
            self.complain(line, path, f"the alias *{self.anchor(node)} refers to itself")
            return None
        if len(self.open) >= MAX_DEPTH:
            raise self.stop(line, path, f"nested more than {MAX_DEPTH} deep")
        if node.tag != (_MAPPING if isinstance(node, yaml.MappingNode) else _LIST):
            self.complain(line, path, f"the tag {node.tag!r} is not allowed")
        self.open.append(node)
        value: Any
        if isinstance(node, yaml.MappingNode):
            value = self.read_mapping(node, path, line)
        else:
            value = [self.read(item, (*path, i), line) for i, item in enumerate(node.value)]
        self.open.pop()
        return value

    def read_mapping(self, node: yaml.MappingNode, path: Location, line: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if id(key_node) not in self.seen:
                self.seen.add(id(key_node))
                line = key_node.start_mark.line + 1
            key = self.read_key(key_node, path, line)
            here = (*path, key)
            if key in result:
                self.complain(line, here, f"written twice, first on line {self.origins[here].line}")
            self.origins[here] = Origin(self.source, line)
            result[key] = self.read(value_node, here, line)
        return result

    def read_key(self, node: yaml.Node, path: Location, line: int) -> str:
        if not isinstance(node, yaml.ScalarNode):
            self.complain(line, path, "expected a text as key, got a list or a mapping")
            return "?"
        self.count += 1
        key = self.read_scalar(node, path, line)
        if not isinstance(key, str):
            self.complain(line, path, f"expected a text as key, got {key!r}; put it in quotes")
        elif key == "<<" and not node.style:
            self.complain(line, path, "merge keys (<<) are not part of YAML 1.2; write the values out")
        return str(key)

    def read_scalar(self, node: yaml.ScalarNode, path: Location, line: int) -> Any:
        if node.tag == _PLAIN:
            if problem := _find_odd_ends(node.value):
                self.complain(line, path, problem)
            return _core_scalar(node.value)
        if node.tag != _TEXT:
            self.complain(line, path, f"the tag {node.tag!r} is not allowed")
        return node.value

    def anchor(self, node: yaml.Node) -> str:
        match = re.match(r"(?:!\S*\s+)?&([^\s,\[\]{}]+)", self.text[node.start_mark.index :])
        return match[1] if match else ""


_WORDS = {
    "": None, "~": None, "null": None, "Null": None, "NULL": None,
    "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False,
}  # fmt: skip
_INTEGER = re.compile(r"[-+]?[0-9]{1,18}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = re.compile(r"([-+]?)\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


def _core_scalar(text: str) -> Any:
    """An unquoted scalar by the core schema of YAML 1.2."""
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    if match := _SPECIAL.fullmatch(text):
        return float("nan") if match[3] else float(f"{match[1]}inf")
    return text


def _find_odd_ends(text: str) -> str:
    """What is wrong if an unquoted text begins or ends with a typographic quote or an invisible character; else empty."""
    if len(text) > 1 and text[0] in OPENING and text[-1] in CLOSING:
        return f"{name_lookalikes(text[0] + text[-1])} surround a text; type \" or ' instead"
    for character in (text[:1], text[-1:]):
        if character and is_invisible(character):
            return f"{name_character(character)} is at an end of {text!r}; remove it, or put the text in quotes"
    return ""
