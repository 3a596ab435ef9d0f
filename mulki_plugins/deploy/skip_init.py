"""Builds a model whose weights are read from a file, without first drawing random ones: seconds for a large CLIP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_DRAWS: frozenset[Any] = frozenset(
    [
        torch.Tensor.normal_,
        torch.Tensor.uniform_,
        torch.nn.init.normal_,
        torch.nn.init.uniform_,
        torch.nn.init.trunc_normal_,
        torch.nn.init.xavier_uniform_,
        torch.nn.init.xavier_normal_,
        torch.nn.init.kaiming_uniform_,
        torch.nn.init.kaiming_normal_,
    ]
)


class SkipInitialisation(TorchFunctionMode):
    """Within this context, filling a tensor with random numbers leaves it as it is.

    For models whose weights are then loaded strictly, so that no tensor keeps what was in its memory.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[Any], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DRAWS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
