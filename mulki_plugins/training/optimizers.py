"""The optimizers that a recipe can name under `train.optimizer`, as functions and classes of parameter groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from mulki_plugins.errors import MulkiError
from mulki_plugins.types import BelowOne, Count, Positive, Weight

Groups = Iterable[dict[str, Any]]
"""Parameter groups as torch takes them, each with `params`, `lr` and `weight_decay`."""


def adamw(
    groups: Groups, *, lr: Positive, weight_decay: Weight = 0.0, betas: tuple[BelowOne, BelowOne] | None = None,
    eps: Positive = 1e-8, fused: bool = False,
) -> torch.optim.AdamW:  # fmt: skip
    """The AdamW optimizer: Adam with decoupled weight decay.

    Args:
        betas: Decay rates of the running means of the gradient and of its square; null for 0.9 and 0.999.
        eps: Added to the root of the mean square.
    """
    return torch.optim.AdamW(groups, lr, betas or (0.9, 0.999), eps, weight_decay, **_in_one_kernel(fused))


def adam(
    groups: Groups, *, lr: Positive, weight_decay: Weight = 0.0, betas: tuple[BelowOne, BelowOne] | None = None,
    eps: Positive = 1e-8, fused: bool = False,
) -> torch.optim.Adam:  # fmt: skip
    """The Adam optimizer, with the weight decay in its gradient.

    Args:
        betas: Decay rates of the running means of the gradient and of its square; null for 0.9 and 0.999.
        eps: Added to the root of the mean square.
    """
    return torch.optim.Adam(groups, lr, betas or (0.9, 0.999), eps, weight_decay, **_in_one_kernel(fused))


def sgd(
    groups: Groups, *, lr: Positive, weight_decay: Weight = 0.0, momentum: BelowOne | None = None,
    nesterov: bool = False, fused: bool = False,
) -> torch.optim.SGD:  # fmt: skip
    """Stochastic gradient descent, with or without momentum.

    Args:
        momentum: Share of the previous step's direction; null for none, with `nesterov` for 0.9.
        nesterov: Look ahead along the momentum.
    """
    how = _in_one_kernel(fused)
    momentum = momentum or (0.9 if nesterov else 0.0)
    return torch.optim.SGD(groups, lr, momentum, weight_decay=weight_decay, nesterov=nesterov, **how)


def _in_one_kernel(fused: bool) -> dict[str, Any]:
    return {"fused": True} if fused else {}


class Muon(torch.optim.Optimizer):
    """The Muon optimizer: orthogonal directions for matrices, AdamW for all other weights.

    Muon takes weights of two dimensions only. As its authors do, this leaves embeddings and everything that is no matrix (gains,
    biases, convolutions, the stacked factors of LoRA) to AdamW, in the same optimizer. The directions have the size of AdamW's,
    so both share a learning rate.
    Jordan et al., 2024, https://kellerjordan.github.io/posts/muon; the size of a step: Liu et al., 2025, arXiv 2502.16982.

    Args:
        momentum: Muon's momentum.
        nesterov: Look ahead along the momentum.
        ns_steps: Iterations of the Newton-Schulz method, which makes the direction orthogonal.
        betas: AdamW's decay rates; null for 0.9 and 0.999.
        eps: AdamW's term beside the root of the mean square.
    """

    def __init__(
        self, groups: Groups, *, lr: Positive, weight_decay: Weight = 0.0, momentum: BelowOne = 0.95,
        nesterov: bool = True, ns_steps: Count = 5, betas: tuple[BelowOne, BelowOne] | None = None, eps: Positive = 1e-8,
        name_of: Callable[[Tensor], str] = lambda weight: "",
    ) -> None:  # fmt: skip
        if not hasattr(torch.optim, "Muon"):
            raise MulkiError(f"torch {torch.__version__} has no Muon", "install torch 2.9 or later, or use adamw")
        self._name_of = name_of
        matrix, other = [torch.nn.Parameter(torch.zeros(1, 1))], [torch.nn.Parameter(torch.zeros(1))]
        self._by_kind: dict[str, torch.optim.Optimizer] = {
            "muon": torch.optim.Muon(
                matrix, lr, weight_decay, momentum, nesterov, ns_steps=ns_steps, adjust_lr_fn="match_rms_adamw"
            ),
            "adamw": torch.optim.AdamW(other, lr, betas or (0.9, 0.999), eps, weight_decay),
        }
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, in two if it has weights of both kinds."""
        params = list(param_group["params"])
        parts = {
            "muon": [p for p in params if self._is_muons(p)],
            "adamw": [p for p in params if not self._is_muons(p)],
        }
        for kind, weights in parts.items():
            if weights or (kind == "adamw" and not params):
                defaults = self._by_kind[kind].defaults
                super().add_param_group({**defaults, **param_group, "params": weights, "kind": kind})

    def _is_muons(self, weight: Tensor) -> bool:
        return weight.ndim == 2 and "embedding" not in self._name_of(weight)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # torch has overloads
        """Make a step with each kind's optimizer, on the groups and the state of this one."""
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        for kind, optimizer in self._by_kind.items():
            optimizer.param_groups = [group for group in self.param_groups if group["kind"] == kind]
            optimizer.state = self.state
            optimizer.step()
        return loss
