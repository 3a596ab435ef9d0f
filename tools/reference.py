"""Writes what is generated from the code: docs/reference.md, and the JSON Schemas beside the recipes and strategies.

    python tools/reference.py            write them
    python tools/reference.py --check    say what is stale or undocumented; status 1 where something is

Only MulKI's own parts are in them, whatever else is installed.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_type_hints

import click
from attrs import fields
from mulki_plugins.types import describe

from mulki_plugins.cli import main as mulki
from mulki_plugins.recipe.json_schema import recipe_schema, strategy_schema
from mulki_plugins.registry import builtin, events, hookspecs
from mulki_plugins.registry.open_clip_names import open_clip_part
from mulki_plugins.registry.parts import Catalog, Part
from mulki_plugins.registry.register import Register
from mulki_plugins.registry.signature import REQUIRED, UNKNOWN, signature_of
from mulki_plugins.testing.names import PLUGIN_CHECKS, STREAM_CHECKS

ROOT = Path(__file__).parents[1]
HEAD = """# Reference: hooks, parts and their options, commands

Generated from the code by `python tools/reference.py`; do not edit it. How to use this: [write a plugin](write-a-plugin.md).
"""


def generated() -> dict[str, str]:
    """Each generated file by its path in the checkout, with its text."""
    return {
        "docs/reference.md": reference(),
        "recipes/recipe.schema.json": _json(recipe_schema(None)),
        "strategies/strategy.schema.json": _json(strategy_schema(None)),
    }


def own() -> Catalog:
    """The parts that MulKI brings."""
    catalog = Catalog()
    builtin.mulki_register(Register(catalog, builtin.PROVENANCE))
    return catalog


def reference() -> str:
    sections = [HEAD, "## Hooks", *_hooks(), "## What a run's hooks are told", *_run(), "## register", *_register()]
    sections += [
        "## Plugins, streams and models",
        *_parts(),
        "## Commands",
        *_commands(),
        "## The kit's checks",
        *_checks(),
    ]
    return "\n\n".join(section.strip() for section in sections) + "\n"


def _hooks() -> Iterator[str]:
    yield "In a module that the entry-point group `mulki` names, marked with `mulki_plugins.hookimpl`; each takes what it needs."
    for name, hook in _specs().items():
        yield f"### `{name}{inspect.signature(hook)}`\n\n{_text(hook)}"


def _specs() -> dict[str, Callable[..., Any]]:
    return {name: value for name, value in vars(hookspecs).items() if name.startswith("mulki_")}


def _run() -> Iterator[str]:
    yield _text(events.Run)
    said = _attribute_docs(events.Run)
    lines = [f"| `{a.name}` | {_cell(said.get(a.name, ''))} |" for a in fields(events.Run)]
    yield "\n".join(["| | |", "| --- | --- |", *lines])


def _attribute_docs(kind: type) -> dict[str, str]:
    """The texts below a class's fields."""
    found = re.findall(r'^    (\w+): [^\n]*\n    """(.*?)"""', inspect.getsource(kind), re.S | re.M)
    return {name: " ".join(text.split()) for name, text in found}


def _register() -> Iterator[str]:
    yield _text(Register)
    for name, method in _methods().items():
        parameters = [p for p in inspect.signature(method).parameters.values() if p.name != "self"]
        said = ", ".join(str(p).replace("mulki_plugins.registry.parts.", "") for p in parameters)
        yield f"### `register.{name}`\n\n```\nregister.{name}({said})\n```\n\n{_text(method)}"


def _methods() -> dict[str, Callable[..., Any]]:
    return {name: value for name, value in vars(Register).items() if inspect.isfunction(value) and name[0] != "_"}


def _parts() -> Iterator[str]:
    catalog = own()
    for kind in ("plugin", "stream", "model"):
        for part in catalog.of_kind(kind):  # type: ignore[arg-type]
            yield f"### {kind} `{part.name}`\n\n{_part(part)}"
    yield f"### models of open_clip, such as `ViT-B-16-quickgelu`\n\n{_part(open_clip_part('ViT-B-16-quickgelu'))}"
    refused = [f"| `{name}` | {_cell(reason)} |" for (kind, name), reason in sorted(catalog.refused.items())]
    yield "### Plugins of Avalanche that cannot be used"
    yield "\n".join(["| name | why |", "| --- | --- |", *refused])
    for kind in ("metric", "logger"):
        lines = [f"| `{p.name}` | {_cell(p.summary)} | {p.source} |" for p in catalog.of_kind(kind)]  # type: ignore[arg-type]
        yield f"### {kind}s\n\n" + "\n".join(["| name | what | source |", "| --- | --- | --- |", *lines])


def _part(part: Part) -> str:
    said = [part.summary[0].upper() + part.summary[1:] + "." + (f" Source: {part.source}." if part.source else "")]
    declared = {
        "Requires": ", ".join(part.requires), "Conflicts with": ", ".join(part.conflicts), "After": ", ".join(part.after),
        "Keeps images of past tasks": "yes" * part.keeps_images, "Needs reference data": "yes" * part.needs_reference,
        "Adds parameters": "yes" * part.adds_parameters, "Tasks": ", ".join(part.tasks),
    }  # fmt: skip
    said += ["".join(f"{what}: {value}. " for what, value in declared.items() if value and value != "yes").strip()]
    said += ["".join(f"{what}. " for what, value in declared.items() if value == "yes").strip()]
    options = signature_of(part).options
    if options:
        rows = []
        for name, option in options.items():
            default = part.defaults.get(name, option.default)
            shown = "required" if default is REQUIRED else "" if default is UNKNOWN else f"`{json.dumps(default)}`"
            rows.append(
                f"| `{name}` | {_cell(describe(option.kind))} | {shown} | {_cell(part.options.get(name, ''))} |"
            )
        said.append("\n".join(["| option | type | default | |", "| --- | --- | --- | --- |", *rows]))
    return "\n\n".join(text for text in said if text)


def _commands() -> Iterator[str]:
    for name, command in _all_commands():
        with click.Context(command, info_name=name, terminal_width=100, max_content_width=100) as context:
            yield f"### `{name}`\n\n```\n{command.get_help(context)}\n```"


def _all_commands() -> Iterator[tuple[str, click.Command]]:
    yield "mulki", click.Group("mulki", mulki.commands, help=mulki.help, params=mulki.params)
    waiting = [(f"mulki {name}", command) for name, command in sorted(mulki.commands.items())]
    while waiting:
        name, command = waiting.pop(0)
        yield name, command
        if isinstance(command, click.Group):
            waiting[:0] = [(f"{name} {inner}", each) for inner, each in sorted(command.commands.items())]


def _checks() -> Iterator[str]:
    for function, fixture, checks in (
        ("check_plugin", "mulki_plugin_check", PLUGIN_CHECKS), ("check_stream", "mulki_stream_check", STREAM_CHECKS),
    ):  # fmt: skip
        rows = [f"| `{name}` | {_cell(what)} |" for name, what in checks.items()]
        yield f"`mulki_plugins.testing.{function}`, and one by one the pytest fixture `{fixture}`:"
        yield "\n".join(["| check | passes where |", "| --- | --- |", *rows])


def undocumented() -> list[str]:
    """What a reader of the reference would look for in vain."""
    wrong = [f"the hook {name} has no docstring" for name, hook in _specs().items() if not hook.__doc__]
    run = _attribute_docs(events.Run)
    wrong += [f"Run.{a.name} says nothing" for a in fields(events.Run) if a.name not in run]
    general = _text(Register)
    for name, method in _methods().items():
        text = f"{general}\n{_text(method)}"
        get_type_hints(method, localns={"Traversable": Path})
        for parameter in inspect.signature(method).parameters:
            if parameter not in ("self", "kind", "path", "reason") and not re.search(rf"\b{parameter}\b", text):
                wrong.append(f"register.{name}: nothing is said of {parameter}")
        wrong += [f"register.{name} has no docstring"] * (not method.__doc__)
    for part in own().parts.values():
        if part.kind in ("plugin", "stream", "model"):
            for option in signature_of(part).options:
                if not part.options.get(option):
                    wrong.append(
                        f"{part.kind} {part.name}: nothing is said of the option {option}; see registry/described.py"
                    )
    for name, command in _all_commands():
        wrong += [f"{name} has no help"] * (not command.help)
        for parameter in command.params:
            if isinstance(parameter, click.Option) and not parameter.help:
                wrong.append(f"{name}: nothing is said of {parameter.opts[0]}")
    return wrong


def stale() -> list[str]:
    """Generated files that are not what the code would write now."""
    found = {name: ROOT / name for name in generated()}
    return [
        name
        for name, text in generated().items()
        if not found[name].is_file() or found[name].read_text("utf-8") != text
    ]


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def _text(thing: Any) -> str:
    return inspect.cleandoc(thing.__doc__ or "")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    os.environ["MULKI_PLUGINS"] = ""
    if check:
        lines = [f"{name} is stale: python tools/reference.py" for name in stale()] + undocumented()
        print("\n".join(lines) or "nothing is stale, nothing is undocumented")
        sys.exit(bool(lines))
    for name, text in generated().items():
        (ROOT / name).write_text(text, "utf-8")
    print("\n".join(undocumented()))


if __name__ == "__main__":
    main()
