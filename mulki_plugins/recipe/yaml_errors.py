"""Why a text is not YAML, in plain words: the parser only reports where it gave up."""

from __future__ import annotations

import re
from typing import Any

import yaml

from mulki_plugins.characters import name_character, name_lookalikes

Position = tuple[int, int]
"""Line and column, counted from 0."""
Explanation = tuple[int, str]
"""The line to look at, counted from 0, and the reason."""

_BREAK = re.compile(r"\r\n|[\n\r\x85\u2028\u2029]")
_NOT_ALLOWED = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_KEY_WITHOUT_SPACE = re.compile(r" *(- )?[\w.-]+:[^ \t\r:/]")
_MARKUP = re.compile(r"<[!?A-Za-z].*>")
_NAME = re.compile(r"[*&]([^\s,\[\]{}]+)")


def explain(text: str, error: Exception) -> tuple[int, str]:
    """The line to look at, counted from 1, and what is wrong there."""
    if isinstance(error, (UnicodeError, yaml.reader.ReaderError)) and (odd := _NOT_ALLOWED.search(text)):
        line = len(_BREAK.findall(text, 0, odd.start())) + 1
        return line, f"this is not YAML: this line contains {name_character(odd[0])}; remove it"
    rows = [*_BREAK.split(text), ""]
    at, context = _position(error, "problem_mark"), _position(error, "context_mark")
    at = at or context or (0, 0)
    if isinstance(error, yaml.composer.ComposerError) and (message := _explain_composition(rows, at, error)):
        return at[0] + 1, message
    line, what = _explain_syntax(rows, at, context)
    row = rows[min(line, len(rows) - 1)]
    if odd_names := name_lookalikes(row):
        what += f"; the line contains {odd_names}, but YAML needs ordinary spaces, quotes, hyphens and colons"
    return line + 1, f"this is not YAML: {what}"


def _position(error: Exception, name: str) -> Position | None:
    mark: Any = getattr(error, name, None)
    return None if mark is None else (mark.line, mark.column)


def _explain_composition(rows: list[str], at: Position, error: yaml.composer.ComposerError) -> str:
    """Why a text that is YAML is not one document, or its anchors and aliases do not match."""
    problem = str(error.problem)
    name = match[1] if (match := _NAME.match(rows[min(at[0], len(rows) - 1)], at[1])) else ""
    if problem.startswith("found undefined alias"):
        return f"the alias *{name} names no anchor before it"
    if str(error.context).startswith("found duplicate anchor"):
        return f"the anchor &{name} is defined twice"
    return "a second document begins here, expected one" if problem == "but found another document" else ""


def _explain_syntax(rows: list[str], at: Position, context: Position | None) -> Explanation:
    """The most certain explanation first."""
    line = min(at[0], len(rows) - 1)
    row, column = rows[line], at[1]
    if _MARKUP.match(next((r.strip() for r in rows if r.strip()), "")):
        return 0, "this looks like a web page, not a recipe"
    for i, r in enumerate(rows):
        if r.startswith(("<<<<<<< ", ">>>>>>> ")):
            return i, "an unresolved merge conflict; keep one of its two sides"
    if "\t" in row[: len(row) - len(row.lstrip())] or row[column : column + 1] == "\t":
        return line, "there is a tab here; indent YAML with spaces, not tabs"
    if context and (explanation := _explain_opening(rows, line, context)):
        return explanation
    return _explain_character(rows, line, column, context)


def _explain_opening(rows: list[str], line: int, context: Position) -> Explanation | None:
    """An unclosed bracket or quote, or a sign with a meaning at the beginning of a value."""
    begun = rows[context[0]] if context[0] < len(rows) else ""
    sign = begun[context[1] : context[1] + 1]
    if sign and sign in "[{":
        seen = "" if line == context[0] else f", noticed on line {line + 1}"
        closing = {"[": "]", "{": "}"}[sign]
        return context[0], f"the {sign} on this line is not closed by {closing}, or a comma is missing after it{seen}"
    if sign and sign in "\"'":
        if not any(row.strip() for row in rows[line + 1 :]) and not rows[line][1:].strip():
            return context[0], f"the quote {sign} on this line is not closed"
        if sign == '"' and "\\" in begun:
            return context[0], r"in double quotes \ begins an escape such as \n; put a text with \ in single quotes"
        return context[0], f"the quote {sign} on this line is not closed, or something follows the closing quote"
    if sign and sign in "*&!":
        return context[0], f"a value that begins with {sign} must be in quotes"
    if sign and sign in "|>":
        what = f"a text after {sign} begins on the next line"
        return context[0], f"{what}; a value that begins with {sign} must be in quotes"
    return None


def _explain_character(rows: list[str], line: int, column: int, context: Position | None) -> Explanation:
    row = rows[line]
    sign, before = row[column : column + 1], row[:column]
    above = next((i for i in range(line - 1, -1, -1) if rows[i].strip() and not rows[i].lstrip().startswith("#")), None)
    if sign and sign in "%@`":
        return line, f"a value cannot begin with {sign}; put it in quotes"
    if sign and sign in ",]}":
        return line, f"this {sign} has no matching [ or {{; put the value in quotes if it is a text"
    if sign == "-" and ":" in before:
        return line, "a list cannot start on the line of its key; write [a, b], or put each entry on its own line"
    if sign == ":" and ": " in before:
        return line, "the value contains a colon; put it in quotes"
    if above is not None and _KEY_WITHOUT_SPACE.match(rows[above]):
        return above, "a space is missing after the colon; write key: value"
    if re.search(r"[\"']\s+$", before):
        return line, "something follows the closing quote; put the whole value in quotes"
    if sign == ":" and above is not None and _indent(rows[above]) < _indent(row) and ":" in rows[above]:
        return line, f"this is indented deeper than line {above + 1}, which already has a value; indent both alike"
    if sign == ":" and above is not None and ":" not in rows[above]:
        return above, "expected key: value"
    first = rows[context[0]][context[1] : context[1] + 1] if context and context[0] < len(rows) else ""
    if row.lstrip().startswith("- ") and first not in ("", "-"):
        return line, "a list entry among the keys of a mapping; indent it under its key"
    if first == "-":
        return line, "a key among the entries of a list; indent it under its entry, or put - before it"
    if above is not None and rows[above].strip() == "...":
        return line, "`...` ends the file, but something follows it"
    if row.lstrip().startswith("%"):
        return line, "a line cannot begin with %; put the text in quotes"
    if unclosed := _explain_unclosed(rows):
        return unclosed
    if _indent(row) not in {_indent(r) for r in rows[:line] if r.strip()}:
        return line, "its indentation matches no line above; indent the keys of one mapping alike"
    return line, "check the quotes, colons, brackets and indentation of this line and the one above"


def _explain_unclosed(rows: list[str]) -> Explanation | None:
    """The first unclosed bracket outside quotes and comments."""
    opened: list[tuple[int, str]] = []
    for i, row in enumerate(rows):
        for sign in re.sub(r"\"[^\"]*\"|'[^']*'|(?:^|\s)#.*", "", row):
            if sign in "[{":
                opened.append((i, sign))
            elif sign in "]}" and opened:
                opened.pop()
    if not opened:
        return None
    line, sign = opened[0]
    return line, f"the {sign} on this line is not closed by {'}' if sign == '{' else ']'}"


def _indent(row: str) -> int:
    return len(row) - len(row.lstrip(" "))
