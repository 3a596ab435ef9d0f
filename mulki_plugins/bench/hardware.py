"""The work of a step (operations, launches, waits), and how fast the machine multiplies matrices at best."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from mulki_plugins.models.precision import MIXED, matrix_products
from mulki_plugins.recipe.schema import Precision
from mulki_plugins.training.flops import FlopCount

_LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
_SIZES = {"cuda": (4096, 8192), "cpu": (512, 1024, 2048)}


def waiter(device: torch.device) -> Callable[[], None]:
    """A function that waits until the device has done all it was given."""
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    if device.type == "mps":
        return torch.mps.synchronize
    return lambda: None


def peak_product(device: torch.device, precision: Precision, seconds: float = 1.0) -> float:
    """The most operations per second that a product of two square matrices reaches here, in a recipe's precision."""
    wait, dtype, best = waiter(device), MIXED.get(precision, torch.float32), 0.0
    with matrix_products(precision):
        sizes = _SIZES.get(device.type, _SIZES["cpu"])
        for n in sizes:
            a, b = (torch.ones(n, n, device=device, dtype=dtype) for _ in range(2))
            torch.mm(a, b)
            wait()
            end = time.perf_counter() + seconds / len(sizes)
            while (began := time.perf_counter()) < end:
                for _ in range(3):
                    torch.mm(a, b)
                wait()
                best = max(best, 3 * 2 * n**3 / (time.perf_counter() - began))
    return best


class Counter:
    """Counts what happens between `start` and `stop`: operations, launches, waits and scalar reads.

    What torch.compile has compiled runs uncompiled there. On a GPU two steps are needed: `kernels` says which is counted.
    """

    def __init__(self, device: torch.device, *, kernels: bool) -> None:
        self._gpu, self._kernels = device.type == "cuda", kernels
        self._entered = contextlib.ExitStack()

    def start(self) -> None:
        if self._kernels and self._gpu:
            self._profile = self._entered.enter_context(
                profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True)
            )
            return
        self._entered.enter_context(torch.compiler.set_stance("force_eager"))
        self._flops = self._entered.enter_context(FlopCount())
        self._operators = self._entered.enter_context(_Operators())

    def stop(self) -> dict[str, int]:
        """Counts of `flops`, or of `launches`, `waits` and `scalar_reads`; on the CPU all at once, launches of operators."""
        self._entered.close()
        if self._kernels and self._gpu:
            events = [(event.key, event.count) for event in self._profile.key_averages()]
            sums = {"launches": _LAUNCHES, "waits": _WAITS, "scalar_reads": ("aten::_local_scalar_dense",)}
            return {what: sum(count for key, count in events if key in keys) for what, keys in sums.items()}
        counts = {"flops": self._flops.total}
        if not self._gpu:
            counts |= {"launches": self._operators.count, "waits": 0, "scalar_reads": self._operators.reads}
        return counts


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no annotations for it
    """Counts torch's operators, and those of them that read a number."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no annotations for it
        self.count = self.reads = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        self.reads += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))
