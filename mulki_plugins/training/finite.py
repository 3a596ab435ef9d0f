"""Why a step of training is not finite: which plugin, which weights or which images are to blame."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from attrs import frozen
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor

from mulki_plugins.errors import MulkiError
from mulki_plugins.ranks import collectives

if TYPE_CHECKING:
    from mulki_plugins.training.step import StepTemplate


class Diverged(Exception):
    """The loss is NaN or infinite."""


@frozen(eq=False)
class Step:
    """What tells why a step was not finite, also some steps later: scalars on the device, and the batch."""

    at: int
    """Iterations before it since training began."""
    number: int
    """Its number in the task, from 1."""
    batch: Sequence[Tensor]
    loss: Tensor
    own_loss: Tensor | None
    """The loss of this rank's share of the batch, if there are several ranks."""
    largest: Tensor
    """The largest gradient."""
    losses: Sequence[tuple[str, Tensor]]
    """The loss after each term, with who added it."""
    gradients: Sequence[tuple[str, Tensor]]
    """The largest gradient after each plugin that may have changed it."""
    output: str
    """Who changed the model's output, if anybody did."""

    def finite(self) -> Tensor:
        """Whether loss and gradients are finite, a scalar on the device."""
        return torch.isfinite(self.loss).all() & torch.isfinite(self.largest)


def explain_step(step: Step, strategy: StepTemplate, name_of: Callable[[object], str]) -> Exception | None:
    """Diverged if the loss of a step was not finite, MulkiError if a gradient was not.

    None if half precision overflowed, so that the gradient scaler left the step out. name_of: a plugin's registered name.
    """
    if not bool(torch.isfinite(step.loss).all()):
        diverged = Diverged(f"{float(step.loss.sum()):g}{_why_the_loss(step, strategy)}")
        elsewhere = step.own_loss is not None and bool(torch.isfinite(step.own_loss).all())
        return _from_elsewhere(diverged) if elsewhere else diverged
    who = _first_not_finite(step.gradients)
    if not who and strategy.scaler.is_enabled():
        return None
    names = []
    if step.batch is strategy.mbatch:  # else its gradients are gone
        learning = strategy.checks.learning().items()
        names = [n for n, p in learning if p.grad is not None and not bool(p.grad.isfinite().all())]
    with collectives.by_itself():
        who = who or _whose_gradient(step, strategy, name_of)
    error = error_at(
        strategy,
        step.number,
        f"the gradient of {listed(names) or 'a weight'} is not finite, though the loss is {float(step.loss.sum()):g}"
        + (f"; it comes from {who}" if who else ""),
        "guard roots, norms, logarithms and divisions at 0"
        if who
        else "try a lower train.optimizer.lr, train.gradient_clip, or another train.precision",
    )
    return error if who else _from_elsewhere(error)


def _from_elsewhere(error: Exception) -> Exception:
    """What the rank says whose share of the batch is to blame, if there are several ranks and one of them knows."""
    known = collectives.error_elsewhere()
    return known if isinstance(known, Exception) else error


def error_at(strategy: StepTemplate, step: int, message: str, hint: str) -> MulkiError:
    """An error of a step of the current task."""
    return MulkiError(f"{strategy.what_learns}, step {step}: {message}", hint)


def _why_the_loss(step: Step, strategy: StepTemplate) -> str:
    """The plugin that made the loss so, or what was not finite before it was computed; empty if neither is known."""
    if who := _first_not_finite(step.losses):
        if who != "criterion":
            return f", made so by {who}"
        if step.output:
            return f", computed from the output that {step.output} changed"
    bad = [n for n, p in strategy.model.named_parameters() if not bool(p.detach().isfinite().all())]
    if bad:
        return f", since weights are not finite: {listed(bad)}"
    return "" if bool(step.batch[0].isfinite().all()) else ", since the images of the batch are not finite"


def _whose_gradient(step: Step, strategy: StepTemplate, name_of: Callable[[object], str]) -> str:
    """The plugin whose term has a gradient that is not finite, found by computing the step again, plugin by plugin."""
    weights = list(strategy.checks.learning().values())
    strategy.mbatch = step.batch
    try:
        with torch.enable_grad():
            strategy.loss = strategy._make_empty_loss()
            strategy.mb_output = strategy.forward()
            own = torch.autograd.grad(strategy.criterion(), weights, retain_graph=True, allow_unused=True)
            if _any_not_finite(own):
                return ""  # no plugin's term causes it
            for event in ("after_forward", "before_backward"):
                if event == "before_backward":
                    strategy.loss = strategy.loss + strategy.criterion()
                for plugin in strategy.stack:
                    if not overrides(plugin, event):
                        continue
                    before = strategy.loss
                    strategy.loss = before.clone()  # it may add in place
                    getattr(plugin, event)(strategy)
                    term = (strategy.loss - before).sum()
                    if not term.requires_grad:
                        continue
                    gradients = torch.autograd.grad(term, weights, retain_graph=True, allow_unused=True)
                    if _any_not_finite(gradients):
                        return f"what the plugin {name_of(plugin)!r} adds to the loss in its {event}"
    except Exception:  # the second attempt may fail differently; then nobody is named
        return ""
    return ""


def overrides(plugin: object, event: str) -> bool:
    """Whether a plugin defines a callback for an event."""
    return event in vars(plugin) or getattr(type(plugin), event, None) is not getattr(SupervisedPlugin, event, None)


def listed(names: Iterable[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    all_names = list(names)
    more = f" and {len(all_names) - most} more" if len(all_names) > most else ""
    return ", ".join(all_names[:most]) + more


def _first_not_finite(noted: Iterable[tuple[str, Tensor]]) -> str:
    return next((who for who, value in noted if not bool(value.isfinite().all())), "")


def _any_not_finite(gradients: Iterable[Tensor | None]) -> bool:
    return any(gradient is not None and not bool(gradient.isfinite().all()) for gradient in gradients)
