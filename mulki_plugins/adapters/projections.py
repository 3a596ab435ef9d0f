"""Adapters that change the projections of a transformer: where these are, and how a change joins a weight and merges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import torch
from attrs import frozen
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mulki_plugins.models.adapter import Adapter

Target = Literal["q", "k", "v", "o", "mlp"]
"""The projections of attention, and the linear layers of the MLPs."""
Towers = Literal["all", "image", "text"]

_PACKED: tuple[Target, ...] = ("q", "k", "v")
"""The order of the projections in the packed weight [3w, w] of torch's attention."""
_LINEAR: dict[str, Target] = {
    "q_proj": "q", "query": "q", "k_proj": "k", "key": "k", "v_proj": "v", "value": "v", "out_proj": "o",
    "c_fc": "mlp", "c_proj": "mlp", "fc1": "mlp", "fc2": "mlp",
}  # fmt: skip
"""The linear layers of a block by the names that open_clip, timm and transformers give them."""
_OF_ATTENTION: dict[str, Target] = {"proj": "o", "c_proj": "o"}
"""Those that have these names within attention alone: elsewhere `proj` is a tower's last projection or embeds patches."""


@frozen(eq=False)
class Projection:
    """A weight to adapt: all its rows, or some of the equal blocks of rows that it packs."""

    module: nn.Module
    name: str
    blocks: tuple[int, ...]
    """The adapted blocks."""
    of: int
    """The number of blocks: 3 for packed q, k and v, else 1."""

    @property
    def weight(self) -> Tensor:
        """The weight [out, in] with everything that adapters add to it."""
        return cast(Tensor, getattr(self.module, self.name))

    @property
    def changes(self) -> list[Change]:
        """The changes that adapters have added to it."""
        return [each for each in self._parametrizations if isinstance(each, Change)]

    @property
    def plain(self) -> nn.Parameter:
        """The model's own weight, without any change."""
        return cast(nn.Parameter, self._parametrizations.original)

    @property
    def _parametrizations(self) -> parametrize.ParametrizationList:
        of_module = cast(nn.ModuleDict, self.module.parametrizations)
        return cast(parametrize.ParametrizationList, of_module[self.name])


def projections(clip: nn.Module, towers: Towers, targets: set[Target]) -> list[Projection]:
    """The projections of these towers and kinds. ValueError if the model has none."""
    found = []
    packed = tuple(i for i, target in enumerate(_PACKED) if target in targets)
    for path, module in clip.named_modules():
        above, _, last = path.rpartition(".")
        in_image_tower = path.startswith("visual.")
        if "parametrizations" in path or (towers != "all" and in_image_tower != (towers == "image")):
            continue
        if isinstance(module, nn.MultiheadAttention):
            if packed and module.in_proj_weight is not None:
                found.append(Projection(module, "in_proj_weight", packed, len(_PACKED)))
        elif isinstance(module, nn.Linear):
            if last == "qkv" and packed:
                found.append(Projection(module, "weight", packed, len(_PACKED)))
            elif _target_of(above.rpartition(".")[2], last) in targets:
                found.append(Projection(module, "weight", (0,), 1))
    if not found:
        raise ValueError(f"the model has no layers {', '.join(sorted(targets))} in the towers {towers!r}")
    return found


def _target_of(parent: str, name: str) -> Target | None:
    """What a linear layer is, by its name and that of the module that holds it; None for one that is not of a block."""
    if name in _OF_ATTENTION and any(part in parent for part in ("attn", "attention", "token_mixer")):
        return _OF_ATTENTION[name]
    return _LINEAR.get(name)


class Change(nn.Module):
    """A parametrization of a weight: W' = W + change, for some of its blocks of rows. Assigning to W' moves W alone."""

    blocks: Tensor

    def __init__(self, weight: Tensor, blocks: Sequence[int], of: int) -> None:
        super().__init__()
        self.of = of
        self.register_buffer("blocks", torch.tensor(blocks, device=weight.device), persistent=False)

    def change(self) -> Tensor:
        """The change of each adapted block, [blocks, rows, in]."""
        raise NotImplementedError

    def reset(self, weight: Tensor) -> None:
        """Start anew from this weight [out, in], with a change of 0."""
        raise NotImplementedError

    def whole_change(self) -> Tensor:
        """The change over all rows, 0 in the blocks that are not adapted, [out, in]."""
        change = self.change()
        if len(self.blocks) < self.of:
            whole = change.new_zeros(self.of, *change.shape[1:])
            change = whole.index_copy(0, self.blocks, change)
        return change.flatten(0, 1)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.whole_change()

    def right_inverse(self, weight: Tensor) -> Tensor:
        with torch.no_grad():
            return weight - self.whole_change()


class ProjectionAdapter(Adapter):
    """An adapter that adds a `Change` to each projection, and merges by adding it to the plain weight."""

    def __init__(self, towers: Towers, targets: Sequence[Target] | None, *, merge_each_task: bool) -> None:
        self.towers = towers
        self.targets: set[Target] = set(targets) if targets else {"q", "k", "v", "o", "mlp"}
        self.merge_each_task = merge_each_task
        self.kind: type[Change] = Change

    def make(self, weight: Tensor, blocks: Sequence[int], of: int) -> Change:
        """A change of 0 of this weight [out, in], for these of its blocks of rows."""
        raise NotImplementedError

    def apply(self, clip: nn.Module) -> None:
        for each in projections(clip, self.towers, self.targets):
            change = self.make(each.weight.detach(), each.blocks, each.of)
            self.kind = type(change)
            parametrize.register_parametrization(each.module, each.name, change)

    def after_task(self, clip: nn.Module, task: int) -> None:
        if self.merge_each_task:
            self.merge(clip)

    @torch.no_grad()
    def merge(self, clip: nn.Module) -> None:
        for each in projections(clip, self.towers, self.targets):
            mine = [change for change in each.changes if type(change) is self.kind]
            merged = each.plain + sum(change.whole_change() for change in mine)
            each.plain.copy_(merged)
            for change in mine:
                change.reset(each.plain)
