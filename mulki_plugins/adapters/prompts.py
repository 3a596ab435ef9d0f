"""Prompts of each task in a second attention beside that of every block, by how surely an image is of the task."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mulki_plugins.adapters.blocks import as_tokens, feature_width, like, residual_blocks
from mulki_plugins.adapters.gaussians import Gaussians, gaussians_of
from mulki_plugins.adapters.projections import Towers
from mulki_plugins.models.adapter import NO_ROUTE, RoutedAdapter
from mulki_plugins.types import Count, Fraction, Positive, checked


class KeysAndValues(nn.Module):
    """A task's prompts in a block: keys K [l, w], drawn from U(−1, 1), and values V [l, w], 0 at the start."""

    def __init__(self, weight: Tensor, length: int, width: int) -> None:
        super().__init__()
        self.K = nn.Parameter(weight.new_empty(length, width).uniform_(-1, 1))
        self.V = nn.Parameter(weight.new_zeros(length, width))


class Prompts(nn.Module):
    """The prompts of a block, of each task that has begun."""

    def __init__(self, width: int, heads: int, length: int, scale: float) -> None:
        super().__init__()
        self.width, self.heads, self.length, self.scale = width, heads, length, scale
        self.tasks = nn.ModuleDict()
        self.task: str | None = None
        """The task whose prompts answer; None if they are switched off."""
        self.strength = 1.0
        """ω, the factor of their answer."""
        self.ended: set[str] = set()
        """The tasks that are over. Several learn at the same time if all tasks are trained at once."""

    def begin(self, task: int, weight: Tensor) -> None:
        """Add the prompts of a task; those of tasks that are over stop learning. weight: of the block, for device and dtype."""
        for each in self.ended:
            self.tasks[each].requires_grad_(False)
        self.tasks[str(task)] = KeysAndValues(weight, self.length, self.width)

    def forward(self, q: Tensor) -> Tensor:
        """ω·scale·softmax(qKᵀ/√h)V in each head, h numbers wide: queries [B, L, w] -> [B, L, w]."""
        assert self.task is not None, "switched off"
        prompts = cast(KeysAndValues, self.tasks[self.task])
        keys, values = (self._by_head(each.to(q.dtype)[None]) for each in (prompts.K, prompts.V))
        queries = self._by_head(q)
        shape = (*queries.shape[:2], -1, -1)
        answer = F.scaled_dot_product_attention(queries, keys.expand(shape), values.expand(shape))
        return self.strength * self.scale * answer.transpose(1, 2).flatten(2)

    def _by_head(self, x: Tensor) -> Tensor:
        """[B, L, w] -> [B, heads, L, h]"""
        return x.reshape(*x.shape[:2], self.heads, -1).transpose(1, 2)


def _attend_twice(
    attention: nn.MultiheadAttention, inputs: tuple[Tensor, ...], output: tuple[Tensor, Any]
) -> tuple[Tensor, Any] | None:
    """Add the prompts' answer to the block's own queries, before the output projection. Text does not mask prompts."""
    prompts = cast(Prompts, attention.prompts)
    if prompts.task is None:
        return None
    width = attention.embed_dim
    bias = None if attention.in_proj_bias is None else attention.in_proj_bias[:width]
    answer = prompts(F.linear(inputs[0], attention.in_proj_weight[:width], bias))
    return output[0] + F.linear(answer, attention.out_proj.weight), output[1]


def _attend_to_map(mlp: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
    """The same in a block of ConvNeXt, which has no attention: the positions that enter its MLP are the queries."""
    prompts = cast(Prompts, mlp.prompts)
    return None if prompts.task is None else output + like(prompts(as_tokens(inputs[0])), output)


class ContextPrompts(RoutedAdapter):
    """Adds prompts of each task to the first blocks of the towers; each image chooses a task's prompts and their strength.

    Attention becomes softmax(qKᵀ/√h)V + ω·scale·softmax(qK_pᵀ/√h)V_p with the task's keys K_p and values V_p: a softmax of
    its own, so that V_p = 0 leaves the model as it was. In training ω = 1. An image of features f of the frozen model takes
    the prompts of the task whose Gaussian gives f the highest density, with ω = sigmoid(log N(f; μ, Σ)/d − 1), rounded to a
    few levels, for each of which the sentences are encoded once. At level 0 the model is the frozen one.
    Tang et al., 2024 (DIKI), arXiv 2407.05342.

    Args:
        length: Prompts in each block.
        blocks: The number of blocks of each tower, from the first on, that get prompts; null for all.
        scale: Factor of V_p. AdamW moves V_p by about the learning rate in each step, whatever the gradient; the authors
            train it by SGD with a rate of 5.
        levels: Levels of ω above 0.
        claimed: Share of a task's own images that may take its prompts, by a threshold on the density; null for no threshold,
            as in the paper.
        towers: The towers that get prompts.
    """

    paper = "arXiv 2407.05342"

    @checked
    def __init__(
        self,
        *,
        length: Count = 8,
        blocks: Count | None = 8,
        scale: Positive = 1.0,
        levels: Count = 4,
        claimed: Fraction | None = None,
        towers: Towers = "all",
    ) -> None:
        self.length, self.blocks, self.scale, self.towers = length, blocks, scale, towers
        self.levels, self.claimed = levels, claimed

    def apply(self, clip: nn.Module) -> None:
        for block in residual_blocks(clip, self.towers):
            if self.blocks is not None and block.depth >= self.blocks:
                continue
            module: Any = block.module
            place = module.attn if block.heads else module.mlp
            place.prompts = Prompts(block.width, block.heads or 1, self.length, self.scale)
            place.register_forward_hook(_attend_twice if block.heads else _attend_to_map)
        cast(Any, clip.visual).gaussians = Gaussians()

    def before_task(self, clip: nn.Module, task: int) -> None:
        weight = cast(Tensor, clip.logit_scale).detach()
        for prompts in _prompts(clip):
            prompts.begin(task, weight)
        gaussians_of(clip).begin(task, feature_width(clip))

    def after_task(self, clip: nn.Module, task: int) -> None:
        for prompts in _prompts(clip):
            prompts.ended.add(str(task))

    def use(self, clip: nn.Module, route: int | None) -> None:
        for prompts in _prompts(clip):
            prompts.task = None if route is None else str(route // self.levels)
            prompts.strength = 1.0 if route is None else (route % self.levels + 1) / self.levels

    def own_route(self, task: int) -> int:
        return (task + 1) * self.levels - 1  # ω = 1

    def learn_route(self, clip: nn.Module, task: int, features: Iterable[Tensor]) -> None:
        gaussians_of(clip).of(task).fit(features, 1.0 if self.claimed is None else self.claimed)

    def route(self, clip: nn.Module, features: Tensor) -> Tensor:
        density, task = gaussians_of(clip).most_likely(features, claiming=self.claimed is not None)
        level = (self.levels * strength(density, features.shape[1])).round().long()
        return torch.where(level > 0, task * self.levels + level - 1, NO_ROUTE)


def strength(log_density: Tensor, width: int) -> Tensor:
    """ω = sigmoid(log N(f; μ, Σ)/d − 1) of images with d features: [B] -> [B], 0 for a density of 0."""
    return (log_density / width - 1).sigmoid()


def _prompts(clip: nn.Module) -> list[Prompts]:
    return [module for module in clip.modules() if isinstance(module, Prompts)]
