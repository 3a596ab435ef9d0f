"""Typed options: what a number may be, strict conversion, and every mistake with its path.

The same types serve a recipe's schema, where they are checked before anything is imported, and the signatures of
stages, which check themselves when they are built in Python (`checked`).
"""

from __future__ import annotations

import functools
import inspect
import math
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import cattrs
from attrs import frozen
from cattrs.gen import make_dict_structure_fn

from mulki_plugins.characters import name_lookalikes
from mulki_plugins.errors import did_you_mean
from mulki_plugins.meant import advice, meant

Path = tuple[str | int, ...]


@frozen
class Range:
    """Numbers from `least` to `most`; `above` and `below` leave out the end itself."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        named = {"at least": self.least, "at most": self.most, "above": self.above, "below": self.below}
        return " and ".join(f"{words} {bound:g}" for words, bound in named.items() if bound is not None)


BelowOne = Annotated[float, Range(least=0, below=1)]
"""A rate of decay: from 0, and below 1."""
Weight = Annotated[float, Range(least=0)]
"""A factor of a loss: 0 or more."""
Fraction = Annotated[float, Range(least=0, most=1)]
"""A share, from 0 to 1."""
Positive = Annotated[float, Range(above=0)]
"""A temperature or a rate: above 0."""
Count = Annotated[int, Range(least=1)]
"""How many: 1 or more."""
Natural = Annotated[int, Range(least=0)]
"""0 or more."""

NAMES: dict[str, Any] = {
    "Weight": Weight, "Fraction": Fraction, "Positive": Positive, "Count": Count, "Natural": Natural,
    "BelowOne": BelowOne,
}  # fmt: skip
"""The types that a signature may name, for readers that do not import the module (see registry/signature.py)."""


MOST = 1000
"""How many mistakes of one sort are worth a closer look."""


class OptionError(ValueError):
    """A value that its type does not admit; `path` leads to it from where the check began.

    write: what was probably meant, as YAML; empty where nobody can tell.
    """

    def __init__(self, message: str, path: Path = (), write: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.path = path
        self.write = write

    def below(self, path: Path) -> OptionError:
        """The same mistake, its path beginning further up."""
        return OptionError(self.message, (*path, *self.path), self.write)

    def __str__(self) -> str:
        return f"{self.message}; write {self.write}" if self.write else self.message


UNKNOWN = "unknown option"
"""How every message about a key that there is not begins."""


def describe(kind: Any) -> str:
    """A type in a user's words: `a number, at least 0`."""
    origin = get_origin(kind)
    if origin is Annotated:
        base, *extra = get_args(kind)
        return ", ".join([describe(base), *(str(e) for e in extra if isinstance(e, Range))])
    if origin is Literal:
        return " or ".join(repr(value) for value in get_args(kind))
    if origin in (Union, types.UnionType):
        return " or ".join(describe(arm) for arm in get_args(kind))
    if origin is list:
        return f"a list, each {describe(get_args(kind)[0])}"
    if origin is tuple:
        return f"a list of {len(get_args(kind))} values"
    if origin is dict:
        return "a mapping"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", types.NoneType: "null"}
    return words.get(kind, "a mapping" if hasattr(kind, "__attrs_attrs__") else "a value")


def shown(value: Any) -> str:
    """A value as it may stand in an error: short, on one line."""
    if isinstance(value, Mapping):
        return "a mapping" if value else "an empty mapping"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    if value is None:
        return "nothing"
    text = repr(value).lower() if isinstance(value, bool) else repr(value)
    odd = name_lookalikes(value) if isinstance(value, str) else ""
    return (text if len(text) <= 60 else text[:57] + "...") + (f" with {odd}" if odd else "")


def _expected(kind: Any, value: Any) -> OptionError:
    return OptionError(f"expected {describe(kind)}, got {shown(value)}" + advice(kind, value), write=meant(kind, value))


def _whole(value: Any, _: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _expected(int, value)
    return value


def _number(value: Any, _: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _expected(float, value)
    return float(value)


def _exactly(kind: type) -> Callable[[Any, Any], Any]:
    def structure(value: Any, _: Any) -> Any:
        if not isinstance(value, kind):
            raise _expected(kind, value)
        return value

    return structure


def _annotated(kind: Any, converter: cattrs.Converter) -> Callable[[Any, Any], Any]:
    base, *extra = get_args(kind)
    ranges = [e for e in extra if isinstance(e, Range)]

    def structure(value: Any, _: Any) -> Any:
        result = converter.structure(value, base)
        if not all(result in allowed for allowed in ranges):
            raise _expected(kind, value)
        return result

    return structure


def _literal(kind: Any) -> Callable[[Any, Any], Any]:
    def structure(value: Any, _: Any) -> Any:
        for choice in get_args(kind):
            if type(value) is type(choice) and value == choice:
                return value
        hint = did_you_mean(value, map(str, get_args(kind))) if isinstance(value, str) else ""
        message = _expected(kind, value).message
        raise OptionError(f"{message} ({hint})" if hint.startswith("did") else message)

    return structure


def _union(kind: Any, converter: cattrs.Converter) -> Callable[[Any, Any], Any]:
    def structure(value: Any, _: Any) -> Any:
        for arm in get_args(kind):
            if _same_shape(value, arm):
                try:
                    return converter.structure(value, arm)
                except OptionError:
                    if meant(kind, value).startswith("["):  # a list in words, and not a wrong word
                        break
                    raise
        raise _expected(kind, value)

    return structure


def _same_shape(value: Any, kind: Any) -> bool:
    """Whether a value is of the sort that a type is written as, be it valid or not."""
    origin = get_origin(kind)
    if origin is Annotated:
        return _same_shape(value, get_args(kind)[0])
    if origin is Literal:
        return any(type(value) is type(choice) for choice in get_args(kind))
    if origin in (list, tuple):
        return isinstance(value, (list, tuple))
    if origin is dict or hasattr(kind, "__attrs_attrs__"):
        return isinstance(value, Mapping)
    if kind is types.NoneType:
        return value is None
    if kind in (int, float):
        return (
            isinstance(value, int | float) and not isinstance(value, bool) and (kind is float or isinstance(value, int))
        )
    return kind is Any or isinstance(value, kind)


def _collection(kind: Any, converter: cattrs.Converter) -> Callable[[Any, Any], Any]:
    """Lists, tuples of a fixed length, and mappings with text keys; every element's mistakes are collected."""
    origin, args = get_origin(kind), get_args(kind)

    def structure(value: Any, _: Any) -> Any:
        if not isinstance(value, Mapping if origin is dict else (list, tuple)):
            raise _expected(kind, value)
        if origin is tuple and len(value) != len(args):
            raise OptionError(f"expected a list of {len(args)} values, got {len(value)}")
        items: list[tuple[Any, Any]] = list(value.items() if isinstance(value, Mapping) else enumerate(value))
        kinds = args if origin is tuple else [args[-1]] * len(items)
        result, errors = {}, []
        for (key, item), item_kind in zip(items, kinds, strict=True):
            if origin is dict and (problem := _key_problem(key, args[0])):
                errors.append(OptionError(problem, (key,)))
                continue
            try:
                result[key] = converter.structure(item, item_kind)
            except Exception as error:
                errors += [e.below((key,)) for e in mistakes_of(error)]
        if errors:
            raise OptionErrors(errors)
        return result if origin is dict else origin(result.values())

    return structure


def _key_problem(key: Any, kind: Any) -> str:
    """What is wrong with a mapping's key, which must be a text, or one of a Literal's."""
    if not isinstance(key, str):
        return f"expected a text as key, got {shown(key)}"
    if get_origin(kind) is Literal and key not in get_args(kind):
        return f"{UNKNOWN} ({did_you_mean(key, get_args(kind))})"
    return ""


class OptionErrors(ValueError):
    """Several mistakes at once (Python 3.10 has no exception groups of its own)."""

    def __init__(self, errors: list[OptionError]) -> None:
        super().__init__("; ".join(error.message for error in errors))
        self.errors = errors


def mistakes_of(error: BaseException, path: Path = ()) -> Iterator[OptionError]:
    """Every mistake in what a conversion raised, with the path from where it began."""
    if isinstance(error, cattrs.ClassValidationError):
        located, rest = error.group_exceptions()
        for inner, note in located:
            yield from mistakes_of(inner, (*path, note.name))
        for inner in rest:
            yield from mistakes_of(inner, path)
    elif isinstance(error, cattrs.ForbiddenExtraKeysError):
        known = [a.name for a in getattr(error.cl, "__attrs_attrs__", ())]
        for key in sorted(error.extra_fields, key=str)[:MOST]:
            yield OptionError(f"{UNKNOWN} ({did_you_mean(str(key), known)})", (*path, key))
    elif isinstance(error, OptionErrors):
        for inner in error.errors:
            yield inner.below(path)
    elif isinstance(error, OptionError):
        yield error.below(path)
    elif isinstance(error, KeyError):
        yield OptionError("missing; it has no default", path)
    else:
        yield OptionError(str(error), path)


def _new_converter() -> cattrs.Converter:
    converter = cattrs.Converter(detailed_validation=True, forbid_extra_keys=True)
    converter.register_structure_hook(int, _whole)
    converter.register_structure_hook(float, _number)
    converter.register_structure_hook(bool, _exactly(bool))
    converter.register_structure_hook(str, _exactly(str))
    converter.register_structure_hook(types.NoneType, _exactly(types.NoneType))

    def when(test: Callable[[Any], bool], make: Callable[[Any, cattrs.Converter], Any]) -> None:
        converter.register_structure_hook_factory(test, lambda kind: make(kind, converter))

    def attrs_class(kind: Any, _: cattrs.Converter) -> Callable[[Any, Any], Any]:
        inner = make_dict_structure_fn(kind, converter, _cattrs_forbid_extra_keys=True)

        def structure(value: Any, target: Any) -> Any:
            if not isinstance(value, Mapping):
                raise _expected(kind, value)
            return inner(value, target)

        return structure

    when(lambda kind: hasattr(kind, "__attrs_attrs__"), attrs_class)
    when(lambda kind: get_origin(kind) in (list, tuple, dict), _collection)
    when(lambda kind: get_origin(kind) in (Union, types.UnionType), _union)
    when(lambda kind: get_origin(kind) is Literal, lambda kind, _: _literal(kind))
    when(lambda kind: get_origin(kind) is Annotated, _annotated)
    return converter


CONVERTER = _new_converter()


def hints_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of a function as types; without those that name what is not there when it runs.

    An annotation may name a class that is imported under `TYPE_CHECKING` only, or use syntax of a later Python.
    """
    function = inspect.unwrap(function)
    hints: dict[str, Any] = {}
    try:
        annotations = getattr(function, "__annotations__", {})
    except Exception:  # Python 3.14 evaluates them only here
        annotations = {}
    for name, written in annotations.items():
        holder = types.SimpleNamespace(__annotations__={name: written})
        try:
            hints.update(get_type_hints(holder, getattr(function, "__globals__", {}), include_extras=True))
        except Exception:  # whatever the evaluation of a stranger's annotation raises
            continue
    return hints


def _may_be(value: Any, kind: Any) -> bool:
    """Whether a value is of a class; what is no class, or cannot be asked, admits everything."""
    try:
        return not inspect.isclass(kind) or isinstance(value, kind)
    except TypeError:
        return True


def convert(value: Any, kind: Any) -> Any:
    """The value as its type; OptionError (or a group of cattrs) where it is not of that type."""
    return value if kind in (Any, inspect.Parameter.empty) else CONVERTER.structure(value, kind)


Init = TypeVar("Init", bound=Callable[..., None])


def checked(init: Init) -> Init:
    """Decorator for `__init__`: the keyword arguments are checked against their annotations, all at once."""

    @functools.wraps(init)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = inspect.signature(init).bind(self, *args, **kwargs)
        hints = hints_of(init)
        wrong = []
        for name, value in bound.arguments.items():
            kind = hints.get(name, Any)
            try:
                if hasattr(kind, "__attrs_attrs__"):
                    raise cattrs.StructureHandlerNotFoundError("", kind)
                convert(value, kind)
            except cattrs.StructureHandlerNotFoundError:  # an object that no recipe can write
                if not _may_be(value, kind):
                    wrong.append(f"{name}: expected a {kind.__name__}, got {shown(value)}")
            except Exception as error:
                wrong += [f"{'.'.join(map(str, (name, *e.path)))}: {e}" for e in mistakes_of(error)]
        if wrong:
            raise ValueError(f"{type(self).__name__}: " + "; ".join(wrong))
        init(self, *args, **kwargs)

    return wrapper  # type: ignore[return-value]
