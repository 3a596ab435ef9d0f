"""The JSON Schema (draft 2020-12) of a recipe and of a strategy, with every part that is installed: for editors.

Made of the same classes and signatures that `mulki validate` goes by. What only shows across values (order, conflicts, two
budgets) is beyond a schema. Nothing is demanded that a strategy's `defaults` may bring.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from attrs import NOTHING, Factory, fields

from mulki_plugins.errors import MulkiError
from mulki_plugins.recipe.files import DEFAULTABLE
from mulki_plugins.recipe.schema import Choice, Entry, Recipe, Strategy, StrategyFile
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.registry.open_clip_names import open_clip_part
from mulki_plugins.registry.parts import Kind, Part
from mulki_plugins.registry.signature import REQUIRED, UNKNOWN, signature_of
from mulki_plugins.types import Range, is_yaml_value

Schema = dict[str, Any]
DIALECT = "https://json-schema.org/draft/2020-12/schema"
_MAY_COME_FROM_A_STRATEGY = {"lr", "optimizer", *DEFAULTABLE}


def recipe_schema(architectures: Iterable[str] | None) -> Schema:
    """Of a recipe. architectures: open_clip's names; None where any name may be one."""
    schema = _of_class(Recipe)
    properties = schema["properties"]
    properties["stream"] = _choice("stream")
    properties["reference"] = {"anyOf": [_choice("stream"), {"type": "null"}]}
    properties["model"] = _model(architectures)
    whole = _of_class(Strategy)
    whole["properties"]["plugins"] = _stack()
    whole["required"] = []
    names = {
        "type": "string",
        "description": "The name of a strategy, or the path of its file.",
        "examples": _strategies(),
    }
    properties["strategy"] = {"anyOf": [names, whole]}
    _named_parts(properties)
    return _whole("a recipe of MulKI", schema)


def strategy_schema(architectures: Iterable[str] | None) -> Schema:
    """Of a strategy's file."""
    recipe = recipe_schema(architectures)
    schema = _of_class(StrategyFile)
    schema["properties"]["plugins"] = _stack()
    towers = {"type": "object", "properties": {"train": _TOWERS}, "additionalProperties": False}
    defaults = {key: recipe["properties"][key] for key in DEFAULTABLE if key != "model"} | {"model": towers}
    schema["properties"]["defaults"] = {"type": "object", "properties": defaults, "additionalProperties": False}
    return _whole("a strategy of MulKI", schema)


def _whole(title: str, schema: Schema) -> Schema:
    return {
        "$schema": DIALECT,
        "title": title,
        **schema,
        "$defs": {p.name: _options(p) for p in catalog().of_kind("plugin")},
    }


def _of_class(kind: Any) -> Schema:
    """An attrs class as an object; every key that it has no default for is required."""
    hints = get_type_hints(kind, include_extras=True)
    properties, required = {}, []
    for attribute in fields(kind):
        properties[attribute.name] = of_type(hints[attribute.name])
        default = attribute.default
        if default is NOTHING:
            if attribute.name not in _MAY_COME_FROM_A_STRATEGY:
                required.append(attribute.name)
        elif not isinstance(default, Factory) and is_yaml_value(default):  # type: ignore[arg-type]
            properties[attribute.name] = {**properties[attribute.name], "default": default}
    schema = {"type": "object", "description": _one_line(kind.__doc__), "properties": properties}
    return {**schema, "required": required, "additionalProperties": False}


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


_WORDS: dict[Any, Schema] = {
    bool: {"type": "boolean"}, int: {"type": "integer"}, float: {"type": "number"}, str: {"type": "string"},
    types.NoneType: {"type": "null"}, None: {"type": "null"}, Any: {},
}  # fmt: skip


def of_type(kind: Any) -> Schema:
    """A type as `mulki_plugins.types` reads it; an empty schema, which admits anything, for one that it does not."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return of_type(args[0]) | {
            k: v for extra in args[1:] if isinstance(extra, Range) for k, v in _range(extra).items()
        }
    if origin is Literal:
        return {"enum": list(args)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [of_type(arm) for arm in args]}
    if origin is list:
        return {"type": "array", "items": of_type(args[0])}
    if origin is tuple:
        prefix = [of_type(arm) for arm in args]
        return {"type": "array", "prefixItems": prefix, "minItems": len(args), "maxItems": len(args)}
    if origin is dict:
        names = {"propertyNames": of_type(args[0])} if get_origin(args[0]) is Literal else {}
        return {"type": "object", **names, "additionalProperties": of_type(args[1])}
    if kind in (Choice, Entry):
        return {}  # written out by the caller
    if hasattr(kind, "__attrs_attrs__"):
        schema = _of_class(kind)
        if "name" in schema["properties"] and "default" in schema["properties"]["name"]:
            return {"anyOf": [schema["properties"]["name"], schema]}  # its short form
        return schema
    return _WORDS.get(kind, {})


def _range(allowed: Range) -> Schema:
    words = {
        "minimum": allowed.least, "maximum": allowed.most,
        "exclusiveMinimum": allowed.above, "exclusiveMaximum": allowed.below,
    }  # fmt: skip
    return {word: bound for word, bound in words.items() if bound is not None}


def _options(part: Part, more: Mapping[str, Schema] | None = None) -> Schema:
    """The options of a part as an object; anything for one whose source cannot be read."""
    try:
        signature = signature_of(part)
    except MulkiError:
        return {"description": part.summary}
    properties: Schema = dict(more or {})
    for name, option in signature.options.items():
        said = part.defaults.get(name, option.default)
        schema = of_type(option.kind)
        if said is not REQUIRED and said is not UNKNOWN and is_yaml_value(said):
            schema = {**schema, "default": list(said) if isinstance(said, tuple) else said}
        if line := part.options.get(name):
            schema = {**schema, "description": line}
        properties[name] = schema
    required = [name for name, option in signature.options.items() if _must_be_said(part, name, option.default)]
    return {
        "type": "object", "description": part.summary + (f" [{part.source}]" if part.source else ""),
        "properties": properties, "required": required, "additionalProperties": signature.open,
    }  # fmt: skip


def _must_be_said(part: Part, name: str, default: Any) -> bool:
    return default is REQUIRED and name not in part.defaults


def _named(name: str, schema: Schema) -> Schema:
    """A part's options with its name among them."""
    properties = {"name": {"const": name}, **schema.get("properties", {})}
    return {**schema, "type": "object", "properties": properties, "required": ["name", *schema.get("required", [])]}


def _choice(kind: Kind, more: Mapping[str, Schema] | None = None) -> Schema:
    """A part by its name alone, or as a mapping of its name and its options."""
    parts = [(part, _options(part, more)) for part in catalog().of_kind(kind)]
    short = [part.name for part, schema in parts if not schema.get("required")]
    return {"anyOf": [{"enum": short}, *(_named(part.name, schema) for part, schema in parts)]}


_TOWERS: Schema = {"enum": ["all", "image", "text"], "default": "all", "description": "Which towers learn."}


def _model(architectures: Iterable[str] | None) -> Schema:
    """A registered model, or an architecture of open_clip."""
    choice = _choice("model", {"train": _TOWERS})
    own = [part.name for part in catalog().of_kind("model")]
    other: Schema = {"not": {"enum": own}, "type": "string"} if architectures is None else {"enum": list(architectures)}
    by_options = _named("", _options(open_clip_part(""), {"train": _TOWERS}))
    by_options["properties"]["name"] = other
    return {"anyOf": [*choice["anyOf"], other, by_options]}


def _stack() -> Schema:
    """A list of plugins, each by its name alone or with its options."""
    plugins = catalog().of_kind("plugin")
    short = [part.name for part in plugins if not _options(part).get("required")]
    by_options: Schema = {}
    for part in plugins:
        reference = {"$ref": f"#/$defs/{part.name}"}
        by_options[part.name] = {"anyOf": [reference, {"type": "null"}]} if part.name in short else reference
    one = {
        "type": "object",
        "properties": by_options,
        "minProperties": 1,
        "maxProperties": 1,
        "additionalProperties": False,
    }
    return {"type": "array", "items": {"anyOf": [{"enum": short}, one]}}


def _strategies() -> list[str]:
    return sorted(catalog().files["strategies"])


def _named_parts(properties: Schema) -> None:
    """Lists of metrics and loggers by name."""
    evaluate = properties["evaluate"]
    kinds: list[tuple[Schema, str, Kind]] = [
        (evaluate["properties"], "metrics", "metric"),
        (properties, "loggers", "logger"),
    ]
    for holder, key, kind in kinds:
        names = [part.name for part in catalog().of_kind(kind)]
        holder[key] = {"type": "array", "items": {"enum": names}, "uniqueItems": True}
