"""Two observers, the first and the last plugin of a stack: any change between them comes from the plugin under test."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from attrs import define, field
from avalanche.benchmarks.scenarios import CLScenario
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor
from torch.nn.utils import get_total_norm

from mulki_plugins.testing import process
from mulki_plugins.training.schedule import factor

if TYPE_CHECKING:
    from mulki_plugins.testing.trial import Trial
    from mulki_plugins.training.strategy import ContinualTemplate

RATE = 2e-3

LEAVE_BATCH = (
    "work on a copy; to train on other images, as mixup does, assign a new list to `strategy.mbatch` in before_forward"
)
LEAVE_LOGITS = "work on a copy and add a term to `strategy.loss`; only the model sets the logits"
LEAVE_FEATURES = "other plugins read them too: compute new tensors without in-place operations"
LEAVE_MODE = (
    "after `model.eval()` or `.train()` restore the previous mode, and leave the strategy's model in training mode"
)
LEAVE_SETTINGS = "restore it before the callback ends, for example with a context manager"
LEAVE_STRATEGY = "the strategy is shared by all plugins: add to its loss, and leave its parts and methods alone"
LEAVE_EVALUATION = "only read in before_eval... and after_eval...; check `strategy.is_training` in other callbacks"


@define(eq=False)
class Step:
    """One training step as the last observer sees it."""

    task: int
    loss: float = float("nan")
    shape: tuple[int, ...] = ()
    bad_gradients: list[str] = field(factory=list)
    """Names of weights whose gradient is not finite."""
    bad_weights: list[str] = field(factory=list)
    """Names of weights that are not finite after the step."""
    same_optimizer: bool = True
    missing: list[str] = field(factory=list)
    """Names of weights that learn and are not in the optimizer."""
    foreign: int = 0
    """The number of weights in the optimizer that are not the model's."""
    settings_kept: bool = True
    rates: tuple[float, ...] = ()
    """Learning rates of the groups that the strategy created."""
    expected_rate: float = 0.0
    early_gradients: bool = False
    """Whether weights have gradients before the strategy's backward pass."""
    dropped: bool = False
    """Whether terms that others added to the loss have no gradient."""
    cleared: bool = False
    """Whether all gradients of the strategy's backward pass are gone before the update."""


class FirstObserver(SupervisedPlugin):
    """Stands before all other plugins and records what they receive."""

    trial: Trial

    def before_training_exp(self, strategy: ContinualTemplate, **kwargs: Any) -> None:
        trial = self.trial
        trial.task += 1
        trial.before.append(weights_of(strategy.model))
        trial.trainable = frozenset()
        if trial.probe is not None:
            trial.probe_features.append(features_on(strategy.model, trial.probe))

    def before_training_iteration(self, strategy: ContinualTemplate, **kwargs: Any) -> None:
        trial = self.trial
        process.draw()
        trial.batch = Batch.of(strategy)
        if strategy.clock.train_exp_iterations == 0:
            trial.began.append(weights_of(strategy.model))

    def after_forward(self, strategy: ContinualTemplate, **kwargs: Any) -> None:
        trial = self.trial
        output = strategy.mb_output
        trial.output = output, output.detach().clone()
        trial.features = _copied_features(strategy.model)
        trial.sentinel = torch.zeros((), requires_grad=True)
        strategy.loss = strategy.loss + trial.sentinel

    def after_backward(self, strategy: ContinualTemplate, **kwargs: Any) -> None:
        step = self.trial.steps[-1]
        sentinel = self.trial.sentinel
        step.dropped = sentinel.grad is None or bool(sentinel.grad == 0)
        step.cleared = _has_gradient(strategy.model)  # until the last observer has seen what is left

    def before_eval(self, strategy: ContinualTemplate, **kwargs: Any) -> None:
        process.draw()

    def before_eval_iteration(self, strategy: ContinualTemplate, **kwargs: Any) -> None:
        self.trial.eval_batch = Batch.of(strategy)

    def after_eval_forward(self, strategy: ContinualTemplate, **kwargs: Any) -> None:
        self.trial.eval_output = strategy.mb_output, strategy.mb_output.detach().clone()


class LastObserver(SupervisedPlugin):
    """Stands after all other plugins and checks what they did."""

    trial: Trial

    def before_training_exp(self, strategy: ContinualTemplate, **kwargs: Any) -> None:
        self._check_surroundings(strategy, "before_training_exp")
        self.trial.generators[(self.trial.task, "before_training_exp")] = process.generators()

    def before_forward(self, strategy: ContinualTemplate, **kwargs: Any) -> None:
        trial = self.trial
        where = self._where()
        if not trial.batch.unchanged(strategy.mbatch):
            trial.note("batch", f"it changes the batch in place, {where}", LEAVE_BATCH)
        trial.batch = Batch.of(strategy)  # a new list is a new batch, which is allowed before the forward pass
        self._check_surroundings(strategy, where)
        trial.trainable = trial.trainable or trainable(strategy.model)

    def before_backward(self, strategy: ContinualTemplate, **kwargs: Any) -> None:
        trial = self.trial
        step = Step(task=trial.task - 1)
        trial.steps.append(step)
        where = self._where(0)
        loss = strategy.loss
        if isinstance(loss, Tensor):  # the backward pass refuses anything else
            step.shape = tuple(loss.shape)
            step.loss = float(loss.detach()) if loss.numel() == 1 else float("nan")
        step.early_gradients = _has_gradient(strategy.model)
        self._check_batch(strategy, where)
        if not _unchanged(strategy.mb_output, trial.output):
            trial.note("batch", f"it changes the logits, `strategy.mb_output`, {where}", LEAVE_LOGITS)
        if any(not torch.equal(tensor.detach(), noted) for tensor, noted in trial.features):
            trial.note("batch", f"it changes the model's features in place, {where}", LEAVE_FEATURES)
        self._check_surroundings(strategy, where)

    def before_update(self, strategy: ContinualTemplate, **kwargs: Any) -> None:
        trial = self.trial
        step = trial.steps[-1]
        named = list(strategy.all_weights().items())
        learning = {id(p): n for n, p in named if p.requires_grad}
        step.bad_gradients = not_finite((name, p.grad) for name, p in named if p.grad is not None)
        step.cleared = step.cleared and not _has_gradient(strategy.model)
        trial.had_gradient |= {id(p) for _, p in named if p.grad is not None}
        groups = strategy.optimizer.param_groups
        inside = {id(p) for group in groups for p in group["params"]}
        optimizer, given = trial.optimizer
        step.same_optimizer = strategy.optimizer is optimizer
        step.missing = [name for key, name in learning.items() if key not in inside]
        step.foreign = len(inside - {id(p) for _, p in named})
        step.settings_kept = [group_settings(group) for group in groups][: len(given)] == given
        step.rates = tuple(float(group["lr"]) for group in groups[: len(given)])
        settings = strategy.settings
        step.expected_rate = RATE * factor(settings.schedule, strategy.clock.train_exp_iterations, strategy.steps)

    def after_update(self, strategy: ContinualTemplate, **kwargs: Any) -> None:
        self.trial.steps[-1].bad_weights = not_finite(strategy.model.named_parameters())

    def after_training_iteration(self, strategy: ContinualTemplate, **kwargs: Any) -> None:
        trial = self.trial
        where = self._where(0)
        self._check_surroundings(strategy, where)
        self._check_batch(strategy, where)
        now = trainable(strategy.model)
        if now != trial.trainable:
            names = sorted({name for name, _ in now ^ trial.trainable})
            fix = "freeze weights before a task's first step; restore what you change for a computation"
            trial.note("gradients", f"it changes `requires_grad` of {names[0]} within a task, {where}", fix)
        trial.generators[(trial.task, trial.steps_in_task)] = process.generators()
        trial.after_step(strategy)

    def after_training_exp(self, strategy: ContinualTemplate, **kwargs: Any) -> None:
        trial = self.trial
        trial.optimizer_age.append(optimizer_age(strategy.optimizer))
        trial.ended.append(weights_of(strategy.model))
        trial.learned.append({name for name, _ in trial.trainable})
        self._check_surroundings(strategy, f"after_training_exp of task {trial.task}")
        for name in not_finite(strategy.model.named_parameters())[:1]:
            trial.note("finite_loss", f"{name} is not finite after task {trial.task}", "do not divide by 0")

    def after_eval_iteration(self, strategy: ContinualTemplate, **kwargs: Any) -> None:
        trial = self.trial
        if not trial.eval_batch.unchanged(strategy.mbatch) or strategy.mbatch is not trial.eval_batch.owner:
            trial.note("evaluation", "it changes the batch of an evaluation", LEAVE_EVALUATION)
        if not _unchanged(strategy.mb_output, trial.eval_output):
            trial.note("evaluation", "it changes the logits of an evaluation, `strategy.mb_output`", LEAVE_LOGITS)
        elif not _same_loss(strategy.loss, strategy.criterion()):
            trial.note("evaluation", "it changes `strategy.loss` in an evaluation", LEAVE_EVALUATION)
        if strategy.model.training:
            trial.note("surroundings", "the model is in training mode in an evaluation", LEAVE_MODE)
        trial.logits.append((int(strategy.mb_task_id[0]), trial.eval_output[1]))

    def after_eval(self, strategy: ContinualTemplate, **kwargs: Any) -> None:
        trial = self.trial
        trial.evaluations += 1
        trial.generators[("evaluation", trial.evaluations)] = process.generators()

    def _where(self, more: int = 1) -> str:
        """The current step in words. more: 0 from its backward pass on, when it is in `trial.steps`."""
        trial = self.trial
        return f"at step {trial.steps_in_task + more} of task {trial.task}"

    def _check_batch(self, strategy: ContinualTemplate, where: str) -> None:
        noted = self.trial.batch
        if strategy.mbatch is None:  # a nested evaluation, which is allowed, leaves none
            return
        if strategy.mbatch is not noted.owner or not noted.unchanged(strategy.mbatch):
            self.trial.note("batch", f"it changes the batch after the forward, {where}", LEAVE_BATCH)

    def _check_surroundings(self, strategy: ContinualTemplate, where: str) -> None:
        trial = self.trial
        trial.check_settings(where)
        if not strategy.model.training:
            trial.note("surroundings", f"it leaves the model in evaluation mode, {where}", LEAVE_MODE)
        for name, module in strategy.model.named_modules():
            if not module.training and any(p.requires_grad for p in module.parameters(recurse=False)):
                what = f"it leaves {name or 'the model'}, which learns, in evaluation mode, {where}"
                trial.note("surroundings", what, LEAVE_MODE)
                break
        for name, part in trial.parts.items():
            if getattr(strategy, name) is not part:
                trial.note("surroundings", f"it replaces the strategy's `{name}`, {where}", LEAVE_STRATEGY)
        if added := replaced_methods(strategy) - trial.replaced:
            trial.note("surroundings", f"it replaces the strategy's `{min(added)}`, {where}", LEAVE_STRATEGY)
        if len(strategy.plugins) != trial.stack:
            trial.note("surroundings", f"it changes the list of the strategy's plugins, {where}", LEAVE_STRATEGY)


@define(eq=False)
class Batch:
    """A batch at some moment: its list, its tensors, and copies of them."""

    owner: Any
    tensors: list[Tensor]
    copies: list[Tensor]

    @classmethod
    def of(cls, strategy: ContinualTemplate) -> Batch:
        tensors = list(strategy.mbatch)
        return cls(strategy.mbatch, tensors, [tensor.clone() for tensor in tensors])

    def unchanged(self, now: Any) -> bool:
        """Whether no tensor changed, and `now`, if it is the same list, still holds these tensors."""
        if any(not torch.equal(tensor, copy) for tensor, copy in zip(self.tensors, self.copies, strict=True)):
            return False
        same_length = now is not self.owner or len(now) == len(self.tensors)
        return same_length and (now is not self.owner or all(a is b for a, b in zip(now, self.tensors, strict=True)))


class EvaluateMidway(SupervisedPlugin):
    """Evaluates in the middle of every task, as a user may who watches a training."""

    def __init__(self, benchmark: CLScenario, at: int = 2) -> None:
        super().__init__()
        self.benchmark, self.at = benchmark, at

    def after_training_iteration(self, strategy: ContinualTemplate, **kwargs: Any) -> None:
        if strategy.clock.train_exp_iterations == self.at:
            with process.preserved_state():  # shuffling draws numbers; that is not the plugin's fault
                strategy.eval(self.benchmark.test_stream[:2])


def weights_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def not_finite(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of the tensors that hold a number that is not finite. Their common norm is computed first: it soon says none."""
    tensors = [(name, value.detach()) for name, value in named]
    if get_total_norm([value for _, value in tensors]).isfinite():
        return []
    return [name for name, value in tensors if not value.isfinite().all()]


def trainable(model: torch.nn.Module) -> frozenset[tuple[str, int]]:
    """The names and identities of the weights that learn."""
    return frozenset((name, id(p)) for name, p in model.named_parameters() if p.requires_grad)


def group_settings(group: dict[str, Any]) -> dict[str, Any]:
    """An optimizer group's settings, except its weights and the learning rate, which the schedule sets."""
    return {key: value for key, value in group.items() if key not in ("params", "lr", "initial_lr")}


def optimizer_age(optimizer: torch.optim.Optimizer) -> int:
    """The number of steps in an optimizer's state."""
    return max((int(state["step"]) for state in optimizer.state.values() if "step" in state), default=0)


def replaced_methods(strategy: ContinualTemplate) -> set[str]:
    """Methods of the strategy's class that are overridden on the object itself."""
    return {
        name
        for name, value in vars(strategy).items()
        if callable(value) and callable(getattr(type(strategy), name, None))
    }


@torch.no_grad()
def features_on(model: Any, images: Tensor) -> list[Tensor]:
    """Features of images and of the first two tasks' classes, by which two models are compared."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        texts = [model.encode_text(task, all_templates=False) for task in range(2)]
        return [each.float() for each in (model.encode_image(images), *texts)]
    finally:
        for module, training in modes:
            module.training = training


def _has_gradient(model: torch.nn.Module) -> bool:
    return any(p.requires_grad and p.grad is not None and bool(p.grad.any()) for p in model.parameters())


def _copied_features(model: Any) -> list[tuple[Tensor, Tensor]]:
    features = getattr(model, "features", None)
    tensors = [features.image, *features.text.values()] if features is not None else []
    return [(tensor, tensor.detach().clone()) for tensor in tensors]


def _unchanged(now: Any, noted: tuple[Tensor, Tensor]) -> bool:
    return isinstance(now, Tensor) and now.shape == noted[1].shape and torch.equal(now.detach(), noted[1])


def _same_loss(a: Any, b: Tensor) -> bool:
    return isinstance(a, Tensor) and a.shape == b.shape and torch.allclose(a, b, equal_nan=True)
