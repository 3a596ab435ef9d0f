"""What a value of the wrong type was probably meant to be, as it is written in YAML."""

from __future__ import annotations

import re
import types
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from mulki_plugins.characters import simplify

_TRUTHS = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}


def _arms(kind: Any) -> list[Any]:
    """A type and all that it may be instead, without their ranges."""
    if get_origin(kind) is Annotated:
        return _arms(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        return [arm for inner in get_args(kind) for arm in _arms(inner)]
    return [kind]


def advice(kind: Any, value: Any) -> str:
    """What to do where a text was meant and YAML read something else; which keys a mapping has."""
    classes = [arm for arm in _arms(kind) if hasattr(arm, "__attrs_attrs__")]
    if classes and not isinstance(value, (Mapping, list, tuple)):
        return f"; its keys are {', '.join(a.name for a in classes[0].__attrs_attrs__)}"
    if str not in _arms(kind) or isinstance(value, (Mapping, list, tuple, str)):
        return ""
    return f"; {IN_QUOTES}" + (', such as "null"' if value is None else "")


IN_QUOTES = "put it in quotes if it is a text"


def meant(kind: Any, value: Any) -> str:
    """What a value was probably meant to be, as YAML: a whole number, a truth value, a list; empty where nobody can tell."""
    arms = _arms(kind)
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 and int in arms:
        return str(int(value))
    text = simplify(value).strip() if isinstance(value, str) else ""
    if text and bool in arms:
        return _TRUTHS.get(text.lower(), "")
    if text and (int in arms or float in arms):
        return _number_in(text, whole=float not in arms)
    lists = [arm for arm in arms if get_origin(arm) in (list, tuple)]
    if not lists or isinstance(value, (Mapping, list, tuple)) or value is None:
        return ""
    if isinstance(value, str) and any(get_origin(arm) is Literal for arm in arms) and "," not in text:
        return ""
    return _list_in(text if isinstance(value, str) else str(value), lists[0])


def _list_in(text: str, kind: Any) -> str:
    """The list that a text means: a,b and `a b` and (a, b); for whole numbers also 0-4 and 0..4."""
    words = [word.strip() for word in text.strip("[]()").split("," if "," in text else None) if word.strip()]
    elements, most = get_args(kind), len(get_args(kind)) if get_origin(kind) is tuple else 0
    if not words or not all(re.fullmatch(r"[\w.+-]+", word) for word in words):
        return ""
    if (int in _arms(elements[0])) and (span := re.fullmatch(r"(\d{1,9})(?:-|\.\.)(\d{1,9})", words[0])):
        first, last = int(span[1]), int(span[2])
        words = [str(n) for n in range(first, last + 1)] if len(words) == 1 and last - first < 20 else []
    numbers = any(arm in (int, float) for arm in _arms(elements[0]))
    if numbers and not all(_number_in(word, whole=float not in _arms(elements[0])) == word for word in words):
        return ""
    ranges = [extra for extra in getattr(elements[0], "__metadata__", ()) if hasattr(extra, "__contains__")]
    if numbers and not all(float(word) in allowed for word in words for allowed in ranges):
        return ""
    if not numbers and str in _arms(elements[0]) and _FIGURES.fullmatch("".join(words)):
        return ""
    exact = get_origin(kind) is not tuple or len(words) == most
    return f"[{','.join(words)}]" if words and exact else ""


_FIGURES = re.compile("[0-9.]+")


def _number_in(text: str, whole: bool) -> str:
    """The number that a text with signs of other notations means: 1_000, 1,000, 1e-4 with a long dash."""
    text = text.replace("_", "").lstrip("= ")
    if re.fullmatch(r"[0-9]{1,3}(,[0-9]{3})+", text):
        text = text.replace(",", "")
    if not re.fullmatch(r"[-+]?(\.[0-9]+|[0-9]{1,15}(\.[0-9]*)?)([eE][-+]?[0-9]{1,2})?", text):
        return ""
    return text if not whole else str(int(float(text))) if float(text).is_integer() else ""
