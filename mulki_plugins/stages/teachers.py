"""The two teachers: the pre-trained model, and the model as it stood before this task."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal

import torch
from attrs import define, field, frozen
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor

from mulki_plugins.models.classifier import ClipClassifier, Features
from mulki_plugins.stages.prototypes import tasks_of, visual_prototypes
from mulki_plugins.stages.stage import classifier_of
from mulki_plugins.types import checked

Rows = Literal["samples", "classes"]
Weigh = Callable[[list[Tensor], Tensor, Rows], Tensor]
"""(logits [B, C] of each teacher, targets [B], what the rows are) -> the share of each teacher for each row [M, B]."""


@define(eq=False)
class Teacher:
    """A frozen model, and what does not change while it teaches one task: its texts and its prototypes."""

    model: ClipClassifier
    forwards: int = 0
    """How often it has encoded a batch, for those who count."""
    prototypes: dict[int, Tensor] = field(factory=dict)
    """By task [C, d]."""
    texts: dict[int, Tensor] = field(factory=dict)
    """By task [C, d], of the training prompt."""

    @torch.no_grad()
    def images(self, x: Tensor) -> Tensor:
        """Unit-norm features [B, d] of a batch."""
        self.forwards += 1
        dtype = next(self.model.clip.visual.parameters()).dtype
        with torch.autocast(x.device.type, enabled=False):
            return self.model.encode_image(x.to(dtype))

    @torch.no_grad()
    def text(self, task: int) -> Tensor:
        """Unit-norm features [C, d] of the task's classes in the training prompt."""
        if task not in self.texts:
            with torch.autocast(self.model.scale.device.type, enabled=False):
                self.texts[task] = self.model.encode_text(task, all_templates=False)
        return self.texts[task]


@frozen(eq=False)
class View:
    """What one teacher says of the samples of one task in the batch."""

    image: Tensor
    """[B, d]"""
    text: Tensor
    """[C, d]"""
    anchors: Tensor
    """Texts [A, d]: the task's own C, and after them those of the other tasks that were asked for."""
    prototypes: Tensor
    """Visual prototypes of the same classes [A, d]; empty where they were not asked for."""


class Teachers(SupervisedPlugin):
    """Holds the teachers, outside the model, so that neither the optimizer nor `.train()` reaches them.

    `initial` is the model as it is before the first task; `previous` the model before the current task. On the first task
    the two share one model, which is forwarded once; each has prototypes of its own. Each model is forwarded once per step,
    however many plugins ask, and only if one does. half: keep them in half precision; `auto` does where the device is a GPU.
    Visual prototypes are computed on first request, once per task, over the task's training set with the evaluation
    transform; those of earlier tasks are kept, as the texts of their classes are (d numbers a class each), nothing else.
    """

    @checked
    def __init__(
        self, *, half: Literal["auto", "always", "never"] = "auto", use: Literal["both", "initial", "previous"] = "both"
    ) -> None:
        super().__init__()
        self.half = half
        self.use = use
        self.initial: Teacher | None = None
        self.previous: Teacher | None = None
        self.weigh: Weigh | None = None
        self.seen: set[int] = set()
        """Tasks whose training has begun."""
        self._batch: Any = None
        self._images: list[Tensor] = []
        self._workers = 0

    @staticmethod
    def of(strategy: Any, plugin: object) -> Teachers:
        """The strategy's Teachers. RuntimeError where it has none."""
        for candidate in strategy.plugins:
            if isinstance(candidate, Teachers):
                return candidate
        raise RuntimeError(f"{type(plugin).__name__} needs the plugin Teachers before it in the strategy's plugins")

    def state_dict(self) -> dict[str, Any]:
        """The prototypes of earlier tasks; the models are the pre-trained one and that before the task."""
        if self.initial is None or self.previous is None:
            return {"seen": [], "initial": {}, "previous": {}}
        known = {"initial": dict(self.initial.prototypes), "previous": dict(self.previous.prototypes)}
        return {"seen": sorted(self.seen), **known}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Called when `before_training` has noted the pre-trained model."""
        if self.initial is None:
            raise RuntimeError("Teachers: before_training comes first, with the pre-trained model in the strategy")
        self.seen = set(state["seen"])
        self.initial.prototypes = dict(state["initial"])
        if self.previous is None:
            self.previous = self._like_initial()
        self.previous.prototypes = dict(state["previous"])

    def before_training(self, strategy: Any, **kwargs: Any) -> None:
        if self.initial is None:
            self.initial = self._frozen(classifier_of(strategy, self))

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        assert self.initial is not None
        if not self.seen:
            self.previous = self._like_initial()
        else:
            known = self.previous.prototypes if self.previous else {}
            self.previous = self._frozen(classifier_of(strategy, self))
            self.previous.prototypes = dict(known)
        for teacher in (self.initial, self.previous):  # a task that comes again may bring other images
            for task in tasks_of(strategy.adapted_dataset):
                teacher.prototypes.pop(task, None)
        self.seen |= tasks_of(strategy.adapted_dataset)
        self._batch = None
        self._workers = int(kwargs.get("num_workers") or 0)

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        self._batch, self._images = None, []

    @property
    def active(self) -> list[Teacher]:
        """The teachers of the current task: one on the first task, else those that `use` names."""
        if self.initial is None or self.previous is None:
            raise RuntimeError("Teachers: there are none before the first task's training has begun")
        if self.use == "initial" or self.initial.model is self.previous.model:
            return [self.initial]
        return [self.previous] if self.use == "previous" else [self.initial, self.previous]

    def images(self, strategy: Any) -> list[Tensor]:
        """Each active teacher's features [B, d] of the strategy's current batch, encoded once per step."""
        if self._batch is not strategy.mbatch:
            self._images = [teacher.images(strategy.mb_x) for teacher in self.active]
            self._batch = strategy.mbatch
        return self._images

    def views(
        self, strategy: Any, features: Features, task: int, rows: Tensor, *, seen: bool = False, visual: bool = True
    ) -> list[View]:
        """What each active teacher says of these rows of the batch, in the dtype of the student's features.

        seen: with the classes of every other task that has been learned among anchors and prototypes. visual: with
        visual prototypes; those of an earlier task are as the teachers of that time saw its images.
        """
        dtype = features.image.dtype
        tasks = [task, *sorted(self.seen - {task})] if seen else [task]
        found = []
        for teacher, z in zip(self.active, self.images(strategy), strict=True):
            texts = [teacher.text(each).to(dtype) for each in tasks]
            prototypes = [self.prototypes(strategy, teacher, each) for each in tasks] if visual else []
            found.append(
                View(
                    image=z[rows].to(dtype),
                    text=texts[0],
                    anchors=torch.cat(texts),
                    prototypes=torch.cat(prototypes).to(dtype) if visual else z.new_zeros(0),
                )
            )
        return found

    def class_views(self, strategy: Any, tasks: list[int], places: Tensor) -> list[View]:
        """What each active teacher says of single classes of these tasks, by their places among all of those classes.

        Without images. The prototypes are the previous teacher's for each of them, so that they are asked the same.
        """
        assert self.previous is not None
        prototypes = torch.cat([self.prototypes(strategy, self.previous, task) for task in tasks])
        found = []
        for teacher in self.active:
            anchors = torch.cat([teacher.text(task).to(prototypes) for task in tasks])
            nothing = anchors.new_zeros(0)
            found.append(View(image=nothing, text=anchors[places], anchors=anchors, prototypes=prototypes))
        return found

    def prototypes(self, strategy: Any, teacher: Teacher, task: int) -> Tensor:
        """The teacher's visual prototypes [C, d] of a task; earlier tasks' stay as that task left them."""
        if task not in teacher.prototypes:
            dataset = strategy.adapted_dataset
            tasks = tasks_of(dataset) | {task}
            stoppable = getattr(strategy, "between_batches", None)  # not every Avalanche strategy has it
            [found] = visual_prototypes(
                [teacher.model], dataset, tasks, num_workers=self._workers, after_batch=stoppable
            )
            for other in (
                teacher,
                self.initial,
                self.previous,
            ):  # on the first task both, from one reading of the images
                if other is not None and other.model is teacher.model:
                    other.prototypes = {each: p.clone() for each, p in found.items()} | other.prototypes
        return teacher.prototypes[task]

    def weights(self, logits: list[Tensor], targets: Tensor, rows: Rows = "samples") -> Tensor:
        """The share of each teacher for each row, [M, B]: uniform unless a plugin set `weigh`."""
        if self.weigh is None or len(logits) == 1:
            return logits[0].new_full((len(logits), len(targets)), 1 / len(logits))
        return self.weigh(logits, targets, rows)

    def _like_initial(self) -> Teacher:
        """A teacher that shares the pre-trained model and its texts, and has no prototypes yet."""
        assert self.initial is not None
        return Teacher(self.initial.model, texts=self.initial.texts)

    def _frozen(self, model: ClipClassifier) -> Teacher:
        teacher = copy.deepcopy(model).eval().requires_grad_(False)
        teacher.templates = (
            "first"  # it teaches in the training prompt, whatever the model was doing when it was copied
        )
        device = teacher.scale.device
        if self.half == "always" or (self.half == "auto" and device.type == "cuda"):
            teacher.to(torch.float16 if device.type == "cuda" else torch.bfloat16)
        return Teacher(teacher)
