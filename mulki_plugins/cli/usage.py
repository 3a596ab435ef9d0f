"""A command line that does not fit: what was probably meant, on one line, in place of click's usage text."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any

import click

from mulki_plugins.characters import name_lookalikes, simplify
from mulki_plugins.cli.common import reports_mistakes
from mulki_plugins.cli.lazy import CommandsByName
from mulki_plugins.errors import MulkiError, did_you_mean

_WORDS = "mulki.words"
_ALSO_CALLED = {
    "train": "run", "start": "run", "fit": "run", "continue": "resume", "compare": "results", "evaluate": "results",
    "eval": "results", "check": "validate", "lint": "validate", "ls": "list", "print": "show", "info": "show", "cat": "show",
    "init": "new recipe",
    "create": "new recipe", "download": "data fetch", "fetch": "data fetch", "help": "--help", "version": "--version",
}  # fmt: skip
_OPTIONS = {
    "--plugin": "--with",
    "--seeds": "--seed",
    "--output": "--out",
    "--output-dir": "--out",
    "--method": "--strategy",
}
_KINDS = ("recipe", "strategy", "strategie", "plugin", "stream", "model", "metric", "logger")
_HELP: Any = getattr(click.exceptions, "NoArgsIsHelpError", ())
_LISTS = ("seeds", "loggers", "evaluate.metrics", "stream.tasks")
_SETTING_ALONE = re.compile(r"=|[-+]?[\d.\[{=].*|true|false|null")


class AnsweringGroup(CommandsByName):
    """The commands, of which a wrong call is answered by what to type."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if ctx.resilient_parsing or self.get_command(ctx, args[0]) is not None:
            ctx.meta[_WORDS] = list(args)
            reports_mistakes(_check_settings)(args)
            return super().resolve_command(ctx, args)
        return reports_mistakes(_no_such_command)(self, ctx, args)  # type: ignore[no-any-return]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            return reports_mistakes(_no_such_option)(error.option_name)  # type: ignore[no-any-return]

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            words = ctx.meta.get(_WORDS, [])
            if not words or words[0] not in self.commands or isinstance(error, _HELP):
                raise  # a package's command answers for itself
            inner = error.ctx or click.Context(self.commands[words[0]], info_name=words[0], parent=ctx)
            return reports_mistakes(_answer)(error, inner, words)


def _no_such_option(name: str) -> None:
    raise MulkiError(f"no option {name} before the command", "`mulki --help` shows those that there are")


def _no_such_command(group: click.Group, ctx: click.Context, words: Sequence[str]) -> None:
    from mulki_plugins.recipe.files import list_registered

    word = words[0]
    line = ""
    if word in _ALSO_CALLED:
        line = f"mulki {_ALSO_CALLED[word]}" + (f" {shlex.join(words[1:])}" if words[1:] else "")
    elif word.rstrip("s") in _KINDS:
        line = f"mulki list {word}"
    elif word.removesuffix(".yaml") in list_registered("recipes") or os.path.isfile(word):
        line = f"mulki run {shlex.join(words)}"
    elif word in list_registered("strategies"):
        line = f"mulki run mtil --strategy {word}"
    elif os.path.isdir(word):
        line = f"mulki results {shlex.quote(word)}"
    hint = f"type: {line}" if line else did_you_mean(word, group.list_commands(ctx))
    raise MulkiError(f"no command {word!r}", hint if line else f"{hint}; `mulki --help` shows all")


def _answer(error: click.UsageError, ctx: click.Context, words: list[str]) -> None:
    command, called = ctx.command, ctx.command_path
    words = words[_depth(ctx) :]
    shows = f"`{called} --help` shows how it is called"
    if isinstance(error, click.BadOptionUsage):
        sample = {"--set": "train.iterations=50", "--seed": "0"}.get(error.option_name, "")
        hint = f"type {error.option_name} {sample}" if sample else shows
        raise MulkiError(f"{error.option_name} expects a value", hint)
    if isinstance(command, click.Group):
        hint = did_you_mean(words[0], command.list_commands(ctx)) if words else "expected one of its commands"
        raise MulkiError(f"{called}: no command {words[0] if words else ''!r}", hint)
    if isinstance(error, click.NoSuchOption):
        name = error.option_name
        if not name.startswith("--"):  # -epochs is taken for -e
            name = next((f"-{word}" for word in words if word.startswith(name) and len(word) > 2), name)
        raise MulkiError(f"no option {name}", _for_option(name, command, words) or shows)
    if isinstance(error, click.MissingParameter) and error.param is not None:
        name = error.param.make_metavar(ctx)
        sample = {"RECIPE": "mtil", "DIR": "runs/mtil/mulki/seed-0", "DIR...": "runs"}.get(name, "")
        raise MulkiError(f"{name} is missing", f"type: {called} {sample}" if sample else shows)
    if isinstance(error, click.BadParameter) and error.param is not None:
        raise MulkiError(*_of_value(error, error.param, words, shows))
    extra = command.make_parser(ctx).parse_args(list(words))[1]
    raise MulkiError(*_of_extra(extra, command, words, shows))


def _depth(ctx: click.Context) -> int:
    """How many words lead to a command: `run` is one, `data check` two."""
    return 0 if ctx.parent is None else 1 + _depth(ctx.parent)


def _takes_settings(command: click.Command) -> bool:
    return any(param.name == "settings" for param in command.params)


def _for_option(name: str, command: click.Command, words: Sequence[str]) -> str:
    """What to type in place of an option that there is not: another one, or a key of the recipe."""
    own = [option for param in command.params for option in param.opts if option.startswith("--")]
    value = _value_behind(name, words)
    if _OPTIONS.get(name) in own:
        return f"type {_OPTIONS[name]} {shlex.quote(value)}".rstrip(" '")
    from mulki_plugins.recipe.suggest import suggest_keys

    keys = suggest_keys(name.lstrip("-").split("."), _recipe_data(words)) if _takes_settings(command) else []
    close = get_close_matches(name, own, n=1, cutoff=0.75)
    if close and not any(key.rpartition(".")[2] == name.lstrip("-").replace("-", "_") for key in keys):
        return f"did you mean {close[0]}?"
    return " or ".join(f"{'type ' if i == 0 else ''}--set {_setting(key, value)}" for i, key in enumerate(keys[:2]))


def _setting(key: str, value: str) -> str:
    if key in _LISTS and value and not value.startswith("["):
        value = f"[{value}]"
    return shlex.quote(f"{key}={value}") if value else f"{key}=VALUE"


def _value_behind(name: str, words: Sequence[str]) -> str:
    for word in (w.lstrip("-") for w in words if w.startswith("-")):
        if word.startswith(f"{name.lstrip('-')}="):
            return word.partition("=")[2]
    behind = [i + 1 for i, word in enumerate(words) if word.startswith("-") and word.lstrip("-") == name.lstrip("-")]
    return next((words[i] for i in behind if i < len(words) and not words[i].startswith("--")), "")


def _recipe_data(words: Sequence[str]) -> Any:
    """The recipe that a command line names, whose stack says which options there are; empty without one."""
    from mulki_plugins.recipe.resolve import resolve

    for word in words:
        if not word.startswith("-"):
            try:
                return resolve(word).tree.value
            except MulkiError:
                continue
    return {}


def _of_value(
    error: click.BadParameter, param: click.Parameter, words: Sequence[str], shows: str
) -> tuple[str, str]:  # fmt: skip
    """A value that an option or an argument does not take."""
    name = param.opts[-1] if param.param_type_name == "option" else str(param.name).upper()
    values = [v for option in param.opts for v in _values(option, words)]
    if isinstance(param.type, click.IntRange):
        from mulki_plugins.errors import OptionError
        from mulki_plugins.types import Natural, convert

        for value in values:
            try:
                convert(value, list[Natural])
            except OptionError as problem:
                if not value.isdecimal():
                    several = [f"{name} {one}" for one in problem.write.strip("[]").split(",") if one.isdecimal()]
                    hint = f"type {' '.join(several)}" if several else shows
                    return f"{name}: expected a whole number, 0 or more, got {value!r}", hint
    if isinstance(param.type, click.Choice) and values:
        choices = list(map(str, param.type.choices))
        hint = did_you_mean(values[-1], choices)
        return f"{name}: expected {' or '.join(choices)}, got {values[-1]!r}", hint if hint.startswith("did") else ""
    return f"{name}: {error.message}", ""


def _values(option: str, words: Sequence[str]) -> Iterator[str]:
    for i, word in enumerate(words):
        if word.startswith(f"{option}="):
            yield word.partition("=")[2]
        elif word == option and i + 1 < len(words):
            yield words[i + 1]


def _of_extra(extra: Sequence[str], command: click.Command, words: Sequence[str], shows: str) -> tuple[str, str]:
    """A word too many."""
    word = extra[0] if extra else ""
    what = f"{word!r} is one word too many"
    odd = name_lookalikes(word[:2])
    if odd and simplify(word).startswith("-"):
        return f"{word!r} begins with {odd}", f"type --{simplify(word).lstrip('-')}"
    if not _takes_settings(command):
        return what, shows
    from mulki_plugins.recipe.files import list_registered
    from mulki_plugins.registry.discovery import catalog

    if "=" in word:
        return what, f"type --set {shlex.quote(word)}"
    if word.isdecimal() and any(w.startswith("--seed") for w in words):
        return what, f"an option for each seed: type --seed {word}"
    if word in list_registered("strategies"):
        return what, f"type --strategy {word}"
    if ("plugin", word) in catalog().parts:
        return what, f"type --with {word}"
    if word.removesuffix(".yaml") in list_registered("recipes") or os.path.isfile(word):
        return what, "a command takes one recipe; call it once for each"
    return what, shows


def _check_settings(words: Sequence[str]) -> None:
    """MulkiError where a shell has split a `--set` at its spaces."""
    for i, word in enumerate(words):
        if word != "--set" and not word.startswith("--set="):
            continue
        rest = list(words[i + 1 :]) if word == "--set" else [word.partition("=")[2], *words[i + 1 :]]
        if not rest:
            return
        setting, following = rest[0], rest[1:]
        if _open(setting) > 0:
            for length in range(1, len(following) + 1):
                whole = " ".join(rest[: length + 1])
                if _open(whole) == 0:
                    raise MulkiError(
                        f"--set {setting} {following[0]}: the shell splits this at its spaces",
                        f"type --set {shlex.quote(whole)}",
                    )
        if (setting.endswith("=") or "=" not in setting) and following and _SETTING_ALONE.fullmatch(following[0]):
            value = following[0] if following[0] != "=" else (following[1:] or ["VALUE"])[0]
            whole = f"{setting.rstrip('=')}={value.lstrip('=')}"
            raise MulkiError(f"--set {setting} {following[0]}: expected one word", f"type --set {shlex.quote(whole)}")


def _open(text: str) -> int:
    """How many brackets of a text are still open."""
    return sum(map(text.count, "[{")) - sum(map(text.count, "]}"))
