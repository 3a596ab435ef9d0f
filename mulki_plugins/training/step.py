"""A step of training, in the order in which Avalanche calls its parts:

    before_training_iteration       the learning rate follows the schedule
    before_forward, forward         mb_output = model(mb_x, mb_task_id)
    after_forward                   stages add their terms: loss = loss + weight · term
    criterion                       loss = loss + cross-entropy
    before_backward, backward
    after_backward
    before_update, optimizer_step, after_update
    after_training_iteration        values go to the loggers, a checkpoint is written if one is due

With `accumulate: n` the lines from before_forward to backward happen n times, for one part of the batch each. On a GPU no
step waits for the device: what it computed is read every ten steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from avalanche.core import BasePlugin
from avalanche.evaluation.metric_results import MetricValue
from avalanche.training.plugins import EvaluationPlugin
from torch import Tensor

from mulki_plugins.losses import smoothed_cross_entropy
from mulki_plugins.models.precision import autocast, matrix_products
from mulki_plugins.ranks import collectives
from mulki_plugins.ranks.draws import set_rows
from mulki_plugins.recipe.schema import Evaluate, Train
from mulki_plugins.stages.statistics import evaluating, unobserved
from mulki_plugins.training.compilation import CompiledTowers
from mulki_plugins.training.evaluation import ScopedEvaluation
from mulki_plugins.training.finite import overrides
from mulki_plugins.training.groups import LABEL, Grouping, all_weights, make_optimizer, step_unless
from mulki_plugins.training.logbook import Journal, Reduction
from mulki_plugins.training.micro_batches import Labels, MicroBatch, MicroBatches
from mulki_plugins.training.over_ranks import SHARE
from mulki_plugins.training.schedule import factor, for_task
from mulki_plugins.training.step_checks import StepChecks

_IN_AN_EVALUATION = (
    "before_eval", "before_eval_dataset_adaptation", "after_eval_dataset_adaptation", "before_eval_exp",
    "before_eval_iteration", "before_eval_forward",
)  # fmt: skip
"""Events at which a plugin may change what an evaluation encodes."""


def calls(event: str) -> Callable[..., None]:
    """A method that only calls the plugins."""
    return lambda self, **kwargs: self._call(event, **kwargs)


def joins_ranks(plugin: object) -> bool:
    return bool(getattr(plugin, "joins_ranks", False))


class StepTemplate(ScopedEvaluation):
    """Avalanche's supervised template with a step of our own: mixed precision, parts of a batch, clipping, checks, values."""

    optimizer: torch.optim.Optimizer
    mbatch: Any
    mb_output: Any
    loss: Any

    def __init__(
        self, *, train: Train, evaluate: Evaluate, device: torch.device, plugins: Sequence[BasePlugin[Any]],
        evaluator: EvaluationPlugin, **arguments: Any,
    ) -> None:  # fmt: skip
        super().__init__(
            optimizer=make_optimizer(
                all_weights(arguments["model"], plugins), train.optimizer, Grouping(train.groups, arguments["model"])
            ),
            criterion=smoothed_cross_entropy,
            train_mb_size=train.batch_size,
            train_epochs=train.epochs or 1,
            evaluate=evaluate,
            device=device,
            plugins=list(plugins),
            evaluator=evaluator,
            **arguments,
        )
        self.settings = train
        self.stack = list(plugins)
        """The recipe's plugins; `self.plugins` also holds Avalanche's own."""
        self.checks = StepChecks(self)
        self.scaler = torch.amp.GradScaler(device.type, enabled=train.precision == "fp16")
        self.steps = 0
        """The number of steps of the current task."""
        self.idle = False
        """Whether no weight learns in the current task: its steps then have neither a backward pass nor an update."""
        self.step = 1
        """The current step, from when its batch is fetched until its checkpoint is written."""
        self.after_step: Callable[[], None] = lambda: None
        """Called after each step of training, after all plugins."""
        self.wishes: Callable[[], list[int]] = list
        """What this rank asks of the end of the step, as numbers."""
        self.agreed: list[int] = []
        """For each wish the largest number among the ranks; empty on one process."""
        self.say: Callable[[str], None] = lambda text: None
        """Called with notices about a task's training."""
        self.journal = Journal(evaluator, self._first_failure, ahead=10 if device.type == "cuda" else 1)
        """On a GPU values and checks wait for ten steps, so that no step waits for them."""
        self.towers: CompiledTowers | None = None
        if train.compile:
            self.towers = CompiledTowers(device, lambda text: self.say(text), graphs=train.accumulate == 1)
        self._labels = Labels()
        self._batches = MicroBatches([], self._labels)
        self._part: MicroBatch | None = None

    def all_weights(self) -> dict[str, torch.nn.Parameter]:
        """The weights that can be trained, by name: the model's, and those that plugins hold themselves."""
        return all_weights(self.model, self.stack, self.checks.names)

    @property
    def what_learns(self) -> str:
        """What this training is about, for a message."""
        return f"task {getattr(self.experience, 'task_name', '')}"

    @property
    def task_settings(self) -> Train:
        """The recipe's `train`, with what `per_task` sets for the current task."""
        return for_task(self.settings, getattr(self.experience, "task_name", None))

    def _before_training_iteration(self, **kwargs: Any) -> None:
        settings, done = self.task_settings, self.clock.train_exp_iterations
        self.step = done + 1
        share = factor(settings.schedule, done, self.steps)
        for group in self.optimizer.param_groups:  # each keeps its ratio to the others
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * share
            if LABEL in group:
                self.publish(f"train/lr/{group[LABEL]}", group["lr"])
        self.publish("train/lr", settings.optimizer.lr * share)
        self.checks.step_begins()
        self._call("before_training_iteration", **kwargs)

    def _unpack_minibatch(self) -> None:
        """Move the batch to the device. The host knows its task ids before, so nobody has to ask the device for them."""
        labels = self.mbatch[-1]
        known = labels.tolist() if labels.device.type == "cpu" else None
        super()._unpack_minibatch()
        self._labels, self._part = Labels(self.mbatch[-1], known), None

    def _before_forward(self, **kwargs: Any) -> None:
        """All parts of the batch but the last one pass here, up to their gradients; the template goes on with the last."""
        if self.towers:
            self.towers.step_begins()
        self._batches = MicroBatches(self.mbatch, self._labels)
        for part in self._batches.split(self.settings.accumulate):
            self._part, self.mbatch = part, part.batch
            set_rows(part.rows)
            self._call("before_forward", **kwargs)
            self.checks.restore_training_mode()
            if part.last:
                return
            self.mb_output = self.forward()
            self._after_forward(**kwargs)
            self.loss += self.criterion()
            self._before_backward(**kwargs)
            self.backward()
            self.loss = self._make_empty_loss()

    def forward(self) -> Tensor:
        """Logits [B, C] over the classes of each sample's task, or over those of the scope in an evaluation."""
        with self.autocast(), self.encoded_once():
            if (logits := self.scope_logits()) is not None:
                return logits
            self.model.batch_labels = (self._labels if self._part is None else self._part.labels).of(self.mbatch)
            self.model.batch_tasks = self._tasks_of_ranks()
            try:
                return super().forward()  # type: ignore[no-any-return]  # Avalanche has no type for it
            finally:
                self.model.batch_labels, self.model.batch_tasks = None, ()

    def _tasks_of_ranks(self) -> list[int]:
        """The tasks of all ranks' samples, if a stage computes its term with the other ranks."""
        if collectives.world() == 1 or not self.is_training or not any(joins_ranks(plugin) for plugin in self.stack):
            return []
        tasks = sorted(set(map(int, self.mb_task_id.tolist())))
        return sorted({task for each in collectives.of_all(tasks) for task in each})

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of a forward in the recipe's precision, also for a plugin's own forwards."""
        return autocast(self.settings.precision, self.device)

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
        if not self.idle:
            self.checks.check_gradient_flows()

    def backward(self) -> None:
        """The gradients of the batch, or those of a part of it, times its share, on top of those of the parts before."""
        part, batches = self._part, self._batches
        share = collectives.factor() * (1.0 if part is None else part.share)
        if not self.idle:
            loss = self.loss if share == 1 else share * self.loss
            self.scaler.scale(loss).backward(retain_graph=self.retain_graph)
        if part is not None and part.share < 1:
            batches.add(part, self.mb_output, self.loss)
            if not part.last:
                return
            self.mbatch, self.mb_output, self.loss = batches.batch, batches.output, batches.loss
            set_rows(batches.rows)
            self._part = None
        if self.towers:
            self.towers.step_ends()
        if collectives.several():
            self._join_ranks()
        if self.idle:
            return
        self.scaler.unscale_(self.optimizer)  # here, so that plugins read the true gradients
        if self.settings.gradient_clip:  # on a GPU, torch computes the norm of all gradients at once
            torch.nn.utils.clip_grad_norm_(self.checks.weights().values(), self.settings.gradient_clip)

    def _join_ranks(self) -> None:
        """The loss and the gradients of all ranks, and what they agree on: each then ends the step as one process would."""
        self.agreed = collectives.largest_of_all(self.wishes())
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        weights = dict.fromkeys([*self.checks.weights().values(), *held])
        collectives.sum_gradients([weight for weight in weights if weight.requires_grad])
        self.checks.own_loss, self.loss = self.loss.detach(), collectives.weighted_sum(self.loss.detach())
        for adapter in self.model.adapters:
            adapter.join_ranks(self.model.clip)

    _after_backward = calls("after_backward")
    _before_update = calls("before_update")

    def optimizer_step(self) -> None:
        """Change the weights, unless the step is not finite: then it ends the run, at once or when the device is read."""
        if not self.idle:
            with unobserved():
                self._change_weights()

    def _change_weights(self) -> None:
        if self.journal.ahead == 1 or not self.checks.can_wait:
            self.check_loss()
            self.check_weights()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            return
        left_out = self.checks.note_finite()
        self.journal.note_left_out(self.clock.train_iterations, left_out)
        self.check_weights()
        if self.scaler.is_enabled():  # it leaves out a step that overflowed
            self.scaler.step(self.optimizer)
            self.scaler.update()
            return
        step_unless(self.optimizer, left_out)

    def check_loss(self) -> None:
        """Diverged if the loss of this step or of one before is not finite, MulkiError if a gradient is not."""
        self.settle()
        try:
            self.checks.check_finite()
        except Exception:
            self.journal.settle(partial=True)  # the loggers see the terms, which show where it comes from
            raise

    def check_weights(self) -> None:
        """MulkiError if a weight that requires a gradient is not in the optimizer."""
        self.checks.check_weights()

    _after_update = calls("after_update")

    def _after_training_iteration(self, **kwargs: Any) -> None:
        self._call("after_training_iteration", **kwargs)
        self.checks.step_ends()
        collectives.end_step()
        set_rows(0)
        self.after_step()
        self.step += 1

    def eval(self, *args: Any, **kwargs: Any) -> Any:
        self.settle()
        step: tuple[Any, ...] = self.mbatch, self.mb_output, self.loss, self._labels, self._batches, self._part
        takes_part = any(overrides(plugin, event) for plugin in self.stack for event in _IN_AN_EVALUATION)
        compiled = self.is_training and self.towers is not None  # within a step a tower computes in another way
        with evaluating(self.model):
            self.kept_features.begin(self.model, keep=not takes_part and not compiled)
        with self.model.using("all"), matrix_products(self.settings.precision):
            result = super().eval(*args, **kwargs)
        if self.is_training:  # a plugin evaluates within a step, which then goes on
            self.mbatch, self.mb_output, self.loss, self._labels, self._batches, self._part = step
        return result

    # what the loggers get

    def publish(self, tag: str, value: Tensor | float, several: Reduction = "last", weight: float = 1.0) -> None:
        """Give a value to the loggers, at the number of training iterations so far.

        In training they get it at the end of the step or some steps later, see `settle`, once per tag. several: what
        becomes of several values of a step; the mean is weighted by `weight`. A term of the loss of a part of the batch
        counts by the part's share.
        """
        at = self.clock.train_iterations
        if not self.is_training:
            self.evaluator.publish_metric_value(MetricValue(self, tag, value, at))
            return
        if self._part is not None and self._part.share < 1 and tag.startswith("train/loss/"):
            value, several = self._part.share * value, "sum"
        self.journal.log.add(tag, at, value, several, weight)

    def settle(self) -> None:
        """Read what the last steps left on the device, in one copy: their values go to the loggers.

        Called every `ahead` steps, before a checkpoint is written, and at a task's end. Diverged or MulkiError if one of the
        steps was not finite; the weights are then those before it.
        """
        self.journal.settle()

    def _end_step(self, event: str) -> None:
        """Values of the step join those that wait, or all go to the loggers, which the evaluator calls next."""
        if event == "after_training_iteration":
            correct = (self.mb_output.detach().argmax(1) == self.mb_y).float().mean()
            self.publish("train/accuracy", 100 * correct)
            self.publish("train/loss/total", self.loss.detach())
            if collectives.several():
                self.journal.log.add(SHARE, self.clock.train_iterations, collectives.factor(), "last")
        self.journal.end_step(read=event != "after_training_iteration")

    def _first_failure(self, left_out: list[int]) -> tuple[int, Exception] | None:
        failure = self.checks.first_failure(left_out)
        if failure is None:
            return None
        at, self.step, error = failure
        return at, error
