"""A Gaussian of each task's image features: which task an image belongs to, and how surely."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import Tensor, nn

HELD_OUT = 5
"""Every fifth image is held out of the fit that sets a task's threshold."""
_FLOOR = 1e-7
"""Joins the variances, so that a covariance can be inverted."""


class Moments:
    """Count, sum and second moments of features, added up in double precision on the host, batch by batch."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self.sum = torch.zeros(width, dtype=torch.float64)
        self.squares = torch.zeros(width, width, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """features: [B, d], double precision, on the host."""
        self.count += len(features)
        self.sum += features.sum(0)
        self.squares += features.T @ features

    def __add__(self, other: Moments) -> Moments:
        both = Moments(len(self.sum))
        both.count, both.sum, both.squares = (
            self.count + other.count, self.sum + other.sum, self.squares + other.squares,
        )  # fmt: skip
        return both

    def mean(self) -> Tensor:
        """[d]; zeros without features."""
        return self.sum / max(self.count, 1)

    def covariance(self) -> Tensor:
        """The covariance [d, d], drawn towards tr(Σ)/d·I where few images leave it uncertain.

        Σ = (1 − ρ)S + ρ tr(S)/d·I, S with the divisor N − 1, ρ the oracle approximating shrinkage of Chen et al., 2010,
        IEEE TSP 58(10), equation 23.
        """
        mean, n, d = self.mean(), self.count, len(self.sum)
        s = (self.squares - n * torch.outer(mean, mean)) / max(n - 1, 1)
        trace, of_square = s.trace(), (s * s).sum()
        above = (1 - 2 / d) * of_square + trace**2
        below = (n + 1 - 2 / d) * (of_square - trace**2 / d)
        rho = float((above / below).clamp(0, 1)) if below > 0 else 1.0
        identity = torch.eye(d, dtype=torch.float64)
        return (1 - rho) * s + (rho * trace / d + _FLOOR) * identity


class Gaussian(nn.Module):
    """The Gaussian of a task's features; before it has learned any, it claims no image."""

    mean: Tensor
    """μ [d]"""
    whitening: Tensor
    """L⁻¹ [d, d], for the covariance LLᵀ"""
    threshold: Tensor
    """The smallest log density of an image that the task claims, a scalar."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("whitening", torch.zeros(width, width))
        self.register_buffer("threshold", torch.tensor(math.inf))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Gaussian:
        """Move to another device, but keep single precision in a model of half precision."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch has no types for it
        for name, tensor in before.items():
            moved = self._buffers[name]
            if tensor is not None and moved is not None and moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        return self

    def fit(self, features: Iterable[Tensor], claimed: float) -> None:
        """Learn from batches [B, d] of a task's features; they are read once.

        claimed: the share of the task's own images that it should claim. Every fifth image is scored by the Gaussian of the
        others, and the threshold is the quantile of these scores; then they join the fit. The memory is that of their
        features. A task of fewer than five images is scored by its own.
        """
        fitted, held_out = (Moments(len(self.mean)) for _ in range(2))
        kept: list[Tensor] = []
        first, position = torch.zeros(0, len(self.mean)), 0
        for batch in features:
            rows = torch.arange(position, position + len(batch)) % HELD_OUT == HELD_OUT - 1
            position += len(batch)
            batch = batch.detach().cpu().double()
            fitted.add(batch[~rows])
            held_out.add(batch[rows])
            kept.append(batch[rows].float())
            first = torch.cat([first, batch.float()])[: HELD_OUT - 1]
        if not position:
            return
        self._set(fitted)
        scored = torch.cat(kept) if held_out.count else first
        scores = self.log_density(scored.to(self.mean.device))
        self.threshold.copy_(torch.quantile(scores.cpu(), 1 - claimed))
        self._set(fitted + held_out)

    def _set(self, moments: Moments) -> None:
        factor = torch.linalg.cholesky(moments.covariance())
        identity = torch.eye(len(factor), dtype=torch.float64)
        self.mean.copy_(moments.mean())
        self.whitening.copy_(torch.linalg.solve_triangular(factor, identity, upper=False))

    def log_density(self, features: Tensor) -> Tensor:
        """log N(f; μ, Σ) of features [B, d]: [B], −∞ before anything was learned."""
        whitened = (features.float() - self.mean) @ self.whitening.T
        log_factor = self.whitening.diagonal().log().sum()
        return log_factor - 0.5 * (whitened.square().sum(1) + features.shape[1] * math.log(2 * math.pi))


class Gaussians(nn.ModuleDict):
    """The Gaussians of the tasks that have begun; the keys are their numbers."""

    def of(self, task: int) -> Gaussian:
        """The Gaussian of a task that has begun."""
        return cast(Gaussian, self[str(task)])

    def begin(self, task: int, width: int) -> None:
        """Make room for a task, whose features have `width` numbers."""
        if str(task) not in self:
            self[str(task)] = Gaussian(width)

    def most_likely(self, features: Tensor, *, claiming: bool) -> tuple[Tensor, Tensor]:
        """For each image [B] the highest log density, −∞ if there is none, and the number of its task, or −1.

        features: [B, d]. claiming: only of tasks that claim the image, by their thresholds.
        """
        densities = torch.stack([gaussian.log_density(features) for gaussian in self._all()])
        if claiming:
            thresholds = torch.stack([gaussian.threshold for gaussian in self._all()])
            densities = densities.masked_fill(densities < thresholds[:, None], -math.inf)
        best = densities.max(0)
        numbers = torch.tensor([int(task) for task in self], device=features.device)
        return best.values, numbers[best.indices].masked_fill(best.values == -math.inf, -1)

    def _all(self) -> list[Gaussian]:
        return [cast(Gaussian, each) for each in self.values()]


def gaussians_of(clip: nn.Module) -> Gaussians:
    """The Gaussians that an adapter has added to a model's image tower, so that they are saved with it."""
    return cast(Gaussians, cast(nn.Module, clip.visual).gaussians)
