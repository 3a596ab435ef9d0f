"""What a task trains with: its budget, and how its learning rate follows the schedule."""

from __future__ import annotations

import math

from attrs import evolve

from mulki_plugins.recipe.schema import Schedule, Train


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
