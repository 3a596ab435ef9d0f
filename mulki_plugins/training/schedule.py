"""What a task trains with: its budget, its optimizer, and how its learning rate follows the schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from attrs import evolve
from torch import Tensor

from mulki_plugins.recipe.schema import Optimizer, Schedule, Train


def for_task(settings: Train, task: str | None) -> Train:
    """The recipe's `train`, with what `per_task` sets for this task."""
    budget = settings.per_task.get(task) if task else None
    if budget is None:
        return settings
    lr = settings.optimizer.lr if budget.lr is None else budget.lr
    if budget.iterations or budget.epochs:
        settings = evolve(settings, iterations=budget.iterations, epochs=budget.epochs)
    return evolve(settings, optimizer=evolve(settings.optimizer, lr=lr))


def factor(schedule: Schedule, step: int, steps: int) -> float:
    """Factor of the learning rate at a step (0 ≤ step < steps) of a task; a function of the step, so there is no state.

    It rises linearly to 1 over `warmup` steps, or over a tenth of a task that has no more steps than that. Then `cosine`
    follows ½(1 + cos πe) and `linear` 1 − e, with e the share of the remaining steps that has passed; `constant` stays 1.
    """
    warmup = schedule.warmup_within(steps)
    if step < warmup:
        return (step + 1) / warmup
    passed = (step - warmup) / max(1, steps - warmup)
    if schedule.name == "cosine":
        return 0.5 * (1 + math.cos(math.pi * passed))
    return 1 - passed if schedule.name == "linear" else 1.0


def make_optimizer(model: torch.nn.Module, settings: Optimizer, *, fused: bool = False) -> torch.optim.Optimizer:
    """An optimizer of the weights that require gradients. Gains and biases are not decayed, as in CLIP's training.

    fused: in one kernel for all weights. The last digits differ from those of the loop over the weights that a CPU uses.
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    groups = parameter_groups(weights, settings) or [{"params": [], "lr": settings.lr}]  # a plugin may add weights
    how: dict[str, Any] = {"fused": True} if fused else {}
    if settings.name == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum or 0.0, **how)
    kind = torch.optim.AdamW if settings.name == "adamw" else torch.optim.Adam
    return kind(groups, lr=settings.lr, betas=settings.betas or (0.9, 0.999), **how)


def step_unless(optimizer: torch.optim.Optimizer, left_out: Tensor) -> None:
    """Let a fused optimizer make its step unless `left_out`, a scalar on the device, is 1: nobody waits for the answer."""
    optimizer.found_inf = left_out  # type: ignore[attr-defined]  # as torch's GradScaler does
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]  # set for this step, as GradScaler does


def parameter_groups(weights: Sequence[torch.nn.Parameter], settings: Optimizer) -> list[dict[str, Any]]:
    """Parameter groups of an optimizer; `initial_lr` is the rate that the schedule multiplies."""
    rates = {"lr": settings.lr, "initial_lr": settings.lr}
    groups = [
        {"params": [p for p in weights if p.ndim >= 2], "weight_decay": settings.weight_decay, **rates},
        {"params": [p for p in weights if p.ndim < 2], "weight_decay": 0.0, **rates},
    ]
    return [group for group in groups if group["params"]]


def add_new_weights(
    optimizer: torch.optim.Optimizer, model: torch.nn.Module, known: Sequence[torch.nn.Parameter], settings: Optimizer
) -> None:
    """Let the optimizer train the weights that a plugin has added or unfrozen since it was made.

    known: the weights that it was made of; those that a plugin took out of it stay out.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]} | {id(p) for p in known}
    new = [p for p in model.parameters() if p.requires_grad and id(p) not in held]
    for group in parameter_groups(new, settings):
        optimizer.add_param_group(group)


def leave_out_frozen(optimizer: torch.optim.Optimizer) -> None:
    """Remove the weights that a plugin has frozen since the optimizer was made.

    A resumed run makes it of a model in which they are not frozen yet, and the kept state must fit.
    """
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if p.requires_grad]
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
