"""Checks that a step trains what it should, and names the plugin that is to blame if it does not."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor, nn

from mulki_plugins.errors import MulkiError

_LOSS_EVENTS = ("before_forward", "after_forward", "before_backward")
_GRADIENT_EVENTS = ("after_backward", "before_update")


class Diverged(Exception):
    """The loss is NaN or infinite."""


class StepChecks:
    """Calls the plugins of one strategy and checks what each does to the loss, the gradients, the optimizer and the model.

    An ordinary step waits for the device only once, for the test that loss and gradients are finite. Checks that cost more
    run at a task's first step, or when something has gone wrong.
    """

    def __init__(self, strategy: Any) -> None:
        self.strategy = strategy
        self.names: dict[int, str] = {}
        """The plugins' registered names, by id; a plugin that is not among them goes by its class's name."""
        self.warn: Callable[[str], None] = _warn
        self.first = True
        """Whether the task's first step is still to be completed."""
        self._blame: dict[str, str] = {}
        """The plugin and event that changed the `eval` mode, the `optimizer`, the `loss` or the `output`."""
        self._losses: list[tuple[str, Tensor]] = []
        """The loss of this step after each term, with who added it."""
        self._gradients: list[tuple[str, Tensor]] = []
        """The largest gradient of this step after each plugin that may have changed it."""
        self._before: dict[str, Tensor] = {}
        """The weights before the task's first step."""
        self._warned: set[str] = set()

    def task_begins(self) -> None:
        self.first = True
        self._blame = {what: who for what, who in self._blame.items() if what == "eval"}
        self._before = {}

    def step_begins(self) -> None:
        self._losses, self._gradients = [], []
        for what in ("loss", "output"):
            self._blame.pop(what, None)

    def call(self, plugin: Any, event: str, **kwargs: Any) -> None:
        """Call one plugin's callback and note what it did."""
        strategy, who = self.strategy, f"the plugin {self.name_of(plugin)!r} in its {event}"
        optimizer, held, training = strategy.optimizer, _count(strategy.optimizer), strategy.model.training
        loss, output = strategy.loss, strategy.mb_output
        before = loss.detach().clone() if event in _LOSS_EVENTS and isinstance(loss, Tensor) else None
        node = loss.grad_fn if isinstance(loss, Tensor) else None
        foreign = event in _GRADIENT_EVENTS and not type(plugin).__module__.startswith("mulki_plugins.")
        if foreign and not self._gradients:
            self._gradients.append(("", self.largest_gradient()))
        try:
            getattr(plugin, event)(strategy, **kwargs)
        except MulkiError:
            raise
        except Exception:
            if event in _GRADIENT_EVENTS:  # it may have failed over a loss that is not finite
                strategy.check_loss()
            raise
        if strategy.optimizer is not optimizer or _count(strategy.optimizer) < held:
            self._blame["optimizer"] = who
        if training and not strategy.model.training:
            self._blame["eval"] = who
        if strategy.mb_output is not output:
            self._blame.setdefault("output", who)
        if before is not None and strategy.is_training:
            self._check_loss_after(who, before, node)
        if foreign:  # MulKI's own plugins only read gradients
            self._gradients.append((who, self.largest_gradient()))

    def name_of(self, plugin: object) -> str:
        return self.names.get(id(plugin), type(plugin).__name__)

    def note_loss(self, who: str) -> None:
        """Note the loss after a term that no plugin added."""
        self._losses.append((who, self.strategy.loss.detach().clone()))

    def restore_training_mode(self) -> None:
        """Put the model back into training mode, and name the plugin that left it in evaluation mode."""
        if not self.strategy.model.training:
            self.strategy.model.train()
            who = self._blame.pop("eval", "a plugin")
            self._warn_once(f"{who} left the model in evaluation mode; it was put back into training mode")

    def check_gradient_flows(self) -> None:
        """MulkiError if the loss of this step depends on no weight that requires a gradient."""
        if self.strategy.loss.requires_grad:
            return
        learning = self._learning()
        if not learning:
            raise self._error(
                "nothing learns: no weight of the model requires a gradient",
                "set model.train, or leave some weights unfrozen",
            )
        who = self._blame.get("loss")
        what = f"{who} detached the loss" if who else f"the loss depends on none of them: {_listed(learning)}"
        raise self._error(
            f"{what}, so that no weight would learn" if who else f"{len(learning)} weights are to learn, and {what}",
            "add a term to strategy.loss, without .detach(), .item() or no_grad around it",
        )

    def check_finite(self) -> None:
        """Diverged if the loss is not finite, MulkiError if a gradient is not. Waits for the device once."""
        loss, largest = self.strategy.loss.detach(), self._latest_gradient()
        finite = torch.isfinite(loss).all() & torch.isfinite(largest.to(loss.device))
        if bool(finite):
            return
        if not bool(torch.isfinite(loss).all()):
            raise Diverged(f"{float(loss.sum()):g}{self._why_not_finite()}")
        who = self._first_not_finite(self._gradients)
        if not who and self.strategy.scaler.is_enabled():  # half precision overflowed: the scaler skips the step
            return
        names = [n for n, p in self._learning().items() if p.grad is not None and not bool(p.grad.isfinite().all())]
        who = who or self._whose_gradient()
        raise self._error(
            f"the gradient of {_listed(names)} is not finite, though the loss is {float(loss.sum()):g}"
            + (f"; it comes from {who}" if who else ""),
            "guard roots, norms, logarithms and divisions at 0"
            if who
            else "try a lower train.optimizer.lr, train.gradient_clip, or another train.precision",
        )

    def check_weights(self) -> None:
        """MulkiError if a weight that requires a gradient is not in the optimizer. Called right before the optimizer's step."""
        held = _held(self.strategy.optimizer)
        missing = [n for n, p in self.strategy.model.named_parameters() if p.requires_grad and id(p) not in held]
        if missing:
            who = self._blame.get("optimizer")
            raise self._error(
                f"{len(missing)} weights that learn are not in the optimizer: {_listed(missing)}"
                + (f"; {who} changed the optimizer" if who else ""),
                "leave strategy.optimizer as it is"
                if who
                else "add or unfreeze weights in before_training_exp at the latest, or give them to the optimizer",
            )
        if self.first:
            self._before = {n: p.detach().clone() for n, p in self._learning().items()}
            idle = [n for n, p in self._learning().items() if p.grad is None]
            if idle and len(idle) < len(self._before):
                self._warn_once(f"{len(idle)} trainable weights get no gradient: {_listed(idle)}")

    def step_ends(self) -> None:
        """After a task's first step: MulkiError if no weight moved although there were gradients."""
        if not self.first or not self._before:
            return
        if self.strategy.scaler.is_enabled() and not bool(self._latest_gradient().isfinite()):
            return  # the scaler has skipped the step; the next one is checked
        before, self._before = self._before, {}
        weights = dict(self.strategy.model.named_parameters())
        self.first = False
        if any(n not in weights or not torch.equal(before[n], weights[n].detach()) for n in before):
            return
        first = self._gradients[0][1] if self._gradients else self.largest_gradient()
        if not bool(first > 0):
            self._warn_once(f"the gradient of each weight is 0 at the task's first step: {_listed(before)}")
            return
        gone = next((who for who, largest in self._gradients[1:] if not bool(largest > 0)), "")
        raise self._error(
            f"no weight moved in the task's first step: {_listed(before)}"
            + (f"; {gone} took the gradients away" if gone else ", though there were gradients"),
            "leave gradients, learning rates and optimizer.step() to the training, and restore no weights after it",
        )

    def largest_gradient(self) -> Tensor:
        """The largest absolute value in the gradients, a scalar: NaN if one is NaN, 0 if there are none."""
        gradients = [p.grad for p in self.strategy.model.parameters() if p.grad is not None and p.grad.numel()]
        if not gradients:
            return torch.zeros((), device=self.strategy.device)
        norms = torch._foreach_norm(gradients, float("inf"))
        return torch.stack([norm.float() for norm in norms]).max()

    def _latest_gradient(self) -> Tensor:
        return self._gradients[-1][1] if self._gradients else self.largest_gradient()

    def _check_loss_after(self, who: str, before: Tensor, node: Any) -> None:
        loss = self.strategy.loss
        if not isinstance(loss, Tensor):
            raise self._error(
                f"{who} made strategy.loss a {type(loss).__name__}, expected a tensor of one number",
                "add a term to strategy.loss and leave it a tensor: no .item(), float() or numpy",
            )
        if loss.numel() != 1 or not loss.is_floating_point():
            kind = str(loss.dtype).removeprefix("torch.")
            raise self._error(
                f"{who} made strategy.loss a tensor of shape {tuple(loss.shape)} and type {kind}, "
                "expected one floating-point number",
                "reduce the term by .mean() or .sum()",
            )
        self._losses.append((who, loss.detach().clone()))
        if node is not None and loss.grad_fn is None:
            self._blame["loss"] = who
        elif (
            self.first
            and not _adds_gradient(loss, node)
            and not torch.equal(loss.detach().reshape(-1), before.reshape(-1))
        ):
            self._warn_once(f"what {who} adds to the loss has no gradient, so it trains nothing")

    def _why_not_finite(self) -> str:
        """The plugin that made the loss so, or what was not finite before it was computed; empty if neither is known."""
        if who := self._first_not_finite(self._losses):
            if who != "criterion":
                return f", made so by {who}"
            if "output" in self._blame:
                return f", computed from the output that {self._blame['output']} changed"
        bad = [n for n, p in self.strategy.model.named_parameters() if not bool(p.detach().isfinite().all())]
        if bad:
            return f", since weights are not finite: {_listed(bad)}"
        return "" if bool(self.strategy.mb_x.isfinite().all()) else ", since the images of the batch are not finite"

    def _first_not_finite(self, noted: Iterable[tuple[str, Tensor]]) -> str:
        return next((who for who, value in noted if not bool(value.isfinite().all())), "")

    def _whose_gradient(self) -> str:
        """The plugin whose term has a gradient that is not finite, found by computing the step again, plugin by plugin."""
        strategy = self.strategy
        weights = list(self._learning().values())
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
                            return f"what the plugin {self.name_of(plugin)!r} adds to the loss in its {event}"
        except Exception:  # the second attempt may fail differently; then nobody is named
            return ""
        return ""

    def _learning(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.strategy.model.named_parameters() if p.requires_grad}

    def _error(self, message: str, hint: str) -> MulkiError:
        name = getattr(self.strategy.experience, "task_name", "")
        return MulkiError(f"task {name}, step {self.strategy.step}: {message}", hint)

    def _warn_once(self, text: str) -> None:
        """Warn, but only once of the same thing."""
        if text not in self._warned:
            self._warned.add(text)
            self.warn(text)


def overrides(plugin: object, event: str) -> bool:
    """Whether a plugin defines a callback for an event."""
    return event in vars(plugin) or getattr(type(plugin), event, None) is not getattr(SupervisedPlugin, event, None)


def _held(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _count(optimizer: torch.optim.Optimizer) -> int:
    return sum(len(group["params"]) for group in optimizer.param_groups)


def _adds_gradient(loss: Tensor, before: Any) -> bool:
    """Whether the term that a plugin added to a loss leads to weights; `before` is the node of the loss in the graph.

    Any other operation than a sum passes: a plugin may scale the loss.
    """
    if loss.grad_fn is not None and not type(loss.grad_fn).__name__.startswith(("Add", "Sub")):
        return True
    seen, ahead = {before}, [loss.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        if hasattr(node, "variable"):
            return True
        seen.add(node)
        ahead += [following for following, _ in node.next_functions]
    return False


def _any_not_finite(gradients: Iterable[Tensor | None]) -> bool:
    return any(gradient is not None and not bool(gradient.isfinite().all()) for gradient in gradients)


def _listed(names: Iterable[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    all_names = list(names)
    more = f" and {len(all_names) - most} more" if len(all_names) > most else ""
    return ", ".join(all_names[:most]) + more


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=2)
