"""Checkpoints on disk: each is a folder that is whole or not there at all.

`checkpoints/task-02-digits/` is the run after its second task. `checkpoints/task-03-step-000200/` is 200 steps into the
third, and builds on the former. A checkpoint holds

- `weights.safetensors`: the model's weights under open_clip's names, so `model.pretrained` can name the folder; without
  those that are still as pre-trained, if these are many (see `pretrained.py`);
- `state.pt`: everything else, written by torch.save and read with weights_only=True, which runs no code;
- `manifest.json`: the moment, the results so far, and a checksum of each file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from attrs import field, frozen
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mulki_plugins.errors import MulkiError, describe_error
from mulki_plugins.files import share, sync, write_text
from mulki_plugins.models.weights import OMITTED, WEIGHTS
from mulki_plugins.training.checksums import Checksummed, checksum_of, digest
from mulki_plugins.training.pretrained import LeftOut
from mulki_plugins.training.snapshot import put_back

FORMAT = 3
WHOLE = 2
"""The format of checkpoints that leave nothing out, which earlier versions read as well."""
FOLDER = "checkpoints"
MANIFEST = "manifest.json"
STATE = "state.pt"
DEVICES = "devices"
"""Where a state keeps the devices that its tensors came from, if they were copied to the CPU."""


class Damaged(MulkiError):
    """A checkpoint that does not hold what was written."""


class OtherFormat(MulkiError):
    """A checkpoint that another version of MulKI wrote."""


@frozen(order=True)
class Moment:
    """A moment of a run: the number of tasks learned, and of steps into the next task."""

    tasks: int
    steps: int = 0


@frozen(kw_only=True, eq=False)
class Checkpoint:
    """A checkpoint on disk. Its manifest has been read, its tensors have not."""

    path: Path
    moment: Moment
    base: str | None
    """The checkpoint of the last task's end that this one builds on; None for a task's end."""
    run: dict[str, Any]
    """Results and counters of the run, as plain data."""
    files: dict[str, str] = field(repr=False)
    """The checksum of each file."""
    left_out: LeftOut | None = None
    """The weights that it leaves out, since they are as pre-trained."""
    refers: bool = False
    """Whether a plugin's state refers to pre-trained weights."""

    def weights(self) -> dict[str, Tensor]:
        """The model's weights by open_clip's names, without those left out; empty if all are. Damaged if not whole."""
        if WEIGHTS not in self.files:
            return {}
        self._verify(WEIGHTS)
        return load_file(self.path / WEIGHTS)

    def state(self) -> dict[str, Any]:
        """Everything else, each tensor on its device, or on the CPU if this machine lacks it. Damaged if not whole."""
        self._verify(STATE)
        path = self.path / STATE
        try:
            with zipfile.ZipFile(
                path
            ) as archive:  # an entry that is larger than the file unpacks to exhaust the memory
                if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                    raise ValueError("it is compressed")
            state: dict[str, Any] = torch.load(path, weights_only=True, map_location=_on_this_machine)
        except Exception as error:  # torch.load raises errors of many kinds
            raise Damaged(f"{path}: cannot be read: {describe_error(error)}") from error
        devices = state.pop(DEVICES, [])
        return put_back(state, devices) if devices else state

    def end_of_task(self) -> Checkpoint:
        """The checkpoint of the last task's end: itself, or the one it builds on."""
        return self if self.base is None else read_checkpoint(self.path.parent / self.base)

    def verify(self) -> None:
        """Damaged if a file is missing or does not hold what was written."""
        for name in self.files:
            self._verify(name)

    def _verify(self, name: str) -> None:
        path = self.path / name
        if path.is_symlink():
            raise Damaged(f"{path}: is a link, and nothing is read from outside a checkpoint")
        try:
            checksum = checksum_of(path)
        except (OSError, SafetensorError, ValueError) as error:
            raise Damaged(f"{path}: cannot be read: {describe_error(error)}") from error
        if checksum != self.files[name]:
            raise Damaged(f"{path}: its checksum differs from the manifest's")


def write_checkpoint(
    run: Path,
    name: str,
    moment: Moment,
    *,
    base: str | None,
    weights: Mapping[str, Tensor],
    state: Mapping[str, Any],
    progress: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
    left_out: LeftOut | None = None,
    refers: bool = False,
) -> Checkpoint:
    """Write a checkpoint below the run's folder. It has a temporary name until it is whole.

    weights: the model's, or none if they are the pre-trained ones; metadata: stored in their file. left_out: those that are
    missing among them; refers: whether a plugin's state refers to such.
    state: nested tensors and plain data, see `snapshot.storable`. progress: the run's results and counters.
    Checksums are those of what was to be written, computed once, on the way. An OSError leaves nothing behind.
    """
    with new_folder(run / FOLDER, name) as part:
        files = {STATE: write_state(part / STATE, state)}
        if weights or left_out:
            mark = {OMITTED: str(len(left_out.names))} if left_out else {}
            files[WEIGHTS] = _write_weights(part / WEIGHTS, weights, {**(metadata or {}), **mark})
        write_manifest(part, moment, base, files, progress, left_out, refers)
    return read_checkpoint(run / FOLDER / name)


@contextmanager
def new_folder(parent: Path, name: str) -> Iterator[Path]:
    """A folder to write into, which is called `name` only when the block has ended without an error.

    It takes the place of one of that name. Nothing is left behind otherwise. MulkiError if the parent is a link.
    """
    parent.mkdir(exist_ok=True)
    if parent.is_symlink():
        raise MulkiError(f"{parent}: is a link, and nothing is written outside the run's folder")
    part = parent / f".{name}.part"
    shutil.rmtree(part, ignore_errors=True)  # left by a run that was killed
    try:
        part.mkdir()
        yield part
        sync(part)
        if (parent / name).exists():  # the same moment of an earlier attempt
            shutil.rmtree(parent / name)
        part.rename(parent / name)
        sync(parent)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def write_manifest(
    folder: Path, moment: Moment, base: str | None, files: Mapping[str, str], progress: Mapping[str, Any],
    left_out: LeftOut | None = None, refers: bool = False,
) -> None:  # fmt: skip
    manifest: dict[str, Any] = {
        "format": FORMAT if left_out or refers else WHOLE, "tasks": moment.tasks, "steps": moment.steps, "base": base,
        "files": dict(files), "run": dict(progress),
    }  # fmt: skip
    if left_out or refers:
        manifest |= {"left_out": [list(left_out.names), left_out.digest] if left_out else None, "refers": refers}
    write_text(folder / MANIFEST, _signed(manifest))


def amend(checkpoint: Checkpoint, progress: Mapping[str, Any]) -> Checkpoint:
    """Replace a checkpoint's results and counters, such as by those of the evaluation after the task."""
    manifest = json.loads((checkpoint.path / MANIFEST).read_text("utf-8"))
    del manifest["sha256"]
    manifest["run"] = dict(progress)
    write_text(checkpoint.path / MANIFEST, _signed(manifest))
    return read_checkpoint(checkpoint.path)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint's manifest and check it. Damaged, or OtherFormat if another version wrote it."""
    try:
        if (path / MANIFEST).is_symlink():
            raise ValueError("it is a link")
        manifest = json.loads((path / MANIFEST).read_text("utf-8"))
        checksum = manifest.pop("sha256")
        if checksum != json.loads(_signed(manifest))["sha256"]:
            raise ValueError("its checksum is wrong")
        if manifest["format"] not in (WHOLE, FORMAT):
            raise OtherFormat(
                f"{path}: another version of MulKI wrote this checkpoint: it has format {manifest['format']}, "
                f"this version reads {WHOLE} and {FORMAT}",
                "resume the run with that version, or start it again",
            )
        if not all(name == Path(name).name for name in (*manifest["files"], manifest["base"] or "")):
            raise ValueError("it names a file outside its folder")
        return Checkpoint(
            path=path,
            moment=Moment(int(manifest["tasks"]), int(manifest["steps"])),
            base=manifest["base"],
            run=manifest["run"],
            files=manifest["files"],
            left_out=LeftOut(tuple(left_out[0]), left_out[1]) if (left_out := manifest.get("left_out")) else None,
            refers=bool(manifest.get("refers")),
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Damaged(f"{path / MANIFEST}: {error}") from error


def checkpoints(run: Path) -> tuple[list[Checkpoint], list[str]]:
    """The run's checkpoints with a readable manifest, the latest first; and why the others cannot be read."""
    readable, problems = [], []
    for path in _folders(run):
        try:
            readable.append(read_checkpoint(path))
        except (Damaged, OtherFormat) as error:
            problems.append(error.message)
    return sorted(readable, key=lambda checkpoint: checkpoint.moment, reverse=True), problems


def to_extend(run: Path, base: str, tasks: int) -> Checkpoint | None:
    """The checkpoint of the last of so many tasks' end, from which a further one goes on; None if none is kept.

    With the base `none`, which trains nothing, it is that of the start.
    """
    done = 0 if base == "none" else tasks
    return next((c for c in checkpoints(run)[0] if c.moment.tasks == done and not c.moment.steps), None)


def latest_checkpoint(run: Path) -> tuple[Checkpoint | None, list[str]]:
    """The run's latest checkpoint that is whole, as is the one it builds on; and what is wrong with later ones.

    MulkiError if the folder cannot be read, or if another version of MulKI wrote the checkpoints.
    """
    try:
        readable, problems = checkpoints(run)
    except OSError as error:
        raise MulkiError(f"{error.filename}: cannot be read: {error.strerror}") from error
    for checkpoint in readable:
        try:
            checkpoint.verify()
            checkpoint.end_of_task().verify()
            return checkpoint, problems
        except Damaged as error:
            problems.append(error.message)
    for path in _folders(run):
        with suppress(Damaged):
            read_checkpoint(path)  # OtherFormat gets out: another version can still resume the run
    return None, problems


def prune(run: Path, newest: Checkpoint, keep: int) -> None:
    """Remove all but the latest `keep` checkpoints up to the newest, and those they build on.

    Checkpoints of a later moment belong to an earlier attempt, and go too.
    """
    latest = [c for c in checkpoints(run)[0] if c.moment <= newest.moment][:keep]
    kept = {c.path.name for c in latest} | {c.base for c in latest}
    for other in checkpoints(run)[0]:
        if other.path.name not in kept:
            half = other.path.with_name(f".{other.path.name}.part")  # never read, if the removal is interrupted
            other.path.rename(half)
            shutil.rmtree(half)
    for half in (run / FOLDER).glob(".*.part"):  # left by a run that was killed
        shutil.rmtree(half, ignore_errors=True)


def _on_this_machine(storage: Any, location: str) -> Any:
    """Where torch.load puts a tensor: None for where it was."""
    return storage if location.startswith("cuda") and not torch.cuda.is_available() else None


def write_state(path: Path, state: Mapping[str, Any]) -> str:
    """Write and sync the state; returns its checksum."""
    try:
        with path.open("wb") as file:
            output = Checksummed(file)
            torch.save(dict(state), output)  # type: ignore[arg-type]  # torch's type asks for more than torch.save calls
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch hides the system's error behind one of its own
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, OSError):
            raise OSError(cause.errno, cause.strerror, str(path)) from error
        raise
    return output.checksum.hexdigest()


def _write_weights(path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Write and sync the weights; returns their digest. Contiguous tensors that own their storage are not copied."""
    ready: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, weight in weights.items():
        tensor = weight.detach().cpu().contiguous()
        if tensor.untyped_storage().nbytes() != tensor.nbytes or tensor.data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.data_ptr())
        ready[name] = tensor
    try:
        save_file(ready, path, metadata={"format": "pt", **metadata})
    except SafetensorError as error:  # it hides the system's own error
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) if number else error from error
    share(path)
    sync(path)
    return digest(ready, ready.__getitem__)


def _folders(run: Path) -> Iterator[Path]:
    folder = run / FOLDER
    for path in sorted(folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else ():
        if path.is_dir() and not path.is_symlink() and not path.name.startswith("."):
            yield path


def _signed(manifest: dict[str, Any]) -> str:
    """The manifest as JSON, with a checksum of everything else in it."""
    text = json.dumps(manifest, sort_keys=True, allow_nan=False)
    return json.dumps({**manifest, "sha256": hashlib.sha256(text.encode()).hexdigest()}, allow_nan=False) + "\n"
