"""Checkpoints on disk: a folder each, of safetensors and one manifest with their checksums; whole, or not there at all.

`checkpoints/task-02-digits/` is the run after its second task, `checkpoints/task-03-step-000200/` 200 steps into the third,
which goes on from the former. Each has `weights.safetensors`, in open_clip's own names, which `model.pretrained` reads, the
rest of the state as `state-<n>.safetensors`, and `manifest.json`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from attrs import field, frozen
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mulki_plugins.errors import MulkiError, describe_error
from mulki_plugins.models.weights import WEIGHTS
from mulki_plugins.report.folder import write_text
from mulki_plugins.training.packing import packed, unpacked

FORMAT = 1
FOLDER = "checkpoints"
MANIFEST = "manifest.json"
SHARD = 2**28
"""Bytes: as much as is copied from a GPU at once."""


class Damaged(Exception):
    """A checkpoint that is not what was written."""


@frozen(order=True)
class Place:
    """A moment of a run: so many tasks learned, and so many steps into the next."""

    tasks: int
    steps: int = 0


@frozen(kw_only=True, eq=False)
class Checkpoint:
    """One checkpoint on disk, whose manifest has been read and whose tensors have not."""

    path: Path
    place: Place
    base: str | None
    """The checkpoint of the last task's end, from which a task's state goes on; None before the first."""
    run: dict[str, Any]
    """What the run had found so far: plain data."""
    files: dict[str, str] = field(repr=False)
    plain: Any = field(repr=False)

    def weights(self) -> dict[str, Tensor]:
        """The model's own, by open_clip's names; empty where they are the pre-trained ones. Damaged where they are not whole."""
        return self._tensors(WEIGHTS) if WEIGHTS in self.files else {}

    def state(self) -> dict[str, Any]:
        """All else, as it was handed in. Damaged where it is not whole."""
        tensors: dict[str, Tensor] = {}
        for name in self.files:
            if name.startswith("state-"):
                tensors |= self._tensors(name)
        try:
            state: dict[str, Any] = unpacked(self.plain, tensors)
        except (TypeError, ValueError) as error:
            raise Damaged(f"{self.path / MANIFEST}: {error}") from error
        return state

    def verify(self) -> None:
        """Damaged where a file is missing, or is not what was written."""
        for name in self.files:
            with self._opened(name) as file:  # a tensor at a time, so that no copy of the whole is needed
                self._compare(name, digest(file.keys(), file.get_tensor))

    def _tensors(self, name: str) -> dict[str, Tensor]:
        with self._opened(name) as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        self._compare(name, digest(tensors, tensors.__getitem__))
        return tensors

    @contextmanager
    def _opened(self, name: str) -> Iterator[Any]:
        path = self.path / name
        if path.is_symlink():
            raise Damaged(f"{path}: is a link, and nothing is read from outside a checkpoint")
        try:
            with safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call]
                yield file
        except (OSError, SafetensorError, ValueError) as error:
            raise Damaged(f"{path}: cannot be read: {describe_error(error)}") from error

    def _compare(self, name: str, found: str) -> None:
        if found != self.files[name]:
            raise Damaged(f"{self.path / name}: its checksum is not the one in the manifest")


def write_checkpoint(
    run: Path,
    name: str,
    place: Place,
    *,
    base: str | None,
    weights: Mapping[str, Tensor],
    state: Mapping[str, Any],
    found: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> Checkpoint:
    """Write a checkpoint below the run's folder, under a temporary name until it is whole, and verify it.

    weights: the model's, if they are to be kept; metadata: what stands beside them in their file.
    state: nested tensors and plain data. found: what the run has found.
    Tensors on a GPU come to memory SHARD bytes at a time. An OSError leaves nothing behind.
    """
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    if folder.is_symlink():
        raise MulkiError(f"{folder}: is a link, and nothing is written outside the run's folder")
    part = folder / f".{name}.part"
    shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
    try:
        part.mkdir()
        plain, tensors = packed(state)
        shards = dict(_shards(tensors))
        files = {}
        for file, contents in {WEIGHTS: weights, **shards}.items():
            if contents:
                files[file] = _write(part / file, contents, metadata if file == WEIGHTS else None)
        manifest: dict[str, Any] = {
            "format": FORMAT, "tasks": place.tasks, "steps": place.steps, "base": base, "files": files,
            "run": dict(found), "state": plain,
        }  # fmt: skip
        write_text(part / MANIFEST, _signed(manifest))
        _sync(part)
        if (folder / name).exists():  # of the same moment, damaged or not trusted
            shutil.rmtree(folder / name)
        part.rename(folder / name)
        _sync(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    written = read_checkpoint(folder / name)
    written.verify()
    return written


def amend(checkpoint: Checkpoint, found: Mapping[str, Any]) -> Checkpoint:
    """Put down what the run has found since, such as the evaluation after the task."""
    manifest = json.loads((checkpoint.path / MANIFEST).read_text("utf-8"))
    del manifest["sha256"]
    manifest["run"] = dict(found)
    write_text(checkpoint.path / MANIFEST, _signed(manifest))
    return read_checkpoint(checkpoint.path)


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a folder, its manifest checked. Damaged where it is none."""
    try:
        if (path / MANIFEST).is_symlink():
            raise ValueError("it is a link")
        manifest = json.loads((path / MANIFEST).read_text("utf-8"))
        signature = manifest.pop("sha256")
        if signature != json.loads(_signed(manifest))["sha256"]:
            raise ValueError("its checksum is wrong")
        if manifest["format"] != FORMAT:
            raise ValueError(f"it is of format {manifest['format']}, this version reads {FORMAT}")
        if not all(name == Path(name).name for name in (*manifest["files"], manifest["base"] or "")):
            raise ValueError("it names a file outside its folder")
        return Checkpoint(
            path=path,
            place=Place(int(manifest["tasks"]), int(manifest["steps"])),
            base=manifest["base"],
            run=manifest["run"],
            files=manifest["files"],
            plain=manifest["state"],
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Damaged(f"{path / MANIFEST}: {error}") from error


def checkpoints(run: Path) -> tuple[list[Checkpoint], list[str]]:
    """The run's checkpoints whose manifest can be read, the latest first; and what is wrong with the others."""
    found, wrong = [], []
    folder = run / FOLDER
    for path in sorted(folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else ():
        if path.is_dir() and not path.is_symlink() and not path.name.startswith("."):
            try:
                found.append(read_checkpoint(path))
            except Damaged as error:
                wrong.append(str(error))
    return sorted(found, key=lambda c: c.place, reverse=True), wrong


def prune(run: Path, newest: Checkpoint, keep: int) -> None:
    """Remove all but the latest `keep` checkpoints up to the newest, and those that they go on from.

    The newest has been verified. Those of a later moment are of an earlier attempt, and go too.
    """
    found = [c for c in checkpoints(run)[0] if c.place <= newest.place]
    kept = {c.path.name for c in found[:keep]} | {c.base for c in found[:keep]}
    for other in checkpoints(run)[0]:
        if other.path.name not in kept:
            half = other.path.with_name(f".{other.path.name}.part")  # so that half of one is none
            other.path.rename(half)
            shutil.rmtree(half)
    for half in (run / FOLDER).glob(".*.part"):  # of a run that was killed
        shutil.rmtree(half, ignore_errors=True)


def digest(names: Iterable[str], tensor_of: Callable[[str], Tensor]) -> str:
    """SHA-256 of names, types, shapes and numbers."""
    result = hashlib.sha256()
    for name in sorted(names):
        tensor = tensor_of(name).detach().cpu().contiguous()
        result.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.numel():
            result.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return result.hexdigest()


def _shards(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The tensors in groups of at most SHARD bytes, or of one."""
    group: dict[str, Tensor] = {}
    size = number = 0
    for name, tensor in tensors.items():
        if group and size + tensor.nbytes > SHARD:
            yield f"state-{number}.safetensors", group
            group, size, number = {}, 0, number + 1
        group[name] = tensor
        size += tensor.nbytes
    yield f"state-{number}.safetensors", group


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write and sync a file; returns its digest. Nothing is copied that lies in memory in one piece of its own."""
    ready: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        one = tensor.detach().cpu().contiguous()
        if one.untyped_storage().nbytes() != one.nbytes or one.data_ptr() in seen:
            one = one.clone()
        seen.add(one.data_ptr())
        ready[name] = one
    try:
        save_file(ready, path, metadata={"format": "pt", **(metadata or {})})
    except SafetensorError as error:  # which hides the system's own
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) if number else error from error
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return digest(ready, ready.__getitem__)


def _sync(folder: Path) -> None:
    """Put a folder's entries on the disk, where the system can do that."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _signed(manifest: dict[str, Any]) -> str:
    """The manifest as JSON, with a checksum of all else in it."""
    text = json.dumps(manifest, sort_keys=True, allow_nan=False)
    return json.dumps({**manifest, "sha256": hashlib.sha256(text.encode()).hexdigest()}, allow_nan=False) + "\n"
