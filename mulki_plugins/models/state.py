"""The tensors in a file of weights, and how they go into a model: strictly, and without running anything in the file."""

from __future__ import annotations

import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mulki_plugins.errors import MissingData, MulkiError
from mulki_plugins.models.weight_files import WeightFile

_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "weights")
"""Under which names training scripts put a state dict beside other things."""
_NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")
"""What OpenAI's archives hold beside their weights."""
_ANOTHER = "model.name must be the architecture that the weights were trained with"
_TRANSFORMERS = "the names are those of Hugging Face's transformers; take the same model's file for open_clip"


def read_state(file: WeightFile) -> dict[str, Tensor]:
    """The tensors of a file by name. MissingData where they cannot be read, or where reading would run code."""
    path = file.path
    try:
        if file.kind == "safetensors":
            return load_file(path)
        if file.kind == "torchscript":
            return _of_archive(path)
        return _state_in(torch.load(path, map_location="cpu", weights_only=True), path)
    except MulkiError:
        raise
    except pickle.UnpicklingError as error:
        hint = "save the state dict alone: torch.save(model.state_dict(), ...)"
        what = "the file holds Python objects beside tensors, which could run code, and is not read"
        raise MissingData(f"{path}: {what}", hint) from error
    except MemoryError:
        raise
    except Exception as error:  # whatever a damaged file makes its readers raise
        raise MissingData(
            f"{path}: the file is damaged: its tensors cannot be read", "download or copy it again"
        ) from error


def _state_in(content: Any, path: Path) -> dict[str, Tensor]:
    """The state dict in what a file holds, also where it stands beside other things."""
    for _ in range(4):
        if not isinstance(content, Mapping):
            break
        if tensors := {str(name): value for name, value in content.items() if isinstance(value, Tensor)}:
            return tensors
        inner = [content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)]
        if not inner:
            found = ", ".join(repr(str(key)) for key in list(content)[:5]) or "nothing"
            raise MissingData(f"{path}: the file holds no state dict; it holds {found}")
        content = inner[0]
    raise MissingData(f"{path}: the file holds no state dict, but a {type(content).__name__}")


def load_state(model: nn.Module, state: Mapping[str, Tensor], where: object, name: str) -> None:
    """Put weights into a model: every one of the model's, and no other. MulkiError says which do not fit.

    A prefix that all names share, such as `module.`, is taken off.
    """
    wanted = model.state_dict()
    found = _unprefixed(state, wanted)
    for key, value in wanted.items():
        if key.endswith("num_batches_tracked") and key not in found:  # which moves no number in evaluation
            found[key] = value
        elif key in ("logit_scale", "logit_bias") and key in found and found[key].numel() == value.numel() == 1:
            found[key] = found[key].reshape(value.shape)
    for key in [key for key in found if key not in wanted and key.rpartition(".")[2] in (*_NO_WEIGHTS, "position_ids")]:
        del found[key]
    missing = [key for key in wanted if key not in found]
    unknown = [key for key in found if key not in wanted]
    problems = []
    if missing:
        problems.append(f"{len(missing)} of the model's {len(wanted)} weights are missing ({_some(missing)})")
    if unknown:
        problems.append(f"the file holds {len(unknown)} other{'s' * (len(unknown) > 1)} ({_some(unknown)})")
    shapes = [key for key in wanted if key in found and found[key].shape != wanted[key].shape]
    if shapes and not missing:
        first = f"{shapes[0]} is {_shape(found[shapes[0]])} in the file and {_shape(wanted[shapes[0]])} in the model"
        problems.append(f"{len(shapes)} have another shape ({first})")
    if problems:
        hint = _TRANSFORMERS if any(key.startswith(("vision_model.", "text_model.")) for key in unknown) else _ANOTHER
        raise MulkiError(f"{where}: the weights do not fit {name}: {'; '.join(problems)}", hint)
    model.load_state_dict(found, strict=True)


def _unprefixed(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names without what stands before all of them, where more of them fit then."""
    prefixes = {""}
    for key in (*list(state)[:3], *list(state)[-3:]):
        parts = key.split(".")
        prefixes |= {".".join(parts[:i]) + "." for i in range(1, len(parts)) if ".".join(parts[i:]) in wanted}

    def fitting(prefix: str) -> int:
        return sum(key.startswith(prefix) and key.removeprefix(prefix) in wanted for key in state)

    best = max(sorted(prefixes), key=fitting)
    return {key.removeprefix(best): value for key, value in state.items()}


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:3]) + (", ..." if len(listed) > 3 else "")


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "one number"


# --- TorchScript archives, as OpenAI publishes its weights -------------------------------------------------------------
# torch.jit.load would compile and may run the code in an archive; this reads its tensors and nothing else.


class _Module:
    """Stands for an object of an archive: its attributes, and none of its code."""

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
        raise ValueError("a tensor that is larger than its storage")
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
    """Unpickles tensors and plain values; whatever else an archive names becomes an empty object, or is refused."""

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
            raise ValueError("a storage that is not what it says")
        return (
            torch.frombuffer(bytearray(self._archive.read(info)), dtype=dtype) if count else torch.empty(0, dtype=dtype)
        )


def _of_archive(path: Path) -> dict[str, Tensor]:
    with zipfile.ZipFile(path) as archive:
        [pickled] = [name for name in archive.namelist() if name.endswith("data.pkl") and name.count("/") <= 1]
        found = _ArchiveReader(archive, pickled.removesuffix("data.pkl")).load()
    state: dict[str, Tensor] = {}
    _collect(found, (), state.__setitem__)
    if not state:
        raise MissingData(f"{path}: the archive of TorchScript holds no weights")
    return state


def _collect(value: Any, path: tuple[str, ...], keep: Callable[[str, Tensor], None]) -> None:
    """Every tensor below an object, by the names that lead to it."""
    if isinstance(value, Tensor):
        keep(".".join(path), value)
    elif isinstance(value, _Module) and isinstance(value.content, Mapping) and len(path) < 50:
        for name, item in value.content.items():
            _collect(item, (*path, str(name)), keep)
