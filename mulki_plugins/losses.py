"""The losses of the stages and of the peers, as pure functions of tensors.

Notation: B samples of a batch, C classes of their task, width d, logit scale s; image features z [B, d], text features
t [C, d] and visual prototypes P [C, d], all of unit norm. The stages' equations are our reading of the abstract of
arXiv 2411.06764 (docs/method.md); the peers' are those of the sources named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Relation = Literal["image_to_image", "image_to_text", "text_to_text", "text_to_image"]
RELATIONS: tuple[Relation, ...] = ("image_to_text", "image_to_image", "text_to_text", "text_to_image")
TextRelation = Literal["text_to_text", "text_to_image"]

Score = Literal["likelihood", "entropy", "margin"]
"""How unsure a teacher is of a sample."""


def smoothed_cross_entropy(logits: Tensor, targets: Tensor, smoothing: float = 0.0, masked: float = -1e4) -> Tensor:
    """Cross-entropy with label smoothing over the classes of each sample's task.

    CE = (1−ε)·(−log p_y) + ε·mean over the task's classes of −log p_c (Szegedy et al., 2016, arXiv 1512.00567).
    logits: [B, C], those at or below `masked` being of classes outside the sample's task; targets: [B].
    torch's own smoothing would spread ε over the masked classes too. Returns a scalar; 0 for an empty batch.
    """
    logp = F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=1)
    hard = -logp.gather(1, targets[:, None])[:, 0]
    if smoothing:
        valid = logits > masked
        spread = -(logp * valid).sum(1) / valid.sum(1)
        hard = (1 - smoothing) * hard + smoothing * spread
    return hard.sum() / max(1, len(hard))


def prototype_alignment(prototypes: Tensor, texts: Tensor, scale: Tensor | float) -> Tensor:
    """Stage 1, eliciting: classify each prototype among the texts, and each text among the prototypes.

    L = ½·[CE(s·P tᵀ, class) + CE(s·t Pᵀ, class)], a scalar ≥ 0. prototypes P, texts t: [C, d], unit norm.
    """
    logits = scale * prototypes @ texts.T
    classes = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, classes) + F.cross_entropy(logits.T, classes)) / 2


def relation_logits(
    relation: Relation, images: Tensor, texts: Tensor, prototypes: Tensor, anchors: Tensor, scale: Tensor | float
) -> Tensor:
    """Stage 2, adding: one of the four relations, as logits over A prototypes.

    images z: [B, d]; texts t: [C, d], a model's own features; prototypes P and anchors (the teacher's texts): [A, d].
    image→image s·z·Pᵀ [B, A]; image→text s·z·anchorsᵀ [B, A]; text→text s·t·anchorsᵀ [C, A]; text→image s·t·Pᵀ [C, A].
    """
    start, end = relation.split("_to_")
    return scale * (images if start == "image" else texts) @ (prototypes if end == "image" else anchors).T


def distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The divergence of the student's distribution from the teacher's, row by row: T²·KL(teacher ‖ student).

    student, teacher: logits [N, C]. Returns [N], each ≥ 0, and 0 where the two rows agree up to a constant.
    The factor T² keeps the size of the gradient independent of T (Hinton et al., 2015, arXiv 1503.02531).
    """
    logp = F.log_softmax(student / temperature, dim=1)
    logq = F.log_softmax(teacher / temperature, dim=1)
    return temperature**2 * F.kl_div(logp, logq, reduction="none", log_target=True).sum(1)


def relation_distillation(
    student: Mapping[Relation, Tensor], teacher: Mapping[Relation, Tensor], weights: Mapping[Relation, float],
    sample_weights: Tensor, temperature: float, class_weights: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Stage 2, adding, for one teacher m: the weighted sum of the relations' divergences.

    L^m = Σ_r λ_r·mean_n w_n·T²·KL(teacher ‖ student)_n. The rows n of a relation from images are the samples; those of a
    relation from texts are the classes, weighted by `class_weights` or, without them, by the mean of w over the batch.
    student, teacher: logits by relation; weights λ: by relation, ≥ 0; sample_weights w: [B], class_weights: [C], in 0..1.
    """
    terms = []
    w_classes = sample_weights.mean() if class_weights is None else class_weights
    for relation, factor in weights.items():
        divergence = distillation(student[relation], teacher[relation], temperature)
        w = sample_weights if relation.startswith("image") else w_classes
        terms.append(factor * (w * divergence).mean())
    return sum(terms[1:], terms[0]) if terms else sample_weights.new_zeros(())


def feature_distillation(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """Stage 2, adding: how far the student's features are from one teacher's own.

    L = mean_n w_n·(1 − cos(student_n, teacher_n)), a scalar in 0..2. student, teacher: [N, d], unit norm; weights w: [N] or
    a scalar, in 0..1.
    """
    return (weights * (1 - (student * teacher).sum(1))).mean()


def movement_along(student: Tensor, teacher: Tensor, directions: Tensor) -> Tensor:
    """How far features have moved along given directions; movement orthogonal to all of them is free.

    L = mean_n mean_b ((student_n − teacher_n)·direction_b)², a scalar ≥ 0. student, teacher: [N, d]; directions: unit norm
    [B, d]. Ours, for the stage preserving.
    """
    return ((student - teacher) @ directions.T).square().mean()


def contrastive_distillation(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Distil image-text similarities both ways: (over the texts of each image, over the images of each text).

    student, teacher: s·z·tᵀ [B, N]. Returns the mean of T²·KL(teacher ‖ student) over the rows and over the columns, two
    scalars ≥ 0. Zheng et al., 2023 (ZSCL, arXiv 2303.06628), who write a cross-entropy, which has the same gradient.
    """
    over_texts = distillation(student, teacher, temperature).mean()
    return over_texts, distillation(student.T, teacher.T, temperature).mean()


def squared_distance(
    weights: Sequence[Tensor], anchors: Sequence[Tensor], importances: Sequence[Tensor] | None = None
) -> Tensor:
    """Σ F·(θ − θ_anchor)² over all numbers of all tensors, at least in single precision: a scalar ≥ 0.

    importances F ≥ 0: of the tensors' shapes; None for 1. Its gradient by θ has no gradient of its own.
    """
    for name, others in (("anchors", anchors), ("importances", importances)):
        if others is not None and len(others) != len(weights):
            longer = "longer" if len(others) > len(weights) else "shorter"
            raise ValueError(f"{name}: {longer} than weights, {len(others)} instead of {len(weights)}")
    if not weights:
        return torch.zeros(())
    distance: Tensor = _SquaredDistance.apply(anchors, importances, *weights)
    return distance


def sums_of(squares: Sequence[Tensor], *, together: bool) -> Tensor:
    """The sum of each of several tensors of numbers ≥ 0. together: in one kernel on a GPU; on a CPU that is less exact."""
    return torch.stack(list(torch._foreach_norm(list(squares), 1)) if together else [each.sum() for each in squares])


class _SquaredDistance(torch.autograd.Function):
    """The squared distance and its gradient 2·F·(θ − θ_anchor), in a few kernels for any number of tensors."""

    @staticmethod
    def forward(ctx: Any, anchors: Sequence[Tensor], importances: Sequence[Tensor] | None, *weights: Tensor) -> Tensor:
        exact = [w.to(torch.promote_types(w.dtype, torch.float32)) for w in weights]
        ctx.moved = torch._foreach_sub(exact, list(anchors))
        ctx.importances, ctx.dtypes = importances, [w.dtype for w in weights]
        squares = torch._foreach_mul(ctx.moved, ctx.moved)
        if importances is not None:
            squares = torch._foreach_mul(squares, list(importances))
        return sums_of(squares, together=squares[0].is_cuda).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        [gradient] = gradients
        twice = torch._foreach_mul(ctx.moved, 2)
        if ctx.importances is None:
            result = torch._foreach_mul(twice, gradient)
        else:
            result = torch._foreach_mul(torch._foreach_mul(list(ctx.importances), gradient), twice)
        return None, None, *(g.to(dtype) for g, dtype in zip(result, ctx.dtypes, strict=True))


def selection(initial: Tensor, previous: Tensor, slope: float, threshold: float) -> Tensor:
    """SnD's weight of the previous teacher for each image: w_b = σ(slope·(‖z⁰_b − z^p_b‖ − threshold)), [B] in 0..1.

    initial z⁰, previous z^p: [B, d], unit norm. Where the two disagree, the image resembles what was learned since.
    Yu et al., 2024 (SnD, arXiv 2403.09296).
    """
    return torch.sigmoid(slope * ((initial - previous).norm(dim=1) - threshold))


def selective_distillation(z: Tensor, initial: Tensor, previous: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """SnD's two distances: (mean_b w_b·‖z_b − z^p_b‖², mean_b (1 − w_b)·‖z_b − z⁰_b‖²), two scalars ≥ 0.

    z, initial, previous: [B, d]; weights w: [B], one per sample (the released code multiplies means by mistake).
    Yu et al., 2024 (SnD, arXiv 2403.09296).
    """
    to_previous, to_initial = ((z - other).square().sum(1) for other in (previous, initial))
    return (weights * to_previous).mean(), ((1 - weights) * to_initial).mean()


def herded(features: Tensor, count: int) -> Tensor:
    """Indices of `count` samples whose mean approximates the mean of all, in order of selection: [N, d] -> [min(count, N)].

    Greedy: each step adds the sample that brings the mean of the selected ones closest to the mean of all.
    Rebuffi et al., 2017 (iCaRL, arXiv 1611.07725, algorithm 4).
    """
    target = features.mean(0)
    total, left = torch.zeros_like(target), torch.ones(len(features), dtype=torch.bool, device=features.device)
    selected: list[int] = []
    for n in range(1, min(count, len(features)) + 1):
        distance = ((total + features) / n - target).norm(dim=1)
        best = int(distance.masked_fill(~left, float("inf")).argmin())
        selected.append(best)
        left[best] = False
        total = total + features[best]
    return torch.tensor(selected, dtype=torch.long, device=features.device)


def teacher_scores(logits: Tensor, targets: Tensor, score: Score) -> Tensor:
    """Stage 3, distinguishing: how unsure a teacher is of each sample; lower is better.

    logits: [B, C] of one teacher; targets: [B]. Returns [B]:
    likelihood −log p_y; entropy −Σ_c p_c·log p_c; margin −(p_y − max_{c≠y} p_c), in −1..1.
    """
    logp = F.log_softmax(logits, dim=1)
    if score == "likelihood":
        return -logp.gather(1, targets[:, None])[:, 0]
    p = logp.exp()
    if score == "entropy":
        return -(p * logp).sum(1)
    p_y = p.gather(1, targets[:, None])[:, 0]
    others = p.scatter(1, targets[:, None], 0.0).max(1).values
    return others - p_y


def teacher_weights(scores: Sequence[Tensor], temperature: float) -> Tensor:
    """Stage 3, distinguishing: w^m ∝ exp(−ℓ^m/κ), the weight of each teacher for each sample.

    scores ℓ: [B] for each of M teachers; temperature κ > 0: the lower, the closer to selecting the better teacher.
    Returns [M, B], in 0..1, with Σ_m w^m = 1.
    """
    return torch.softmax(-torch.stack(list(scores)) / temperature, dim=0)


def mixture_weights(scores: Sequence[Tensor], sharpness: float) -> Tensor:
    """Stage 3, distinguishing, as a mixture of two teachers by the relative difference of their scores.

    α = σ(γ·(ℓ_a − ℓ_b) / (ℓ_a + ℓ_b)) is the weight of the second teacher b, 1 − α that of the first one a.
    scores ℓ_a, ℓ_b: [B], ≥ 0; sharpness γ > 0. Returns [2, B], in 0..1, with sum 1; ½ where both scores are 0.
    The difference is relative, so the weights do not depend on how hard the task is as a whole.
    """
    a, b = scores
    second = torch.sigmoid(sharpness * (a - b) / (a + b).clamp(min=torch.finfo(a.dtype).eps))
    return torch.stack([1 - second, second])


def novelty_weights(features: Tensor, prototypes: Tensor, slope: float, threshold: float) -> Tensor:
    """Stage 3, distinguishing, by how new a sample is: w_b = σ(slope·(1 − max_c z_b·P_c − threshold)), [B] in 0..1.

    features z: [B, d]; prototypes P: [A, d] of the classes of earlier tasks, all of unit norm, A ≥ 0. The weight of the
    initial teacher: near 1 for a sample that resembles no learned class, and 1 if there are none.
    """
    if not len(prototypes):
        return features.new_ones(len(features))
    return torch.sigmoid(slope * (1 - (features @ prototypes.T).max(1).values - threshold))


def class_sums(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """The sum of the features of each class: [B, d], [B] in 0..classes−1 -> [C, d].

    A matrix product, because the last digits of torch's index_add vary on a GPU.
    """
    return members_of(labels, classes).to(features.dtype).T @ features


def members_of(labels: Tensor, classes: int) -> Tensor:
    """Which sample is of which class: [B] in 0..classes−1 -> [B, C], boolean. torch's one_hot reads the labels' values back."""
    return labels[:, None] == torch.arange(classes, device=labels.device)
