"""`mulki new`: write a recipe for the user's own images, or a package with a stage, to start from."""

from __future__ import annotations

import keyword
import os
import re
import shlex
import shutil
import sys
import tempfile
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from string import Template

import click

from mulki_plugins.characters import printable
from mulki_plugins.cli.common import UserPath, echo_note, echo_recipe, report_errors
from mulki_plugins.errors import MulkiError

TEMPLATES = {
    "pyproject.toml": "pyproject.toml",
    "README.md": "README.md",
    "gitignore": ".gitignore",
    "init.py": "$module/__init__.py",
    "hooks.py": "$module/hooks.py",
    "stage.py": "$module/stage.py",
    "strategy.yaml": "$module/strategies/$name.yaml",
    "test_stage.py": "tests/test_stage.py",
    "ci.yml": ".github/workflows/test.yml",
}
"""Each template of a package, and the path of its file."""


@click.group()
def new() -> None:
    """Write files to start from. Existing files are never overwritten."""


@new.command("recipe")
@click.argument("folders", nargs=-1, metavar="DIR...")
@click.option("--from-folders", is_flag=True, hidden=True, help="The default.")
@click.option("--out", metavar="FILE", help="The file to write; - is stdout. Default: NAME.yaml in the current folder.")
@click.option("--name", metavar="NAME", help="The recipe's name. Default: composed of the folders' names.")
@report_errors
def new_recipe(folders: tuple[str, ...], from_folders: bool, out: str | None, name: str | None) -> None:
    """Write a recipe that learns your own images, one task for each DIR, in this order.

    DIR contains a folder of images for each class, a fifth of which is held out for the test; or `train` and `test` (or
    `val`), each with such folders. Classes are named after their folders; correct the names in the recipe. Folders without
    images are no classes; the recipe lists them.

    \b
    mulki new recipe data/birds data/mushrooms --name mine
    mulki run mine.yaml
    """
    from mulki_plugins.streams.folders.draft import draft

    if not folders:
        raise MulkiError("expected the folders of the tasks", "type: mulki new recipe DIR...")
    drafted = draft(folders, name)
    for notice in drafted.notices:
        echo_note(f"note: {notice}")
    if out == "-":
        echo_recipe(drafted.text(f"{drafted.name}.yaml"))
        return
    path = Path(os.path.expanduser(out or f"{drafted.name}.yaml"))
    _write_new(path, drafted.text(str(path)))
    file = shlex.quote(str(path))
    try:
        notes, next_step = _class_name_notes(path), f"check its class names, then: mulki run {file}"
    except MulkiError as error:
        notes, next_step = error.lines(), f"mend what is said above, then: mulki validate {file}"
    for note in notes:
        echo_note(note if note.startswith("warning: ") else f"note: {note}")
    click.echo(printable(f"{path}: written; {next_step}"))


def _write_new(path: Path, text: str) -> None:
    hint = "choose another file with --out"
    try:
        content = text.encode()
        with path.open("xb") as file:
            try:
                file.write(content)
                file.flush()
            except OSError:  # a full disk: a part of the file would keep the next try from writing it
                path.unlink()
                raise
    except FileExistsError:
        raise MulkiError(f"{path}: already exists and is not overwritten", hint) from None
    except (OSError, ValueError) as error:
        raise MulkiError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}", hint) from error


def _class_name_notes(path: Path) -> list[str]:
    from mulki_plugins.cli.validate import check_class_names
    from mulki_plugins.recipe.resolve import resolve

    return check_class_names(resolve(str(path)).recipe)


@new.command("plugin")
@click.argument("name")
@click.option(
    "--into",
    type=UserPath(path_type=Path),
    default=Path("."),
    show_default=True,
    help="Folder in which to create the package's folder.",
)
@report_errors
def new_plugin(name: str, into: Path) -> None:
    """Write the package NAME, with a stage of that name, its test, a strategy and a CI file.

    NAME consists of lower-case letters, digits and hyphens: `mulki new plugin my-stage`.
    """
    if problem := name_problem(name):
        raise MulkiError(f"{name!r}: {problem}")
    target = into / name
    if target.exists() or target.is_symlink():
        raise MulkiError(f"{target} already exists", "choose another name, or another folder with --into")
    if not into.is_dir():
        raise MulkiError(f"{into}: no such folder", "create it first")
    write_package(name, target)
    click.echo(f"{printable(str(target))} is written. Next:\n")
    click.echo(printable(f"  pip install -e '{target}[test]'"))
    click.echo(printable(f"  pytest {target}"))
    click.echo(f"  mulki run mtil --with {name}")


def name_problem(name: str) -> str:
    """Why a name cannot be that of a package and its stage; empty if it can."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) or len(name) > 60:
        similar = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-0123456789")
        hint = f" (such as {similar[:60].strip('-')!r})" if similar else ""
        return f"expected lower-case letters, digits and single hyphens, starting with a letter{hint}"
    module = name.replace("-", "_")
    if keyword.iskeyword(module) or keyword.issoftkeyword(module) or module in sys.stdlib_module_names:
        return f"{module!r} has a meaning in Python; choose another name"
    if module in ("null", "true", "false"):
        return f"{module!r} has a meaning in YAML; choose another name"
    from mulki_plugins.registry.discovery import catalog

    if ("plugin", name) in catalog().parts or name in catalog().files["strategies"]:
        return "a plugin or strategy of this name is already installed; `mulki plugins` shows its package"
    if module in ("mulki", "tests") or find_spec(module) is not None:
        return f"a package {module!r} is already installed; choose another name"
    return ""


def write_package(name: str, target: Path) -> None:
    """Write all files into a temporary folder beside the target, then rename it: all or nothing."""
    from mulki_plugins import __version__

    words = {
        "name": name,
        "module": name.replace("-", "_"),
        "Class": "".join(part.capitalize() for part in name.removesuffix("-stage").split("-")) + "Stage",
        "mulki": ".".join(__version__.split(".")[:2]),
    }
    templates = files("mulki_plugins.cli") / "templates" / "plugin"
    temporary = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
    try:
        for template, path in TEMPLATES.items():
            file = temporary / Template(path).substitute(words)
            file.parent.mkdir(parents=True, exist_ok=True)
            text = templates.joinpath(f"{template}.template").read_text("utf-8")
            file.write_text(Template(text).substitute(words), "utf-8")
        temporary.chmod(0o755)
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
