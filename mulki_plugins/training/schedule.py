"""Learning-rate schedules as functions of the step, so that there is no state to keep."""

from __future__ import annotations

import math

from mulki_plugins.recipe.schema import Schedule


def factor(schedule: Schedule, step: int, steps: int) -> float:
    """What the learning rate is multiplied by at a step (0 ≤ step < steps) of a task.

    It rises linearly to 1 over `warmup` steps, or over a tenth of a task that has no more steps than that; then `cosine`
    follows ½(1 + cos πe), `linear` 1 − e, with e the share of the rest that has passed, and `constant` stays at 1.
    """
    warmup = schedule.warmup_within(steps)
    if step < warmup:
        return (step + 1) / warmup
    passed = (step - warmup) / max(1, steps - warmup)
    if schedule.name == "cosine":
        return 0.5 * (1 + math.cos(math.pi * passed))
    return 1 - passed if schedule.name == "linear" else 1.0
