"""Checksums of tensors and of files, computed while a file is written or from what it holds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor


def digest(names: Iterable[str], tensor_of: Callable[[str], Tensor]) -> str:
    """SHA-256 of the names, types, shapes and numbers of tensors."""
    result = hashlib.sha256()
    for name in sorted(names):
        tensor = tensor_of(name).detach().cpu().contiguous()
        result.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.numel():
            result.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return result.hexdigest()


class Checksummed:
    """A file that keeps the checksum of everything written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.checksum = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.checksum.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def checksum_of(path: Path) -> str:
    """The digest of the tensors in a file of safetensors, one at a time; SHA-256 of the bytes of any other."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as weights:
            return digest(weights.keys(), weights.get_tensor)
    result = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            result.update(block)
    return result.hexdigest()
