"""Avalanche's supervised template, with what it lacks: budgets, schedules, precision, and scopes of classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from attrs import evolve
from avalanche.core import BasePlugin
from avalanche.evaluation.metric_results import MetricValue
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from avalanche.training.templates import SupervisedTemplate
from torch import Tensor

from mulki_plugins.losses import smoothed_cross_entropy
from mulki_plugins.models.classifier import ClipClassifier
from mulki_plugins.recipe.schema import Evaluate, Optimizer, Train
from mulki_plugins.stages.stage import Stage
from mulki_plugins.training.loader import TaskBatches
from mulki_plugins.training.schedule import factor


class Diverged(Exception):
    """The loss is not a number, or infinite."""


_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class ContinualTemplate(SupervisedTemplate):
    """Trains by a recipe's `train` and evaluates by its `evaluate`; call `train` with one experience at a time.

    Over Avalanche's own it overrides only: the optimizer (new for each task, of the weights that learn and no others), the
    loader (wrapped for an exact number of iterations, after plugins may have replaced it), the learning rate (set before
    each step), forward, criterion, backward and step (mixed precision, label smoothing, clipping), and the calls of plugins
    that may add to the loss (which is logged for each).
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
        self._silent = [plugin for plugin in plugins if not isinstance(plugin, Stage)]
        self.scaler = torch.amp.GradScaler(device.type, enabled=train.precision == "fp16")

    def make_optimizer(self, **kwargs: Any) -> None:
        """A new optimizer for each task; Avalanche's own would take frozen weights in, and carries Adam's state over."""
        self.optimizer = _make_optimizer(self.model, self.task_settings.optimizer)
        self.optimized_param_id = dict(self.model.named_parameters())

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

    def _before_training_exp(self, **kwargs: Any) -> None:
        self.step = 1
        super()._before_training_exp(**kwargs)
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
        super()._after_training_exp(**kwargs)

    def _before_training_iteration(self, **kwargs: Any) -> None:
        settings, done = self.task_settings, self.clock.train_exp_iterations
        self.step = done + 1
        rate = settings.optimizer.lr * factor(settings.schedule, done, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.publish("train/lr", rate)
        super()._before_training_iteration(**kwargs)

    def _after_training_iteration(self, **kwargs: Any) -> None:
        super()._after_training_iteration(**kwargs)
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
        self._call("before_backward", **kwargs)

    def _call(self, event: str, **kwargs: Any) -> None:
        """Call the plugins as Avalanche does, and log what those add to the loss that do not log it themselves."""
        for plugin in self.plugins:
            if not hasattr(plugin, event):
                continue
            own = getattr(type(plugin), event, None) is not getattr(SupervisedPlugin, event)
            before = self.loss.detach().clone() if own and plugin in self._silent else None  # it may add in place
            getattr(plugin, event)(self, **kwargs)
            if before is not None:
                self.publish(f"train/loss/{_term(plugin)}", (self.loss.detach() - before).sum())

    def backward(self) -> None:
        self.check_loss()
        self.scaler.scale(self.loss).backward(  # type: ignore[no-untyped-call]
            retain_graph=self.retain_graph
        )
        self.scaler.unscale_(self.optimizer)  # here, so that plugins that read gradients see true ones
        if self.settings.gradient_clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.gradient_clip)

    def check_loss(self) -> None:
        """Diverged where the loss of this step is not a number, or infinite."""
        if not torch.isfinite(self.loss).all():
            raise Diverged(f"{float(self.loss.detach().sum()):g}")

    def optimizer_step(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def publish(self, tag: str, value: Tensor | float) -> None:
        """Hand a value to the loggers, at the number of training iterations so far."""
        at = self.clock.train_iterations
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
    groups = [
        {"params": [p for p in learning if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in learning if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.name == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum or 0.0)
    kind = torch.optim.AdamW if settings.name == "adamw" else torch.optim.Adam
    return kind(groups, lr=settings.lr, betas=settings.betas or (0.9, 0.999))
