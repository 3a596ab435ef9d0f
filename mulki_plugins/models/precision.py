"""The precision of a run: of its forward passes, and of the matrix products in single precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mulki_plugins.recipe.schema import Precision

MIXED: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""The precisions whose forward passes are in mixed precision."""


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """The context of a forward: mixed precision for bf16 and fp16, else that of the weights."""
    return torch.autocast(device.type, dtype=MIXED.get(precision), enabled=precision in MIXED)


@contextmanager
def matrix_products(precision: Precision) -> Iterator[None]:
    """With tf32, matrix products in single precision have 10 bits of mantissa, on GPUs that are faster with it.

    The setting is torch's, for the whole process; afterwards it is as it was.
    """
    before = torch.get_float32_matmul_precision()
    if precision == "tf32":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
