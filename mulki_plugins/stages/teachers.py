"""The two teachers: the pre-trained model, and the model as it stood before this task."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from attrs import define, field, frozen
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor

from mulki_plugins.errors import MulkiError
from mulki_plugins.models.classifier import ClipClassifier
from mulki_plugins.models.fixed_images import image_tower_is_fixed, image_weights, same_image_tower
from mulki_plugins.stages.protocols import Strategy, classifier_of, tasks_of
from mulki_plugins.stages.prototypes import visual_prototypes
from mulki_plugins.stages.statistics import sampled
from mulki_plugins.types import Count, checked

if TYPE_CHECKING:
    from mulki_plugins.stages.stage import Part

Rows = Literal["samples", "classes"]
Weigh = Callable[[list[Tensor], Tensor, Rows, Sequence[Tensor]], Tensor]
"""(logits [N, C] of each of M teachers, targets [N], what the N rows are, each teacher's features [N, d]) -> weights [M, N]."""


@define(eq=False)
class Teacher:
    """A frozen model with its prototypes and the text features of its classes."""

    model: ClipClassifier
    forwards: int = 0
    """The number of image batches it has encoded."""
    prototypes: dict[int, Tensor] = field(factory=dict)
    """P [C, d] by task."""
    texts: dict[int, Tensor] = field(factory=dict)
    """t [C, d] by task, from the training prompt."""
    _joined: dict[Any, tuple[list[tuple[Tensor, int]], Tensor]] = field(factory=dict)

    @torch.no_grad()
    def images(self, x: Tensor) -> Tensor:
        """Unit-norm features [B, d] of a batch."""
        self.forwards += 1
        dtype = next(self.model.clip.visual.parameters()).dtype
        with torch.autocast(x.device.type, enabled=False):
            return self.model.encode_image(x.to(dtype))

    @torch.no_grad()
    def text(self, task: int) -> Tensor:
        """Unit-norm features [C, d] of the task's classes in the training prompt.

        Each task's sentences pass the text tower once, by themselves: together with others their last digits would depend
        on which tasks were asked for before, and a resumed run would differ.
        """
        if task not in self.texts:
            with torch.autocast(self.model.scale.device.type, enabled=False):
                self.texts[task] = self.model.encode_text(task, all_templates=False)
        return self.texts[task]

    def forget_joined(self) -> None:
        """Drop what `joined` keeps, when a task begins."""
        self._joined.clear()

    def joined(self, what: object, parts: list[Tensor], dtype: torch.dtype) -> Tensor:
        """The parts one after the other [A, d], kept from step to step until one of them changes. what: names them."""
        versions = [(part, part._version) for part in parts]
        kept = self._joined.get((what, dtype))
        if kept is None or not _same(kept[0], versions):
            kept = self._joined[what, dtype] = versions, torch.cat(parts).to(dtype)
        return kept[1]


@frozen(eq=False)
class View:
    """One teacher's features of the samples of one task, and what they are compared with."""

    image: Tensor
    """z^m [B, d]"""
    text: Tensor
    """t^m [C, d]"""
    anchors: Tensor
    """Textual prototypes [A, d]: t^m of the task's own C classes, then of those of other tasks, if requested."""
    prototypes: Tensor
    """Visual prototypes P^m [A, d] of the same classes; empty if not requested."""


class Teachers(SupervisedPlugin):
    """Holds the pre-trained model and the model before this task, frozen, and forwards each once per step.

    `initial` is the model before the first task, `previous` the model before the current one. On the first task the two
    share one model, but each has its own prototypes. They are not submodules of the model, so neither the optimizer nor
    `.train()` reaches them. A model is forwarded at most once per step, however many plugins ask for its features. A teacher
    whose image tower is still the student's is not forwarded: it takes the student's features, also in mixed precision.
    Visual prototypes are computed on request, once per task, over its training set. Of earlier tasks only prototypes and
    text features are kept, d numbers each per class.

    Args:
        half: Keep the teachers in half precision; `auto` does so on a GPU.
        use: The teachers that teach: the pre-trained model (`initial`), the model before the task (`previous`), or both.
        images_per_class: Training images of each class that the visual prototypes are the mean of, drawn with a fixed seed;
            null for all.
    """

    per_sample = True
    paper = "arXiv 2411.06764"

    @checked
    def __init__(
        self,
        *,
        half: Literal["auto", "always", "never"] = "auto",
        use: Literal["both", "initial", "previous"] = "both",
        images_per_class: Count | None = None,
    ) -> None:
        super().__init__()
        self.half = half
        self.use = use
        self.images_per_class = images_per_class
        self.initial: Teacher | None = None
        self.previous: Teacher | None = None
        self.weigh: Weigh | None = None
        """Set by a plugin that weighs the teachers."""
        self.seen: set[int] = set()
        """Tasks whose training has begun."""
        self._batch: Any = None
        self._images: list[Tensor] = []
        self._shared: dict[int, tuple[tuple[int, ...], bool]] = {}
        """For each teacher of this task whether its image tower was the student's, and at which state of that."""
        self._workers = 0

    @staticmethod
    def of(strategy: Strategy, plugin: object) -> Teachers:
        """The strategy's Teachers. RuntimeError if it has none; `plugin` is the one that needs them."""
        for candidate in strategy.plugins:
            if isinstance(candidate, Teachers):
                return candidate
        raise RuntimeError(f"{type(plugin).__name__} needs the plugin Teachers before it in the strategy's plugins")

    def require(self, use: Literal["both", "previous"], name: str) -> None:
        """MulkiError if the teachers that the plugin of this name compares with do not teach."""
        if self.use not in ("both", use):
            which = "both teachers" if use == "both" else "the previous teacher"
            what = f"{name} needs {which}, and $.strategy.teachers.use is {self.use}"
            raise MulkiError(what, "type --set strategy.teachers.use=both")

    def before_training(self, strategy: Strategy, **kwargs: Any) -> None:
        if self.initial is None:
            self.initial = self._frozen(classifier_of(strategy, self))

    def before_training_exp(self, strategy: Strategy, **kwargs: Any) -> None:
        assert self.initial is not None
        if not self.seen:
            self.previous = self._like_initial()
        else:
            prototypes = dict(self.previous.prototypes) if self.previous else {}
            self.previous = self._frozen(classifier_of(strategy, self))
            self.previous.prototypes = prototypes
        tasks = tasks_of(strategy.adapted_dataset)
        for teacher in (self.initial, self.previous):  # a repeated task may bring other images
            for task in tasks:
                teacher.prototypes.pop(task, None)
            teacher.forget_joined()
        self.seen |= tasks
        self._batch, self._shared = None, {}
        self._workers = int(kwargs.get("num_workers") or 0)

    def after_training_iteration(self, strategy: Strategy, **kwargs: Any) -> None:
        self._batch, self._images = None, []

    @property
    def active(self) -> list[Teacher]:
        """The teachers of the current task: one on the first task, then those selected by `use`."""
        if self.initial is None or self.previous is None:
            raise RuntimeError("Teachers: there are none before the first task's training has begun")
        if self.use == "initial" or self.initial.model is self.previous.model:
            return [self.initial]
        return [self.previous] if self.use == "previous" else [self.initial, self.previous]

    def images(self, strategy: Strategy) -> list[Tensor]:
        """Each active teacher's features [B, d] of the current batch, encoded once per step."""
        if self._batch is not strategy.mbatch:
            student = classifier_of(strategy, self)
            z = _fixed_features(student, strategy.mb_x)
            self._images = [
                teacher.images(strategy.mb_x) if z is None or not self._sees_as_student(teacher, student) else z.clone()
                for teacher in self.active
            ]
            self._batch = strategy.mbatch
        return self._images

    def _sees_as_student(self, teacher: Teacher, student: ClipClassifier) -> bool:
        """Whether the student's image tower is the teacher's. They are compared again when somebody has written to a weight."""
        state = tuple(n for w in image_weights(student).values() for n in (w.data_ptr(), w._version))
        if (known := self._shared.get(id(teacher))) is None or known[0] != state:
            known = self._shared[id(teacher)] = state, same_image_tower(student, teacher.model)
        return known[1]

    def views(self, part: Part, *, seen: bool = False, visual: bool = True) -> list[View]:
        """Each active teacher's view of the part, in the dtype of the student's features.

        seen: add the classes of all other tasks learned so far to anchors and prototypes. visual: with visual prototypes.
        """
        dtype, strategy = part.z.dtype, part.strategy
        tasks = [part.task, *sorted(self.seen - {part.task})] if seen else [part.task]
        views = []
        for teacher, z in zip(self.active, self.images(strategy), strict=True):
            texts = [teacher.text(task) for task in tasks]
            prototypes = [self.prototypes(strategy, teacher, task) for task in tasks] if visual else []
            views.append(
                View(
                    image=part.of(z).to(dtype),
                    text=texts[0].to(dtype),
                    anchors=teacher.joined(("texts", *tasks), texts, dtype),
                    prototypes=teacher.joined(("prototypes", *tasks), prototypes, dtype) if visual else z.new_zeros(0),
                )
            )
        return views

    def class_views(self, strategy: Strategy, tasks: list[int], indices: Tensor) -> list[View]:
        """Each active teacher's view of single classes, without images.

        indices: [N], among the concatenated classes of `tasks`. All teachers are compared with the previous teacher's
        prototypes, so that they answer the same question.
        """
        assert self.previous is not None
        visual = [self.prototypes(strategy, self.previous, task) for task in tasks]
        prototypes = self.previous.joined(("prototypes", *tasks), visual, visual[0].dtype)
        views = []
        for teacher in self.active:
            texts = [teacher.text(task) for task in tasks]
            anchors = teacher.joined(("texts", *tasks), texts, prototypes.dtype)
            views.append(View(anchors.new_zeros(0), text=anchors[indices], anchors=anchors, prototypes=prototypes))
        return views

    def prototypes(self, strategy: Strategy, teacher: Teacher, task: int) -> Tensor:
        """The teacher's visual prototypes [C, d] of a task, computed on first request; those of earlier tasks are kept.

        With them come those that the stages say they read of other teachers, so that the images are read once.
        """
        if task not in teacher.prototypes:
            self._compute_prototypes(strategy, teacher, tasks_of(strategy.adapted_dataset) | {task})
        return teacher.prototypes[task]

    def earlier_prototypes(self, current: set[int]) -> list[Tensor]:
        """The previous teacher's visual prototypes [C, d] of each task but the current ones, as far as they were computed."""
        known = self.previous.prototypes if self.previous else {}
        return [known[task] for task in sorted(self.seen - current) if task in known]

    def _compute_prototypes(self, strategy: Strategy, teacher: Teacher, tasks: set[int]) -> None:
        wanted = [teacher, *(each for each in self._read(strategy) if not tasks <= each.prototypes.keys())]
        models = list({id(each.model): each.model for each in wanted}.values())
        dataset = strategy.adapted_dataset
        if self.images_per_class:
            dataset = sampled(dataset, self.images_per_class)
        stoppable = getattr(strategy, "between_batches", None)  # MulKI's own training only
        computed = visual_prototypes(models, dataset, tasks, num_workers=self._workers, after_batch=stoppable)
        for model, prototypes in zip(models, computed, strict=True):
            for each in {id(t): t for t in (teacher, self.initial, self.previous) if t and t.model is model}.values():
                each.prototypes = {task: p.clone() for task, p in prototypes.items()} | each.prototypes

    def _read(self, strategy: Strategy) -> Iterator[Teacher]:
        """The teachers whose prototypes some stage reads."""
        for plugin in strategy.plugins:
            reads: Callable[[Teachers], Sequence[Teacher]] | None = getattr(plugin, "reads_prototypes", None)
            yield from reads(self) if reads is not None else ()

    def weights(
        self, logits: list[Tensor], targets: Tensor, rows: Rows = "samples", features: Sequence[Tensor] = ()
    ) -> Tensor:
        """The weight of each of M teachers for each row, [M, N]: uniform unless a plugin has set `weigh`.

        features: each teacher's [N, d], unit norm, of the image (`samples`) or of the sentence (`classes`) of a row.
        """
        if self.weigh is None or len(logits) == 1:
            return logits[0].new_full((len(logits), len(targets)), 1 / len(logits))
        return self.weigh(logits, targets, rows, features)

    def state_dict(self) -> dict[str, Any]:
        """The prototypes; the models are restored from the pre-trained weights and those before the task."""
        if self.initial is None or self.previous is None:
            return {"seen": [], "initial": {}, "previous": {}}
        return {
            "seen": sorted(self.seen),
            "initial": dict(self.initial.prototypes),
            "previous": dict(self.previous.prototypes),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the prototypes, after `before_training` has copied the pre-trained model."""
        if self.initial is None:
            raise RuntimeError("Teachers: call before_training first, with the pre-trained model in the strategy")
        self.seen = set(state["seen"])
        self.initial.prototypes = dict(state["initial"])
        if self.previous is None:
            self.previous = self._like_initial()
        self.previous.prototypes = dict(state["previous"])

    def _like_initial(self) -> Teacher:
        """A teacher with the pre-trained model and its text features, but its own prototypes."""
        assert self.initial is not None
        return Teacher(self.initial.model, texts=self.initial.texts)

    def _frozen(self, model: ClipClassifier) -> Teacher:
        teacher = copy.deepcopy(model).eval().requires_grad_(False)
        teacher.templates = "first"  # teachers use the training prompt, whatever the model was doing when it was copied
        device = teacher.scale.device
        if self.half == "always" or (self.half == "auto" and device.type == "cuda"):
            teacher.to(torch.float16 if device.type == "cuda" else torch.bfloat16)
        return Teacher(teacher)


def _fixed_features(student: ClipClassifier, x: Tensor) -> Tensor | None:
    """The student's features of these images, if it has been forwarded on them and its image tower does not change."""
    features = student.features
    if features is None or features.x is not x or features.image.requires_grad or not image_tower_is_fixed(student):
        return None
    return features.image


def _same(a: list[tuple[Tensor, int]], b: list[tuple[Tensor, int]]) -> bool:
    """Whether two lists have the same tensors, none of them written to in between."""
    return len(a) == len(b) and all(x is y and m == n for (x, m), (y, n) in zip(a, b, strict=True))
