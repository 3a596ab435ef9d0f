"""Files of weights: which file is meant, of what kind it is, and what it says of itself. Imports no torch.

A file is judged by what is in it, not by its suffix. `mulki validate` and the loader go by the same answers.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from pathlib import Path
from typing import Any, Literal

from attrs import frozen

from mulki_plugins.errors import MissingData
from mulki_plugins.models.trained_with import CLIP_MEAN, CLIP_STD, TrainedWith, from_metadata

Kind = Literal["safetensors", "torch", "torchscript", "numpy"]
WEIGHTS = "weights.safetensors"
_LONGEST_HEADER = 100_000_000
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How a file of torch.save began before it became a zip archive."""
_CLIP_HINT = "expected safetensors, a PyTorch file of a state dict, or OpenAI's archive"


@frozen(kw_only=True)
class WeightFile:
    """A file that holds weights, of which none have been read yet."""

    path: Path
    kind: Kind
    known: TrainedWith
    note: str = ""
    """Which file was taken where a folder was named."""


def looks_like_a_path(text: str) -> bool:
    """Whether a text can only mean a file: it has a folder or a suffix, or something lies there."""
    return (
        "/" in text or os.sep in text or text.startswith("~") or bool(re.search(r"\.[A-Za-z0-9]{1,12}$", text))
        or os.path.exists(text)
    )  # fmt: skip


def weight_file(text: str) -> WeightFile:
    """The file that a recipe's `pretrained` names: a file, a run's folder, or a checkpoint in one.

    MissingData that says what lies there instead.
    """
    path = Path(os.path.expanduser(text))
    try:
        if not path.exists():
            where = "" if path.is_absolute() else f" (a path begins in the current folder, {os.getcwd()})"
            raise MissingData(f"{text}: no such file{where}")
        note = ""
        if path.is_dir():
            path = _in_folder(path)
            note = f"the weights are those of {path}"
        kind, known = _content(path)
    except OSError as error:
        raise MissingData(f"{text}: cannot be read: {error.strerror or error}") from error
    return WeightFile(path=path, kind=kind, known=known, note=note)


def _in_folder(folder: Path) -> Path:
    """The latest weights of a run, or those of a checkpoint."""
    if (folder / WEIGHTS).is_file():
        return folder / WEIGHTS
    for holder in (folder / "checkpoints", folder):
        if found := sorted((moment, path) for path in _subfolders(holder) if (moment := _moment(path))):
            return found[-1][1] / WEIGHTS
    if (folder / "result.json").is_file() or (folder / "checkpoints").is_dir():
        raise MissingData(
            f"{folder}: this run's folder holds no weights", "train.checkpoint.keep says how many are kept"
        )
    if runs := [path for path in _subfolders(folder) if (path / "result.json").is_file()]:
        raise MissingData(f"{folder}: several runs lie in it", f"name one, such as {runs[0]}")
    suffixes = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
    files = sorted(path for path in folder.iterdir() if path.suffix in suffixes and path.is_file())
    hint = f"name the file: {files[0]}" if files else "name a file of weights, or the folder of a run"
    raise MissingData(f"{folder}: this is a folder, and no run's", hint)


def _subfolders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _moment(checkpoint: Path) -> tuple[int, int] | None:
    """How far a run was at a checkpoint that holds weights: tasks, and steps into the next."""
    if not (checkpoint / WEIGHTS).is_file():
        return None
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text("utf-8"))
        return int(manifest["tasks"]), int(manifest["steps"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _content(path: Path) -> tuple[Kind, TrainedWith]:
    """What a file holds. MissingData where that is no weights."""
    if not path.is_file():
        raise MissingData(f"{path}: this is no regular file")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(512)
    if size == 0:
        raise MissingData(f"{path}: the file is empty", "download or copy it again")
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(b"version https://git-lfs"):
        hint = "fetch the weights themselves with `git lfs pull`, or download them from the page of the repository"
        raise MissingData(f"{path}: this is a pointer of Git LFS, {size} bytes long, and not the weights", hint)
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<")):
        hint = "the download led to a page, such as a login or an error; download the file itself"
        raise MissingData(f"{path}: this is a web page and not weights", hint)
    if head.startswith(b"PK"):
        return _zip(path)
    length = int.from_bytes(head[:8], "little")
    if size > 8 and head[8:9] == b"{" and length <= _LONGEST_HEADER:
        return "safetensors", _safetensors(path, length, size)
    if head.startswith(_LEGACY):
        return "torch", TrainedWith()
    if head.startswith(b"\x93NUMPY"):
        return "numpy", TrainedWith()
    if all(byte in b"\t\r\n\x1b" or 32 <= byte < 127 for byte in head):
        raise MissingData(
            f"{path}: this is a text and not weights; it begins {head[:40].decode('ascii')!r}", _CLIP_HINT
        )
    if head.startswith(b"\x80"):
        hint = "save the state dict alone: torch.save(model.state_dict(), ...)"
        raise MissingData(f"{path}: this is a pickle that could run code, and is not read", hint)
    raise MissingData(f"{path}: this is no file of weights, or a damaged one", _CLIP_HINT)


def _safetensors(path: Path, length: int, size: int) -> TrainedWith:
    with path.open("rb") as file:
        file.seek(8)
        header = file.read(length)
    try:
        if len(header) < length:
            raise EOFError
        said: dict[str, Any] = json.loads(header)
        metadata = said.pop("__metadata__", {})
        end = max((entry["data_offsets"][1] for entry in said.values()), default=0)
    except EOFError:
        end = size
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise MissingData(f"{path}: the file is damaged: its header cannot be read", "copy it again") from error
    if 8 + length + end > size:
        what = f"the file is cut short: {size} bytes of {8 + length + end}" if end != size else "the file is cut short"
        raise MissingData(f"{path}: {what}", "download or copy it again")
    return from_metadata(metadata if isinstance(metadata, dict) else {}, path)


def _zip(path: Path) -> tuple[Kind, TrainedWith]:
    """PyTorch's archives: of torch.save, or of TorchScript, whose code shows the activation."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            code = "".join(
                archive.read(name).decode("utf-8", "replace")
                for name in names
                if re.fullmatch(r"[^/]+/code/.+\.py", name) and archive.getinfo(name).file_size < 10_000_000
            )
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError) as error:
        raise MissingData(f"{path}: the file is cut short or damaged", "download or copy it again") from error
    if any(name.endswith(".npy") for name in names):
        return "numpy", TrainedWith()
    if not any(re.fullmatch(r"([^/]+/)?data\.pkl", name) for name in names):
        raise MissingData(f"{path}: this is a zip archive without weights", "unpack it, and name the file in it")
    if not any(name.endswith("constants.pkl") for name in names):
        return "torch", TrainedWith()
    if re.search(r"\bgelu\(", code) and not re.search(r"\bsigmoid\(", code):
        return "torchscript", TrainedWith(quickgelu=False)
    # QuickGELU is x·sigmoid(1.702·x); and archives of CLIP that do not show theirs are OpenAI's
    return "torchscript", TrainedWith(
        quickgelu=True, mean=CLIP_MEAN, std=CLIP_STD, interpolation="bicubic", resize_mode="shortest"
    )
