"""Answers to a wrong command line: on one line, the command that was probably meant, instead of click's usage text."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any

import click

from mulki_plugins.characters import name_lookalikes, simplify
from mulki_plugins.cli.common import report_errors
from mulki_plugins.cli.lazy import Commands
from mulki_plugins.errors import MulkiError, did_you_mean

WORDS = "mulki.words"
_COMMAND_SYNONYMS = {
    "train": "run", "start": "run", "fit": "run", "continue": "resume", "compare": "results", "eval": "evaluate",
    "test": "evaluate", "classify": "predict", "infer": "predict", "save": "export", "check": "validate",
    "lint": "validate", "ls": "list", "print": "show", "info": "show", "cat": "show",
    "init": "new recipe", "create": "new recipe", "download": "data fetch", "fetch": "data fetch", "help": "--help",
    "version": "--version", "benchmark": "bench", "profile": "bench", "estimate": "bench",
}  # fmt: skip
_OPTION_SYNONYMS = {
    "--plugin": "--with", "--seeds": "--seed", "--output": "--out", "--output-dir": "--out", "--method": "--strategy",
}  # fmt: skip
_KINDS = (
    "recipe", "strategy", "strategie", "plugin", "adapter", "head", "optimizer", "stream", "model", "metric", "logger",
)  # fmt: skip
_HELP: Any = getattr(click.exceptions, "NoArgsIsHelpError", ())
_LIST_KEYS = ("seeds", "loggers", "evaluate.metrics", "stream.tasks")
_SEPARATE_VALUE = re.compile(r"=|[-+]?[\d.\[{=].*|true|false|null")


class HelpfulCommands(Commands):
    """A group of commands that answers a wrong call with the right one."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if ctx.resilient_parsing or self.get_command(ctx, args[0]) is not None:
            ctx.meta[WORDS] = list(args)
            report_errors(_check_settings)(args)
            return super().resolve_command(ctx, args)
        report_errors(_no_such_command)(self, ctx, args)
        raise AssertionError("unreachable")

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            report_errors(_no_such_option)(error.option_name)
            raise

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            words = ctx.meta.get(WORDS, [])
            if not words or words[0] not in self.commands or isinstance(error, _HELP):
                raise  # another package's command reports its own usage errors
            inner = error.ctx or click.Context(self.commands[words[0]], info_name=words[0], parent=ctx)
            return report_errors(_answer)(error, inner, words)


def _no_such_option(name: str) -> None:
    raise MulkiError(f"no option {name} before the command", "`mulki --help` lists the options")


def _no_such_command(group: click.Group, ctx: click.Context, words: Sequence[str]) -> None:
    from mulki_plugins.recipe.files import list_registered

    word = words[0]
    line = ""
    if word in _COMMAND_SYNONYMS:
        line = f"mulki {_COMMAND_SYNONYMS[word]}" + (f" {shlex.join(words[1:])}" if words[1:] else "")
    elif word.rstrip("s") in _KINDS:
        line = f"mulki list {word}"
    elif word.removesuffix(".yaml") in list_registered("recipes") or os.path.isfile(word):
        line = f"mulki run {shlex.join(words)}"
    elif word in list_registered("strategies"):
        line = f"mulki run mtil --strategy {word}"
    elif os.path.isdir(word):
        line = f"mulki results {shlex.quote(word)}"
    hint = f"type: {line}" if line else did_you_mean(word, group.list_commands(ctx))
    raise MulkiError(f"no command {word!r}", hint if line else f"{hint}; `mulki --help` lists all")


def _answer(error: click.UsageError, ctx: click.Context, words: list[str]) -> None:
    """Raise a MulkiError that says what to type instead of a command's wrong arguments."""
    command, path = ctx.command, ctx.command_path
    depth = _depth(ctx)
    words = words[depth if words[:depth] == path.split()[-depth:] else depth - 1 :]  # `mulki study mini` implies `run`
    usage = f"`{path} --help` shows its usage"
    if isinstance(error, click.BadOptionUsage):
        example = {"--set": "train.iterations=50", "--seed": "0"}.get(error.option_name, "")
        raise MulkiError(
            f"{error.option_name} expects a value", f"type {error.option_name} {example}" if example else usage
        )
    if isinstance(command, click.Group):
        hint = did_you_mean(words[0], command.list_commands(ctx)) if words else "expected one of its commands"
        raise MulkiError(f"{path}: no command {words[0] if words else ''!r}", hint)
    if isinstance(error, click.NoSuchOption):
        name = error.option_name
        if not name.startswith("--"):  # click takes -epochs for -e
            name = next((f"-{word}" for word in words if word.startswith(name) and len(word) > 2), name)
        raise MulkiError(f"no option {name}", _replacement(name, command, words) or usage)
    if isinstance(error, click.MissingParameter) and error.param is not None:
        name = error.param.make_metavar(ctx)
        run = "runs/mtil/mulki-plus/seed-0"
        example = {"RECIPE": "mtil", "DIR": run, "DIR...": "runs", "RUN": run, "STUDY": "mini"}.get(name, "")
        raise MulkiError(f"{name} is missing", f"type: {path} {example}" if example else usage)
    if isinstance(error, click.BadParameter) and error.param is not None:
        raise MulkiError(*_wrong_value(error, error.param, words, usage))
    extra = command.make_parser(ctx).parse_args(list(words))[1]
    if not extra:
        raise MulkiError(error.message, usage)
    raise MulkiError(*_extra_word(extra, command, words, usage))


def _depth(ctx: click.Context) -> int:
    """The number of words of a command: 1 for `run`, 2 for `data check`."""
    return 0 if ctx.parent is None else 1 + _depth(ctx.parent)


def _takes_settings(command: click.Command) -> bool:
    return any(param.name == "settings" for param in command.params)


def _replacement(name: str, command: click.Command, words: Sequence[str]) -> str:
    """What to type instead of an unknown option: another option, or `--set` with a key of the recipe."""
    options = [option for param in command.params for option in param.opts if option.startswith("--")]
    value = _value_after(name, words)
    if _OPTION_SYNONYMS.get(name) in options:
        return f"type {_OPTION_SYNONYMS[name]} {shlex.quote(value)}".rstrip(" '")
    from mulki_plugins.recipe.suggest import suggest_keys

    keys = suggest_keys(name.lstrip("-").split("."), _recipe_data(words)) if _takes_settings(command) else []
    close = get_close_matches(name, options, n=1, cutoff=0.75)
    if close and not any(key.rpartition(".")[2] == name.lstrip("-").replace("-", "_") for key in keys):
        return f"did you mean {close[0]}?"
    return " or ".join(f"{'type ' if i == 0 else ''}--set {_setting(key, value)}" for i, key in enumerate(keys[:2]))


def _setting(key: str, value: str) -> str:
    if key in _LIST_KEYS and value and not value.startswith("["):
        value = f"[{value}]"
    return shlex.quote(f"{key}={value}") if value else f"{key}=VALUE"


def _value_after(name: str, words: Sequence[str]) -> str:
    """The value of an option, written `--name=value` or `--name value`; empty without one."""
    for word in (w.lstrip("-") for w in words if w.startswith("-")):
        if word.startswith(f"{name.lstrip('-')}="):
            return word.partition("=")[2]
    after = [i + 1 for i, word in enumerate(words) if word.startswith("-") and word.lstrip("-") == name.lstrip("-")]
    return next((words[i] for i in after if i < len(words) and not words[i].startswith("--")), "")


def _recipe_data(words: Sequence[str]) -> Any:
    """The recipe on the command line, whose stack determines the valid options; empty without one."""
    from mulki_plugins.recipe.resolve import resolve

    for word in words:
        if not word.startswith("-"):
            try:
                return resolve(word).tree.value
            except MulkiError:
                continue
    return {}


def _wrong_value(
    error: click.BadParameter, param: click.Parameter, words: Sequence[str], usage: str
) -> tuple[str, str]:  # fmt: skip
    """Message and hint for a value that an option or argument does not accept."""
    name = param.opts[-1] if param.param_type_name == "option" else str(param.name).upper()
    values = [value for option in param.opts for value in _values(option, words)]
    if isinstance(param.type, click.IntRange):
        from mulki_plugins.errors import OptionError
        from mulki_plugins.types import Natural, convert

        for value in values:
            try:
                convert(value, list[Natural])
            except OptionError as problem:
                if not value.isdecimal():
                    numbers = [f"{name} {word}" for word in problem.write.strip("[]").split(",") if word.isdecimal()]
                    hint = f"type {' '.join(numbers)}" if numbers else usage
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


def _extra_word(extra: Sequence[str], command: click.Command, words: Sequence[str], usage: str) -> tuple[str, str]:
    """Message and hint for a superfluous word."""
    word = extra[0] if extra else ""
    message = f"{word!r} is one word too many"
    lookalike = name_lookalikes(word[:2])
    if lookalike and simplify(word).startswith("-"):
        return f"{word!r} begins with {lookalike}", f"type --{simplify(word).lstrip('-')}"
    if not _takes_settings(command):
        return message, usage
    from mulki_plugins.recipe.files import list_registered
    from mulki_plugins.registry.discovery import catalog

    if "=" in word:
        return message, f"type --set {shlex.quote(word)}"
    if word.isdecimal() and any(w.startswith("--seed") for w in words):
        return message, f"repeat the option for each seed: type --seed {word}"
    if word in list_registered("strategies"):
        return message, f"type --strategy {word}"
    if ("plugin", word) in catalog().parts:
        return message, f"type --with {word}"
    if word.removesuffix(".yaml") in list_registered("recipes") or os.path.isfile(word):
        return message, "a command takes one recipe; call it once for each"
    return message, usage


def _check_settings(words: Sequence[str]) -> None:
    """MulkiError if the shell split a `--set` at its spaces."""
    for i, word in enumerate(words):
        if word != "--set" and not word.startswith("--set="):
            continue
        rest = list(words[i + 1 :]) if word == "--set" else [word.partition("=")[2], *words[i + 1 :]]
        if not rest:
            return
        setting, following = rest[0], rest[1:]
        if _unclosed(setting) > 0:
            for length in range(1, len(following) + 1):
                whole = " ".join(rest[: length + 1])
                if _unclosed(whole) == 0:
                    raise MulkiError(
                        f"--set {setting} {following[0]}: the shell splits this at its spaces",
                        f"type --set {shlex.quote(whole)}",
                    )
        if (setting.endswith("=") or "=" not in setting) and following and _SEPARATE_VALUE.fullmatch(following[0]):
            value = following[0] if following[0] != "=" else (following[1:] or ["VALUE"])[0]
            whole = f"{setting.rstrip('=')}={value.lstrip('=')}"
            raise MulkiError(f"--set {setting} {following[0]}: expected one word", f"type --set {shlex.quote(whole)}")


def _unclosed(text: str) -> int:
    """The number of brackets that are opened and not closed."""
    return sum(map(text.count, "[{")) - sum(map(text.count, "]}"))
