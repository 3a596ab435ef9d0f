"""LoRA: low-rank changes of the projections of attention and of the MLPs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mulki_plugins.models.adapter import Adapter
from mulki_plugins.types import Count, Positive, checked

Target = Literal["q", "k", "v", "o", "mlp"]
Towers = Literal["all", "image", "text"]

_PACKED: tuple[Target, ...] = ("q", "k", "v")
"""The order of the projections in the packed weight [3w, w] of torch's attention."""
_LINEAR: dict[str, Target] = {
    "q_proj": "q", "query": "q", "k_proj": "k", "key": "k", "v_proj": "v", "value": "v", "out_proj": "o", "proj": "o",
    "c_fc": "mlp", "c_proj": "mlp", "fc1": "mlp", "fc2": "mlp",
}  # fmt: skip
"""The linear layers of a transformer block by the names that open_clip, timm and transformers give them."""


class LowRank(nn.Module):
    """A parametrization of a weight [out, in]: W' = W + s·BA, for some of its equal blocks of rows.

    A [blocks, rank, in] starts at random (Kaiming-uniform, √5), B [blocks, rows, rank] at 0, so W' = W at the start.
    Assigning to the parametrized weight moves W and keeps A and B.
    """

    blocks: Tensor

    def __init__(self, weight: Tensor, rank: int, scale: float, blocks: Sequence[int], of: int) -> None:
        super().__init__()
        self.scale = scale
        self.of = of
        """The number of blocks that the rows of the weight fall into."""
        self.register_buffer("blocks", torch.tensor(blocks, device=weight.device), persistent=False)
        self.A = nn.Parameter(weight.new_empty(len(blocks), rank, weight.shape[1]))
        self.B = nn.Parameter(weight.new_empty(len(blocks), weight.shape[0] // of, rank))
        self.reset()

    def reset(self) -> None:
        """A at random and B at 0: no change of the weight."""
        for a in self.A:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        nn.init.zeros_(self.B)

    def change(self) -> Tensor:
        """s·BA in its blocks and 0 in the others, [out, in]."""
        change = self.scale * self.B @ self.A
        if len(self.blocks) < self.of:
            whole = change.new_zeros(self.of, *change.shape[1:])
            change = whole.index_copy(0, self.blocks, change)
        return change.flatten(0, 1)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.change()

    def right_inverse(self, weight: Tensor) -> Tensor:
        with torch.no_grad():
            return weight - self.change()


class LoRA(Adapter):
    """Adds a low-rank change to the projections of a transformer: W' = W + (α/r)·BA, B = 0 at the start.

    The model's own weights can stay frozen (`model.train: adapters`). One adapter serves all tasks; with `merge_each_task`
    each task's change is added to the weights at its end, and the next task starts with a fresh one.
    Hu et al., 2021, arXiv 2106.09685.

    Args:
        rank: r, the rank of each change.
        alpha: α; null for α = r, a factor of 1.
        towers: The towers that are adapted.
        targets: The projections of attention (q, k, v, o) and the layers of the MLPs (mlp) that are adapted.
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
        self.rank = rank
        self.scale = (rank if alpha is None else alpha) / rank
        self.towers = towers
        self.targets = set(targets) if targets else {"q", "k", "v", "o", "mlp"}
        self.merge_each_task = merge_each_task

    def apply(self, clip: nn.Module) -> None:
        places = list(self._places(clip))
        if not places:
            raise ValueError(f"the model has no layers {', '.join(sorted(self.targets))} in the towers {self.towers!r}")
        for module, name, blocks, of in places:
            low_rank = LowRank(getattr(module, name), self.rank, self.scale, blocks, of)
            parametrize.register_parametrization(module, name, low_rank)

    def after_task(self, clip: nn.Module, task: int) -> None:
        if self.merge_each_task:
            self.merge(clip)

    @torch.no_grad()
    def merge(self, clip: nn.Module) -> None:
        for module, name, *_ in self._places(clip):
            merged = getattr(module, name).clone()
            parametrizations: Any = module.parametrizations[name]  # type: ignore[index]  # a ModuleDict
            for part in parametrizations:
                if isinstance(part, LowRank):
                    part.reset()
            parametrizations.original.copy_(merged)

    def _places(self, clip: nn.Module) -> list[tuple[nn.Module, str, list[int], int]]:
        """Each weight to adapt: its module and name, the adapted blocks of rows, and how many there are (3 of q, k and v)."""
        places: list[tuple[nn.Module, str, list[int], int]] = []
        packed = [i for i, target in enumerate(_PACKED) if target in self.targets]
        for path, module in clip.named_modules():
            last = path.rpartition(".")[2]
            if "parametrizations" in path or not self._is_in_towers(path):
                continue
            if isinstance(module, nn.MultiheadAttention):
                if packed and module.in_proj_weight is not None:
                    places.append((module, "in_proj_weight", packed, len(_PACKED)))
            elif isinstance(module, nn.Linear):
                if last == "qkv" and packed:
                    places.append((module, "weight", packed, len(_PACKED)))
                elif _LINEAR.get(last) in self.targets:
                    places.append((module, "weight", [0], 1))
        return places

    def _is_in_towers(self, path: str) -> bool:
        return self.towers == "all" or path.startswith("visual.") == (self.towers == "image")
