"""Avalanche's supervised template, with what it lacks: budgets, schedules, precision, and scopes of classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from attrs import evolve
from avalanche.core import BasePlugin
from avalanche.evaluation.metric_results import MetricValue
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.templates import SupervisedTemplate
from torch import Tensor

from mulki_plugins.losses import smoothed_cross_entropy
from mulki_plugins.models.classifier import ClipClassifier
from mulki_plugins.recipe.schema import Evaluate, Optimizer, Train
from mulki_plugins.stages.stage import Stage
from mulki_plugins.training.loader import TaskBatches
from mulki_plugins.training.schedule import factor
from mulki_plugins.training.watch import Diverged, Watch, overrides

__all__ = ["ContinualTemplate", "Diverged"]

_LOGGED_AT = ("before_training_exp", "after_training_iteration", "after_training_exp")
"""Events at which the loggers get what was published."""

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class ContinualTemplate(SupervisedTemplate):
    """Trains by a recipe's `train` and evaluates by its `evaluate`; call `train` with one experience at a time.

    Over Avalanche's own it overrides only: the optimizer (new for each task, of the weights that learn and no others), the
    loader (wrapped for an exact number of iterations, after plugins may have replaced it), the learning rate (set before
    each step), forward, criterion, backward and step (mixed precision, label smoothing, clipping), the templates that the
    model answers from (the first in training, all in evaluation), and the calls of plugins in training (what they add to
    the loss is logged, and what keeps weights from learning is reported, see Watch).
    """

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
            optimizer=_make_optimizer(model, train.optimizer),
            criterion=smoothed_cross_entropy,
            train_mb_size=train.batch_size,
            train_epochs=train.epochs or 1,
            eval_mb_size=evaluate.batch_size,
            device=device,
            plugins=list(plugins),
            evaluator=evaluator,
        )
        self.settings = train
        self.dataloader: Any
        self.steps = 0
        """Steps of the current task."""
        self.step = 1
        """Which of them it is at: its batch is being fetched, or trained on, or a checkpoint written after it."""
        self.budgets = 1
        """How many tasks' iterations one experience is given."""
        self.learned: set[int] = set()
        """Task labels that have been trained."""
        self.after_step: Callable[[], None] = _nothing
        """Called after each step of training, when all plugins have had their turn."""
        self.between_batches: Callable[[], None] = _nothing
        """Called after each batch of images outside of training: of an evaluation, or of what a plugin looks at."""
        self.say: Callable[[str], None] = lambda text: None
        """Called with what the user is told of a task's training."""
        self._resume: tuple[int, Callable[[], None]] | None = None
        self._classes = evaluate.classes
        self._scope: list[int] | None = None
        self._made = self._latest = self.optimizer  # type: ignore[has-type]
        self.watched = list(plugins)
        self.watch = Watch(self)
        self._logged: dict[tuple[str, int], tuple[Any, float]] = {}
        """What is to be logged of this step by tag and iteration: a sum of values and of their weights."""
        self.scaler = torch.amp.GradScaler(device.type, enabled=train.precision == "fp16")

    def make_optimizer(self, **kwargs: Any) -> None:
        """A new optimizer for each task; Avalanche's own would take frozen weights in, and carries Adam's state over."""
        if self.optimizer is not self._latest:  # type: ignore[has-type]
            self.watch.warn("an optimizer that a plugin set before the task began is replaced by the recipe's")
        self.optimizer = self._made = self._latest = _make_optimizer(self.model, self.task_settings.optimizer)
        self._given = {id(p): p for p in self.model.parameters() if p.requires_grad}
        self.optimized_param_id = dict(self.model.named_parameters())

    def _add_new_weights(self) -> None:
        """Weights that a plugin has added or unfrozen since the optimizer was made learn too.

        An optimizer that a plugin put in its place is left as it is, and what a plugin took out of ours is not put back.
        """
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        learning = [p for p in self.model.parameters() if p.requires_grad]
        new = [p for p in learning if id(p) not in held and id(p) not in self._given]
        if new and self.optimizer is self._made:
            self.model.to(self.device)
            for group in _groups(new, self.task_settings.optimizer):
                self.optimizer.add_param_group(group)
            self.optimized_param_id = dict(self.model.named_parameters())

    def _leave_out_frozen(self) -> None:
        """Take weights that a plugin has frozen since the optimizer was made out of it.

        A resume makes it of a model in which they still learn, and its state must fit all the same.
        """
        if self.optimizer is not self._made:
            return
        for group in self.optimizer.param_groups:
            group["params"] = [p for p in group["params"] if p.requires_grad]
        self.optimizer.param_groups[:] = [group for group in self.optimizer.param_groups if group["params"]]

    @property
    def task_settings(self) -> Train:
        """The recipe's `train` with what `per_task` says of the current task."""
        name = getattr(self.experience, "task_name", None)
        budget = self.settings.per_task.get(name) if name else None
        if budget is None:
            return self.settings
        changed = self.settings
        if budget.iterations or budget.epochs:
            changed = evolve(changed, iterations=budget.iterations, epochs=budget.epochs)
        return evolve(changed, optimizer=evolve(changed.optimizer, lr=budget.lr or changed.optimizer.lr))

    def resume_at(self, steps: int, then: Callable[[], None]) -> None:
        """Begin the next training after so many steps: the task begins as ever, their batches are dropped, `then` is called."""
        self._resume = steps, then

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with self.model.using("first"):  # type: ignore[operator]
            return super().train(*args, **kwargs)

    def eval(self, *args: Any, **kwargs: Any) -> Any:
        step: tuple[Any, Any, Any] = self.mbatch, self.mb_output, self.loss  # type: ignore[has-type]
        with self.model.using("all"):  # type: ignore[operator]
            result = super().eval(*args, **kwargs)
        if self.is_training:  # a plugin evaluates within a step, which goes on
            self.mbatch, self.mb_output, self.loss = step
        return result

    def _before_training_exp(self, **kwargs: Any) -> None:
        self.step = 1
        self.watch.task_begins()
        self._before_train_dataset_adaptation(**kwargs)  # from here to the plugins as Avalanche does
        self.train_dataset_adaptation(**kwargs)
        self._after_train_dataset_adaptation(**kwargs)
        self.make_train_dataloader(**kwargs)
        self.check_model_and_optimizer(**kwargs)
        self._call("before_training_exp", **kwargs)
        self._add_new_weights()
        self._leave_out_frozen()
        for group in self.optimizer.param_groups:  # as a plugin may have set it
            group["initial_lr"] = group["lr"]
        settings = self.task_settings
        self.train_epochs = settings.epochs or 1
        self.dataloader = TaskBatches(
            self.dataloader, self.budgets * settings.iterations if settings.iterations else None
        )
        self.steps = self.train_epochs * len(self.dataloader)
        if settings.epochs or self.budgets > 1:  # of iterations the recipe's own notice has told
            self._tell_of_warmup(settings)
        if self._resume:
            self.dataloader.skip(*self._resume)
            self._resume = None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.settings.precision == "fp16")

    def _tell_of_warmup(self, settings: Train) -> None:
        if said := settings.schedule.shortened(self.steps):
            self.say(f"task {getattr(self.experience, 'task_name', '')}: {said}")

    def _after_training_exp(self, **kwargs: Any) -> None:
        self.learned |= {int(task) for task in self.experience.task_labels}  # type: ignore[union-attr]
        self._call("after_training_exp", **kwargs)
        self._latest = self.optimizer

    def _before_training(self, **kwargs: Any) -> None:
        self._call("before_training", **kwargs)

    def _before_training_epoch(self, **kwargs: Any) -> None:
        self._call("before_training_epoch", **kwargs)

    def _after_training_epoch(self, **kwargs: Any) -> None:
        self._call("after_training_epoch", **kwargs)

    def _before_training_iteration(self, **kwargs: Any) -> None:
        settings, done = self.task_settings, self.clock.train_exp_iterations
        self.step = done + 1
        share = factor(settings.schedule, done, self.steps)
        for group in self.optimizer.param_groups:  # each keeps its ratio to the others
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * share
        self.publish("train/lr", settings.optimizer.lr * share)
        self.watch.step_begins()
        self._call("before_training_iteration", **kwargs)

    def _before_forward(self, **kwargs: Any) -> None:
        self._call("before_forward", **kwargs)
        self.watch.put_back_in_training()

    def _after_training_iteration(self, **kwargs: Any) -> None:
        self._call("after_training_iteration", **kwargs)
        self.watch.step_is_over()
        self.after_step()
        self.step += 1

    def _after_eval_iteration(self, **kwargs: Any) -> None:
        super()._after_eval_iteration(**kwargs)
        self.between_batches()

    def _before_eval_exp(self, **kwargs: Any) -> None:
        super()._before_eval_exp(**kwargs)
        self._scope = self._tasks_in_scope(int(self.experience.task_label))  # type: ignore[union-attr]

    def _tasks_in_scope(self, task: int) -> list[int] | None:
        """The tasks whose classes a test image of this task is told apart among; None for its own alone.

        `seen`: for a learned task all learned ones (class-incremental), for another its own. `all`: all of the stream.
        """
        if self._classes == "all":
            return list(range(len(self.model.prompts)))  # type: ignore[arg-type]
        if self._classes == "seen" and task in self.learned:
            return sorted(self.learned)
        return None

    @property
    def targets(self) -> Tensor:
        """The batch's classes as places among the logits [B]: in a scope of several tasks, their places in the union."""
        y: Tensor = self.mb_y
        if self.is_training or self._scope is None:
            return y
        places = self.model.union(self._scope).places  # type: ignore[operator]
        mine = places[self._scope.index(int(self.experience.task_label))]  # type: ignore[union-attr]
        return torch.tensor(mine, device=y.device)[y]

    def forward(self) -> Tensor:
        with self.autocast():
            if self.is_training or self._scope is None:
                return super().forward()  # type: ignore[no-any-return]
            logits: Tensor = self.model.union_logits(self.mb_x, self._scope)  # type: ignore[operator]
            return logits

    def criterion(self) -> Tensor:
        smoothing = self.settings.label_smoothing if self.is_training else 0.0
        loss = smoothed_cross_entropy(self.mb_output, self.targets.clamp(min=0), smoothing)
        if self.is_training:
            self.publish("train/loss/cross_entropy", loss.detach())
        return loss

    def _after_forward(self, **kwargs: Any) -> None:
        self._call("after_forward", **kwargs)

    def _before_backward(self, **kwargs: Any) -> None:
        self.watch.note_loss("criterion")
        self._call("before_backward", **kwargs)
        self.watch.check_gradient_flows()

    def _after_backward(self, **kwargs: Any) -> None:
        self._call("after_backward", **kwargs)

    def _before_update(self, **kwargs: Any) -> None:
        self._call("before_update", **kwargs)

    def _after_update(self, **kwargs: Any) -> None:
        self._call("after_update", **kwargs)

    def _call(self, event: str, **kwargs: Any) -> None:
        """Call the plugins as Avalanche does, and log what those add to the loss that do not log it themselves."""
        for plugin in self.plugins:
            if not hasattr(plugin, event):
                continue
            if plugin is self.evaluator and event in _LOGGED_AT:
                self._log()
            if not any(plugin is each for each in self.watched) or not overrides(plugin, event):
                getattr(plugin, event)(self, **kwargs)
                continue
            adds = event in ("after_forward", "before_backward") and not isinstance(plugin, Stage)
            before = self.loss.detach().clone() if adds else None  # it may add in place
            self.watch.call(plugin, event, **kwargs)
            if before is not None:
                self.publish(f"train/loss/{_term(plugin)}", (self.loss.detach() - before).sum(), "sum")

    def backward(self) -> None:
        self.scaler.scale(self.loss).backward(  # type: ignore[no-untyped-call]
            retain_graph=self.retain_graph
        )
        self.scaler.unscale_(self.optimizer)  # here, so that plugins that read gradients see true ones
        if self.settings.gradient_clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.gradient_clip)

    def check_loss(self) -> None:
        """Diverged where the loss of this step is not a number, or infinite; MulkiError where a gradient is."""
        try:
            self.watch.check_finite()
        except Exception:
            self._log()
            self.evaluator.before_update(self)  # shows the loggers the terms, which say where it comes from
            raise

    def optimizer_step(self) -> None:
        self.check_loss()
        self.check_weights()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def check_weights(self) -> None:
        """MulkiError where a weight that learns is not in the optimizer."""
        self.watch.check_weights()

    def publish(
        self, tag: str, value: Tensor | float, several: Literal["last", "sum", "mean"] = "last", weight: float = 1.0
    ) -> None:
        """Hand a value to the loggers, at the number of training iterations so far.

        In training that happens at the step's end, once for each tag. several: which value is logged where a tag is
        published several times in one step; the mean is that by `weight`.
        """
        if not self.is_training:
            self._hand_on(tag, value, self.clock.train_iterations)
            return
        key = (tag, self.clock.train_iterations)
        share = weight if several == "mean" else 1.0
        total, weights = self._logged.get(key, (0.0, 0.0)) if several != "last" else (0.0, 0.0)
        self._logged[key] = total + share * value, weights + share if several == "mean" else 1.0

    def _log(self) -> None:
        """Hand on what has been published."""
        logged, self._logged = self._logged, {}
        for (tag, at), (total, weights) in logged.items():
            self._hand_on(tag, total / weights if weights else 0.0, at)

    def _hand_on(self, tag: str, value: Tensor | float, at: int) -> None:
        self.evaluator.publish_metric_value(MetricValue(self, tag, value, at))  # type: ignore[arg-type]

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of a forward in the recipe's precision, also for forwards that a plugin makes."""
        precision = self.settings.precision
        return torch.autocast(self.device.type, dtype=_DTYPES.get(precision), enabled=precision != "fp32")


def _nothing() -> None:
    """What is called where nobody asked for a call."""


def _term(plugin: object) -> str:
    """What a plugin's loss is called in the logs: `ewc` for Avalanche's EWCPlugin."""
    return type(plugin).__name__.removesuffix("Plugin").lower()


def _make_optimizer(model: torch.nn.Module, settings: Optimizer) -> torch.optim.Optimizer:
    """An optimizer of the weights that learn; gains and biases are not decayed, as CLIP was trained."""
    learning = [p for p in model.parameters() if p.requires_grad]
    groups = _groups(learning, settings) or [{"params": [], "lr": settings.lr}]  # for weights that a plugin may add
    if settings.name == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum or 0.0)
    kind = torch.optim.AdamW if settings.name == "adamw" else torch.optim.Adam
    return kind(groups, lr=settings.lr, betas=settings.betas or (0.9, 0.999))


def _groups(weights: Sequence[torch.nn.Parameter], settings: Optimizer) -> list[dict[str, Any]]:
    """Parameter groups of an optimizer, with the learning rate that a schedule starts from."""
    rates = {"lr": settings.lr, "initial_lr": settings.lr}
    groups = [
        {"params": [p for p in weights if p.ndim >= 2], "weight_decay": settings.weight_decay, **rates},
        {"params": [p for p in weights if p.ndim < 2], "weight_decay": 0.0, **rates},
    ]
    return [group for group in groups if group["params"]]
