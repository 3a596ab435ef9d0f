"""A mixture of experts beside the MLP of every block, with a router for each task."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mulki_plugins.adapters.blocks import as_tokens, feature_width, like, residual_blocks
from mulki_plugins.adapters.gaussians import Gaussians, gaussians_of
from mulki_plugins.adapters.projections import Towers
from mulki_plugins.models.adapter import RoutedAdapter
from mulki_plugins.ranks import collectives
from mulki_plugins.ranks.draws import draw_for_samples, dropout_of_samples
from mulki_plugins.types import BelowOne, Count, Fraction, Natural, Positive, Weight, checked

CHOSEN = 2
"""Experts that answer for an image."""
_LEAST_NOISE = 0.01


class Expert(nn.Module):
    """Up(Drop(ReLU(Down x))): Down [hidden, w] starts at random (Kaiming-uniform, √5), Up [hidden, w] and biases at 0.

    Up is kept transposed.
    """

    def __init__(self, weight: Tensor, width: int, hidden: int) -> None:
        super().__init__()
        self.down = nn.Parameter(weight.new_empty(hidden, width))
        self.down_bias = nn.Parameter(weight.new_zeros(hidden))
        self.up = nn.Parameter(weight.new_zeros(hidden, width))
        self.up_bias = nn.Parameter(weight.new_zeros(width))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))


class Router(nn.Module):
    """Scores u·R of the experts for an image; in training noise·ε·(softplus(u·N) + 0.01) joins, with ε ~ N(0, 1)."""

    def __init__(self, weight: Tensor, width: int, experts: int, noise: float, of_images: bool) -> None:
        super().__init__()
        self.noise, self.of_images = noise, of_images
        self.R = nn.Parameter(weight.new_zeros(width, experts))
        self.N = nn.Parameter(weight.new_zeros(width, experts))

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The scores [B, experts] without noise, and those by which experts are chosen. u: [B, w]."""
        scores = u @ self.R
        if not self.training:
            return scores, scores
        drawn = draw_for_samples(scores, torch.randn_like) if self.of_images else torch.randn_like(scores)
        return scores, scores + self.noise * drawn * (F.softplus(u @ self.N) + _LEAST_NOISE)


def choose_experts(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The experts of each image's two highest scores [B, 2], and the softmax over these scores [B, 2]; of one expert, it.

    Of equal scores the first count, on every device. scores: [B, experts].
    """
    chosen = scores.sort(dim=1, descending=True, stable=True).indices[:, :CHOSEN]
    return chosen, scores.gather(1, chosen).softmax(1)


class Mixture(nn.Module):
    """The experts of a block, and a router for each task that has begun."""

    frozen: Tensor
    """[experts], bool: those that learn no more."""
    used: Tensor
    """[experts]: how many images of the current task each would have answered for without noise, as at test time."""
    counted: Tensor
    """[experts]: those of this rank that have not joined `used` yet; 0 on one process."""

    def __init__(
        self, width: int, weight: Tensor, experts: int, hidden: int, scale: float, dropout: float, noise: float,
        *, of_images: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.of_images = of_images
        self.width, self.scale, self.dropout, self.noise = width, scale, dropout, noise
        self.experts = nn.ModuleList(Expert(weight, width, hidden) for _ in range(experts))
        self.routers = nn.ModuleDict()
        self.register_buffer("frozen", torch.zeros(experts, dtype=torch.bool, device=weight.device))
        self.register_buffer("used", torch.zeros(experts, dtype=torch.long, device=weight.device))
        self.register_buffer("counted", torch.zeros_like(self.used), persistent=False)
        self.task: str | None = None
        """The task whose router answers; None if the experts are switched off."""
        self.ended: set[str] = set()
        """The tasks that are over. Several learn at the same time if all tasks are trained at once."""

    def begin(self, task: int) -> None:
        """Add the router of a task. Routers of tasks that are over, and the experts that these used most, stop learning."""
        for each in self.ended:
            self.routers[each].requires_grad_(False)
        weight = next(self.experts.parameters())
        self.routers[str(task)] = Router(weight, self.width, len(self.experts), self.noise, self.of_images)
        self.used.zero_()
        self.counted.zero_()
        for expert, frozen in zip(self.experts, self.frozen.tolist(), strict=True):
            expert.requires_grad_(not frozen)

    def end(self, task: int, freeze: int) -> None:
        """Mark the experts that the task has used most, `freeze` of them; of equally used ones the first."""
        self.ended.add(str(task))
        most = self.used.sort(descending=True, stable=True).indices[:freeze]
        self.frozen[most] = True

    def forward(self, x: Tensor, u: Tensor) -> Tensor:
        """scale·Σ_e g_e·e(x) of tokens x [B, L, w]; the gates g are one decision for all tokens of an image, by u [B, w].

        Nothing here waits for the device: each image's two experts are looked up by a product, not by an index. Where few
        tokens make that dearer, as with short texts, all experts compute, most of them for a gate of 0.
        """
        assert self.task is not None, "switched off"
        experts = [cast(Expert, expert) for expert in self.experts]
        plain, noisy = self.routers[self.task](u)
        chosen, gates = choose_experts(noisy)
        picked = F.one_hot(chosen, len(experts)).to(x.dtype)  # [B, 2, experts]
        if self.training and torch.is_grad_enabled():
            count = self.counted if collectives.several() else self.used
            count += F.one_hot(choose_experts(plain)[0], len(experts)).sum((0, 1))
        down, down_bias, up, up_bias = (
            torch.stack([getattr(expert, name) for expert in experts])
            for name in ("down", "down_bias", "up", "up_bias")
        )
        shares = (gates[..., None] * picked).sum(1)  # [B, experts]
        if CHOSEN * self.width < x.shape[1] * len(experts):
            down, of_each, up = (torch.einsum("bke,e...->bk...", picked, each) for each in (down, down_bias, up))
            hidden = torch.einsum("blw,bkhw->blkh", x, down) + of_each[:, None]
            mixed = torch.einsum("blkh,bkhw->blw", self._activate(hidden, gates), up)
        else:
            hidden = F.linear(x, down.flatten(0, 1), down_bias.flatten())
            hidden = hidden.reshape(*x.shape[:2], *down_bias.shape)
            mixed = self._activate(hidden, shares).flatten(2) @ up.flatten(0, 1)
        return self.scale * (mixed + (shares @ up_bias)[:, None])

    def _activate(self, hidden: Tensor, gates: Tensor) -> Tensor:
        """hidden: [B, L, k, h], of k experts; gates: [B, k]."""
        drop = dropout_of_samples if self.of_images else F.dropout
        return drop(hidden.relu(), self.dropout, self.training) * gates[:, None, :, None]


def _remember(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Keep what enters a block's second half until the block's own hook takes it."""
    norm.__dict__["entered"] = inputs[0]


def _add_after_attention(block: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
    """x + Attn(LN₁x) =: x; x + MLP(LN₂x) + the experts' answer to x. The first token speaks for the image or the text."""
    mixture, x = cast(Mixture, block.experts), cast(nn.Module, block.ln_2).__dict__.pop("entered")
    return None if mixture.task is None else output + mixture(x, x[:, 0])


def _add_to_convolution(block: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
    """The same for a block of ConvNeXt, in which nothing precedes the MLP's branch; the mean position speaks for the image."""
    mixture, x = cast(Mixture, block.experts), inputs[0]
    tokens = as_tokens(x)
    return None if mixture.task is None else output + like(mixture(tokens, tokens.mean(1)), x)


class Experts(RoutedAdapter):
    """Adds a mixture of experts to every block, and a router for each task; each image chooses a task's router, or none.

    In each block x ← x + MLP(LN x) + scale·Σ g·e(x), over the two experts e of the highest scores, g their softmax. A task
    learns its router and all experts but those that earlier tasks have used most: at a task's end the experts of each block
    that answered for most images are frozen, two by default. An image takes the router of the task whose Gaussian of the frozen
    model's features gives it the highest density, if that is above the task's threshold; else no expert answers.
    Yu et al., 2024, arXiv 2403.11549; the paper recognises tasks by autoencoders on AlexNet's features instead.

    Args:
        experts: Experts in each block. A stream of T tasks needs about T·`freeze`.
        hidden: The width of an expert; null for an eighth of the block's width, at most 64.
        freeze: Experts of each block that are frozen at a task's end.
        scale: Factor of the experts' answer.
        noise: Factor of the noise by which a router tries experts in training.
        dropout: Share of an expert's hidden units that is left out in training.
        claimed: Share of a task's own images that takes its router; a threshold on the density leaves the others out.
        towers: The towers that get experts.
    """

    paper = "arXiv 2403.11549"

    @checked
    def __init__(
        self,
        *,
        experts: Count = 22,
        hidden: Count | None = None,
        freeze: Natural = 2,
        scale: Positive = 0.1,
        noise: Weight = 1.0,
        dropout: BelowOne = 0.1,
        claimed: Fraction = 0.99,
        towers: Towers = "all",
    ) -> None:
        self.experts, self.hidden, self.scale, self.dropout = experts, hidden, scale, dropout
        self.noise = noise
        self.freeze, self.claimed = freeze, claimed
        self.towers = towers

    def apply(self, clip: nn.Module) -> None:
        for block in residual_blocks(clip, self.towers):
            module: Any = block.module
            weight = next(module.parameters()).detach()
            hidden = self.hidden or min(64, max(1, block.width // 8))
            module.experts = Mixture(
                block.width, weight, self.experts, hidden, self.scale, self.dropout, self.noise,
                of_images=block.of_images,
            )  # fmt: skip
            if block.heads:
                module.ln_2.register_forward_pre_hook(_remember)
                module.register_forward_hook(_add_after_attention)
            else:
                module.register_forward_hook(_add_to_convolution)
        cast(Any, clip.visual).gaussians = Gaussians()

    def before_task(self, clip: nn.Module, task: int) -> None:
        for mixture in _mixtures(clip):
            mixture.begin(task)
        gaussians_of(clip).begin(task, feature_width(clip))

    def after_task(self, clip: nn.Module, task: int) -> None:
        for mixture in _mixtures(clip):
            mixture.end(task, self.freeze)

    def join_ranks(self, clip: nn.Module) -> None:
        """Add up the images of all ranks that experts answered for; the sentences are the same on all ranks."""
        mixtures = _mixtures(clip)
        counts = torch.stack([mixture.counted for mixture in mixtures])
        collectives.add_up(counts)
        for mixture, count in zip(mixtures, counts, strict=True):
            mixture.used += count if mixture.of_images else count // collectives.world()
            mixture.counted.zero_()

    def use(self, clip: nn.Module, route: int | None) -> None:
        for mixture in _mixtures(clip):
            mixture.task = None if route is None else str(route)

    def learn_route(self, clip: nn.Module, task: int, features: Iterable[Tensor]) -> None:
        gaussians_of(clip).of(task).fit(features, self.claimed)

    def route(self, clip: nn.Module, features: Tensor) -> Tensor:
        return gaussians_of(clip).most_likely(features, claiming=True)[1]


def _mixtures(clip: nn.Module) -> list[Mixture]:
    return [module for module in clip.modules() if isinstance(module, Mixture)]
