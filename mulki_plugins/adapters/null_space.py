"""Changes of the projections in the directions that the current weights use least."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mulki_plugins.adapters.projections import Change, ProjectionAdapter, Target, Towers
from mulki_plugins.types import Count, checked


class Trailing(Change):
    """U₀ Z V₀ᵀ for each block W = U S Vᵀ: U₀, V₀ span the last `rank` singular directions of W, and Z starts at 0."""

    left: Tensor
    """U₀ [blocks, rows, rank]"""
    right: Tensor
    """V₀ [blocks, in, rank]"""

    def __init__(self, weight: Tensor, rank: int, blocks: Sequence[int], of: int) -> None:
        super().__init__(weight, blocks, of)
        rows, columns = weight.shape[0] // of, weight.shape[1]
        rank = min(rank, rows, columns)
        self.register_buffer("left", weight.new_empty(len(blocks), rows, rank))
        self.register_buffer("right", weight.new_empty(len(blocks), columns, rank))
        self.Z = nn.Parameter(weight.new_zeros(len(blocks), rank, rank))
        self._seen = b""
        """The digest of the weight that U₀ and V₀ belong to."""
        self.reset(weight)

    @torch.no_grad()
    def reset(self, weight: Tensor) -> None:
        nn.init.zeros_(self.Z)
        digest = hashlib.sha256(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data).digest()
        if digest == self._seen:  # as in every task that a resumed run passes again
            return
        self._seen = digest
        blocks = weight.reshape(self.of, -1, weight.shape[1])[self.blocks]
        u, _, vh = torch.linalg.svd(blocks.double(), full_matrices=False)
        rank = self.Z.shape[-1]
        self.left.copy_(near_the_axes(u[..., -rank:]))
        self.right.copy_(near_the_axes(vh[..., -rank:, :].mT))

    def change(self) -> Tensor:
        return self.left @ self.Z @ self.right.mT


def near_the_axes(basis: Tensor) -> Tensor:
    """The orthonormal basis of the same space that is nearest to the first coordinate axes, U·polar(UᵀE).

    It depends on the space alone, unless no direction of that is near one of these axes. Singular directions with nearly equal
    singular values would turn into each other by rounding, and with them what an optimizer makes of each weight.
    basis: U [..., n, r], orthonormal columns.
    """
    left, _, right = torch.linalg.svd(basis[..., : basis.shape[-1], :].mT)
    polar: Tensor = left @ right
    return basis @ polar


class NullSpace(ProjectionAdapter):
    """Trains each projection only where the current weights do least, and merges at each task's end.

    W' = W + U₀ Z V₀ᵀ. U₀ and V₀ span the last `rank` singular directions of W = U S Vᵀ, computed anew when a task has been
    merged. Inputs along the leading directions pass unchanged: (W' − W)·v = 0 for every other right singular vector v of W,
    whatever the optimizer does to Z. Nothing is kept of earlier tasks.
    Our reading of the abstract of NuSA-CL (arXiv 2510.21175), whose code was not at hand.

    Args:
        rank: The number of singular directions of each projection that may change.
        towers: The towers that are adapted.
        targets: The projections of attention (q, k, v, o) and the layers of the MLPs (mlp) that are adapted; null for all.
    """

    paper = "arXiv 2510.21175"

    @checked
    def __init__(self, *, rank: Count = 32, towers: Towers = "all", targets: list[Target] | None = None) -> None:
        super().__init__(towers, targets, merge_each_task=True)
        self.rank = rank

    def make(self, weight: Tensor, blocks: Sequence[int], of: int) -> Trailing:
        return Trailing(weight, self.rank, blocks, of)
