"""Files of weights: which file a recipe names, what kind it is, and what its weights were trained with. Imports no torch.

The contents of a file decide, not its suffix. `mulki validate` and the loader use the same answers.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from attrs import asdict, evolve, fields_dict, frozen

from mulki_plugins.errors import MissingData, MulkiError
from mulki_plugins.types import convert

Numbers = tuple[float, float, float]
Interpolation = Literal["bicubic", "bilinear"]
ResizeMode = Literal["shortest", "longest", "squash"]
Kind = Literal["safetensors", "torch", "torchscript", "numpy"]

WEIGHTS = "weights.safetensors"
"""The file of weights in a checkpoint."""
FINAL_HEAD = "head.safetensors"
"""What the head of a finished run's model has learned, beside its weights, unless it is the text head."""
FINAL = "model.safetensors"
"""A finished run's weights, beside its checkpoints. Adapters are merged into them."""
EXPORTED = "open_clip_model.safetensors"
"""The weights in a folder that `mulki export` wrote, under the name that open_clip looks for first."""
KEY = "mulki"
"""Our entry in a safetensors file's metadata."""
OMITTED = "mulki_left_out"
"""The entry in the metadata of a checkpoint's weights that says how many are missing, since they are as pre-trained."""
ADDED = "mulki_added"
"""The entry in the metadata of a finished run's weights with the names, in JSON, of those that a plugin has added outside of
the model: the file does not hold them."""
CLIP_MEAN: Numbers = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Numbers = (0.26862954, 0.26130258, 0.27577711)

_LONGEST_HEADER = 100_000_000
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How a file of torch.save began before it became a zip archive."""
_EXPECTED = "expected safetensors, a PyTorch file of a state dict, or OpenAI's archive"


@frozen(kw_only=True)
class TrainedWith:
    """What weights were trained with and must be used with; None if unknown."""

    architecture: str | None = None
    quickgelu: bool | None = None
    mean: Numbers | None = None
    std: Numbers | None = None
    interpolation: Interpolation | None = None
    resize_mode: ResizeMode | None = None

    def metadata(self) -> dict[str, str]:
        """As an entry in a safetensors file's metadata."""
        return {KEY: json.dumps(self._known())}

    def over(self, other: TrainedWith) -> TrainedWith:
        """These values, completed by those of `other`."""
        return evolve(other, **self._known())

    def missing(self) -> list[str]:
        """The names of the unknown properties, except the architecture."""
        return [key for key in _PROPERTIES if getattr(self, key) is None]

    def conflicts(self, other: TrainedWith) -> list[str]:
        """The names of the properties that both know and that differ, except the architecture."""
        pairs = {key: (getattr(self, key), getattr(other, key)) for key in _PROPERTIES}
        return [key for key, (a, b) in pairs.items() if a is not None and b is not None and not _same(a, b)]

    def _known(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self, recurse=False).items() if value is not None}


_PROPERTIES = [key for key in fields_dict(TrainedWith) if key != "architecture"]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, (tuple, list)):
        return all(abs(x - y) < 1e-4 for x, y in zip(a, b, strict=True))  # 0.4815 is a rounded 0.48145466
    return bool(a == b)


def from_metadata(metadata: Mapping[str, str], where: object) -> TrainedWith:
    """What a safetensors file's metadata say. MulkiError if our entry cannot be read."""
    if KEY not in metadata:
        return TrainedWith()
    try:
        entry = json.loads(metadata[KEY])
        result: TrainedWith = convert({k: v for k, v in entry.items() if k in fields_dict(TrainedWith)}, TrainedWith)
    except Exception as error:
        raise MulkiError(f"{where}: its metadata are damaged: `{KEY}` does not describe a model") from error
    return result


def in_words(key: str, value: Any) -> str:
    """One property as a message names it: `QuickGELU`, `mean [0.5, 0.5, 0.5]`."""
    if key == "quickgelu":
        return "QuickGELU" if value else "GELU"
    return f"{key} {list(value)}" if isinstance(value, tuple) else f"{key} {value}"


@frozen(kw_only=True)
class WeightFile:
    """A file of weights that has been identified but not read."""

    path: Path
    kind: Kind
    known: TrainedWith
    note: str = ""
    """Which file was taken, if the recipe names a folder."""


def looks_like_a_path(text: str) -> bool:
    """Whether a text can only be a path: it has a folder or a suffix, or the file exists."""
    return (
        "/" in text or os.sep in text or text.startswith("~") or bool(re.search(r"\.[A-Za-z0-9]{1,12}$", text))
        or os.path.exists(text)
    )  # fmt: skip


def weight_file(text: str) -> WeightFile:
    """The file that a recipe's `pretrained` names: a file, a run's folder, or a checkpoint in one.

    MissingData, which says what is there instead, if it is not a file of weights.
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
        kind, known = _identify(path)
    except OSError as error:
        raise MissingData(f"{text}: cannot be read: {error.strerror or error}") from error
    return WeightFile(path=path, kind=kind, known=known, note=note)


def _in_folder(folder: Path) -> Path:
    """The final weights of a run, or its latest ones, or those of a checkpoint or an export."""
    for name in (WEIGHTS, FINAL, EXPORTED):
        if (folder / name).is_file():
            return folder / name
    for parent in (folder / "checkpoints", folder):
        if checkpoints := [(when, path) for path in _subfolders(parent) if (when := _progress(path))]:
            return max(checkpoints)[1] / WEIGHTS
    if (folder / "result.json").is_file() or (folder / "checkpoints").is_dir():
        raise MissingData(
            f"{folder}: this run's folder holds no weights", "train.checkpoint.keep says how many are kept"
        )
    if runs := [path for path in _subfolders(folder) if (path / "result.json").is_file()]:
        raise MissingData(f"{folder}: the folder holds several runs", f"name one, such as {runs[0]}")
    suffixes = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
    files = sorted(path for path in folder.iterdir() if path.suffix in suffixes and path.is_file())
    hint = f"name the file: {files[0]}" if files else "name a file of weights, or the folder of a run"
    raise MissingData(f"{folder}: this folder does not belong to a run", hint)


def _subfolders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _progress(checkpoint: Path) -> tuple[int, int] | None:
    """How far the run was: finished tasks, and steps into the next. None if the checkpoint holds no weights."""
    if not (checkpoint / WEIGHTS).is_file():
        return None
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text("utf-8"))
        return int(manifest["tasks"]), int(manifest["steps"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _identify(path: Path) -> tuple[Kind, TrainedWith]:
    """The kind of a file and what it says about itself. MissingData if it holds no weights."""
    if not path.is_file():
        raise MissingData(f"{path}: this is not a regular file")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(512)
    if size == 0:
        raise MissingData(f"{path}: the file is empty", "download or copy it again")
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(b"version https://git-lfs"):
        hint = "fetch the weights themselves with `git lfs pull`, or download them from the page of the repository"
        raise MissingData(f"{path}: this is a pointer of Git LFS, {size} bytes long, and not the weights", hint)
    if text.startswith(b"<"):
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
        raise MissingData(f"{path}: this is a text and not weights; it begins {head[:40].decode('ascii')!r}", _EXPECTED)
    if head.startswith(b"\x80"):
        hint = "save the state dict alone: torch.save(model.state_dict(), ...)"
        raise MissingData(f"{path}: this is a pickle that could run code, and is not read", hint)
    raise MissingData(f"{path}: this is no file of weights, or a damaged one", _EXPECTED)


def _safetensors(path: Path, length: int, size: int) -> TrainedWith:
    with path.open("rb") as file:
        file.seek(8)
        header = file.read(length)
    if len(header) < length:
        raise MissingData(f"{path}: the file is cut short", "download or copy it again")
    try:
        entries: dict[str, Any] = json.loads(header)
        metadata = entries.pop("__metadata__", {})
        end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        complete = end <= size
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise MissingData(f"{path}: the file is damaged: its header cannot be read", "copy it again") from error
    if not complete:
        raise MissingData(f"{path}: the file is cut short: {size} bytes of {end}", "download or copy it again")
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
    # QuickGELU is x·sigmoid(1.702·x); archives of CLIP whose code does not show the activation are OpenAI's
    return "torchscript", TrainedWith(
        quickgelu=True, mean=CLIP_MEAN, std=CLIP_STD, interpolation="bicubic", resize_mode="shortest"
    )
