"""iCaRL for CLIP-like models: herded exemplars of earlier tasks, and the previous model distilled on them."""

from __future__ import annotations

from typing import Any

import torch
from avalanche.benchmarks.utils import concat_datasets
from avalanche.training.plugins import ReplayPlugin
from avalanche.training.storage_policy import ExemplarsBuffer
from torch import Tensor
from torch.utils.data import DataLoader

from mulki_plugins.baselines.stored import images_at, places_of
from mulki_plugins.losses import distillation, herded
from mulki_plugins.models.classifier import ClipClassifier
from mulki_plugins.stages.prototypes import tasks_of
from mulki_plugins.stages.stage import Stage, by_task, classifier_of, features_of
from mulki_plugins.stages.teachers import Teachers
from mulki_plugins.types import Count, Positive, Weight, checked

Group = tuple[int, int]
"""(task, class)"""


class HerdedExemplars(ExemplarsBuffer):
    """At most `max_size` images of the tasks so far, as many of each class as of any other, or one more.

    Chosen by `herded` on the model's unit-norm features at the end of the class's task, through the evaluation transform,
    so that their mean is near the class's. When room gets scarce each class gives up those chosen last; where there are
    more classes than room, the first learned keep one each.
    """

    def __init__(self, max_size: int) -> None:
        super().__init__(max_size)
        self.groups: dict[Group, Any] = {}
        self._kept: list[list[Any]] = []

    def state_dict(self) -> dict[str, Any]:
        """Of each exemplar its task and index; no image is stored."""
        return {"groups": self._kept or [[*group, places_of(kept)] for group, kept in self.groups.items()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._kept = state["groups"]

    def find_again(self, strategy: Any) -> None:
        """Take the images of a loaded state from the strategy's stream."""
        if self._kept:
            self.groups = {(task, c): images_at(places, strategy) for task, c, places in self._kept}
            self._kept = []
            self._fit()

    def add(self, model: ClipClassifier, dataset: Any) -> None:
        """Choose among a task's training images, and make the others give way."""
        features, classes, tasks = _seen_by(model, dataset)
        for task, c in sorted({(int(t), int(c)) for t, c in zip(tasks, classes, strict=True)}):
            rows = ((tasks == task) & (classes == c)).nonzero()[:, 0]
            self.groups[task, c] = dataset.subset(rows[herded(features[rows], self.max_size)].tolist())
        self._fit()

    def resize(self, strategy: Any, new_size: int) -> None:
        self.max_size = new_size
        self._fit()

    def _fit(self) -> None:
        room, more = divmod(self.max_size, max(1, len(self.groups)))
        for i, (key, kept) in enumerate(self.groups.items()):
            self.groups[key] = kept.subset(range(min(room + (i < more), len(kept))))
        self.buffer = concat_datasets([kept for kept in self.groups.values() if len(kept)])


@torch.no_grad()
def _seen_by(model: ClipClassifier, dataset: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Features [N, d], classes [N] and task labels [N] of a training set."""
    features, classes, tasks = [], [], []
    learning = model.training
    model.eval()
    for batch in DataLoader(dataset.eval(), batch_size=256):
        features.append(model.encode_image(batch[0].to(model.scale.device)).float().cpu())
        classes.append(batch[1])
        tasks.append(batch[-1])
    model.train(learning)
    return torch.cat(features), torch.cat(classes), torch.cat(tasks)


class ICarl(Stage):
    """Mixes exemplars of earlier tasks into every batch, and adds weight·T²·KL(previous model ‖ student) on them.

    memory: images kept in all, as many of each class seen. Each exemplar is told from its own task's classes, in the
    cross-entropy as in the distillation. The classification by nearest exemplars is not used: CLIP's texts classify.
    Rebuffi et al., 2017, arXiv 1611.07725; for CLIP in Zheng et al., 2023 (arXiv 2303.06628), whose code herds by data set,
    distils from the pre-trained model and loses the pairing of features and images.
    """

    @checked
    def __init__(
        self,
        *,
        memory: Count = 550,
        batch_size: Count | None = None,
        weight: Weight = 1.0,
        temperature: Positive = 2.0,
    ) -> None:
        super().__init__()
        self.weight, self.temperature = weight, temperature
        self.exemplars = HerdedExemplars(memory)
        self._replay = ReplayPlugin(mem_size=memory, batch_size_mem=batch_size, storage_policy=self.exemplars)
        self._current: set[int] = set()

    def state_dict(self) -> dict[str, Any]:
        return self.exemplars.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.exemplars.load_state_dict(state)

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self.exemplars.find_again(strategy)
        self._current = tasks_of(strategy.adapted_dataset)
        self._replay.before_training_exp(strategy, **kwargs)

    def after_forward(self, strategy: Any, **kwargs: Any) -> None:
        features = features_of(strategy, self)
        total = features.image.new_zeros(())
        kept = [(task, rows) for task, rows in by_task(features) if task not in self._current]
        if kept:
            teachers = Teachers.of(strategy, self)
            previous, known = teachers.active[-1], teachers.images(strategy)[-1]
            samples = sum(len(rows) for _, rows in kept)
            for task, rows in kept:
                z, t, s = features.image[rows], features.text[task], features.scale
                taught = s * known[rows].to(z) @ previous.text(task).to(z).T
                total = total + distillation(s * z @ t.T, taught, self.temperature).sum() / samples
        self.add_loss(strategy, "icarl", total, self.weight)

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self.exemplars.find_again(strategy)
        self.exemplars.add(classifier_of(strategy, self), strategy.experience.dataset)
