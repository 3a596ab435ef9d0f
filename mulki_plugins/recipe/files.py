"""Recipe and strategy files: found by path or by name, and strategies read and checked on their own."""

from __future__ import annotations

import copy
import os
import shlex
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from attrs import frozen

from mulki_plugins.characters import simplify
from mulki_plugins.errors import Mistakes, OptionError, did_you_mean, format_value
from mulki_plugins.recipe.check import check_name, check_recipe
from mulki_plugins.recipe.layers import overlay, write_out_plugins, write_out_short_forms
from mulki_plugins.recipe.parts import check_plugins
from mulki_plugins.recipe.schema import StrategyFile
from mulki_plugins.recipe.yaml import Origin, Tree, locate, read_yaml, sort_by_line
from mulki_plugins.registry.catalog import Provenance
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.types import collect_mistakes, convert

SINGULAR = {"recipes": "recipe", "strategies": "strategy", "studies": "study"}
SUFFIXES = (".yaml", ".yml")
MAX_FILES = 10_000
"""How many files of a folder are searched for a similar name."""
DEFAULTABLE = ("train", "evaluate", "model")
"""The parts of a recipe for which a strategy may bring defaults."""
_OF_MODEL = ("train", "adapters", "head")
"""The options of the model that are a strategy's to set."""
_OWN_KEYS = {
    "recipes": {"stream", "model", "strategy", "train"},
    "strategies": {"plugins", "paper", "base"},
    "studies": {"recipes", "parts", "orders", "choice", "cost"},
}
"""Keys that only one kind of file has."""


@frozen
class YamlFile:
    """A YAML file, its name in messages, and a notice if it is not the path that was typed."""

    path: Path
    shown: str
    notice: str = ""


def list_registered(kind: str) -> dict[str, tuple[Path, Provenance]]:
    """Every registered YAML file of a kind (`recipes`, `strategies` or `studies`) by its name."""
    return catalog().files[kind]  # type: ignore[index]  # the kinds are a Literal there


def find(kind: str, name: str) -> YamlFile:
    """A file of `recipes`, `strategies` or `studies`. An existing path wins; else a registered name, with or without the folder.

    Raises Mistakes if there is neither.
    """
    path = Path(name)
    if name and _may_be_file(path):
        return YamlFile(path, name)
    registered, stem = list_registered(kind), _stem(kind, name)
    in_our_folder = path.parent in (Path("."), Path(kind))
    similar = _find_similar_files(path) if path.suffix in SUFFIXES else []
    if in_our_folder and stem in registered and not any(Path(file).stem == stem for file in similar):
        file, provenance = registered[stem]
        return YamlFile(file, f"{kind}/{file.name}", f"{name}: using the {SINGULAR[kind]} {stem!r} of {provenance}")
    if name and kind != "strategies" and os.path.isdir(path):
        message = f"this is a folder, expected a YAML file{_suggest_in_folder(path)}"
    else:
        all_of_them = f"`mulki list {kind}` shows all{catalog().hint_at_packages()}"
        message = f"no such file, and no {SINGULAR[kind]} of that name ({suggest_file(kind, name)}); {all_of_them}"
    raise Mistakes([f"{name}: {message}"])


def _stem(kind: str, name: str) -> str:
    path = Path(name)
    return path.stem if path.suffix in SUFFIXES else name.removeprefix(f"{kind}/")


def _may_be_file(path: Path) -> bool:
    """Whether a path exists and is no folder. True without permission to look: reading then gives the reason."""
    try:
        os.stat(path)
    except PermissionError:
        return True
    except (OSError, ValueError):  # missing, or a name that no file can have
        return False
    return not os.path.isdir(path)


def suggest_file(kind: str, name: str) -> str:
    """What the unknown name of a recipe or strategy may mean."""
    path, stem = Path(name), _stem(kind, name)
    if similar := _find_similar_files(path):
        return f"did you mean {similar[0]!r}?"
    if advice := _suggest_other_kind(kind, stem):
        return advice
    hint = did_you_mean(stem, list_registered(kind))
    if not hint.startswith("did") and (path.suffix in SUFFIXES or len(path.parts) > 1):
        missing = next((str(p) for p in reversed(path.parents) if not os.path.isdir(p)), "")
        gone = f"there is no folder {missing!r} here, and a path" if missing else "a path"
        hint += f"; {gone} is relative to the current folder"
    return hint


def _find_similar_files(path: Path) -> list[str]:
    """YAML files in the same folder with similar names, the most similar first."""
    try:
        files = [entry.name for entry in os.scandir(path.parent) if entry.name.endswith(SUFFIXES)][:MAX_FILES]
    except (OSError, ValueError):
        return []
    stems = {Path(file).stem.lower(): file for file in sorted(files, reverse=True)}
    word = (path.stem if path.suffix in SUFFIXES else path.name).lower()
    cutoff = 0.7 if path.suffix in SUFFIXES or len(path.parts) > 1 else 1.0
    close = get_close_matches(simplify(word), stems, n=1, cutoff=cutoff)
    return [str(path.parent / stems[stem]) for stem in close]


def _suggest_other_kind(kind: str, name: str) -> str:
    """How to use something that is registered as another kind."""
    if kind != "studies" and name in list_registered("studies"):
        return f"{name!r} is a study; type `mulki study {name}`"
    if kind == "studies":
        return f"{name!r} is a recipe; type `mulki run {name}`" if name in list_registered("recipes") else ""
    if kind == "recipes" and name in list_registered("strategies"):
        return f"{name!r} is a strategy; type `mtil --strategy {name}`, or another recipe in place of mtil"
    if kind == "strategies" and name in list_registered("recipes"):
        return f"{name!r} is a recipe; type it without --strategy"
    parts = catalog()
    plugins = [part.name for part in parts.of_kind("plugin")]
    if plugin := name if name in plugins else next((p for p in plugins if p.rpartition(".")[2] == name), None):
        return f"{plugin!r} is a plugin; type `{'mtil ' if kind == 'recipes' else ''}--with {plugin}`"
    for other, key in (("stream", "stream"), ("model", "model"), ("metric", "evaluate.metrics"), ("logger", "loggers")):
        if (other, name) in parts.parts:
            setting = f"{key}=[{name}]" if other in ("metric", "logger") else f"{key}={name}"
            return f"{name!r} is a {other}; set it in a recipe: `mtil --set {shlex.quote(setting)}`"
    return ""


def _suggest_in_folder(path: Path) -> str:
    """What to type in place of a folder."""
    if os.path.isfile(path / "recipe.yaml"):
        return f"; a run's recipe is {path / 'recipe.yaml'}, and `mulki resume {path}` continues the run"
    try:
        entries = sorted(os.scandir(path), key=lambda entry: entry.name)[:MAX_FILES]
    except OSError:
        return ""
    if files := [str(path / entry.name) for entry in entries if entry.name.endswith(SUFFIXES)]:
        return f", such as {', '.join(files[:3])}"
    return "; `mulki new recipe` makes a recipe of folders of images" if any(e.is_dir() for e in entries) else ""


def registered_name(kind: str, path: Path) -> str | None:
    """The name under which this very file is registered, if it is."""
    for name, (registered, _) in list_registered(kind).items():
        try:
            if os.path.samefile(registered, path):
                return name
        except (OSError, ValueError):
            continue
    return None


def kind_of(values: dict[str, Any]) -> str | None:
    """The kind of file that has such keys: `recipes`, `strategies` or `studies`. None if they fit none or several."""
    kinds = [kind for kind, keys in _OWN_KEYS.items() if keys & set(values)]
    return kinds[0] if len(kinds) == 1 else None


def refuse_other_kind(tree: Tree, file: YamlFile, kind: str) -> None:
    """Raises Mistakes, with what to type instead, if the file's keys are those of another kind than expected."""
    found = kind_of(tree.value)
    if found is None or found == kind:
        return
    path = shlex.quote(file.shown)
    advice = {
        "recipes": f"type `mulki run {path}`",
        "strategies": f"use it with --strategy, such as mtil --strategy {path}",
        "studies": f"type `mulki study {path}`",
    }[found]
    what = f"this is a {SINGULAR[found]}, not a {SINGULAR[kind]}; {advice}"
    raise Mistakes([locate(Origin(file.shown, 1), (), what)])


def read_strategy(file: YamlFile) -> tuple[StrategyFile, Tree]:
    """The strategy in a file, and its values with their lines. Raises Mistakes; does not check the stack and the defaults."""
    tree = _read_strategy_tree(file)
    strategy, wrong = _convert_strategy(tree, file)
    if strategy is None or wrong:
        raise _locate_all(tree, wrong)
    return strategy, tree


def check_strategy(file: YamlFile) -> StrategyFile:
    """The strategy in a file, with its stack and its defaults checked too. Raises Mistakes."""
    tree = _read_strategy_tree(file)
    strategy, wrong = _convert_strategy(tree, file)
    plugins, defaults = tree.value.get("plugins"), tree.value.get("defaults")
    if isinstance(plugins, list):
        wrong += check_plugins(plugins, ("plugins",))[1]
    if isinstance(defaults, dict):
        wrong += _check_defaults({key: value for key, value in defaults.items() if isinstance(value, dict)})
    if strategy is None or wrong:
        raise _locate_all(tree, wrong)
    return strategy


def _read_strategy_tree(file: YamlFile) -> Tree:
    tree = read_yaml(file.path, file.shown)
    refuse_other_kind(tree, file, "strategies")
    return tree


def _locate_all(tree: Tree, wrong: list[OptionError]) -> Mistakes:
    return Mistakes(sort_by_line(dict.fromkeys(locate(tree.origin(e.path), e.path, str(e)) for e in wrong)))


def _convert_strategy(tree: Tree, file: YamlFile) -> tuple[StrategyFile | None, list[OptionError]]:
    write_out_plugins(tree, ("plugins",))
    wrong: list[OptionError] = []
    strategy: StrategyFile | None = None
    try:
        strategy = convert(tree.value, StrategyFile)
    except Exception as error:
        wrong += collect_mistakes(error)
    name, defaults = tree.value.get("name"), tree.value.get("defaults")
    if isinstance(name, str):
        problems = (check_name(name), _check_name_is_free(file, name))
        wrong += [OptionError(problem, ("name",)) for problem in problems if problem]
    for key, value in defaults.items() if isinstance(defaults, dict) else ():
        if key not in DEFAULTABLE:
            wrong.append(OptionError(f"expected one of {', '.join(DEFAULTABLE)}", ("defaults", key)))
        elif not isinstance(value, dict):
            wrong.append(OptionError(f"expected a mapping, got {format_value(value)}", ("defaults", key)))
        elif key == "model":
            message = (
                "a strategy may only set `train`, what learns, `adapters` and `head`; the recipe chooses the model"
            )
            wrong += [OptionError(message, ("defaults", key, option)) for option in value if option not in _OF_MODEL]
    return strategy, wrong


def _check_name_is_free(file: YamlFile, name: str) -> str:
    """What is wrong with a strategy's name: results are stored under it, so a registered name belongs to its file."""
    strategies = list_registered("strategies")
    registered = registered_name("strategies", file.path)
    if registered is not None:
        return (
            "" if name == registered else f"expected {registered!r}, under which the file is registered, got {name!r}"
        )
    taken = next((other for other in strategies if other.casefold() == name.casefold()), None)
    if taken is None or _same_text(strategies[taken][0], file.path):
        return ""
    return f"the strategy {taken!r} of {strategies[taken][1]} has this name, and results are stored under it; choose another"


def _same_text(one: Path, other: Path) -> bool:
    """An unchanged copy is the same strategy."""
    try:
        return one.read_bytes() == other.read_bytes()
    except (OSError, ValueError):
        return False


def _check_defaults(defaults: dict[str, Any]) -> list[OptionError]:
    """What is wrong with defaults when they lie under the smallest possible recipe."""
    smallest = {
        "name": "any", "stream": {"name": "mtil-mini"}, "model": {"name": "mulki-tiny", "adapters": ["lora"]},
        "strategy": {"name": "any", "plugins": []}, "train": {"iterations": 10**9, "optimizer": {"lr": 1.0}},
    }  # fmt: skip
    model = {key: value for key, value in defaults.get("model", {}).items() if key in _OF_MODEL}
    layer = Tree(copy.deepcopy({**defaults, "model": model}))
    write_out_short_forms(layer)
    _, wrong = check_recipe(overlay(Tree(smallest), layer).value)
    return [error.below(("defaults",)) for error in wrong]


def find_strategy_provenance(name: str) -> Provenance | None:
    """The package of a strategy, also after `--with` and `--without`; None if it is not registered."""
    registered = list_registered("strategies")
    for known in sorted(registered, key=len, reverse=True):
        if name == known or name.startswith((f"{known}-with-", f"{known}-without-")):
            return registered[known][1]
    return None


def warn_of_borrowed_name(name: str, plugins: list[str]) -> str:
    """A notice if a stack has the name of a registered strategy but other plugins; else empty."""
    if name not in (registered := list_registered("strategies")):
        return ""
    try:
        strategy, _ = read_strategy(YamlFile(registered[name][0], name))
    except Mistakes:
        return ""
    if [entry.name for entry in strategy.plugins] == plugins:
        return ""
    whose = f"the strategy {name!r} of {registered[name][1]}"
    return f"strategy.name: this stack differs from {whose}, but its results are stored under that name; choose another"
