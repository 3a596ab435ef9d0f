"""The JSON Schema (draft 2020-12) of a recipe and of a strategy, with every installed part: for editors.

Built from the same classes, types and signatures that `mulki validate` checks against. A schema cannot express what only
shows across values (order, conflicts, two budgets), and it requires nothing that a strategy's `defaults` may bring.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, get_type_hints

from attrs import NOTHING, Factory, fields

from mulki_plugins.errors import MulkiError
from mulki_plugins.recipe.files import DEFAULTABLE, list_registered
from mulki_plugins.recipe.parts import TRAIN
from mulki_plugins.recipe.schema import Choice, Entry, Optimizer, Recipe, Strategy, StrategyFile, is_yaml_value
from mulki_plugins.registry.builtin import open_clip_part
from mulki_plugins.registry.catalog import Kind, Part, signature_of
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.registry.static import REQUIRED, UNKNOWN
from mulki_plugins.types import Schema, json_schema

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_TOWERS: Schema = {"enum": list(TRAIN), "default": "all", "description": "What learns: towers, adapters, or nothing."}
_MAY_COME_FROM_A_STRATEGY = {"lr", "optimizer", *DEFAULTABLE}


def recipe_schema(architectures: Iterable[str] | None) -> Schema:
    """The schema of a recipe. architectures: open_clip's names; None to admit any name."""
    schema = schema_of_class(Recipe)
    properties = schema["properties"]
    properties["stream"] = _part("stream")
    properties["reference"] = {"anyOf": [_part("stream"), {"type": "null"}]}
    properties["model"] = _model(architectures)
    written_out = schema_of_class(Strategy)
    written_out["properties"]["plugins"] = _stack()
    written_out["required"] = []
    by_name = {
        "type": "string",
        "description": "The name of a strategy, or the path of its file.",
        "examples": sorted(list_registered("strategies")),
    }
    properties["strategy"] = {"anyOf": [by_name, written_out]}
    properties["evaluate"]["properties"]["metrics"] = _names("metric")
    properties["loggers"] = _names("logger")
    return _document("a recipe of MulKI", schema)


def strategy_schema(architectures: Iterable[str] | None) -> Schema:
    """The schema of a strategy's file."""
    recipe = recipe_schema(architectures)
    schema = schema_of_class(StrategyFile)
    schema["properties"]["plugins"] = _stack()
    own = {"train": _TOWERS, "adapters": _adapters(), "head": _head()}
    towers = {"type": "object", "properties": own, "additionalProperties": False}
    defaults = {key: recipe["properties"][key] for key in DEFAULTABLE if key != "model"} | {"model": towers}
    schema["properties"]["defaults"] = {"type": "object", "properties": defaults, "additionalProperties": False}
    return _document("a strategy of MulKI", schema)


def _document(title: str, schema: Schema) -> Schema:
    plugins = {part.name: _options(part) for part in catalog().of_kind("plugin")}
    return {"$schema": DIALECT, "title": title, **schema, "$defs": plugins}


def schema_of_class(class_: Any) -> Schema:
    """An attrs class as an object; keys without a default are required."""
    hints = get_type_hints(class_, include_extras=True)
    properties, required = {}, []
    for attribute in fields(class_):
        schema, default = json_schema(hints[attribute.name], _of_nested_class), attribute.default
        if default is NOTHING:
            if attribute.name not in _MAY_COME_FROM_A_STRATEGY:
                required.append(attribute.name)
        elif not isinstance(default, Factory) and is_yaml_value(default):  # type: ignore[arg-type]  # a class at run time
            schema = {**schema, "default": default}
        properties[attribute.name] = schema
    return {
        "type": "object", "description": " ".join((class_.__doc__ or "").split()), "properties": properties,
        "required": required, "additionalProperties": False,
    }  # fmt: skip


def _of_nested_class(class_: Any) -> Schema:
    if class_ in (Choice, Entry):
        return {}  # the caller writes these out
    if class_ is Optimizer:
        return _optimizer()
    schema = schema_of_class(class_)
    name = schema["properties"].get("name", {})
    return {"anyOf": [name, schema]} if "default" in name else schema  # its name alone is the short form


def _options(part: Part, more: Mapping[str, Schema] | None = None) -> Schema:
    """The options of a part as an object; anything if its source cannot be read."""
    try:
        signature = signature_of(part)
    except MulkiError:
        return {"description": part.summary}
    properties, required = dict(more or {}), []
    for name, option in signature.options.items():
        default = part.defaults.get(name, option.default)
        schema = json_schema(option.kind, _of_nested_class)
        if default is REQUIRED:
            required.append(name)
        elif default is not UNKNOWN and is_yaml_value(default):
            schema = {**schema, "default": list(default) if isinstance(default, tuple) else default}
        if description := part.options.get(name):
            schema = {**schema, "description": description}
        properties[name] = schema
    return {
        "type": "object", "description": part.summary + (f" [{part.source}]" if part.source else ""),
        "properties": properties, "required": required, "additionalProperties": signature.open,
    }  # fmt: skip


def _with_name(name: Schema, options: Schema) -> Schema:
    """A part's options, with its name among them."""
    properties = {**{"name": name, **options.get("properties", {})}, "name": name}  # first, and not the option "name"
    return {
        **options,
        "type": "object",
        "properties": properties,
        "required": ["name", *options.get("required", [])],
    }


def _part(kind: Kind, more: Mapping[str, Schema] | None = None) -> Schema:
    """A part by its name alone, or as a mapping of its name and its options."""
    options = {part.name: _options(part, more) for part in catalog().of_kind(kind)}
    by_name = {"enum": [name for name, schema in options.items() if not schema.get("required")]}
    return {"anyOf": [by_name, *(_with_name({"const": name}, schema) for name, schema in options.items())]}


def _model(architectures: Iterable[str] | None) -> Schema:
    """A registered model, or an architecture of open_clip."""
    ours = [part.name for part in catalog().of_kind("model")]
    other: Schema = (
        {"not": {"enum": ours}, "type": "string"} if architectures is None else {"enum": list(architectures)}
    )
    towers = {"train": _TOWERS, "adapters": _adapters(), "head": _head()}
    return {"anyOf": [*_part("model", towers)["anyOf"], other, _with_name(other, _options(open_clip_part(""), towers))]}


def _optimizer() -> Schema:
    """A registered optimizer by its name alone, or with its rate, its weight decay and its options; AdamW without a name."""
    own = schema_of_class(Optimizer)["properties"]
    common = {"lr": own["lr"], "weight_decay": own["weight_decay"]}
    named = _part("optimizer", common)
    default = catalog().find("optimizer", own["name"]["default"])
    return {"anyOf": [*named["anyOf"], _options(default, common)]}


def _stack() -> Schema:
    """A list of plugins, each by its name alone or with its options."""
    return _list_of("plugin", {part.name: {"$ref": f"#/$defs/{part.name}"} for part in catalog().of_kind("plugin")})


def _adapters() -> Schema:
    """A list of adapters, each by its name alone or with its options."""
    return _list_of("adapter", {part.name: _options(part) for part in catalog().of_kind("adapter")})


def _head() -> Schema:
    """A head by its name alone or with its options."""
    return _one_of("head", {part.name: _options(part) for part in catalog().of_kind("head")})


def _list_of(kind: Kind, references: Mapping[str, Schema]) -> Schema:
    """A list of parts of a kind, each by its name alone or as {name: options}."""
    return {"type": "array", "items": _one_of(kind, references)}


def _one_of(kind: Kind, references: Mapping[str, Schema]) -> Schema:
    """A part of a kind by its name alone or as {name: options}."""
    short = [part.name for part in catalog().of_kind(kind) if not _options(part).get("required")]
    with_options = {
        "type": "object",
        "properties": {
            name: {"anyOf": [reference, {"type": "null"}]} if name in short else reference
            for name, reference in references.items()
        },
        "minProperties": 1,
        "maxProperties": 1,
        "additionalProperties": False,
    }
    return {"anyOf": [{"enum": short}, with_options]}


def _names(kind: Kind) -> Schema:
    """A list of parts by name."""
    return {"type": "array", "items": {"enum": [part.name for part in catalog().of_kind(kind)]}, "uniqueItems": True}
