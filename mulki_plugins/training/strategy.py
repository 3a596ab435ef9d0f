"""The Avalanche strategy: its supervised template with budgets, schedules, and a stack of plugins that is checked.

The class reads in the order in which Avalanche calls it; `training/step.py` has the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from avalanche.benchmarks.utils.data_loader import MultiDatasetDataLoader
from avalanche.training.supervised import Cumulative, JointTraining

from mulki_plugins.models.precision import matrix_products
from mulki_plugins.ranks.draws import draw_dropout_for_samples
from mulki_plugins.recipe.schema import Base
from mulki_plugins.stages.protocols import learning_weights
from mulki_plugins.stages.stage import Stage
from mulki_plugins.stages.statistics import TaskImages
from mulki_plugins.stages.teachers import Teachers
from mulki_plugins.training.batches import TaskBatches
from mulki_plugins.training.finite import overrides
from mulki_plugins.training.groups import (
    Grouping,
    add_new_weights,
    leave_out_frozen,
    make_optimizer,
    move_plugin_weights,
)
from mulki_plugins.training.step import StepTemplate, calls

_LOGGED_AT = ("before_training_exp", "after_training_iteration", "after_training_exp")
"""Events at which the loggers get the values published so far."""

_IN_AN_EPOCH = tuple(
    f"{when}_{event}"
    for when in ("before", "after")
    for event in ("training_epoch", "training_iteration", "forward", "backward", "update")
)

_LEAST_SCALE = 2.0**-149
"""The smallest number above 0 in single precision: a scale that overflows again and again ends at 0."""


class ContinualTemplate(StepTemplate):
    """Trains by a recipe's `train` and evaluates by its `evaluate`; call `train` with one experience at a time.

    It overrides Avalanche's own in these: the optimizer (new for each task, of the weights that require gradients), the
    data loader (wrapped for an exact number of batches, after plugins may have replaced it), the learning rate, forward,
    criterion, backward and step (mixed precision, label smoothing, clipping), the prompt templates of the model (the first
    one in training, all in evaluation), and the calls of plugins (their terms are logged, and checked by StepChecks). If no
    weight requires a gradient, a step ends before its backward pass, and without a plugin that sees steps there are none.
    """

    dataloader: Any

    def __init__(self, **arguments: Any) -> None:
        """The keyword arguments are `model`, `train`, `evaluate`, `device`, `plugins` and `evaluator`."""
        super().__init__(**arguments)
        self._own_optimizer = self._latest_optimizer = self.optimizer
        self._scale = self.scaler.get_scale()
        """The loss's scale in half precision when the task began."""
        self.budgets = 1
        """The number of tasks whose iterations one experience gets."""
        self._resume: tuple[int, Callable[[], None]] | None = None

    # a task begins

    def train(self, *args: Any, **kwargs: Any) -> Any:
        compiled = self.towers.stepping() if self.towers else nullcontext()
        with self.model.using("first"), matrix_products(self.settings.precision), compiled:
            try:
                return super().train(*args, **kwargs)
            except BaseException as error:
                self.journal.settle_after(error)
                raise

    _before_training = calls("before_training")
    _before_training_epoch = calls("before_training_epoch")
    _after_training_epoch = calls("after_training_epoch")

    def resume_at(self, steps: int, then: Callable[[], None]) -> None:
        """Begin the next training after this many steps: the task begins as usual, their batches are skipped, `then` runs."""
        self._resume = steps, then

    def _before_training_exp(self, **kwargs: Any) -> None:
        self.step = 1
        self.checks.task_begins()
        for task in self._beginning():
            self.model.before_task(task)
        draw_dropout_for_samples(self.model.clip.visual)
        self._before_train_dataset_adaptation(**kwargs)  # from here to the plugins as Avalanche does
        self.train_dataset_adaptation(**kwargs)
        self._after_train_dataset_adaptation(**kwargs)
        self._teach_routes(int(kwargs.get("num_workers") or 0))
        self.make_train_dataloader(**kwargs)
        self.check_model_and_optimizer(**kwargs)
        self._call("before_training_exp", **kwargs)
        if self.optimizer is self._own_optimizer:  # a plugin may have put another in its place
            self.model.to(self.device)
            move_plugin_weights(self.stack, self.device)
            weights, grouping = self.all_weights(), Grouping(self.settings.groups, self.model)
            grouping.check(weights)
            add_new_weights(self.optimizer, weights, self._known, self.task_settings.optimizer, grouping)
            leave_out_frozen(self.optimizer)
            self.optimized_param_id = dict(self.model.named_parameters())
        for group in self.optimizer.param_groups:  # a plugin may have set other rates
            group["initial_lr"] = group["lr"]
        settings = self.task_settings
        self.train_epochs = settings.epochs or 1
        self.idle = not self._known and not learning_weights(self.model)  # else a plugin has frozen what was to learn
        budget = self.budgets * settings.iterations if settings.iterations else None
        self.dataloader = TaskBatches(self.dataloader, 0 if self.idle and not self._is_watched() else budget)
        self.steps = self.train_epochs * len(self.dataloader)
        unknown = settings.epochs or self.budgets > 1  # a number of iterations is known from the recipe, which says it
        if unknown and (notice := settings.schedule.shortened(self.steps)):
            self.say(f"{self.what_learns}: {notice}")
        if self._resume:
            self.dataloader.skip(*self._resume)
            self._resume = None
        self._scale = self.scaler.get_scale()
        if self.towers:
            teachers = [plugin for plugin in self.stack if isinstance(plugin, Teachers)]
            self.towers.compile(self.model, [each.model for plugin in teachers for each in plugin.active])

    def _teach_routes(self, workers: int) -> None:
        """Let an adapter with routes learn to recognise the images of each task that begins."""
        if (adapter := self.model.routes.adapter) is None:
            return
        for experience in self._learned_now():
            dataset, task = experience.dataset, int(experience.task_label)
            images = TaskImages.of(self, dataset, task, adapter, workers=workers)
            adapter.learn_route(self.model.clip, task, images.features())

    def _is_watched(self) -> bool:
        """Whether a plugin of the stack has a callback within the epochs, so that it sees batches though nothing learns."""
        return any(overrides(plugin, event) for plugin in self.stack for event in _IN_AN_EPOCH)

    def _beginning(self) -> list[int]:
        """The labels of the tasks that begin with this training."""
        return sorted({int(task) for task in self.experience.task_labels})

    def make_optimizer(self, **kwargs: Any) -> None:
        """A new optimizer for each task. Avalanche's would train frozen weights and carry Adam's state over."""
        if self.optimizer is not self._latest_optimizer:
            self.checks.warn("the recipe's optimizer replaces the one that a plugin set before the task")
        move_plugin_weights(self.stack, self.device)
        weights, grouping = self.all_weights(), Grouping(self.settings.groups, self.model)
        self.optimizer = make_optimizer(weights, self.task_settings.optimizer, grouping, fused=self.journal.ahead > 1)
        self._own_optimizer = self._latest_optimizer = self.optimizer
        self._known = [p for p in weights.values() if p.requires_grad]
        self.optimized_param_id = dict(self.model.named_parameters())

    # a task ends

    def _after_training_exp(self, **kwargs: Any) -> None:
        self.settle()
        if (scale := self.scaler.get_scale()) < self._scale:
            least = halvings(self._scale, scale)
            what = f"fp16 overflowed, and at least {least} of {self.steps} steps were left out"
            self.say(
                f"{self.what_learns}: {what}, until a smaller scale of the loss fitted; later tasks start from that"
            )
        self.learned |= {int(task) for task in self.experience.task_labels}
        self._call("after_training_exp", **kwargs)
        for task in self._beginning():
            self.model.after_task(task)
        self._teach_head(int(kwargs.get("num_workers") or 0))
        self._latest_optimizer = self.optimizer

    def _teach_head(self, workers: int) -> None:
        """Let the head learn from each task's own images, through the model as the task leaves it."""
        if not self.model.head.learns_from_images():
            return
        for experience in self._learned_now():
            dataset, task = experience.dataset, int(experience.task_label)
            self.model.head.after_task(task, TaskImages.of(self, dataset, task, self.model.head, workers=workers))

    def _learned_now(self) -> list[Any]:
        """The experiences whose tasks this training is about."""
        return [self.experience]

    def _call(self, event: str, **kwargs: Any) -> None:
        """Call the plugins as Avalanche does, and log the terms of those that do not log them themselves."""
        for plugin in self.plugins:
            if not hasattr(plugin, event):
                continue
            if plugin is self.evaluator and event in _LOGGED_AT:
                self._end_step(event)
            if not any(plugin is each for each in self.stack) or not overrides(plugin, event):
                getattr(plugin, event)(self, **kwargs)
                continue
            adds = event in ("after_forward", "before_backward") and not isinstance(plugin, Stage)
            before = self.loss.detach().clone() if adds else None  # it may add in place
            self.checks.call(plugin, event, **kwargs)
            if before is not None:
                term = type(plugin).__name__.removesuffix("Plugin").lower()  # `ewc` for Avalanche's EWCPlugin
                self.publish(f"train/loss/{term}", (self.loss.detach() - before).sum(), "sum")


class PooledTemplate(ContinualTemplate):
    """Draws batches from the images of several tasks as if they were one data set.

    Avalanche's batches have as many images of each task, so that those of a small task come again and again, an epoch is
    longer, and a batch must be as large as there are tasks.
    """

    def make_train_dataloader(
        self, num_workers: int = 0, shuffle: bool = True, pin_memory: bool | None = None, persistent_workers: bool = False,
        drop_last: bool = False, **kwargs: Any,
    ) -> None:  # fmt: skip
        options = self._obtain_common_dataloader_parameters(
            num_workers=num_workers, shuffle=shuffle, pin_memory=pin_memory, persistent_workers=persistent_workers,
            drop_last=drop_last,
        )  # fmt: skip
        self.dataloader = MultiDatasetDataLoader([self.adapted_dataset], [self.train_mb_size], **options)


class CumulativeTemplate(PooledTemplate, Cumulative):
    """Each task trains on the images of all tasks so far, mixed, with the budget of one task."""


class JointTemplate(PooledTemplate, JointTraining):
    """Trains once, on the whole stream, with the budget of all its tasks."""

    def _before_training_exp(self, **kwargs: Any) -> None:
        self.budgets = len(self._experiences)
        super()._before_training_exp(**kwargs)

    def _beginning(self) -> list[int]:
        return sorted({int(task) for experience in self._experiences for task in experience.task_labels})

    @property
    def what_learns(self) -> str:
        return "all tasks"

    def _learned_now(self) -> list[Any]:
        return list(self._experiences)

    def _after_training_exp(self, **kwargs: Any) -> None:
        super()._after_training_exp(**kwargs)
        self.learned |= {int(task) for experience in self._experiences for task in experience.task_labels}


TEMPLATES: dict[Base, type[ContinualTemplate]] = {
    "naive": ContinualTemplate,
    "cumulative": CumulativeTemplate,
    "joint": JointTemplate,
    "none": ContinualTemplate,
}


def halvings(before: float, after: float) -> int:
    """How often the loss's scale was halved, once for each step that overflowed."""
    return round(math.log2(before / max(after, _LEAST_SCALE)))
