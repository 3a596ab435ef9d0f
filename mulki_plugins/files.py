"""Files on disk: written whole or not at all, locked folders, and the folder of the cache."""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from mulki_plugins.errors import MulkiError
from mulki_plugins.libraries import provide_user

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]  # the functions below check for None


# atomic writes


@contextmanager
def in_place_of(path: Path, *, if_absent: bool = False) -> Iterator[Path]:
    """A temporary path, for a file that takes the place of `path` when the block ends without an error.

    It is synced, then renamed: a reader sees the old file or the new one, never a part. if_absent: a file that another
    process puts there in the meantime stays.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(descriptor)
    try:
        yield Path(name)
        share(Path(name))
        sync(Path(name))
        if not (if_absent and _link_if_absent(name, path)):
            os.replace(name, path)
    finally:
        with suppress(OSError):  # also if both are names of one file: replacing one by the other does nothing
            os.unlink(name)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of `path` when the block ends without an error, see `in_place_of`."""
    with in_place_of(path) as temporary, temporary.open("wb") as file:
        yield file


def link_or_copy(source: Path, target: Path) -> None:
    """The same file under a second name, or a synced copy where the file system has no hard links.

    MulkiError if the source is a symbolic link: it may lead anywhere.
    """
    if source.is_symlink():
        raise MulkiError(f"{source}: is a link, and nothing is read from outside the run's folder")
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        sync(target)


def sync(path: Path) -> None:
    """Put a file, or the entries of a folder, on the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # a folder on Windows
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically."""
    with replacing(path) as file:
        file.write(data)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    write_bytes(path, text.encode())


def share(path: Path) -> None:
    """Give a file the permissions of an ordinary new one: mkstemp and safetensors let only the owner read."""
    os.chmod(path, 0o666 & ~umask())


@functools.cache
def umask() -> int:
    """The permissions that new files of this process lack. Read once: reading changes it for a moment, in all threads."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _link_if_absent(source: str, target: Path) -> bool:
    """Whether there is a file at the target now: another one, or this one under a second name."""
    try:
        os.link(source, target)  # fails if the file exists, which a rename does not
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        return False
    return True


# locks

_locks: set[int] = set()
"""Descriptors of the folders that this process has locked."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from writing the run in a folder. MulkiError if another process has locked it.

    Without effect on Windows, on file systems without locks, and if the folder does not exist.
    """
    if fcntl is None or not folder.is_dir():
        yield
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise MulkiError(f"{folder}: cannot be opened: {error.strerror}") from error
    try:
        take_lock(descriptor)
    except BlockingIOError:
        os.close(descriptor)
        hint = "wait for it, or choose another folder with --out"
        raise MulkiError(f"{folder}: another process is writing this run", hint) from None
    except OSError:  # a file system without locks
        pass
    _locks.add(descriptor)
    try:
        yield
    finally:
        _locks.discard(descriptor)
        os.close(descriptor)


def is_locked(path: Path, *, even_shared: bool = False) -> bool | None:
    """Whether a process has locked a folder or a file; None if the system cannot tell.

    even_shared: a lock that several processes may hold counts too.
    """
    if fcntl is None:
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if even_shared else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return None
    finally:
        os.close(descriptor)


def take_lock(descriptor: int) -> None:
    """Lock an open file or folder, for this process and those that inherit the descriptor. BlockingIOError if it is taken.

    It is tried several times: another process's `is_locked` holds the lock for a moment. Without effect on Windows.
    """
    for wait in (0.05, 0.1, 0.2, None) if fcntl is not None else ():
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if wait is None:
                raise
            time.sleep(wait)


def _close_inherited_locks() -> None:
    """In a forked data-loader worker: a worker that outlives the run must not keep its lock."""
    for descriptor in _locks:
        os.close(descriptor)
    _locks.clear()


if fcntl is not None:
    os.register_at_fork(after_in_child=_close_inherited_locks)


# the cache


def cache_folder() -> Path:
    """The folder of files that MulKI can make again: `$MULKI_CACHE`, else `~/.cache/mulki`. It need not exist."""
    if folder := os.environ.get("MULKI_CACHE"):
        return Path(os.path.expanduser(folder))  # a variable set outside of a shell still has its ~
    provide_user()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mulki"
