"""Writes the generated files: docs/reference.md, docs/authors.md, and the JSON Schemas beside recipes, strategies and studies.

    python tools/reference.py            write them
    python tools/reference.py --check    list stale files and missing documentation; status 1 if there are any

They cover MulKI's own parts only, whatever else is installed.
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

import authors
import click
from attrs import fields

from mulki_plugins.cli import main as mulki
from mulki_plugins.recipe.json_schema import recipe_schema, strategy_schema
from mulki_plugins.registry import builtin, hookspecs
from mulki_plugins.registry.builtin import open_clip_part
from mulki_plugins.registry.catalog import Catalog, Part, signature_of
from mulki_plugins.registry.register import Register
from mulki_plugins.registry.static import REQUIRED, UNKNOWN
from mulki_plugins.study.json_schema import study_schema
from mulki_plugins.testing import ADAPTER_CHECKS, HEAD_CHECKS, OPTIMIZER_CHECKS, PLUGIN_CHECKS, STREAM_CHECKS
from mulki_plugins.types import describe

ROOT = Path(__file__).parents[1]
HEAD = """# Reference: hooks, parts and their options, commands

Generated from the code by `python tools/reference.py`; do not edit. For a tutorial see [write a plugin](write-a-plugin.md).
"""


def generated() -> dict[str, str]:
    """Each generated file by its path in the checkout, with its text."""
    return {
        "docs/reference.md": reference(),
        "docs/authors.md": authors.authors(),
        "recipes/recipe.schema.json": _json(recipe_schema(None)),
        "strategies/strategy.schema.json": _json(strategy_schema(None)),
        "studies/study.schema.json": _json(study_schema()),
    }


def builtin_catalog() -> Catalog:
    """The parts that come with MulKI."""
    catalog = Catalog()
    builtin.mulki_register(Register(catalog, builtin.PROVENANCE))
    return catalog


def reference() -> str:
    sections = {
        "Hooks": _hooks(), "The argument of a run's hooks": _run(), "register": _register(),
        "Plugins, adapters, optimizers, streams and models": _parts(), "Commands": _commands(),
        "The kit's checks": _checks(),
    }  # fmt: skip
    texts = [HEAD, *(text for title, section in sections.items() for text in (f"## {title}", *section))]
    return "\n\n".join(text.strip() for text in texts) + "\n"


def _hooks() -> Iterator[str]:
    yield (
        "Functions in a module that the entry-point group `mulki` names, marked with `mulki_plugins.hookimpl`. "
        "A hook may leave out arguments that it does not need."
    )
    for name, hook in hookspecs.specs().items():
        yield f"### `{name}{inspect.signature(hook)}`\n\n{_text(hook)}"


def _run() -> Iterator[str]:
    yield _text(hookspecs.Run)
    docs = _attribute_docs(hookspecs.Run)
    yield _table(["", ""], [[f"`{a.name}`", docs.get(a.name, "")] for a in fields(hookspecs.Run)])


def _attribute_docs(cls: type) -> dict[str, str]:
    """The docstrings below a class's fields."""
    docs = re.findall(r'^    (\w+): [^\n]*\n    """(.*?)"""', inspect.getsource(cls), re.S | re.M)
    return {name: " ".join(text.split()) for name, text in docs}


def _register() -> Iterator[str]:
    yield _text(Register)
    for name, method in _methods().items():
        parameters = [p for p in inspect.signature(method).parameters.values() if p.name != "self"]
        arguments = ", ".join(re.sub(r": '([^']*)'", r": \1", str(parameter)) for parameter in parameters)
        signature = f"register.{name}({arguments})"
        yield f"### `register.{name}`\n\n```\n{signature}\n```\n\n{_text(method)}"


def _methods() -> dict[str, Callable[..., Any]]:
    return {name: value for name, value in vars(Register).items() if inspect.isfunction(value) and name[0] != "_"}


def _parts() -> Iterator[str]:
    catalog = builtin_catalog()
    for part in _documented_parts(catalog):
        yield f"### {part.kind} `{part.name}`\n\n{_part(part)}"
    yield f"### models of open_clip, such as `ViT-B-16-quickgelu`\n\n{_part(open_clip_part('ViT-B-16-quickgelu'))}"
    yield "### Plugins of Avalanche that cannot be used"
    yield _table(["name", "why"], [[f"`{name}`", reason] for (_, name), reason in sorted(catalog.refused.items())])
    for title, parts in (("metrics", catalog.of_kind("metric")), ("loggers", catalog.of_kind("logger"))):
        rows = [[f"`{part.name}`", part.summary, part.source] for part in parts]
        yield f"### {title}\n\n{_table(['name', 'what', 'source'], rows)}"


def _documented_parts(catalog: Catalog) -> list[Part]:
    return [
        *catalog.of_kind("plugin"),
        *catalog.of_kind("adapter"),
        *catalog.of_kind("head"),
        *catalog.of_kind("optimizer"),
        *catalog.of_kind("stream"),
        *catalog.of_kind("model"),
    ]


def _part(part: Part) -> str:
    summary = part.summary[0].upper() + part.summary[1:] + "." + (f" Source: {part.source}." if part.source else "")
    lists = {
        "Requires": part.requires, "Conflicts with": part.conflicts, "After": part.after, "Tasks": part.tasks,
    }  # fmt: skip
    flags = {
        "Keeps images of past tasks": part.keeps_images, "Needs reference data": part.needs_reference,
        "Adds parameters": part.adds_parameters,
    }  # fmt: skip
    paragraphs = [
        summary,
        " ".join(f"{what}: {', '.join(names)}." for what, names in lists.items() if names),
        " ".join(f"{what}." for what, flag in flags.items() if flag),
    ]
    rows = []
    for name, option in signature_of(part).options.items():
        default = part.defaults.get(name, option.default)
        shown = "required" if default is REQUIRED else "" if default is UNKNOWN else f"`{json.dumps(default)}`"
        rows.append([f"`{name}`", describe(option.kind), shown, part.options.get(name, "")])
    if rows:
        paragraphs.append(_table(["option", "type", "default", ""], rows))
    return "\n\n".join(text for text in paragraphs if text)


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
        ("check_plugin", "mulki_plugin_check", PLUGIN_CHECKS), ("check_adapter", "mulki_adapter_check", ADAPTER_CHECKS),
        ("check_head", "mulki_head_check", HEAD_CHECKS), ("check_optimizer", "mulki_optimizer_check", OPTIMIZER_CHECKS),
        ("check_stream", "mulki_stream_check", STREAM_CHECKS),
    ):  # fmt: skip
        yield f"`mulki_plugins.testing.{function}`, or check by check with the pytest fixture `{fixture}`:"
        yield _table(["check", "passes if"], [[f"`{name}`", what] for name, what in checks.items()])


def undocumented() -> list[str]:
    """A line for everything that the reference should explain and does not."""
    missing = [f"the hook {name} has no docstring" for name, hook in hookspecs.specs().items() if not hook.__doc__]
    run = _attribute_docs(hookspecs.Run)
    missing += [f"Run.{a.name} is not documented" for a in fields(hookspecs.Run) if a.name not in run]
    for name, method in _methods().items():
        get_type_hints(method, localns={"Traversable": Path})
        text = f"{_text(Register)}\n{_text(method)}"
        for parameter in inspect.signature(method).parameters:
            if parameter not in ("self", "kind", "path", "reason") and not re.search(rf"\b{parameter}\b", text):
                missing.append(f"register.{name}: the argument {parameter} is not documented")
        missing += [f"register.{name} has no docstring"] * (not method.__doc__)
    for part in _documented_parts(builtin_catalog()):
        for option in signature_of(part).options.keys() - {o for o, text in part.options.items() if text}:
            where = f"see `Args:` in the docstring of {part.target}"
            missing.append(f"{part.kind} {part.name}: the option {option} is not documented; {where}")
    for name, command in _all_commands():
        missing += [f"{name} has no help"] * (not command.help)
        for parameter in command.params:
            if isinstance(parameter, click.Option) and not parameter.help:
                missing.append(f"{name}: the option {parameter.opts[0]} is not documented")
    return missing + authors.undocumented()


def stale() -> list[str]:
    """The generated files that differ from what the code would write now."""
    files = {name: (ROOT / name, text) for name, text in generated().items()}
    return [name for name, (path, text) in files.items() if not path.is_file() or path.read_text("utf-8") != text]


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def _text(thing: Any) -> str:
    return inspect.cleandoc(thing.__doc__ or "")


def _table(head: list[str], rows: list[list[str]]) -> str:
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    os.environ["MULKI_PLUGINS"] = ""
    if check:
        lines = [f"{name} is stale: python tools/reference.py" for name in stale()] + undocumented()
        print("\n".join(lines) or "everything is up to date and documented")
        sys.exit(bool(lines))
    for name, text in generated().items():
        (ROOT / name).write_text(text, "utf-8")
    print("\n".join(undocumented()))


if __name__ == "__main__":
    main()
