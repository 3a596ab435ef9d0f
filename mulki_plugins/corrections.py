"""Corrections for values of the wrong type: what the user probably meant, as YAML writes it."""

from __future__ import annotations

import re
import types
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from mulki_plugins.characters import simplify

IN_QUOTES = "put it in quotes if it is a text"
_TRUTHS = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}
_FIGURES = re.compile("[0-9.]+")


def advise(kind: Any, value: Any) -> str:
    """The end of an error message: put quotes around a text that YAML read as something else, or use a mapping's keys."""
    classes = [arm for arm in _arms(kind) if hasattr(arm, "__attrs_attrs__")]
    if classes and not isinstance(value, (Mapping, list, tuple)):
        return f"; its keys are {', '.join(a.name for a in classes[0].__attrs_attrs__)}"
    if str not in _arms(kind) or isinstance(value, (Mapping, list, tuple, str)):
        return ""
    return f"; {IN_QUOTES}" + (', such as "null"' if value is None else "")


def suggest_value(kind: Any, value: Any) -> str:
    """The value of the right type that was probably meant, as YAML: a number, a truth value, a list; empty if unclear."""
    arms = _arms(kind)
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 and int in arms:
        return str(int(value))
    text = simplify(value).strip() if isinstance(value, str) else ""
    if text and bool in arms:
        return _TRUTHS.get(text.lower(), "")
    if text and (int in arms or float in arms):
        return _read_number(text, whole=float not in arms)
    lists = [arm for arm in arms if get_origin(arm) in (list, tuple)]
    if not lists or isinstance(value, (Mapping, list, tuple)) or value is None:
        return ""
    if isinstance(value, str) and any(get_origin(arm) is Literal for arm in arms) and "," not in text:
        return ""
    return _read_list(text if isinstance(value, str) else str(value), lists[0])


def _arms(kind: Any) -> list[Any]:
    """The members of a union, or the type itself, without their ranges."""
    if get_origin(kind) is Annotated:
        return _arms(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        return [arm for inner in get_args(kind) for arm in _arms(inner)]
    return [kind]


def _read_list(text: str, kind: Any) -> str:
    """The list that a text means: `a,b`, `a b` or `(a, b)`, and `0-4` or `0..4` for whole numbers."""
    words = [word.strip() for word in text.strip("[]()").split("," if "," in text else None) if word.strip()]
    elements, length = get_args(kind), len(get_args(kind)) if get_origin(kind) is tuple else 0
    arms = _arms(elements[0])
    if not words or not all(re.fullmatch(r"[\w.+-]+", word) for word in words):
        return ""
    if int in arms and (span := re.fullmatch(r"(\d{1,9})(?:-|\.\.)(\d{1,9})", words[0])):
        first, last = int(span[1]), int(span[2])
        words = [str(n) for n in range(first, last + 1)] if len(words) == 1 and last - first < 20 else []
    numbers = int in arms or float in arms
    if numbers and not all(_read_number(word, whole=float not in arms) == word for word in words):
        return ""
    ranges = [extra for extra in getattr(elements[0], "__metadata__", ()) if hasattr(extra, "__contains__")]
    if numbers and not all(float(word) in allowed for word in words for allowed in ranges):
        return ""
    if not numbers and str in arms and _FIGURES.fullmatch("".join(words)):
        return ""
    complete = get_origin(kind) is not tuple or len(words) == length
    return f"[{','.join(words)}]" if words and complete else ""


def _read_number(text: str, whole: bool) -> str:
    """The number that a text in another notation means: `1_000`, `1,000`, or `1e-4` with a long dash."""
    text = text.replace("_", "").lstrip("= ")
    if re.fullmatch(r"[0-9]{1,3}(,[0-9]{3})+", text):
        text = text.replace(",", "")
    if not re.fullmatch(r"[-+]?(\.[0-9]+|[0-9]{1,15}(\.[0-9]*)?)([eE][-+]?[0-9]{1,2})?", text):
        return ""
    return text if not whole else str(int(float(text))) if float(text).is_integer() else ""
