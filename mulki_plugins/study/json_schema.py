"""The JSON Schema of a study, with the names of installed recipes, strategies and plugins: for editors."""

from __future__ import annotations

from mulki_plugins.recipe.files import list_registered
from mulki_plugins.recipe.json_schema import DIALECT, schema_of_class
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.study.schema import Study
from mulki_plugins.types import Schema

_EXAMPLES = {"recipes": "recipes", "strategies": "strategies"}
"""Lists of names, which may also be paths, and the kinds of files they name."""


def study_schema() -> Schema:
    """The schema of a study's file, built from the classes that it is checked against."""
    schema = schema_of_class(Study)
    part = schema["properties"]["parts"]["additionalProperties"]
    block = part["properties"]["runs"]["items"]
    for properties in (schema["properties"], block["properties"]):
        for key, kind in _EXAMPLES.items():
            _name_examples(properties[key], sorted(list_registered(kind)))
        for variants in _arms(properties["variants"]):
            if "additionalProperties" in variants:
                variant = variants["additionalProperties"]["properties"]
                for key in ("without", "add"):
                    _name_examples(variant[key], [part.name for part in catalog().of_kind("plugin")])
    return {"$schema": DIALECT, "title": "a study of MulKI", **schema}


def _name_examples(schema: Schema, names: list[str]) -> None:
    for arm in _arms(schema):
        if arm.get("type") == "array":
            arm["items"] = {**arm["items"], "examples": names}


def _arms(schema: Schema) -> list[Schema]:
    return list(schema.get("anyOf", [schema]))
