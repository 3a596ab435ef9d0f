"""What a plugin must leave as it found it: torch's and the process's settings, and the global random generators."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.nn.modules import module as torch_module

from mulki_plugins.training.rng import random_state, set_random_state

GENERATORS = ("random", "numpy.random", "torch")

_GRADIENTS = "whether gradients are computed"
_PYTESTS = "PYTEST_CURRENT_TEST"
"""Changes from one phase of a test to the next."""


def settings() -> dict[str, Any]:
    """The settings of torch and of the process that are shared by everything that runs in it."""
    return {
        _GRADIENTS: torch.is_grad_enabled(),
        "torch's default dtype": torch.get_default_dtype(),
        "torch's default device": torch.get_default_device(),
        "the number of torch's threads": torch.get_num_threads(),
        "torch.use_deterministic_algorithms": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        "torch.backends.cudnn": (
            torch.backends.cudnn.benchmark,
            torch.backends.cudnn.deterministic,
            torch.backends.cudnn.enabled,
        ),
        "torch's precision of matrix products": torch.get_float32_matmul_precision(),
        "torch's anomaly detection": torch.is_anomaly_enabled(),
        "torch's autocast": torch.is_autocast_enabled("cpu"),
        "hooks on all modules": sum(
            len(getattr(torch_module, name))
            for name in ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks")
        ),
        "numpy's handling of floating-point errors": np.geterr(),
        "the current folder": _folder(),
        "the environment variables": {k: v for k, v in os.environ.items() if k != _PYTESTS},
        "the handlers of signals": (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)),
        "sys.excepthook": sys.excepthook,
        "Python's limit of recursion": sys.getrecursionlimit(),
        "the garbage collector": gc.isenabled(),
        "the level of the root logger": logging.root.level,
    }


def changed(before: dict[str, Any], *, gradients: bool = True) -> list[str]:
    """The settings that are no longer as they were. gradients: look at whether gradients are computed, too."""
    return [name for name, value in settings().items() if value != before[name] and (gradients or name != _GRADIENTS)]


def _folder() -> str:
    try:
        return os.getcwd()
    except OSError:  # it has been removed
        return ""


@contextlib.contextmanager
def kept_settings() -> Iterator[None]:
    """Afterwards all settings are as before, whatever a plugin did."""
    before = settings()
    autocast = torch.is_autocast_enabled("cpu")
    try:
        yield
    finally:
        for name in changed(before):
            _put_back(name, before[name])
        torch.set_autocast_enabled("cpu", autocast)


def _put_back(name: str, value: Any) -> None:
    if name == _GRADIENTS:
        torch.set_grad_enabled(value)
    elif name == "torch's default dtype":
        torch.set_default_dtype(value)
    elif name == "torch's default device":
        torch.set_default_device(None if value == torch.device("cpu") else value)
    elif name == "the number of torch's threads":
        torch.set_num_threads(value)
    elif name == "torch.use_deterministic_algorithms":
        torch.use_deterministic_algorithms(value[0], warn_only=value[1])
    elif name == "torch.backends.cudnn":
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, torch.backends.cudnn.enabled = value
    elif name == "torch's precision of matrix products":
        torch.set_float32_matmul_precision(value)
    elif name == "torch's anomaly detection":
        torch.autograd.set_detect_anomaly(value)
    elif name == "numpy's handling of floating-point errors":
        np.seterr(**value)
    elif name == "the current folder" and value:
        os.chdir(value)
    elif name == "the environment variables":
        for key in os.environ.keys() - value.keys() - {_PYTESTS}:
            del os.environ[key]
        os.environ.update(value)
    elif name == "the handlers of signals":
        with contextlib.suppress(ValueError, TypeError):  # only the main thread may, and only what Python has set
            for number, handler in zip((signal.SIGINT, signal.SIGTERM), value, strict=True):
                signal.signal(number, handler)
    elif name == "sys.excepthook":
        sys.excepthook = value
    elif name == "Python's limit of recursion":
        sys.setrecursionlimit(value)
    elif name == "the garbage collector":
        gc.enable() if value else gc.disable()
    elif name == "the level of the root logger":
        logging.root.setLevel(value)


@contextlib.contextmanager
def kept_random_state() -> Iterator[None]:
    """Python's, numpy's and torch's random numbers go on afterwards as if nothing had been drawn; settings stay too."""
    before = random_state()
    with kept_settings():
        try:
            yield
        finally:
            set_random_state(before)


def draw() -> None:
    """Move every global generator on, as dropout or an augmentation would."""
    random.random()
    np.random.rand()
    torch.rand((), device="cpu")


def generators() -> tuple[int, ...]:
    """Where each of GENERATORS stands, as a number."""
    python, arrays, tensors = random_state()
    return hash(python), hash((arrays[1].tobytes(), arrays[2])), hash(tensors.numpy().tobytes())


@contextlib.contextmanager
def another_day() -> Iterator[None]:
    """The clocks of `time` stand elsewhere, as they do in every other process."""
    with contextlib.ExitStack() as stack:
        for name in ("time", "monotonic", "perf_counter", "process_time"):
            _shift(stack, name, 98765.4321)
            _shift(stack, f"{name}_ns", 98765_432100001)
        yield


def _shift(stack: contextlib.ExitStack, name: str, by: float) -> None:
    clock = getattr(time, name)

    def shifted() -> float:
        now: float = clock() + by
        return now

    stack.enter_context(mock.patch.object(time, name, shifted))
