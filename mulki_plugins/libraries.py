"""Imports torch, matplotlib, open_clip and Avalanche late, in any environment, and explains why one cannot be imported.

Some of them read or write settings during the import: Avalanche reads a file in the home folder, matplotlib its variables,
settings and cache, torch the variables of its logs. MulKI needs none of these, so none of them may end a command.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import functools
import gc
import getpass
import importlib
import json
import os
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from mulki_plugins.characters import printable
from mulki_plugins.deferred import deferring
from mulki_plugins.errors import MulkiError, describe_error

PACKAGES = {
    "torch": "torch",
    "matplotlib": "matplotlib",
    "open_clip": "open_clip_torch",
    "avalanche": "avalanche-lib",
}
"""The libraries in the order of import, and their packages."""

_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables with which a user decides how torch's threads wait."""
_SPINS = "1000"
"""Rounds for which a waiting thread spins before it sleeps: microseconds, where OpenMP's own choice is milliseconds."""
_OF_THE_SHELL = ("PWD", "OLDPWD", "_")
"""Variables that a shell sets for itself; no library reads them."""
_TORCH_LOGS = ("TORCH_LOGS", "TORCH_LOGS_OUT", "TORCH_LOGS_FORMAT", "TORCH_TRACE", "TORCH_DTRACE")


def load_lazily(package: str, homes: Mapping[str, str], light: Collection[str] = ()) -> Callable[[str], Any]:
    """A package's `__getattr__`, which imports the module of a name on its first use.

    homes: for each name its module, below the package. light: the modules that need no torch.
    """

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if homes[name] not in light:
            import_libraries()
        return getattr(importlib.import_module(f"{package}.{homes[name]}"), name)

    return load


def import_libraries(*names: str) -> None:
    """Import these libraries, by default all of them. MulkiError says why one cannot be imported, and what to do."""
    for name in names or PACKAGES:
        import_library(name)


def import_library(name: str) -> Any:
    """Import one of the libraries in a clean environment, which is restored afterwards."""
    if name in sys.modules:
        return sys.modules[name]
    provide_user()
    try:
        with warnings.catch_warnings(), _without_collector():
            warnings.simplefilter("ignore")  # useless to a user, and PYTHONWARNINGS may turn them into errors
            return _IMPORTS[name]()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a library may also end the program
        raise MulkiError(f"{name} cannot be imported: {describe_error(error)}", hint_for(name, error)) from error


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Keep Python's garbage collector from looking through what is imported: it finds nothing, and takes a tenth of the time.

    It does not look there later either.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def hint_for(name: str, error: BaseException) -> str:
    """What to do about a library that cannot be imported."""
    package, text = PACKAGES.get(name, name), str(error)
    if file := _hiding_file(error):
        return f"rename {file}: it hides the module {file.stem!r}"
    if isinstance(error, ModuleNotFoundError) and error.name:
        missing = error.name.partition(".")[0]
        return f"pip install {package}" if missing == name else f"{package} needs {missing!r}, which is not installed"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some disk space"
    settings = {key: value for key, value in os.environ.items() if key not in _OF_THE_SHELL and len(value) > 2}
    if variables := [key for key, value in settings.items() if _is_named(value, text)]:
        return f"correct or unset {' and '.join(variables)} in the environment"
    if isinstance(error, (MemoryError, OSError)) and ("llocate memory" in text or "map segment" in text or not text):
        return "there is not enough memory to load it"
    if isinstance(error, OSError) and error.filename:
        return f"{name} must be able to use this file"
    if isinstance(error, json.JSONDecodeError):
        return f"a settings file of {name} is damaged; remove it"
    if "numpy" in text.lower() and name != "numpy":
        return f"numpy and {package} do not match; pip install --upgrade numpy {package}"
    return f"pip install --force-reinstall {package}"


def _torch() -> Any:
    """Import torch with threads that soon sleep while they wait for each other, unless the environment says otherwise.

    Threads that spin for long take the cores from whatever else runs, so that two runs beside each other take many times as
    long; threads that sleep at once cost an idle machine what a second thread gains. GNU's OpenMP, torch's on Linux, reads the
    variable while it is loaded. The numbers are the same: as many threads share the work in the same way.
    """
    settings = {key: os.environ[key] for key in _TORCH_LOGS if key in os.environ}
    waiting = {} if any(key in os.environ for key in _WAITING) else {"GOMP_SPINCOUNT": _SPINS}
    with _environment({**dict.fromkeys(settings), **waiting}):
        torch = importlib.import_module("torch")
    if settings:
        try:
            importlib.import_module("torch._logging")._init_logs()
        except Exception:  # not valid for torch; later imports must not read them either
            for key in settings:
                os.environ.pop(key, None)
    return torch


def _matplotlib() -> Any:
    """With the user's settings if they are readable; the pictures of a run do not use them."""
    backend = os.environ.get("MPLBACKEND")
    changes: dict[str, str | None] = {"MPLBACKEND": None}
    settings = os.environ.get("MATPLOTLIBRC")
    if settings is not None and not (_is_text(Path(settings)) or _is_text(Path(settings, "matplotlibrc"))):
        changes["MATPLOTLIBRC"] = None
    folders = _matplotlib_folders()
    if not folders or not all(
        _takes_files(folder) and _is_text_or_absent(folder / "matplotlibrc") for folder in folders
    ):
        changes["MPLCONFIGDIR"] = str(_temporary_folder() / "matplotlib")
    with _environment(changes), _without_settings_here():
        library = importlib.import_module("matplotlib")
        library.get_configdir(), library.get_cachedir()  # matplotlib remembers both
        importlib.import_module("matplotlib.font_manager")
    if backend:
        with contextlib.suppress(ValueError):  # an unknown backend
            library.rcParams["backend"] = backend
    return library


def _matplotlib_folders() -> list[Path]:
    """The folders of matplotlib's settings and cache."""
    if folder := os.environ.get("MPLCONFIGDIR"):
        return [Path(folder)]
    try:
        config = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # unknown home folder
        return []
    return [Path(config, "matplotlib"), Path(cache, "matplotlib")]


@contextlib.contextmanager
def _without_settings_here() -> Iterator[None]:
    """Hide a damaged `matplotlibrc` in the current folder, which matplotlib reads first."""
    if _is_text_or_absent(Path("matplotlibrc")):
        yield
        return
    folder = os.getcwd()
    os.chdir(_temporary_folder())
    try:
        yield
    finally:
        os.chdir(folder)


def _open_clip() -> Any:
    changes: dict[str, str | None] = {key: None for key in os.environ if key.startswith("HF_") and not _is_usable(key)}
    with _environment(changes), deferring():
        return importlib.import_module("open_clip")


def _avalanche() -> Any:
    """Import Avalanche with an empty home folder, then apply the user's own settings file if it is valid."""
    home = str(_temporary_folder())
    with _environment({"HOME": home, "USERPROFILE": home}):
        try:
            with deferring():
                library = importlib.import_module("avalanche")
                importlib.import_module("avalanche.training.supervised")  # imports what the stand-ins are for
        except Exception:  # a version that uses them while it is imported
            library = importlib.import_module("avalanche")
        module: Any = importlib.import_module("avalanche.benchmarks.datasets.dataset_utils")
    root = Path(os.path.expanduser("~/.avalanche"))
    module.AVALANCHE_CONFIG_ROOT, module.AVALANCHE_CONFIG_FILENAME = str(root), str(root / "config.json")
    try:
        location = json.loads((root / "config.json").read_text("utf-8"))["dataset_location"]
        os.fspath(location)
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        location = str(root / "data")
    module.AVALANCHE_CONFIG["dataset_location"] = location
    return library


_IMPORTS = {"torch": _torch, "matplotlib": _matplotlib, "open_clip": _open_clip, "avalanche": _avalanche}


def provide_user() -> None:
    """Give a user without a name or a home folder, such as a bare number in a container, what libraries ask for."""
    try:
        getpass.getuser()
    except Exception:  # KeyError, ImportError or OSError, depending on Python's version
        os.environ["LOGNAME"] = f"user-{os.getuid()}" if hasattr(os, "getuid") else "user"
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = str(_temporary_folder())


@contextlib.contextmanager
def _environment(changes: Mapping[str, str | None]) -> Iterator[None]:
    """Set environment variables, or unset those that are None, and restore them afterwards."""
    before = {key: os.environ.get(key) for key in changes}
    _apply(changes)
    try:
        yield
    finally:
        _apply(before)


def _apply(changes: Mapping[str, str | None]) -> None:
    for key, value in changes.items():
        if value is None:
            os.environ.pop(key, None)
        else:
            os.environ[key] = value


@functools.cache
def _temporary_folder() -> Path:
    """An empty folder that is removed when the process ends. MulkiError if it cannot be created."""
    try:
        folder = tempfile.mkdtemp(prefix="mulki-")
    except OSError as error:
        reason = error.strerror or str(error)
        raise MulkiError(f"cannot create a temporary folder: {reason}", "set TMPDIR to a writable folder") from error
    process = os.getpid()

    def remove() -> None:
        if os.getpid() == process:  # rather than a loader's worker that ends
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return Path(folder)


def _is_usable(key: str) -> bool:
    """Whether a variable of the Hugging Face hub is a number, if it has to be one."""
    return not key.endswith("_TIMEOUT") or os.environ[key].strip().isdecimal()


def _is_text(path: Path) -> bool:
    try:
        path.read_text("utf-8")
    except (OSError, ValueError):
        return False
    return True


def _is_text_or_absent(path: Path) -> bool:
    return not os.path.exists(path) or os.path.isdir(path) or _is_text(path)


def _takes_files(folder: Path) -> bool:
    """Whether a folder is writable, or can be created in the nearest folder above it that exists."""
    folder = Path(os.path.abspath(folder))
    while not os.path.exists(folder) and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _hiding_file(error: BaseException) -> Path | None:
    """A user's file that was imported instead of a module of Python or of a library."""
    here = os.path.abspath(os.curdir) if os.path.exists(os.curdir) else ""
    for frame in traceback.extract_tb(error.__traceback__):
        path = Path(frame.filename)
        if str(path.parent) == here and (path.stem in sys.stdlib_module_names or path.stem in PACKAGES):
            return path
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and os.path.dirname(file) == here and (name in sys.stdlib_module_names or name in PACKAGES):
            return Path(file)
    return None


def _is_named(value: str, text: str) -> bool:
    return f"'{value}'" in text or f'"{value}"' in text or (os.sep in value and value in printable(text))
