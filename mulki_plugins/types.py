"""Option types, their strict conversion, and `@checked`.

They annotate a recipe's schema, and the keyword arguments of stages, which check themselves when built in Python.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import operator
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import attrs
import cattrs
from cattrs.cols import list_structure_factory
from cattrs.gen import make_dict_structure_fn, mapping_structure_factory

from mulki_plugins.corrections import advise, suggest_value
from mulki_plugins.errors import MAX_REPORTED, UNKNOWN_OPTION, Location, OptionError, did_you_mean, format_value

Schema = dict[str, Any]
"""JSON Schema, draft 2020-12."""
ClassSchema = Callable[[Any], Schema]
Hook = Callable[[Any, Any], Any]


@attrs.frozen
class Range:
    """Numbers from `least` to `most`; `above` and `below` exclude the bound itself."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return all(holds(value, bound) for holds, _, _, bound in self._bounds)

    def __str__(self) -> str:
        return " and ".join(f"{words} {bound:g}" for _, words, _, bound in self._bounds)

    @property
    def schema(self) -> Schema:
        """The bounds as keywords of JSON Schema."""
        return {keyword: bound for _, _, keyword, bound in self._bounds}

    @property
    def _bounds(self) -> list[tuple[Callable[[float, float], bool], str, str, float]]:
        """For each bound: how it compares, its words, its keyword of JSON Schema, and itself."""
        bounds = (
            (operator.ge, "at least", "minimum", self.least), (operator.le, "at most", "maximum", self.most),
            (operator.gt, "above", "exclusiveMinimum", self.above), (operator.lt, "below", "exclusiveMaximum", self.below),
        )  # fmt: skip
        return [(holds, words, keyword, bound) for holds, words, keyword, bound in bounds if bound is not None]


BelowOne = Annotated[float, Range(least=0, below=1)]
"""A decay rate: at least 0 and below 1."""
Weight = Annotated[float, Range(least=0)]
"""The factor of a loss: 0 or more."""
Fraction = Annotated[float, Range(least=0, most=1)]
"""A share, from 0 to 1."""
Positive = Annotated[float, Range(above=0)]
"""A temperature or a rate: above 0."""
Count = Annotated[int, Range(least=1)]
"""A count: 1 or more."""
Natural = Annotated[int, Range(least=0)]
"""0 or more."""

OPTION_TYPES: dict[str, Any] = {
    "Weight": Weight, "Fraction": Fraction, "Positive": Positive, "Count": Count, "Natural": Natural,
    "BelowOne": BelowOne,
}  # fmt: skip
"""The option types by name, for reading signatures without importing their module."""


@attrs.frozen(kw_only=True)
class TypeKind:
    """How one kind of type, such as lists, is recognised, described and converted. Every function takes the type."""

    matches: Callable[[Any], bool]
    describe: Callable[[Any], str]
    fits: Callable[[Any, Any], bool]
    """Whether a value, valid or not, has the shape of this kind; it selects the arm of a union."""
    schema: Callable[[Any, ClassSchema], Schema]
    convert: Hook
    any_shape: bool = False
    """Whether `convert` also takes values that do not fit, and reports them itself."""


def describe(type_: Any) -> str:
    """A type in words: `a number, at least 0`."""
    return _kind_of(type_).describe(type_)


def json_schema(type_: Any, of_class: ClassSchema) -> Schema:
    """A type as JSON Schema; `of_class` gives that of an attrs class. An empty schema, for other classes, admits anything."""
    return _kind_of(type_).schema(type_, of_class)


def convert(value: Any, type_: Any) -> Any:
    """The value as its type. Raises an error for `collect_mistakes`."""
    return value if type_ in (Any, inspect.Parameter.empty) else CONVERTER.structure(value, type_)


def _kind_of(type_: Any) -> TypeKind:
    return next(kind for kind in _KINDS if kind.matches(type_))


def _fits(value: Any, type_: Any) -> bool:
    return _kind_of(type_).fits(value, type_)


def _mismatch(value: Any, type_: Any) -> OptionError:
    message = f"expected {describe(type_)}, got {format_value(value)}" + advise(type_, value)
    return OptionError(message, write=suggest_value(type_, value))


def _in_range(value: Any, type_: Any) -> Any:
    result = CONVERTER.structure(value, get_args(type_)[0])
    if not all(result in allowed for allowed in _ranges(type_)):
        raise _mismatch(value, type_)
    return result


def _one_of(value: Any, type_: Any) -> Any:
    for choice in get_args(type_):
        if type(value) is type(choice) and value == choice:
            return value
    hint = did_you_mean(value, map(str, get_args(type_))) if isinstance(value, str) else ""
    message = _mismatch(value, type_).message
    raise OptionError(f"{message} ({hint})" if hint.startswith("did") else message)


def _first_fitting_arm(value: Any, type_: Any) -> Any:
    for arm in get_args(type_):
        if _fits(value, arm):
            try:
                return CONVERTER.structure(value, arm)
            except OptionError:
                if suggest_value(type_, value).startswith("["):  # a list written as text rather than a misspelt word
                    break
                raise
    raise _mismatch(value, type_)


def _fixed_tuple(value: Any, type_: Any) -> Any:
    arms = get_args(type_)
    if len(value) != len(arms):
        raise OptionError(f"expected a list of {len(arms)} values, got {len(value)}")
    if len(set(arms)) == 1:
        return tuple(_convert(value, types.GenericAlias(list, arms[:1])))
    return tuple(CONVERTER.structure(item, arm) for item, arm in zip(value, arms, strict=True))


@functools.cache
def _by_cattrs(factory: Callable[..., Hook], type_: Any) -> Hook:
    return factory(type_, CONVERTER)


def _ranges(type_: Any) -> list[Range]:
    return [extra for extra in get_args(type_)[1:] if isinstance(extra, Range)]


def _scalar(type_: Any, words: str, name: str, fits: Callable[[Any], bool]) -> TypeKind:
    return TypeKind(
        matches=lambda t: t is type_ or (t is None and type_ is types.NoneType),
        describe=lambda _: words,
        fits=lambda value, _: fits(value),
        schema=lambda *_: {"type": name},
        convert=lambda value, _: float(value) if type_ is float else value,
    )


def _list_of(element: str) -> str:
    """The words for a list of such elements: `a number, at least 0` gives `a list of numbers, each at least 0`."""
    noun, _, bounds = element.partition(", ")
    if not noun.startswith("a ") or " " in noun[2:].removeprefix("whole "):
        return f"a list, each {element}"
    return f"a list of {noun[2:]}s" + (f", each {bounds}" if bounds else "")


def _is_number(value: Any, allowed: Any) -> bool:
    return isinstance(value, allowed) and not isinstance(value, bool) and abs(value) < math.inf


_KINDS = (
    TypeKind(
        matches=lambda t: get_origin(t) is Annotated,
        describe=lambda t: ", ".join([describe(get_args(t)[0]), *(str(e) for e in _ranges(t))]),
        fits=lambda value, t: _fits(value, get_args(t)[0]),
        schema=lambda t, of_class: functools.reduce(
            operator.or_, (r.schema for r in _ranges(t)), json_schema(get_args(t)[0], of_class)
        ),
        convert=_in_range,
        any_shape=True,
    ),
    TypeKind(
        matches=lambda t: get_origin(t) is Literal,
        describe=lambda t: " or ".join(map(repr, get_args(t))),
        fits=lambda value, t: any(type(value) is type(choice) for choice in get_args(t)),
        schema=lambda t, _: {"enum": list(get_args(t))},
        convert=_one_of,
        any_shape=True,
    ),
    TypeKind(
        matches=lambda t: get_origin(t) in (Union, types.UnionType),
        describe=lambda t: " or ".join(map(describe, get_args(t))),
        fits=lambda value, t: any(_fits(value, arm) for arm in get_args(t)),
        schema=lambda t, of_class: {"anyOf": [json_schema(arm, of_class) for arm in get_args(t)]},
        convert=_first_fitting_arm,
        any_shape=True,
    ),
    TypeKind(
        matches=lambda t: get_origin(t) is list,
        describe=lambda t: _list_of(describe(get_args(t)[0])),
        fits=lambda value, _: isinstance(value, (list, tuple)),
        schema=lambda t, of_class: {"type": "array", "items": json_schema(get_args(t)[0], of_class)},
        convert=lambda value, t: _by_cattrs(list_structure_factory, t)(value, t),
    ),
    TypeKind(
        matches=lambda t: get_origin(t) is tuple,
        describe=lambda t: f"a list of {len(get_args(t))} values",
        fits=lambda value, _: isinstance(value, (list, tuple)),
        schema=lambda t, of_class: {
            "type": "array",
            "prefixItems": [json_schema(arm, of_class) for arm in get_args(t)],
            **dict.fromkeys(("minItems", "maxItems"), len(get_args(t))),
        },
        convert=_fixed_tuple,
    ),
    TypeKind(
        matches=lambda t: get_origin(t) is dict,
        describe=lambda _: "a mapping",
        fits=lambda value, _: isinstance(value, Mapping),
        schema=lambda t, of_class: {
            "type": "object",
            **({"propertyNames": json_schema(key, of_class)} if get_origin(key := get_args(t)[0]) is Literal else {}),
            "additionalProperties": json_schema(get_args(t)[1], of_class),
        },
        convert=lambda value, t: _by_cattrs(mapping_structure_factory, t)(value, t),
    ),
    TypeKind(
        matches=attrs.has,
        describe=lambda _: "a mapping",
        fits=lambda value, _: isinstance(value, Mapping),
        schema=lambda t, of_class: of_class(t),
        convert=lambda value, t: _by_cattrs(make_dict_structure_fn, t)(value, t),
    ),
    _scalar(bool, "true or false", "boolean", lambda value: isinstance(value, bool)),
    _scalar(int, "a whole number", "integer", lambda value: _is_number(value, int)),
    _scalar(float, "a number", "number", lambda value: _is_number(value, (int, float))),
    _scalar(str, "a text", "string", lambda value: isinstance(value, str)),
    _scalar(types.NoneType, "null", "null", lambda value: value is None),
    TypeKind(
        matches=lambda _: True,
        describe=lambda _: "a value",
        fits=lambda value, t: t is Any or isinstance(value, t),
        schema=lambda *_: {},
        convert=lambda value, _: value,  # not used: cattrs converts other types
    ),
)
"""The kinds of types that options have, the more special first."""


def _convert(value: Any, type_: Any) -> Any:
    kind = _kind_of(type_)
    if not kind.any_shape and not kind.fits(value, type_):  # cattrs would coerce it
        raise _mismatch(value, type_)
    return kind.convert(value, type_)


CONVERTER = cattrs.Converter(detailed_validation=True, forbid_extra_keys=True)
CONVERTER.register_structure_hook_func(lambda type_: _kind_of(type_) is not _KINDS[-1], _convert)
for _type in (bool, int, float, str, types.NoneType):  # cattrs' own hooks for these would win
    CONVERTER.register_structure_hook(_type, _convert)


def collect_mistakes(error: BaseException, path: Location = ()) -> Iterator[OptionError]:
    """Every mistake in an error that a conversion raised, located from where it began (`path`)."""
    if isinstance(error, (cattrs.ClassValidationError, cattrs.IterableValidationError)):
        located, rest = error.group_exceptions()
        for inner, note in located:
            where: Location = (*path, note.name if hasattr(note, "name") else note.index)
            if "mapping key @" in str(note) and isinstance(where[-1], str):
                yield OptionError(f"{UNKNOWN_OPTION} ({did_you_mean(where[-1], get_args(note.type))})", where)
            else:
                yield from collect_mistakes(inner, where)
        for inner in rest:
            yield from collect_mistakes(inner, path)
    elif isinstance(error, cattrs.ForbiddenExtraKeysError):
        known = [a.name for a in getattr(error.cl, "__attrs_attrs__", ())]
        for key in sorted(error.extra_fields, key=str)[:MAX_REPORTED]:
            yield OptionError(f"{UNKNOWN_OPTION} ({did_you_mean(str(key), known)})", (*path, key))
    elif isinstance(error, OptionError):
        yield error.below(path)
    elif isinstance(error, KeyError):
        yield OptionError("missing; it has no default", path)
    else:
        yield OptionError(str(error), path)


def read_hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of a function as types, without those that cannot be evaluated.

    An annotation may name a class that is imported under `TYPE_CHECKING` only, or use the syntax of a later Python.
    """
    function = inspect.unwrap(function)
    hints, annotations = dict[str, Any](), dict[str, Any]()
    with contextlib.suppress(Exception):  # Python 3.14 evaluates them only here
        annotations = getattr(function, "__annotations__", {})
    for name, annotation in annotations.items():
        holder = types.SimpleNamespace(__annotations__={name: annotation})
        with contextlib.suppress(Exception):  # third-party annotations may raise anything
            hints.update(get_type_hints(holder, getattr(function, "__globals__", {}), include_extras=True))
    return hints


Init = TypeVar("Init", bound=Callable[..., None])


def checked(init: Init) -> Init:
    """Decorator for `__init__`: checks the arguments against their annotations and raises one ValueError for all."""

    @functools.wraps(init)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = inspect.signature(init).bind(self, *args, **kwargs)
        hints = read_hints(init)
        wrong = []
        for name, value in bound.arguments.items():
            type_ = hints.get(name, Any)
            try:
                if attrs.has(type_):
                    raise cattrs.StructureHandlerNotFoundError("", type_)
                convert(value, type_)
            except cattrs.StructureHandlerNotFoundError:  # an object that YAML cannot express
                with contextlib.suppress(TypeError):  # a class that refuses isinstance
                    if inspect.isclass(type_) and not isinstance(value, type_):
                        wrong.append(f"{name}: expected a {type_.__name__}, got {format_value(value)}")
            except Exception as error:
                wrong += [f"{'.'.join(map(str, (name, *e.path)))}: {e}" for e in collect_mistakes(error)]
        if wrong:
            raise ValueError(f"{type(self).__name__}: " + "; ".join(wrong))
        init(self, *args, **kwargs)

    return wrapper  # type: ignore[return-value]  # functools.wraps keeps the signature, which mypy cannot see
