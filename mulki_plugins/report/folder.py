"""A run's folder: `<out>/<recipe>/<strategy>/seed-<n>`; an earlier run there is moved aside, never overwritten."""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mulki_plugins.errors import MulkiError
from mulki_plugins.recipe.schema import Recipe

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_ASIDE = re.compile(r"\.before-\d+$")


def run_folder(out: Path, recipe: Recipe, seed: int) -> Path:
    """Where the run goes. The names were checked: none leads out of `out`."""
    return out / recipe.name / recipe.strategy.name / f"seed-{seed}"


def prepare_folder(folder: Path) -> Path | None:
    """Make the folder, empty; returns where an earlier run's was moved to, if there was one. MulkiError if it cannot."""
    aside = None
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            with held(folder):  # an earlier run may be moved, one that is going on may not
                pass
            number = 1
            while (aside := folder.with_name(f"{folder.name}.before-{number}")).exists():
                number += 1
            folder.rename(str(aside))
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MulkiError(
            f"{folder}: the run's folder cannot be made: {error.strerror or error}", "choose another with --out"
        ) from error
    return aside


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keeps other processes from this run's folder; MulkiError where another one holds it. On Windows none is kept."""
    if fcntl is None or not folder.is_dir():
        yield
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise MulkiError(f"{folder}: cannot be opened: {error.strerror}") from error
    try:
        _lock(descriptor)
    except BlockingIOError:
        os.close(descriptor)
        hint = "wait for it, or choose another folder with --out"
        raise MulkiError(f"{folder}: another process is writing this run", hint) from None
    except OSError:  # a file system without locks
        pass
    _held.add(descriptor)
    try:
        yield
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


def is_held(folder: Path) -> bool | None:
    """Whether a process is writing the run in this folder; None where that cannot be known."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return None
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    """Several tries, since `is_held` of another process has the lock for a moment."""
    for wait in (0.05, 0.1, 0.2, None):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if wait is None:
                raise
            time.sleep(wait)


_held: set[int] = set()


def _let_go() -> None:
    """In a loader's worker: the lock is the run's own, and must not outlive it."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if fcntl is not None:
    os.register_at_fork(after_in_child=_let_go)


def refuse_links(folder: Path) -> None:
    """MulkiError where something in a run's folder is a link: what is written through it would lie outside."""
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            if (Path(root) / name).is_symlink():
                raise MulkiError(
                    f"{Path(root) / name}: is a link, and nothing is written outside a run's folder", "remove it"
                )


def is_aside(folder: Path) -> bool:
    """Whether a folder holds an earlier run that was moved aside."""
    return bool(_ASIDE.search(folder.name))


def write_text(path: Path, text: str) -> None:
    """Write a file whole: to a temporary name, synced, then renamed, so that no reader sees half of it."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
