"""What is kept of the images of all tasks: a Gaussian of the features around each class's mean; and how the means drift."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from attrs import define, field
from torch import Tensor

from mulki_plugins.losses import class_sums, members_of
from mulki_plugins.models.classifier import ClipClassifier
from mulki_plugins.stages.protocols import Dataset
from mulki_plugins.stages.statistics import Batch, Totals, encoded, evaluating, sum_over


@define(eq=False)
class Spreads:
    """A Gaussian N(μ_c, σ_c²·Σ) for each class: d + 1 numbers a class, and one matrix Σ for all classes of all tasks.

    Σ is the covariance of the features around their own class's mean, over all tasks; σ_c² is the variance of class c (the
    mean squared distance from μ_c) over tr Σ.
    """

    means: dict[int, Tensor] = field(factory=dict)
    """μ [C, d] by task, of features of unit norm."""
    variances: dict[int, Tensor] = field(factory=dict)
    """tr of each class's own covariance [C], by task; NaN for a class of fewer than two images."""
    scatter: Tensor = field(factory=lambda: torch.zeros(0, 0, dtype=torch.float64))
    """Σ_i (z_i − μ)(z_i − μ)ᵀ [d, d] over the images of all tasks."""
    degrees: float = 0.0
    """The number of these images, less one for each class."""
    _root: Tensor | None = None
    """F [d, d], F Fᵀ = Σ."""

    def draw(self, task: int, classes: Tensor, factor: float = 1.0) -> Tensor:
        """A feature of unit norm of each class, unit(μ_c + factor·σ_c·F ε) with ε ~ N(0, I): [N, d].

        classes: [N] of the task, on the host, where torch's random numbers come from; factor 0 draws the means' directions.
        """
        root, means = self._root_of_covariance(), self.means[task]
        noise = torch.randn(len(classes), len(root)).to(means) @ root.T
        chosen = classes.to(means.device)
        return F.normalize(means[chosen] + factor * self._sizes(task)[chosen, None] * noise, dim=1)

    def add(self, task: int, counts: Tensor, sums: Tensor, lengths: Tensor, squares: Tensor) -> None:
        """Keep a task's classes, from sums over its features z in double precision.

        counts: [C]; sums Σ z: [C, d]; lengths Σ ‖z‖²: [C], by class; squares Σ z zᵀ: [d, d], over all of them.
        """
        n, spare = counts.double().clamp(min=1), (counts - 1).clamp(min=0).double()
        means = sums / n[:, None]
        self.means[task] = torch.where(counts[:, None] > 0, means, torch.nan).float()
        spread = (lengths - n * means.square().sum(1)).clamp(min=0)
        self.variances[task] = torch.where(spare > 0, spread / spare, torch.nan).float()
        scatter = squares - torch.einsum("c,ci,cj->ij", n, means, means)
        self.scatter = self.scatter.to(scatter) + scatter if len(self.scatter) else scatter
        self.degrees += float(spare.sum())
        self._root = None

    def _root_of_covariance(self) -> Tensor:
        if self._root is None:
            values, vectors = torch.linalg.eigh(self.scatter / max(self.degrees, 1.0))
            self._root = (vectors * values.clamp(min=0).sqrt()).float()
        return self._root

    def _sizes(self, task: int) -> Tensor:
        """σ_c [C]; 1 where a class's own variance is unknown."""
        trace = (self.scatter.trace() / max(self.degrees, 1.0)).clamp(min=torch.finfo(torch.float32).tiny)
        return (self.variances[task] / trace.float()).nan_to_num(1.0).sqrt()

    def state_dict(self) -> dict[str, Any]:
        return {
            "means": dict(self.means), "variances": dict(self.variances), "scatter": self.scatter, "degrees": self.degrees,
        }  # fmt: skip

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Spreads:
        """The inverse of `state_dict`."""
        return cls(dict(state["means"]), dict(state["variances"]), state["scatter"], state["degrees"])


def measure(
    spreads: Spreads, model: ClipClassifier, dataset: Dataset, classes: Mapping[int, int], *,
    before: ClipClassifier | None = None, points: Mapping[int, Tensor] | None = None, width: float = 1.0, workers: int = 0,
    after_batch: Callable[[], None] | None = None,
) -> dict[int, Tensor]:  # fmt: skip
    """Add the tasks of a data set to the spreads, and return how far points of earlier tasks have drifted.

    The images are read once, through the evaluation transform. classes: the number of classes of each of their tasks.
    points p: [A, d] by earlier task, in the features of the model `before` the training. They drift like the images near
    them, Δp = Σ_i w_i (z_i − z_i^before) / Σ_i w_i, w_i = exp(−‖z_i^before − p‖² / (2·width²)): [A, d] by task; 0 for a
    point without images near it. Yu et al., 2020 (semantic drift compensation, arXiv 2004.00440).
    """
    device = model.scale.device

    def term(batch: Batch) -> Totals:
        z = encoded(model, batch.images).double()
        parts: Totals = {}
        for task, count in classes.items():
            rows = (batch.tasks == task).nonzero()[:, 0].to(device)
            mine, y = z[rows], batch.classes[rows]
            parts[f"counts {task}"] = members_of(y, count).sum(0)
            parts[f"sums {task}"] = class_sums(mine, y, count)
            parts[f"lengths {task}"] = class_sums(mine.square().sum(1, keepdim=True), y, count)[:, 0]
            parts[f"squares {task}"] = mine.T @ mine
        if before is not None and points:
            old = encoded(before, batch.images).double()
            for task, p in points.items():
                near = torch.exp(-torch.cdist(p.double(), old).square() / (2 * width**2))
                parts[f"near {task}"], parts[f"moved {task}"] = near.sum(1), near @ (z - old)
        return parts

    with evaluating(model):
        totals = sum_over(dataset, term, device, workers=workers, after_batch=after_batch)
    for task in classes:
        spreads.add(task, *(totals[f"{part} {task}"] for part in ("counts", "sums", "lengths", "squares")))
    tiny = torch.finfo(torch.float64).tiny
    return {
        task: (totals[f"moved {task}"] / totals[f"near {task}"].clamp(min=tiny)[:, None]).float()
        for task in (points if before is not None and points else ())
    }
