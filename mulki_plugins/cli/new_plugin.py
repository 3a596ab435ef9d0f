"""`mulki new plugin`: a whole package with one stage, which works and is tested as it is written."""

from __future__ import annotations

import keyword
import re
import shutil
import sys
import tempfile
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from string import Template

import click

from mulki_plugins.characters import printable
from mulki_plugins.cli.common import reports_mistakes
from mulki_plugins.errors import MulkiError

FILES = {
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
"""Each template, and the path of the file that is made of it."""


@click.command("plugin")
@click.argument("name")
@click.option(
    "--into",
    type=click.Path(path_type=Path),
    default=Path("."),
    show_default=True,
    help="Folder to make the package's folder in.",
)
@reports_mistakes
def new_plugin(name: str, into: Path) -> None:
    """Write the package NAME, with a stage of that name, its test, a strategy and a CI file.

    NAME is of small letters, digits and hyphens: `mulki new plugin my-stage`. Nothing that exists is touched.
    """
    if problem := name_problem(name):
        raise MulkiError(f"{name!r}: {problem}")
    target = into / name
    if target.exists() or target.is_symlink():
        raise MulkiError(f"{target} is already there", "choose another name, or another folder with --into")
    if not into.is_dir():
        raise MulkiError(f"{into}: there is no such folder", "make it first")
    write_package(name, target)
    click.echo(f"{printable(str(target))} is written. Next:\n")
    click.echo(printable(f"  pip install -e '{target}[test]'"))
    click.echo(printable(f"  pytest {target}"))
    click.echo(f"  mulki run mtil --with {name}")


def name_problem(name: str) -> str:
    """What keeps a name from being a package's and a stage's; empty where it is fine."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) or len(name) > 60:
        like = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-0123456789")
        hint = f" (such as {like[:60].strip('-')!r})" if like else ""
        return f"expected small letters, digits and single hyphens, the first a letter{hint}"
    module = name.replace("-", "_")
    if keyword.iskeyword(module) or keyword.issoftkeyword(module) or module in sys.stdlib_module_names:
        return f"{module!r} means something in Python itself; choose another"
    if module in ("null", "true", "false"):
        return f"{module!r} means something in YAML; choose another"
    from mulki_plugins.registry.discovery import catalog

    if ("plugin", name) in catalog().parts or name in catalog().files["strategies"]:
        return "a plugin or strategy of this name is already installed; `mulki plugins` says who brought it"
    if module in ("mulki", "tests") or find_spec(module) is not None:
        return f"a package {module!r} is already installed; choose another name"
    return ""


def write_package(name: str, target: Path) -> None:
    """All files at once: into a folder beside the target, which is then renamed."""
    from mulki_plugins import __version__

    words = {
        "name": name,
        "module": name.replace("-", "_"),
        "Class": "".join(part.capitalize() for part in name.removesuffix("-stage").split("-")) + "Stage",
        "mulki": ".".join(__version__.split(".")[:2]),
    }
    templates = files("mulki_plugins.cli") / "templates" / "plugin"
    beside = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
    try:
        for template, path in FILES.items():
            file = beside / Template(path).substitute(words)
            file.parent.mkdir(parents=True, exist_ok=True)
            text = templates.joinpath(f"{template}.template").read_text("utf-8")
            file.write_text(Template(text).substitute(words), "utf-8")
        beside.chmod(0o755)
        beside.rename(target)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
