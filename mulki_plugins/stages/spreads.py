"""What is kept of a task's images: Gaussians of their features, one around each class's mean; and how they drift later."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from attrs import evolve, frozen
from torch import Tensor

from mulki_plugins.losses import class_sums, members_of
from mulki_plugins.models.classifier import ClipClassifier
from mulki_plugins.stages.protocols import Dataset
from mulki_plugins.stages.statistics import Batch, Totals, encoded, sum_over


@frozen(eq=False)
class Spread:
    """A Gaussian N(μ_c, σ_c²·(F Fᵀ + diag r)) around each class of a task: d + 1 numbers a class, and (k + 1)·d a task."""

    means: Tensor
    """μ [C, d], of features of unit norm."""
    sizes: Tensor
    """σ [C]: how far each class spreads, compared with all classes of the task."""
    directions: Tensor
    """F [d, k]: the k directions in which the task's classes spread most."""
    rest: Tensor
    """r [d]: the variances along the axes that F leaves."""

    def draw(self, classes: Tensor, factor: float = 1.0) -> Tensor:
        """A feature of unit norm of each class, [N, d], from torch's random numbers on the host.

        classes: [N], on the host; factor: of the spread, 0 for the directions of the means alone.
        """
        along, across = torch.randn(len(classes), self.directions.shape[1]), torch.randn(len(classes), len(self.rest))
        device = self.means.device
        noise = along.to(device) @ self.directions.T + across.to(device) * self.rest.sqrt()
        chosen = classes.to(device)
        return F.normalize(self.means[chosen] + factor * self.sizes[chosen, None] * noise, dim=1)

    def moved(self, shift: Tensor) -> Spread:
        """The same Gaussians around means that have moved by `shift` [C, d]."""
        return evolve(self, means=self.means + shift)

    def state_dict(self) -> dict[str, Tensor]:
        return {"means": self.means, "sizes": self.sizes, "directions": self.directions, "rest": self.rest}


def measure(
    model: ClipClassifier, dataset: Dataset, classes: Mapping[int, int], *, directions: int, before: ClipClassifier | None,
    kept: Mapping[int, Tensor], width: float, workers: int = 0, after_batch: Callable[[], None] | None = None,
) -> tuple[dict[int, Spread], dict[int, Tensor]]:  # fmt: skip
    """The spread of each task of a data set, and how far points of earlier tasks have drifted, from one reading.

    classes: the number of classes of each task. The model's features z of the images pass the evaluation transform;
    `directions` is k. kept: points p [A, d] by earlier task, in the features of the model `before`, which is None if there
    are none. Their drift is that of the images near them, Δp = Σ_i w_i (z_i − z_i^before) / Σ_i w_i with
    w_i = exp(−‖z_i^before − p‖² / (2·width²)), [A, d] by task. Yu et al., 2020 (semantic drift compensation, arXiv 2004.00440).
    """
    device = model.scale.device

    def term(batch: Batch) -> Totals:
        z = encoded(model, batch.images).double()
        parts: Totals = {}
        for task, count in classes.items():
            rows = (batch.tasks == task).nonzero()[:, 0].to(device)
            mine, y = z[rows], batch.classes[rows]
            parts[f"count {task}"] = members_of(y, count).sum(0)
            parts[f"sum {task}"] = class_sums(mine, y, count)
            parts[f"length {task}"] = class_sums(mine.square().sum(1, keepdim=True), y, count)[:, 0]
            parts[f"square {task}"] = mine.T @ mine
        if before is not None:
            old = encoded(before, batch.images).double()
            for task, points in kept.items():
                near = torch.exp(-torch.cdist(points.double(), old).square() / (2 * width**2))
                parts[f"near {task}"], parts[f"moved {task}"] = near.sum(1), near @ (z - old)
        return parts

    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            totals = sum_over(dataset, term, device, workers=workers, after_batch=after_batch)
    finally:
        model.train(training)
    tiny = torch.finfo(torch.float64).tiny
    drift = {
        task: (totals[f"moved {task}"] / totals[f"near {task}"].clamp(min=tiny)[:, None]).float()
        for task in (kept if before is not None else ())
    }
    spreads = {
        task: spread_of(
            *(totals[f"{part} {task}"] for part in ("count", "sum", "length", "square")), directions=directions
        )
        for task in classes
    }
    return spreads, drift


def spread_of(counts: Tensor, sums: Tensor, lengths: Tensor, square: Tensor, *, directions: int) -> Spread:
    """The spread of a task from sums over its features z.

    counts: [C]; sums Σ z: [C, d] and lengths Σ ‖z‖²: [C], by class; square Σ z zᵀ: [d, d], over all classes. The covariance
    of all classes around their own means is split into its `directions` leading eigenvectors and the rest of its diagonal;
    σ_c² is the variance of class c over the mean variance, 1 for a class of fewer than two images.
    """
    n = counts.double().clamp(min=1)
    means = sums / n[:, None]
    spare = (counts - 1).clamp(min=0).double()
    covariance = (square - torch.einsum("c,ci,cj->ij", n, means, means)) / spare.sum().clamp(min=1)
    values, vectors = torch.linalg.eigh(covariance)
    k = min(directions, len(values))
    leading = vectors[:, -k:] * values[-k:].clamp(min=0).sqrt()
    rest = (covariance.diagonal() - leading.square().sum(1)).clamp(min=0)
    variances = (lengths - n * means.square().sum(1)).clamp(min=0) / spare.clamp(min=1)
    mean_variance = covariance.trace().clamp(min=torch.finfo(torch.float64).tiny)
    sizes = torch.where(spare > 0, variances / mean_variance, torch.ones_like(variances)).sqrt()
    return Spread(means.float(), sizes.float(), leading.float(), rest.float())


def spreads_from(state: Mapping[int, Mapping[str, Any]]) -> dict[int, Spread]:
    """The inverse of each spread's `state_dict`."""
    return {task: Spread(**parts) for task, parts in state.items()}
