"""The Avalanche strategy: its supervised template with budgets, schedules, precision, and scopes of classes.

The class reads in the order in which Avalanche calls it. A step of training is

    before_training_iteration       the learning rate follows the schedule
    before_forward, forward         mb_output = model(mb_x, mb_task_id)
    after_forward                   stages add their terms: loss = loss + weight · term
    criterion                       loss = loss + cross-entropy
    before_backward, backward, after_backward
    before_update, optimizer_step, after_update
    after_training_iteration        values go to the loggers, a checkpoint is written if one is due
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from avalanche.core import BasePlugin
from avalanche.evaluation.metric_results import MetricValue
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.supervised import Cumulative, JointTraining
from avalanche.training.templates import SupervisedTemplate
from torch import Tensor

from mulki_plugins.losses import smoothed_cross_entropy
from mulki_plugins.models.classifier import ClipClassifier
from mulki_plugins.recipe.schema import Base, Evaluate, Train
from mulki_plugins.stages.stage import Stage
from mulki_plugins.training.batches import TaskBatches
from mulki_plugins.training.logbook import Reduction, StepLog
from mulki_plugins.training.schedule import add_new_weights, factor, for_task, leave_out_frozen, make_optimizer
from mulki_plugins.training.step_checks import StepChecks, overrides

_LOGGED_AT = ("before_training_exp", "after_training_iteration", "after_training_exp")
"""Events at which the loggers get the values published so far."""
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def _calls(event: str) -> Callable[..., None]:
    """A method that only calls the plugins."""
    return lambda self, **kwargs: self._call(event, **kwargs)


class ContinualTemplate(SupervisedTemplate):
    """Trains by a recipe's `train` and evaluates by its `evaluate`; call `train` with one experience at a time.

    It overrides Avalanche's own in these: the optimizer (new for each task, of the weights that require gradients), the
    data loader (wrapped for an exact number of batches, after plugins may have replaced it), the learning rate, forward,
    criterion, backward and step (mixed precision, label smoothing, clipping), the prompt templates of the model (the first
    one in training, all in evaluation), and the calls of plugins (their terms are logged, and checked by StepChecks).
    """

    model: ClipClassifier
    optimizer: torch.optim.Optimizer
    experience: Any
    dataloader: Any
    mbatch: Any
    mb_output: Any
    loss: Any

    def __init__(
        self,
        *,
        model: ClipClassifier,
        train: Train,
        evaluate: Evaluate,
        device: torch.device,
        plugins: Sequence[BasePlugin[Any]],
        evaluator: EvaluationPlugin,
    ) -> None:
        super().__init__(
            model=model,
            optimizer=make_optimizer(model, train.optimizer),
            criterion=smoothed_cross_entropy,
            train_mb_size=train.batch_size,
            train_epochs=train.epochs or 1,
            eval_mb_size=evaluate.batch_size,
            device=device,
            plugins=list(plugins),
            evaluator=evaluator,
        )
        self.settings = train
        self._own_optimizer = self._latest_optimizer = self.optimizer
        self.stack = list(plugins)
        """The recipe's plugins; `self.plugins` also holds Avalanche's own."""
        self.checks = StepChecks(self)
        self.scaler = torch.amp.GradScaler(device.type, enabled=train.precision == "fp16")
        self.steps = 0
        """The number of steps of the current task."""
        self.step = 1
        """The current step, from when its batch is fetched until its checkpoint is written."""
        self.budgets = 1
        """The number of tasks whose iterations one experience gets."""
        self.learned: set[int] = set()
        """The labels of the tasks trained so far."""
        self.after_step: Callable[[], None] = lambda: None
        """Called after each step of training, after all plugins."""
        self.between_batches: Callable[[], None] = lambda: None
        """Called after each batch outside of training: in an evaluation, or while a plugin looks at images."""
        self.say: Callable[[str], None] = lambda text: None
        """Called with notices about a task's training."""
        self._values = StepLog()
        self._resume: tuple[int, Callable[[], None]] | None = None
        self._classes = evaluate.classes
        self._scope: list[int] | None = None

    @property
    def task_settings(self) -> Train:
        """The recipe's `train`, with what `per_task` sets for the current task."""
        return for_task(self.settings, getattr(self.experience, "task_name", None))

    # a task begins

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with self.model.using("first"):
            return super().train(*args, **kwargs)

    _before_training = _calls("before_training")
    _before_training_epoch = _calls("before_training_epoch")
    _after_training_epoch = _calls("after_training_epoch")

    def resume_at(self, steps: int, then: Callable[[], None]) -> None:
        """Begin the next training after this many steps: the task begins as usual, their batches are skipped, `then` runs."""
        self._resume = steps, then

    def _before_training_exp(self, **kwargs: Any) -> None:
        self.step = 1
        self.checks.task_begins()
        for task in self._beginning():
            self.model.before_task(task)
        self._before_train_dataset_adaptation(**kwargs)  # from here to the plugins as Avalanche does
        self.train_dataset_adaptation(**kwargs)
        self._after_train_dataset_adaptation(**kwargs)
        self.make_train_dataloader(**kwargs)
        self.check_model_and_optimizer(**kwargs)
        self._call("before_training_exp", **kwargs)
        if self.optimizer is self._own_optimizer:  # a plugin may have put another in its place
            self.model.to(self.device)
            add_new_weights(self.optimizer, self.model, self._known, self.task_settings.optimizer)
            leave_out_frozen(self.optimizer)
            self.optimized_param_id = dict(self.model.named_parameters())
        for group in self.optimizer.param_groups:  # a plugin may have set other rates
            group["initial_lr"] = group["lr"]
        settings = self.task_settings
        self.train_epochs = settings.epochs or 1
        self.dataloader = TaskBatches(
            self.dataloader, self.budgets * settings.iterations if settings.iterations else None
        )
        self.steps = self.train_epochs * len(self.dataloader)
        unknown = settings.epochs or self.budgets > 1  # a number of iterations is known from the recipe, which says it
        if unknown and (notice := settings.schedule.shortened(self.steps)):
            self.say(f"task {getattr(self.experience, 'task_name', '')}: {notice}")
        if self._resume:
            self.dataloader.skip(*self._resume)
            self._resume = None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.settings.precision == "fp16")

    def _beginning(self) -> list[int]:
        """The labels of the tasks that begin with this training."""
        return sorted({int(task) for task in self.experience.task_labels})

    def make_optimizer(self, **kwargs: Any) -> None:
        """A new optimizer for each task. Avalanche's would train frozen weights and carry Adam's state over."""
        if self.optimizer is not self._latest_optimizer:
            self.checks.warn("the recipe's optimizer replaces the one that a plugin set before the task")
        self.optimizer = make_optimizer(self.model, self.task_settings.optimizer)
        self._own_optimizer = self._latest_optimizer = self.optimizer
        self._known = [p for p in self.model.parameters() if p.requires_grad]
        self.optimized_param_id = dict(self.model.named_parameters())

    # a step

    def _before_training_iteration(self, **kwargs: Any) -> None:
        settings, done = self.task_settings, self.clock.train_exp_iterations
        self.step = done + 1
        share = factor(settings.schedule, done, self.steps)
        for group in self.optimizer.param_groups:  # each keeps its ratio to the others
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * share
        self.publish("train/lr", settings.optimizer.lr * share)
        self.checks.step_begins()
        self._call("before_training_iteration", **kwargs)

    def _before_forward(self, **kwargs: Any) -> None:
        self._call("before_forward", **kwargs)
        self.checks.restore_training_mode()

    def forward(self) -> Tensor:
        """Logits [B, C] over the classes of each sample's task, or over those of the scope in an evaluation."""
        with self.autocast():
            if self.is_training or self._scope is None:
                return super().forward()  # type: ignore[no-any-return]  # Avalanche has no type for it
            return self.model.union_logits(self.mb_x, self._scope)

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of a forward in the recipe's precision, also for a plugin's own forwards."""
        precision = self.settings.precision
        return torch.autocast(self.device.type, dtype=_DTYPES.get(precision), enabled=precision != "fp32")

    def _after_forward(self, **kwargs: Any) -> None:
        self._call("after_forward", **kwargs)  # here the stages' losses join the step's loss

    def criterion(self) -> Tensor:
        """The cross-entropy, which Avalanche adds to the step's loss."""
        smoothing = self.settings.label_smoothing if self.is_training else 0.0
        loss = smoothed_cross_entropy(self.mb_output, self.targets.clamp(min=0), smoothing)
        if self.is_training:
            self.publish("train/loss/cross_entropy", loss.detach())
        return loss

    def _before_backward(self, **kwargs: Any) -> None:
        self.checks.note_loss("criterion")
        self._call("before_backward", **kwargs)
        self.checks.check_gradient_flows()

    def backward(self) -> None:
        self.scaler.scale(self.loss).backward(retain_graph=self.retain_graph)
        self.scaler.unscale_(self.optimizer)  # here, so that plugins read the true gradients
        if self.settings.gradient_clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.gradient_clip)

    _after_backward = _calls("after_backward")
    _before_update = _calls("before_update")

    def optimizer_step(self) -> None:
        self.check_loss()
        self.check_weights()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def check_loss(self) -> None:
        """Diverged if the loss of this step is not finite, MulkiError if a gradient is not."""
        try:
            self.checks.check_finite()
        except Exception:
            self._log()
            self.evaluator.before_update(self)  # the loggers see the terms, which show where it comes from
            raise

    def check_weights(self) -> None:
        """MulkiError if a weight that requires a gradient is not in the optimizer."""
        self.checks.check_weights()

    _after_update = _calls("after_update")

    def _after_training_iteration(self, **kwargs: Any) -> None:
        self._call("after_training_iteration", **kwargs)
        self.checks.step_ends()
        self.after_step()
        self.step += 1

    def _after_training_exp(self, **kwargs: Any) -> None:
        self.learned |= {int(task) for task in self.experience.task_labels}
        self._call("after_training_exp", **kwargs)
        for task in self._beginning():
            self.model.after_task(task)
        self._latest_optimizer = self.optimizer

    def _call(self, event: str, **kwargs: Any) -> None:
        """Call the plugins as Avalanche does, and log the terms of those that do not log them themselves."""
        for plugin in self.plugins:
            if not hasattr(plugin, event):
                continue
            if plugin is self.evaluator and event in _LOGGED_AT:
                self._log()
            if not any(plugin is each for each in self.stack) or not overrides(plugin, event):
                getattr(plugin, event)(self, **kwargs)
                continue
            adds = event in ("after_forward", "before_backward") and not isinstance(plugin, Stage)
            before = self.loss.detach().clone() if adds else None  # it may add in place
            self.checks.call(plugin, event, **kwargs)
            if before is not None:
                term = type(plugin).__name__.removesuffix("Plugin").lower()  # `ewc` for Avalanche's EWCPlugin
                self.publish(f"train/loss/{term}", (self.loss.detach() - before).sum(), "sum")

    # an evaluation

    def eval(self, *args: Any, **kwargs: Any) -> Any:
        step: tuple[Any, Any, Any] = self.mbatch, self.mb_output, self.loss
        with self.model.using("all"):
            result = super().eval(*args, **kwargs)
        if self.is_training:  # a plugin evaluates within a step, which then goes on
            self.mbatch, self.mb_output, self.loss = step
        return result

    def _before_eval_exp(self, **kwargs: Any) -> None:
        super()._before_eval_exp(**kwargs)
        self._scope = self._tasks_in_scope(int(self.experience.task_label))

    def _after_eval_iteration(self, **kwargs: Any) -> None:
        super()._after_eval_iteration(**kwargs)
        self.between_batches()

    def _tasks_in_scope(self, task: int) -> list[int] | None:
        """The tasks among whose classes a test image of this task is classified; None for its own task alone.

        `seen`: for a learned task all learned ones (class-incremental), for another task itself. `all`: the whole stream.
        """
        if self._classes == "all":
            return list(range(len(self.model.prompts)))
        if self._classes == "seen" and task in self.learned:
            return sorted(self.learned)
        return None

    @property
    def targets(self) -> Tensor:
        """Index of each sample's class among the logits [B]; in a scope of several tasks, among their classes together."""
        y: Tensor = self.mb_y
        if self.is_training or self._scope is None:
            return y
        indices = self.model.union(self._scope).places[self._scope.index(int(self.experience.task_label))]
        return torch.tensor(indices, device=y.device)[y]

    # what the loggers get

    def publish(self, tag: str, value: Tensor | float, several: Reduction = "last", weight: float = 1.0) -> None:
        """Give a value to the loggers, at the number of training iterations so far.

        In training they get it at the end of the step, once per tag. several: what becomes of several values of a step;
        the mean is weighted by `weight`.
        """
        if self.is_training:
            self._values.add(tag, self.clock.train_iterations, value, several, weight)
        else:
            self._hand_on(tag, value, self.clock.train_iterations)

    def _log(self) -> None:
        for tag, at, value in self._values.take():
            self._hand_on(tag, value, at)

    def _hand_on(self, tag: str, value: Tensor | float, at: int) -> None:
        self.evaluator.publish_metric_value(MetricValue(self, tag, value, at))


class CumulativeTemplate(ContinualTemplate, Cumulative):
    """Each task trains on the images of all tasks so far, mixed, with the budget of one task."""


class JointTemplate(ContinualTemplate, JointTraining):
    """Trains once, on the whole stream, with the budget of all its tasks."""

    def _before_training_exp(self, **kwargs: Any) -> None:
        self.budgets = len(self._experiences)
        super()._before_training_exp(**kwargs)

    def _beginning(self) -> list[int]:
        return sorted({int(task) for experience in self._experiences for task in experience.task_labels})

    def _after_training_exp(self, **kwargs: Any) -> None:
        super()._after_training_exp(**kwargs)
        self.learned |= {int(task) for experience in self._experiences for task in experience.task_labels}


TEMPLATES: dict[Base, type[ContinualTemplate]] = {
    "naive": ContinualTemplate,
    "cumulative": CumulativeTemplate,
    "joint": JointTemplate,
    "none": ContinualTemplate,
}
