"""The towers of the student and of the teachers through torch.compile, for the steps of training."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mulki_plugins.errors import describe_error
from mulki_plugins.models.classifier import ClipClassifier

_ROWS = 64
"""Sentences pass the text tower in multiples of this, so that few shapes are compiled."""


def _first_sentence(error: Exception) -> str:
    """What went wrong, without the advice for developers of the compiler that follows it."""
    return re.split(r"\s*(?:Set TORCH|You can suppress|\.\s|\n)", describe_error(error), maxsplit=1)[0][:300]


class CompiledTowers:
    """Compiles the towers that a step of training needs; evaluations and prototypes use them as they are.

    Each shape of a batch is compiled for itself, so that what is computed depends on the shape alone and a resumed run
    computes the same. Nothing of it is in the model's state: neither in its state_dict nor in its copies. If the compiler
    fails, the tower goes on without it, after a notice.
    """

    backend = "inductor"

    def __init__(self, device: torch.device, say: Callable[[str], None], *, graphs: bool) -> None:
        """graphs: record CUDA graphs of the image towers, which saves most launches; not if gradients accumulate."""
        self.say = say
        self.on = False
        """Whether a step is being computed."""
        self.observe: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None] = lambda module, args, kwargs: None
        """Called with each call of a tower."""
        self.ready: Callable[[], None] = lambda: None
        """Called when a task's towers are about to be compiled."""
        self._mode = "reduce-overhead" if graphs and device.type == "cuda" else None
        self._modules: list[nn.Module] = []
        self._reported = False

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Within this block steps are computed with compiled towers; afterwards all towers are as they were."""
        import torch._dynamo.config  # it takes seconds to import

        limits = {
            "cache_size_limit": 2**10,
            "accumulated_cache_size_limit": 2**12,
        }  # beyond them shapes would not compile
        try:
            with torch._dynamo.config.patch(limits):
                yield
        finally:
            self._release()

    def compile(self, student: ClipClassifier, teachers: Iterable[ClipClassifier]) -> None:
        """Compile the student's towers that learn, and the teachers' image towers, when they are first used in a step."""
        self._release()
        self.ready()
        for model in (student, *teachers):
            self._wrap(model.clip.visual, self._mode, rows=1)
        text = student.clip.text if hasattr(student.clip, "text") else getattr(student.clip, "transformer", None)
        if isinstance(text, nn.Module) and any(p.requires_grad for p in text.parameters()):
            self._wrap(text, None, rows=_ROWS if getattr(text, "batch_first", True) else 1)

    def step_begins(self) -> None:
        self.on = True
        if self._mode:  # outputs of the step before may be overwritten
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]  # torch has no type for it

    def step_ends(self) -> None:
        self.on = False

    def report(self, error: Exception) -> None:
        """Say once that the compiler failed."""
        if not self._reported:
            self.say(f"train.compile: the compiler failed, the run goes on without it: {_first_sentence(error)}")
        self._reported = True

    def _wrap(self, module: nn.Module, mode: str | None, *, rows: int) -> None:
        if module in self._modules:  # the teachers of the first task are one model
            return
        compiled = torch.compile(module._call_impl, backend=self.backend, dynamic=False, mode=mode)
        module._compiled_call_impl = _Tower(self, module, compiled, rows, copies=mode is not None)
        self._modules.append(module)

    def _release(self) -> None:
        self.on = False
        for module in self._modules:
            module._compiled_call_impl = None
        self._modules = []


class _Tower:
    """Takes the place of a tower's forward: compiled within a step, as it is otherwise."""

    def __init__(
        self, towers: CompiledTowers, module: nn.Module, compiled: Callable[..., Any], rows: int, *, copies: bool
    ) -> None:
        self.towers, self.module, self.compiled, self.rows, self.copies = towers, module, compiled, rows, copies
        self.eager: Callable[..., Any] = module._call_impl

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.towers.observe(self.module, (x, *args), kwargs)
        if not self.towers.on:
            return self.eager(x, *args, **kwargs)
        size = len(x)
        missing = -size % self.rows
        padded = torch.cat([x, x[-1:].expand(missing, *x.shape[1:])]) if missing else x
        try:
            output = self.compiled(padded, *args, **kwargs)
        except Exception as error:
            output = self.eager(x, *args, **kwargs)  # if this fails too, its error is the one to report
            self.module._compiled_call_impl = None
            self.towers.report(error)
            return output
        if missing:
            output = _each(output, lambda tensor: tensor[:size])
        return _each(output, Tensor.clone) if self.copies else output  # a graph writes into the same memory again


def _each(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A tower's output, a tensor or several, each changed."""
    return tuple(map(change, output)) if isinstance(output, tuple) else change(output)
