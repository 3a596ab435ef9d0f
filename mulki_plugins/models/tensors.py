"""Reads the tensors in a file of weights without running its code, and loads them into a model strictly."""

from __future__ import annotations

import json
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from mulki_plugins.errors import MissingData, MulkiError
from mulki_plugins.models.weights import ADDED, OMITTED, WeightFile

_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "weights")
"""Keys under which training scripts store a state dict beside other things."""
_NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")
"""Entries of OpenAI's archives that are not weights."""
_ANOTHER = "model.name must be the architecture that the weights were trained with"
_TRANSFORMERS = "the names are those of Hugging Face's transformers; take the same model's file for open_clip"


def read_state(file: WeightFile) -> dict[str, Tensor]:
    """The tensors of a file by name. MissingData if they cannot be read, or if reading them could run code."""
    path = file.path
    try:
        if file.kind == "safetensors":
            _refuse_part(path)
            return load_file(path)
        if file.kind == "torchscript":
            return _read_archive(path)
        return _state_dict_in(torch.load(path, map_location="cpu", weights_only=True), path)
    except MulkiError:
        raise
    except pickle.UnpicklingError as error:
        hint = "save the state dict alone: torch.save(model.state_dict(), ...)"
        what = "the file holds Python objects beside tensors, which could run code, and is not read"
        raise MissingData(f"{path}: {what}", hint) from error
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can make its readers raise anything
        raise MissingData(
            f"{path}: the file is damaged: its tensors cannot be read", "download or copy it again"
        ) from error


def left_out_of(path: Path) -> int:
    """How many weights a file of safetensors leaves out, since they are as pre-trained."""
    with safe_open(path, framework="pt") as file:
        return int((file.metadata() or {}).get(OMITTED, 0))


def added_to(path: Path) -> list[str]:
    """The names of the weights that a plugin has added to a model, and that its file of safetensors does not hold."""
    try:
        with safe_open(path, framework="pt") as file:
            return [str(name) for name in json.loads((file.metadata() or {}).get(ADDED, "[]"))]
    except (OSError, SafetensorError, ValueError, TypeError):  # a damaged file: whoever reads its weights says so
        return []


def _refuse_part(path: Path) -> None:
    if count := left_out_of(path):
        what = (
            f"{path}: this checkpoint leaves out {count} weights that are as pre-trained, so it is no model by itself"
        )
        raise MissingData(what, "name model.safetensors of a complete run, or a folder that `mulki export` has written")


def _state_dict_in(content: Any, path: Path) -> dict[str, Tensor]:
    """The state dict in a file's content, possibly nested in a mapping with other things."""
    for _ in range(4):
        if not isinstance(content, Mapping):
            break
        if tensors := {str(name): value for name, value in content.items() if isinstance(value, Tensor)}:
            return tensors
        inner = [content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)]
        if not inner:
            keys = ", ".join(repr(str(key)) for key in list(content)[:5]) or "nothing"
            raise MissingData(f"{path}: the file holds no state dict; it holds {keys}")
        content = inner[0]
    raise MissingData(f"{path}: the file holds no state dict, but a {type(content).__name__}")


def load_state(model: nn.Module, state: Mapping[str, Tensor], where: object, name: str) -> None:
    """Load weights into a model, which must match exactly. MulkiError names those that do not fit.

    where, name: the file and the model, for messages. A prefix common to all names, such as `module.`, is removed.
    """
    wanted = model.state_dict()
    given = _unprefixed(state, wanted)
    for key, value in wanted.items():
        if key.endswith("num_batches_tracked") and key not in given:  # affects no number in evaluation
            given[key] = value
        elif key in ("logit_scale", "logit_bias") and key in given and given[key].numel() == value.numel() == 1:
            given[key] = given[key].reshape(value.shape)
    for key in [key for key in given if key not in wanted and key.rpartition(".")[2] in (*_NO_WEIGHTS, "position_ids")]:
        del given[key]
    missing = [key for key in wanted if key not in given]
    unknown = [key for key in given if key not in wanted]
    problems = []
    if missing:
        problems.append(f"{len(missing)} of the model's {len(wanted)} weights are missing ({_first_few(missing)})")
    if unknown:
        problems.append(f"the file holds {len(unknown)} other{'s' * (len(unknown) > 1)} ({_first_few(unknown)})")
    shapes = [key for key in wanted if key in given and given[key].shape != wanted[key].shape]
    if shapes and not missing:
        first = f"{shapes[0]} is {_shape(given[shapes[0]])} in the file and {_shape(wanted[shapes[0]])} in the model"
        problems.append(f"{len(shapes)} have another shape ({first})")
    if problems:
        hint = _TRANSFORMERS if any(key.startswith(("vision_model.", "text_model.")) for key in unknown) else _ANOTHER
        raise MulkiError(f"{where}: the weights do not fit {name}: {'; '.join(problems)}", hint)
    model.load_state_dict(given, strict=True)


def _unprefixed(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict without the common prefix that makes most names fit."""
    prefixes = {""}
    for key in (*list(state)[:3], *list(state)[-3:]):
        parts = key.split(".")
        prefixes |= {".".join(parts[:i]) + "." for i in range(1, len(parts)) if ".".join(parts[i:]) in wanted}

    def fitting(prefix: str) -> int:
        return sum(key.startswith(prefix) and key.removeprefix(prefix) in wanted for key in state)

    best = max(sorted(prefixes), key=fitting)
    return {key.removeprefix(best): value for key, value in state.items()}


def _first_few(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:3]) + (", ..." if len(listed) > 3 else "")


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "one number"


# --- TorchScript archives, as OpenAI publishes its weights ------------------------------------------------------------
# torch.jit.load compiles the code in an archive and may run it; this reads the tensors only.


class _Module:
    """An object of an archive: its attributes without its code."""

    content: Any = None

    def __setstate__(self, state: Any) -> None:
        self.content = state


_STORAGES = {
    "FloatStorage": torch.float32, "HalfStorage": torch.float16, "DoubleStorage": torch.float64,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16,
    "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip


def _rebuilt(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    if math.prod(size) > storage.numel():
        raise ValueError("a tensor is larger than its storage")
    return storage.as_strided(size, stride, offset).clone()


def _first(value: Any, *_: Any) -> Any:
    return value


_KNOWN: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuilt,
    ("collections", "OrderedDict"): OrderedDict,
    ("torch.jit._pickle", "restore_type_tag"): _first,
    **{("torch.jit._pickle", f"build_{kind}list"): _first for kind in ("int", "double", "bool", "tensor")},
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
}


class _ArchiveReader(pickle.Unpickler):
    """Unpickles tensors and plain values; modules become `_Module`, and everything else is refused."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(archive.open(f"{root}data.pkl"))
        self._archive, self._root = archive, root

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return _Module
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return _KNOWN[module, name]

    def persistent_load(self, pid: Any) -> Tensor:
        kind, dtype, key, _, count = pid
        info = self._archive.getinfo(f"{self._root}data/{key}")
        size = count * torch.empty((), dtype=dtype).element_size()
        if kind != "storage" or info.compress_type != zipfile.ZIP_STORED or info.file_size != size:
            raise ValueError("a storage does not match its description")
        return (
            torch.frombuffer(bytearray(self._archive.read(info)), dtype=dtype) if count else torch.empty(0, dtype=dtype)
        )


def _read_archive(path: Path) -> dict[str, Tensor]:
    with zipfile.ZipFile(path) as archive:
        [pickled] = [name for name in archive.namelist() if name.endswith("data.pkl") and name.count("/") <= 1]
        root = _ArchiveReader(archive, pickled.removesuffix("data.pkl")).load()
    state: dict[str, Tensor] = {}
    _collect(root, (), state.__setitem__)
    if not state:
        raise MissingData(f"{path}: the archive of TorchScript holds no weights")
    return state


def _collect(value: Any, path: tuple[str, ...], keep: Callable[[str, Tensor], None]) -> None:
    """Call `keep` with every tensor below an object and its dotted name."""
    if isinstance(value, Tensor):
        keep(".".join(path), value)
    elif isinstance(value, _Module) and isinstance(value.content, Mapping) and len(path) < 50:
        for name, item in value.content.items():
            _collect(item, (*path, str(name)), keep)
