"""Random numbers: every task starts from a state that depends only on the run's seed and the task's position."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int, task: int = 0) -> None:
    """Seed Python, numpy and torch for one task of a run.

    What a task draws then does not depend on what was drawn before it, such as by an evaluation. Numpy's SeedSequence mixes
    the two numbers; its streams for different pairs are independent.
    """
    words = np.random.SeedSequence([seed, task]).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]))
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


def random_state() -> tuple[Any, ...]:
    """The state of Python's, numpy's and torch's generators on the CPU."""
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def set_random_state(state: tuple[Any, ...]) -> None:
    """Restore the generators to what `random_state` returned."""
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])
