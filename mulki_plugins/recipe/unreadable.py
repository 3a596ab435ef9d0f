"""Why a text is not YAML, in words of our own: the parser says only where it gave up."""

from __future__ import annotations

import re
from typing import Any

import yaml

from mulki_plugins.characters import name_character, name_lookalikes

_BREAK = re.compile(r"\r\n|[\n\r\x85\u2028\u2029]")
_NOT_ALLOWED = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_KEY_WITHOUT_SPACE = re.compile(r" *(- )?[\w.-]+:[^ \t\r:/]")
_MARKUP = re.compile(r"<[!?A-Za-z].*>")


def explain(text: str, error: Exception, max_depth: int) -> tuple[int, str]:
    """The line to look at, counted from 1, and what is wrong there."""
    if isinstance(error, (UnicodeError, yaml.reader.ReaderError)) and (odd := _NOT_ALLOWED.search(text)):
        line = len(_BREAK.findall(text, 0, odd.start())) + 1
        return line, f"this is not YAML: {name_character(odd[0])} stands on this line; remove it"
    rows = [*_BREAK.split(text), ""]
    at, context = _place(error, "problem_mark"), _place(error, "context_mark")
    at = at or context or (0, 0)
    if _depth(text) > max_depth:
        return at[0] + 1, f"nested more than {max_depth} deep"
    line, what = _reason(rows, at, context)
    row = rows[min(line, len(rows) - 1)]
    if odd_names := name_lookalikes(row):
        what += f"; the line holds {odd_names}, where YAML wants ordinary spaces, quotes, hyphens and colons"
    return line + 1, f"this is not YAML: {what}"


def _place(error: Exception, name: str) -> tuple[int, int] | None:
    mark: Any = getattr(error, name, None)
    return None if mark is None else (mark.line, mark.column)


def _depth(text: str) -> int:
    """About how deep the brackets and the dashes of one line go; the parser may give up before it hands on a level."""
    depth = deepest = 0
    for character in text:
        depth = max(0, depth + (character in "[{") - (character in "]}"))
        deepest = max(deepest, depth)
    dashes = max((len(match[0]) // 2 for match in re.finditer(r"(?:[-?] )+", text)), default=0)
    return max(deepest, dashes)


def _reason(rows: list[str], at: tuple[int, int], context: tuple[int, int] | None) -> tuple[int, str]:
    """The index of the line to look at, and the reason. From what is certain to what is likely."""
    line = min(at[0], len(rows) - 1)
    row, column = rows[line], at[1]
    if _MARKUP.match(next((r.strip() for r in rows if r.strip()), "")):
        return 0, "this looks like a web page, not like a recipe"
    for i, r in enumerate(rows):
        if r.startswith(("<<<<<<< ", ">>>>>>> ")):
            return i, "a merge conflict is left here; choose one of its two sides"
    if "\t" in row[: len(row) - len(row.lstrip())] or row[column : column + 1] == "\t":
        return line, "a tab stands here; YAML is indented with spaces, not with tabs"
    if context and (found := _opened(rows, line, context)):
        return found
    return _at_character(rows, line, column, context)


def _opened(rows: list[str], line: int, context: tuple[int, int]) -> tuple[int, str] | None:
    """A bracket or a quote that was opened and not closed; a sign that means something at the beginning of a value."""
    begun = rows[context[0]] if context[0] < len(rows) else ""
    sign = begun[context[1] : context[1] + 1]
    if sign and sign in "[{":
        seen = "" if line == context[0] else f", noticed on line {line + 1}"
        closing = {"[": "]", "{": "}"}[sign]
        return context[0], f"the {sign} on this line is not closed by {closing}, or a comma is missing behind it{seen}"
    if sign and sign in "\"'":
        if not any(row.strip() for row in rows[line + 1 :]) and not rows[line][1:].strip():
            return context[0], f"the quote {sign} on this line is not closed"
        if sign == '"' and "\\" in begun:
            return context[0], r"in double quotes \ begins an escape such as \n; put a text with \ in single quotes"
        return context[0], f"the quote {sign} on this line is not closed, or something stands behind its end"
    if sign and sign in "*&!":
        return context[0], f"a value that begins with {sign} must be in quotes"
    if sign and sign in "|>":
        what = f"the text that {sign} announces begins on the next line"
        return context[0], f"{what}; a value that begins with {sign} must be in quotes"
    return None


def _at_character(
    rows: list[str], line: int, column: int, context: tuple[int, int] | None
) -> tuple[int, str]:  # fmt: skip
    row = rows[line]
    sign, before = row[column : column + 1], row[:column]
    above = next((i for i in range(line - 1, -1, -1) if rows[i].strip() and not rows[i].lstrip().startswith("#")), None)
    if sign and sign in "%@`":
        return line, f"a value cannot begin with {sign}; put it in quotes"
    if sign and sign in ",]}":
        return line, f"a {sign} stands here without a [ or {{ before it; put the value in quotes if it is a text"
    if sign == "-" and ":" in before:
        return line, "a list cannot begin behind a key; write it as [a, b], or each entry on a line of its own"
    if sign == ":" and ": " in before:
        return line, "the value holds a colon; put it in quotes"
    if above is not None and _KEY_WITHOUT_SPACE.match(rows[above]):
        return above, "a space is missing behind the colon; write key: value"
    if re.search(r"[\"']\s+$", before):
        return line, "something stands behind the closing quote; put the whole value in quotes"
    if sign == ":" and above is not None and _indent(rows[above]) < _indent(row) and ":" in rows[above]:
        return line, f"it is indented deeper than line {above + 1}, which has its value already; indent both alike"
    if sign == ":" and above is not None and ":" not in rows[above]:
        return above, "expected key: value"
    first = rows[context[0]][context[1] : context[1] + 1] if context and context[0] < len(rows) else ""
    if row.lstrip().startswith("- ") and first not in ("", "-"):
        return line, "an entry of a list stands among the keys of a mapping; indent it under its key"
    if first == "-":
        return line, "a key stands among the entries of a list; indent it under its entry, or put - before it"
    if above is not None and rows[above].strip() == "...":
        return line, "`...` ends the file, and something stands behind it"
    if row.lstrip().startswith("%"):
        return line, "a line cannot begin with %; put the text in quotes"
    if unclosed := _unclosed(rows):
        return unclosed
    if _indent(row) not in {_indent(r) for r in rows[:line] if r.strip()}:
        return line, "its indentation is that of no line above; indent the keys of one mapping alike"
    return line, "check the quotes, colons, brackets and indentation of this line and the one above"


def _unclosed(rows: list[str]) -> tuple[int, str] | None:
    """The first bracket that nothing closes, quotes and comments aside."""
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
