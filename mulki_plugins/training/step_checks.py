"""Checks that a step trains what it should, and names the plugin that is to blame if it does not."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mulki_plugins.errors import MulkiError
from mulki_plugins.ranks import collectives
from mulki_plugins.training.finite import Step, error_at, explain_step, listed

if TYPE_CHECKING:
    from mulki_plugins.training.step import StepTemplate

_LOSS_EVENTS = ("before_forward", "after_forward", "before_backward")
_GRADIENT_EVENTS = ("after_backward", "before_update")


class StepChecks:
    """Calls the plugins of one strategy and checks what each does to the loss, the gradients, the optimizer and the model.

    Whether loss and gradients are finite is asked in each step on a CPU. A GPU notes it and leaves the weights as they are
    where they are not; the answers are read many steps at once, see `ContinualTemplate.settle`. Checks that cost more run
    at a task's first step, or when something has gone wrong.
    """

    def __init__(self, strategy: StepTemplate) -> None:
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
        self._weights: dict[str, nn.Parameter] = {}
        """The weights of this step by name, from its backward pass on: to walk through all modules costs time."""
        self.own_loss: Tensor | None = None
        """The loss of this rank's share of the batch, if there are several ranks; `strategy.loss` is then that of all."""
        self._noted: list[Step] = []
        """The steps whose check has not been read yet."""

    def task_begins(self) -> None:
        self.first = True
        self._blame = {what: who for what, who in self._blame.items() if what == "eval"}
        self._before = {}

    def step_begins(self) -> None:
        self._losses, self._gradients, self._weights = [], [], {}
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
                strategy.check_loss() if not collectives.several() else self.check_finite()  # the other ranks are elsewhere
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
        learning = self.learning()
        if not learning:
            raise self._error(
                "nothing learns: no weight of the model requires a gradient",
                "set model.train, or leave some weights unfrozen",
            )
        who = self._blame.get("loss")
        what = f"{who} detached the loss" if who else f"the loss depends on none of them: {listed(learning)}"
        raise self._error(
            f"{what}, so that no weight would learn" if who else f"{len(learning)} weights are to learn, and {what}",
            "add a term to strategy.loss, without .detach(), .item() or no_grad around it",
        )

    def check_finite(self) -> None:
        """Diverged if the loss is not finite, MulkiError if a gradient is not. Waits for the device once."""
        step = self._this_step()
        if not bool(step.finite()) and (error := explain_step(step, self.strategy, self.name_of)) is not None:
            raise error

    @property
    def can_wait(self) -> bool:
        """Whether the check may be read after the step: the optimizer itself leaves out a step that is not finite."""
        return not self.first and all(group.get("fused") for group in self.strategy.optimizer.param_groups)

    def note_finite(self) -> Tensor:
        """Note the check of this step for `first_failure`. Returns 1 on the device if the step must be left out, else 0."""
        step = self._this_step()
        self._noted.append(step)
        return (~step.finite()).float()

    def first_failure(self, failed: Collection[int]) -> tuple[int, int, Exception] | None:
        """The first error among the noted steps, which are then forgotten: iteration, step of the task, and what to raise.

        failed: the iterations of the steps that were left out.
        """
        noted, self._noted = self._noted, []
        for step in noted:
            if step.at in failed and (error := explain_step(step, self.strategy, self.name_of)) is not None:
                return step.at, step.number, error
        return None

    def _this_step(self) -> Step:
        strategy = self.strategy
        return Step(
            at=strategy.clock.train_iterations,
            number=strategy.step,
            batch=strategy.mbatch,
            loss=strategy.loss.detach(),
            own_loss=self.own_loss,
            largest=self._latest_gradient().to(strategy.loss.device),
            losses=self._losses,
            gradients=self._gradients,
            output=self._blame.get("output", ""),
        )

    def check_weights(self) -> None:
        """MulkiError if a weight that requires a gradient is not in the optimizer. Called right before the optimizer's step."""
        held = _held(self.strategy.optimizer)
        missing = [n for n, p in self.weights().items() if p.requires_grad and id(p) not in held]
        if missing:
            who = self._blame.get("optimizer")
            raise self._error(
                f"{len(missing)} weights that learn are not in the optimizer: {listed(missing)}"
                + (f"; {who} changed the optimizer" if who else ""),
                "leave strategy.optimizer as it is"
                if who
                else "add weights in before_training_exp at the latest, or give them to the optimizer",
            )
        if self.first:
            self._before = {n: p.detach().clone() for n, p in self.learning().items()}
            idle = [n for n, p in self.learning().items() if p.grad is None]
            if idle and len(idle) < len(self._before):
                self._warn_once(f"{len(idle)} trainable weights get no gradient: {listed(idle)}")

    def step_ends(self) -> None:
        """After a task's first step: MulkiError if no weight moved although there were gradients and a rate above 0."""
        if not self.first or not self._before:
            return
        if self.strategy.task_settings.optimizer.lr == 0:
            self.first, self._before = False, {}
            return
        if self.strategy.scaler.is_enabled() and not bool(self._latest_gradient().isfinite()):
            return  # the scaler has skipped the step; the next one is checked
        before, self._before = self._before, {}
        weights = self.strategy.all_weights()
        self.first = False
        if any(n not in weights or not torch.equal(before[n], weights[n].detach()) for n in before):
            return
        first = self._gradients[0][1] if self._gradients else self.largest_gradient()
        if not bool(first > 0):
            self._warn_once(f"the gradient of each weight is 0 at the task's first step: {listed(before)}")
            return
        gone = next((who for who, largest in self._gradients[1:] if not bool(largest > 0)), "")
        raise self._error(
            f"no weight moved in the task's first step: {listed(before)}"
            + (f"; {gone} took the gradients away" if gone else ", though there were gradients"),
            "leave gradients, learning rates and optimizer.step() to the training, and restore no weights after it",
        )

    def weights(self) -> dict[str, nn.Parameter]:
        """The weights by name, as they were when somebody first asked in this step."""
        if not self._weights:
            self._weights = self.strategy.all_weights()
        return self._weights

    def learning(self) -> dict[str, nn.Parameter]:
        """The weights that learn, by name."""
        return {name: p for name, p in self.strategy.all_weights().items() if p.requires_grad}

    def largest_gradient(self) -> Tensor:
        """The largest absolute value in the gradients, a scalar: NaN if one is NaN, 0 if there are none."""
        gradients = [p.grad for p in self.weights().values() if p.grad is not None and p.grad.numel()]
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

    def _error(self, message: str, hint: str) -> MulkiError:
        return error_at(self.strategy, self.strategy.step, message, hint)

    def _warn_once(self, text: str) -> None:
        """Warn, but only once of the same thing."""
        if text not in self._warned:
            self._warned.add(text)
            self.warn(text)


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


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=2)
