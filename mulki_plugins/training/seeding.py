"""Random numbers: every task begins from a state that follows from the run's seed and the task's place alone."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int, task: int = 0) -> None:
    """Seed Python, numpy and torch for one task of a run.

    So that what a task draws does not depend on how much was drawn before it, such as by an evaluation. The two numbers
    are mixed by numpy's SeedSequence, whose streams for different pairs are independent.
    """
    words = np.random.SeedSequence([seed, task]).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]))
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


def random_state() -> tuple[Any, ...]:
    """Where Python's, numpy's and torch's generators stand on the CPU."""
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def set_random_state(state: tuple[Any, ...]) -> None:
    """Put the generators where `random_state` found them."""
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])
