"""Rehearsing ideas, beyond the paper: earlier classes as features drawn around their prototypes, to be classified again."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mulki_plugins.losses import distillation, smoothed_cross_entropy
from mulki_plugins.stages.spreads import Spreads, measure
from mulki_plugins.stages.stage import Stage, Strategy, autocast_of, classifier_of, features_of, tasks_of
from mulki_plugins.stages.teachers import Teachers
from mulki_plugins.stages.words import Phrases
from mulki_plugins.types import Count, Fraction, Positive, Weight, checked


class Rehearsing(Stage):
    """Classifies features drawn around the prototypes of earlier classes, instead of images of them.

    At a task's end the features of its training images leave a Gaussian N(μ_c, σ_c²·Σ) for each class: a mean and a variance
    a class, and one covariance Σ for all classes of all tasks. In each step some earlier classes are drawn, and features
    z = unit(a draw of their Gaussians); t are the student's features of their sentences. With `labels`
    L = mean_z CE(s·z tᵀ, class), and with `teacher` L = mean_z T²·KL(s·z t^{k−1}ᵀ ‖ s·z tᵀ), the previous teacher answering.
    The drawn features carry no gradient, so only the text tower is taught. Zero on the first task. Its place is after
    Connecting, whose weights the features are to be of.

    Args:
        weight: Factor of the loss.
        classes: Earlier classes whose sentences are drawn in each step.
        count: Features drawn in each step, each around one of those classes.
        among: The classes of a step come from one earlier `task` and are told apart among themselves; or from all tasks
            `seen`, and are told apart from the classes of the batch too.
        targets: The `labels` of the features, or the answers of the previous `teacher`.
        smoothing: Label smoothing of the targets `labels`.
        temperature: T of the softened answers of the targets `teacher`; the divergence is multiplied by T².
        templates: The sentences of the classes are in each task's `first` template, as in training, or in one `drawn` in each
            step, since an evaluation uses all of them.
        spread: Factor of the spread around the means; 0 for the means alone.
        drift: Width of the neighbourhood in which images of a new task show how far a point has drifted during the task
            (arXiv 2004.00440); the means of earlier classes and the previous teacher's prototypes are moved by that. Null to
            leave them.
    """

    requires = ("teachers",)

    @checked
    def __init__(
        self, *, weight: Weight = 1.0, classes: Count = 32, count: Count = 64, among: Literal["task", "seen"] = "task",
        targets: Literal["labels", "teacher"] = "labels", smoothing: Fraction = 0.0, temperature: Positive = 2.0,
        templates: Literal["first", "drawn"] = "first", spread: Weight = 1.0, drift: Positive | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.weight = weight
        self.classes, self.count = classes, count
        self.among, self.targets = among, targets
        self.smoothing, self.temperature = smoothing, temperature
        self.templates = templates
        self.spread, self.drift = spread, drift
        self.kept = Spreads()
        """The Gaussians of the classes of the tasks learned."""
        self._current: set[int] = set()
        """The tasks that are learned now."""
        self._known: dict[int, Tensor] = {}
        """The classes of each earlier task that had training images, on the host."""
        self._workers = 0
        self._tasks: list[int] = []
        """The earlier tasks of this step."""
        self._template = 0.0
        """Which of a task's templates, in 0..1."""
        self._phrases: Phrases | None = None
        self._classes = torch.empty(0, dtype=torch.long)
        """The classes drawn in this step, [N], among the concatenated classes of these tasks, on the host."""
        self._labels = torch.empty(0, dtype=torch.long)
        """The class of each feature, [count], among those drawn, on the host."""
        self._z = torch.empty(0, 0)
        """The features drawn in this step, [count, d]."""

    def before_training_exp(self, strategy: Strategy, **kwargs: Any) -> None:
        if self.targets == "teacher":
            Teachers.of(strategy, self).require("previous", "rehearsing with targets: teacher")
        self._current = tasks_of(strategy.adapted_dataset)
        self._known = {
            task: (~means.isnan().any(1)).nonzero()[:, 0].cpu()
            for task, means in self.kept.means.items()
            if task not in self._current
        }
        self._workers = int(kwargs.get("num_workers") or 0)
        self._phrases = Phrases(classifier_of(strategy, self)) if self.templates == "drawn" else None

    def before_forward(self, strategy: Strategy, **kwargs: Any) -> None:
        """Draw classes and features, so that the sentences pass the text tower with those of the batch."""
        earlier = sorted(task for task, known in self._known.items() if len(known)) if self.weight else []
        if earlier and self.among == "task":
            earlier = [earlier[int(torch.randint(len(earlier), ()))]]
        self._tasks = earlier
        sizes = [len(self.kept.means[task]) for task in earlier]
        known = self._known_among(earlier, sizes)
        self._classes = known[torch.randperm(len(known))[: self.classes]].sort().values
        if self._phrases is None:
            classifier_of(strategy, self).request(self, earlier, self._classes)
        elif earlier:
            self._template = float(torch.rand(()))
        if earlier:
            self._labels = torch.randint(len(self._classes), (self.count,)).sort().values
            self._z = self._features(self._classes[self._labels], sizes)

    def _known_among(self, tasks: list[int], sizes: list[int]) -> Tensor:
        """The classes [N], among the concatenated classes of these tasks, that had training images."""
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        each = [start + self._known[task] for task, start in zip(tasks, starts, strict=True)]
        return torch.cat(each) if each else torch.empty(0, dtype=torch.long)

    def _features(self, classes: Tensor, sizes: list[int]) -> Tensor:
        """A feature of each of these classes [N, d], given in rising order among the concatenated classes of the step's tasks."""
        drawn, start = [], 0
        for task, size in zip(self._tasks, sizes, strict=True):
            mine = classes[(classes >= start) & (classes < start + size)] - start
            drawn.append(self.kept.draw(task, mine, self.spread))
            start += size
        return torch.cat(drawn)

    def after_forward(self, strategy: Strategy, **kwargs: Any) -> None:
        loss = self.rehearsed(strategy) if self._tasks else strategy.loss.new_zeros(())
        self.add_loss(strategy, self.term, loss, self.weight)

    def rehearsed(self, strategy: Strategy) -> Tensor:
        """L for the features of earlier classes that were drawn, a scalar."""
        features, teachers = features_of(strategy, self), Teachers.of(strategy, self)
        s, t = features.scale, self._sentences(strategy)
        z = self._z.to(t)
        current = sorted(features.text.keys() - set(self._tasks)) if self.among == "seen" else []
        t = torch.cat([t, *(features.text[task] for task in current)])
        if self.targets == "labels":
            return smoothed_cross_entropy(s * z @ t.T, self._labels.to(t.device, non_blocking=True), self.smoothing)
        teacher = teachers.active[-1]
        every = torch.cat([teacher.text(task) for task in self._tasks])[self._classes.to(t.device, non_blocking=True)]
        known = torch.cat([every, *(teacher.text(task) for task in current)]).to(t)
        return distillation(s * z @ t.T, s * z @ known.T, self.temperature).mean()

    def _sentences(self, strategy: Strategy) -> Tensor:
        """t [N, d] of the classes drawn, with their gradient."""
        if self._phrases is None:
            return features_of(strategy, self).classes[self]
        chosen = [(task, int(self._template * self._phrases.templates(task))) for task in self._tasks]
        with autocast_of(strategy):
            return self._phrases.features(chosen, self._classes)

    def after_training_exp(self, strategy: Strategy, **kwargs: Any) -> None:
        """Keep the Gaussians of the tasks that were learned, and move what is kept of earlier ones."""
        model, previous = classifier_of(strategy, self), Teachers.of(strategy, self).previous
        model.request(self, (), self._classes[:0])
        self._phrases = None
        if previous is None or not (self.weight or self.drift):
            return
        means = {task: mean for task, mean in self.kept.means.items() if task not in self._current}
        prototypes = {task: previous.prototypes[task] for task in means if task in previous.prototypes}
        points = {
            task: torch.cat([mean, *([prototypes[task]] if task in prototypes else [])]) for task, mean in means.items()
        }
        drift = measure(
            self.kept, model, strategy.adapted_dataset,
            {task: len(model.prompts[task].class_names) for task in self._current},
            before=previous.model if self.drift else None, points=points, width=self.drift or 1.0, workers=self._workers,
            after_batch=getattr(strategy, "between_batches", None),
        )  # fmt: skip
        for task, shift in drift.items():
            of_means, of_prototypes = shift[: len(means[task])], shift[len(means[task]) :]
            self.kept.means[task] = means[task] + of_means
            if task in prototypes:
                moved = F.normalize(prototypes[task].float() + of_prototypes, dim=1)
                previous.prototypes[task] = moved.to(prototypes[task])

    def state_dict(self) -> dict[str, Any]:
        return {"kept": self.kept.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kept = Spreads.from_state(state["kept"])
