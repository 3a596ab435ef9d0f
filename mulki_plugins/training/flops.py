"""Floating-point operations of a run's training: some steps are counted, the others are taken to be like them.

A multiplication and an addition are two operations. What counts is what torch has a formula for: products of matrices,
convolutions, attention. Sums, normalisations and the optimizer's step are left out, as they are in papers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from mulki_plugins.ranks import collectives
from mulki_plugins.report.result import Result
from mulki_plugins.training.strategy import ContinualTemplate

EVERY = 100
"""One step of so many is counted, besides the first two: a counted step waits for Python at each operation."""


class FlopCount(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no annotations for it
    """Adds up the operations of what torch computes within it. Changes no number and draws none.

    Unlike torch's own FlopCounterMode it knows the attention of the CPU and the fused attention of a module in evaluation
    mode, and registers no hooks.
    """

    supports_higher_order_operators = True
    hides = True
    """What `unobserved` hides has no formula, or is the optimizer's."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no annotations for it
        self.total = 0
        self.problem = ""
        """Why the total is too low, if it is."""
        self._formulas: dict[int, Callable[..., int] | None] = {}
        """By the id of an operation, which torch keeps: to look for it by itself takes as long as a small one computes."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        key = id(function)
        if key not in self._formulas:
            self._formulas[key] = _FORMULAS.get(getattr(function, "_overloadpacket", None))
        if (formula := self._formulas[key]) is not None:
            try:
                self.total += int(formula(*args, **kwargs, out_val=out))
            except Exception as error:  # a count never ends a run
                self.problem = f"{function}: {error}"
        return out


class TrainingFlops:
    """Counts the training of a run's tasks, into `Result.flops`; on several ranks all of them, with what each repeats.

    A task's beginning, its first step and its end are counted as they are: there are the passes over its images, such as
    those for prototypes. Of the other steps the second is counted, and each hundredth; all are taken for their mean. Torch
    does not show what compiled towers do inside; in their steps each call of a tower is counted, and nothing else. A run that
    goes on in another process encodes sentences again that it had cached, and they count. What prepares the images of a batch
    does not: no formula would apply, and the count would wait for each operation on each image.
    """

    def __init__(self, strategy: ContinualTemplate, result: Result) -> None:
        """Make it when the strategy's `after_step` is set, which is called after each step's count."""
        self.strategy, self.result = strategy, result
        self._after_step, strategy.after_step = strategy.after_step, self._step_ends
        if strategy.towers:
            strategy.towers.observe, strategy.towers.ready = self._observe, self._towers_ready
        if result.base == "none":
            result.flops = {"step": [], "train": [], "total": 0}
        self._count = FlopCount()
        self._entered: ExitStack | None = None
        self._mark: int | None = None
        """The total at the beginning of what is being counted."""
        self._known: dict[Any, int] = {}
        """Operations of calls of compiled towers."""

    @contextmanager
    def of_task(self) -> Iterator[None]:
        """Count the task that is trained within the block. One that was begun before the run was stopped is continued."""
        self._count, self._mark, self._known = FlopCount(), None, {}
        if not self._begun:
            self.result.flops["begun"] = {"once": 0, "sampled": 0, "samples": 0}
            self._start()
        try:
            yield
            self._stop("once")
        finally:
            self._leave()
        self._task_ends()

    @property
    def _begun(self) -> dict[str, int]:
        """Of the task in progress: operations counted once, those of the sampled steps, and the number of these steps.

        In the result, which the run's checkpoints hold.
        """
        begun: dict[str, int] = self.result.flops.get("begun", {})
        return begun

    def _step_ends(self) -> None:
        done, begun = self.strategy.clock.train_exp_iterations, self._begun
        if self._mark is not None:
            begun["samples"] += done > 1
            self._stop("once" if done == 1 else "sampled")
        self._after_step()
        if not begun:
            return
        if done == self.strategy.steps:
            self._start()
        elif self.strategy.towers:
            self._mark = self._count.total
        elif not begun["samples"] or (done + 1) % EVERY == 0:
            self._start()

    def _start(self) -> None:
        self._mark = self._count.total
        self._entered = ExitStack()
        self._entered.enter_context(self._count)

    def _stop(self, kind: str) -> None:
        self._leave()
        if self._mark is not None:
            self._begun[kind] += collectives.total(self._count.total - self._mark)
        self._mark = None

    def _leave(self) -> None:
        if self._entered is not None:
            self._entered.close()
            self._entered = None

    def _towers_ready(self) -> None:
        """The steps begin, whose towers are compiled: within a count of operations they would not be."""
        self._leave()
        if self._mark is None:
            self._mark = self._count.total

    def _observe(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A compiled tower is called."""
        if self._entered is not None:
            return
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        key = module, torch.is_grad_enabled(), tuple((each.shape, each.requires_grad) for each in tensors)
        if key not in self._known:
            try:
                self._known[key] = count_call(module, *args, **kwargs)
            except Exception as error:  # a count never ends a run
                self._known[key], self._count.problem = 0, str(error)
        self._count.total += self._known[key]

    def _task_ends(self) -> None:
        flops, begun = self.result.flops, self.result.flops.pop("begun")
        rest = max(0, self.strategy.clock.train_exp_iterations - 1)
        step = round(begun["sampled"] / begun["samples"]) if begun["samples"] else begun["once"]
        unknown = bool(self._count.problem) or (rest > 0 and not begun["samples"])
        flops.setdefault("step", []).append(None if unknown else step)
        flops.setdefault("train", []).append(None if unknown else begun["once"] + rest * step)
        earlier = len(self.result.seconds.get("train", []))  # a run of an earlier version has counted none of them
        complete = len(flops["train"]) == earlier + 1 and None not in flops["train"]
        flops["total"] = sum(flops["train"]) if complete else None


def count_call(module: nn.Module, *args: Any, **kwargs: Any) -> int:
    """The operations of calling a module, and of the gradients of its weights and inputs that require one.

    Nothing is computed: the module is copied to torch's `meta` device, which knows shapes only. Without gradients in the
    context, those of the forward alone.
    """

    def empty(tensor: Tensor) -> Tensor:
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        return torch.empty(tensor.shape, dtype=dtype, device="meta", requires_grad=tensor.requires_grad)

    weights = {id(p): nn.Parameter(empty(p), p.requires_grad) for p in module.parameters()}
    buffers = {id(b): empty(b) for b in module.buffers()}
    shadow = copy.deepcopy(module, {**weights, **buffers})
    args, kwargs = tree_map_only(Tensor, empty, (args, kwargs))
    with FlopCount() as count:
        outputs = [each for each in tree_leaves(shadow(*args, **kwargs)) if isinstance(each, Tensor)]
        for output in outputs:
            if output.requires_grad:
                torch.autograd.backward(output.sum(), retain_graph=output is not outputs[-1])
    return int(count.total)


def _of_shapes(formula: Callable[..., int]) -> Callable[..., int]:
    """A formula of three shapes as the table has it."""
    return lambda *args, out_val=None, **kwargs: formula(*(each.shape for each in args[:3]))


def _backward_of_shapes(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return int(sdpa_backward_flop_count(*(each.shape for each in args[:4])))  # type: ignore[no-untyped-call]  # torch has no annotations


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, width: int, *args: Any, **kwargs: Any) -> int:
    """nn.MultiheadAttention in evaluation mode: its three projections, two products of each head, and the last projection."""
    batch, length, size = query.shape
    return 2 * batch * length * (3 * size * width + 2 * length * width + width * width)


def _directly(formula: Callable[..., int]) -> Callable[..., int]:
    """A formula of torch's table without its walk through nested arguments, which takes longer than small operations.

    The table wraps formulas of shapes; others take the tensors.
    """
    inner: Callable[..., int] | None = getattr(formula, "__wrapped__", None)
    if inner is None:
        return formula
    return lambda *args, out_val=None, **kwargs: inner(
        *map(_shape, args), out_shape=_shape(out_val), **{name: _shape(value) for name, value in kwargs.items()}
    )


def _shape(value: Any) -> Any:
    """The shape in place of a tensor, also of each in a tuple or list."""
    if isinstance(value, Tensor):
        return value.shape
    return [_shape(each) for each in value] if isinstance(value, (tuple, list)) else value


def _formulas() -> dict[Any, Callable[..., int]]:
    """Torch's table with what it lacks."""
    more: dict[str, Callable[..., int]] = {
        "_scaled_dot_product_flash_attention_for_cpu": _of_shapes(sdpa_flop_count),
        "_scaled_dot_product_flash_attention_for_cpu_backward": _backward_of_shapes,
        "_native_multi_head_attention": _fused_attention,
    }
    torchs = {packet: _directly(formula) for packet, formula in flop_registry.items()}
    return {**torchs, **{getattr(torch.ops.aten, n): f for n, f in more.items() if hasattr(torch.ops.aten, n)}}


_FORMULAS = _formulas()
