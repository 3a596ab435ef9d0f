"""The lines of a report, each with what to type next."""

from __future__ import annotations

import shlex
from collections.abc import Iterable

from mulki_plugins.errors import Mistakes, OptionError
from mulki_plugins.meant import IN_QUOTES
from mulki_plugins.recipe.files import YamlFile
from mulki_plugins.recipe.layers import get
from mulki_plugins.recipe.suggest import suggest_keys
from mulki_plugins.recipe.yaml import Origin, Tree, locate
from mulki_plugins.types import UNKNOWN, Path

LOOKED_UP = 50
"""For how many unknown keys the right one is looked for."""


def answered(tree: Tree, problems: Iterable[OptionError]) -> list[str]:
    """Each mistake with its place, and with what was meant: another key, or the value as it is written."""
    lines, unknown = [], 0
    for problem in problems:
        message = str(problem)
        if message.startswith(UNKNOWN):
            unknown += 1
            message = _of_key(tree, problem) if unknown <= LOOKED_UP else message
        elif setting := _set_alone(tree, problem.path):
            message = _of_setting(setting, problem)
        lines.append(locate(tree.origin(problem.path), problem.path, message))
    return lines


def _of_key(tree: Tree, problem: OptionError) -> str:
    """An unknown key: the one of the same name that stands elsewhere in a recipe."""
    path, inner = list(problem.path), get(tree.value, problem.path)
    while isinstance(inner, dict) and len(inner) == 1:  # --set optimizer.lr=1 is wrong at `optimizer` already
        [(key, inner)] = inner.items()
        path.append(key)
    written = [part for part in path if isinstance(part, str)]
    likely = [key for key in suggest_keys(written, tree.value) if key != ".".join(written)][:3]
    if "did you mean" in problem.message and len(path) == len(problem.path):  # a neighbour of almost the same name
        likely = [key for key in likely if _last(key) == written[-1]]
    if not likely:
        return problem.message
    return f"{UNKNOWN} (did you mean {' or '.join(map(repr, likely))}?)"


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _set_alone(tree: Tree, path: Path) -> Origin | None:
    """The `--set` that wrote the value at a path, and nothing around it."""
    origin = tree.origins.get(path)
    return origin if origin and origin.source.startswith("--set ") else None


def _of_setting(origin: Origin, problem: OptionError) -> str:
    """A wrong value of a `--set`: the whole of it as it is typed, in quotes where a shell wants them."""
    key, _, text = origin.source.removeprefix("--set ").partition("=")
    value = problem.write
    if IN_QUOTES in problem.message:
        value = f'"{text.strip()}"'
    if not value:
        return problem.message
    line = f"{problem.message}; type --set {shlex.quote(f'{key.strip()}={value}')}"
    if problem.path == ("seeds",):
        line += " or " + " ".join(f"--seed {seed}" for seed in value.strip("[]").split(","))
    return line


def check_is_recipe(tree: Tree, found: YamlFile) -> None:
    """Mistakes where a file is a strategy's, or the settings of a plugin's package, and not a recipe's."""
    keys = set(tree.value)
    if "plugins" in keys and not keys & {"stream", "model", "strategy", "train"}:
        what = f"this is a strategy, not a recipe; a recipe takes it with --strategy, such as mtil --strategy {found.shown}"
        raise Mistakes([locate(Origin(found.shown, 1), (), what)])
