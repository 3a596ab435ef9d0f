"""LoRA: low-rank changes of the projections of attention and of the MLPs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mulki_plugins.adapters.projections import Change, ProjectionAdapter, Target, Towers
from mulki_plugins.types import Count, Positive, checked


class LowRank(Change):
    """s·BA for each block: A [blocks, rank, in] starts at random (Kaiming-uniform, √5), B [blocks, rows, rank] at 0."""

    def __init__(self, weight: Tensor, rank: int, scale: float, blocks: Sequence[int], of: int) -> None:
        super().__init__(weight, blocks, of)
        self.scale = scale
        self.A = nn.Parameter(weight.new_empty(len(blocks), rank, weight.shape[1]))
        self.B = nn.Parameter(weight.new_empty(len(blocks), weight.shape[0] // of, rank))
        self.reset(weight)

    @torch.no_grad()
    def reset(self, weight: Tensor) -> None:
        for a in self.A:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        nn.init.zeros_(self.B)

    def change(self) -> Tensor:
        return self.scale * self.B @ self.A


class LoRA(ProjectionAdapter):
    """Adds a low-rank change to the projections of a transformer.

    W' = W + (α/r)·BA, with B = 0 at the start. The model's own weights can stay frozen (`model.train: adapters`). One change
    serves all tasks; with `merge_each_task` each task's change is added to the weights at its end, and the next task starts
    with a fresh one.
    Hu et al., 2021, arXiv 2106.09685.

    Args:
        rank: r, the rank of each change.
        alpha: α; null for α = r, a factor of 1.
        towers: The towers that are adapted.
        targets: The projections of attention (q, k, v, o) and the layers of the MLPs (mlp) that are adapted; null for all.
        merge_each_task: Merge at the end of each task and start anew, rather than train one change through all tasks.
    """

    paper = "arXiv 2106.09685"

    @checked
    def __init__(
        self,
        *,
        rank: Count = 8,
        alpha: Positive | None = None,
        towers: Towers = "all",
        targets: list[Target] | None = None,
        merge_each_task: bool = False,
    ) -> None:
        super().__init__(towers, targets, merge_each_task=merge_each_task)
        self.rank = rank
        self.scale = (rank if alpha is None else alpha) / rank

    def make(self, weight: Tensor, blocks: Sequence[int], of: int) -> LowRank:
        return LowRank(weight, self.rank, self.scale, blocks, of)
