"""Preserving ideas, beyond the paper: the initial teacher speaks of what no task has taught, in sentences of generic words."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from mulki_plugins.errors import MulkiError
from mulki_plugins.losses import distillation, feature_distillation, movement_along
from mulki_plugins.models.text_tower import length_needed
from mulki_plugins.stages.check import check_preserving, refuse
from mulki_plugins.stages.mixtures import distorted, mixed
from mulki_plugins.stages.stage import Stage, Strategy, autocast_of, classifier_of, features_of
from mulki_plugins.stages.teachers import Teachers
from mulki_plugins.stages.words import generic_sentences, sentence_features, vocabulary_words, words_of
from mulki_plugins.types import Count, Positive, Weight, checked


class Preserving(Stage):
    """Distils what the initial teacher knows of generic words, which no task teaches, on the task's own images.

    For each task, sentences are made of words outside the classes of all tasks so far, in the templates of these tasks and
    alone; each step draws some of them. With the features v and v⁰ of those sentences by the student and by the initial
    teacher, over images x of the step:
    L = logits·mean_x T²·KL(s·z⁰ v⁰ᵀ ‖ s·z vᵀ) + texts·mean_v ‖v − v⁰‖² + orthogonal·mean_v,x ((v − v⁰)·z⁰)²
    + features·mean_x (1 − z·z⁰).
    The first term teaches both towers, the next two the text tower, the last the image tower. The stage takes part in every
    task, the first too. If `teachers` uses the previous teacher alone, that one speaks in the initial one's place.

    Args:
        weight: Factor of the loss.
        temperature: T of the softened distributions over the sentences; the divergence is multiplied by T².
        logits: Factor of the divergence of each image's distribution over the sentences.
        texts: Factor of the squared distance that the sentences' features have moved.
        orthogonal: Factor of the square of their movement along the teacher's image features, so that they may move
            orthogonally to these.
        features: Factor of the distance that the images' features have moved.
        count: Sentences drawn in each step.
        pool: Sentences that are made for each task, and that the teacher encodes once.
        longest: Words of a made-up name: one to that many.
        words: The generic words; null for those in the vocabulary of the model's tokenizer.
        classes: Add the sentences of the batch's own classes to the generic ones.
        images: The `batch` itself; or images unlike the task's, each `mixed` from two of the batch, or `distorted` (turned,
            cropped, in other colours) and then mixed. The student and the teacher encode these once more in each step.
        alpha: α of Beta(α, α), from which the shares of the two images of a mixture are drawn.
    """

    requires = ("teachers",)

    @checked
    def __init__(
        self, *, weight: Weight = 1.0, temperature: Positive = 2.0, logits: Weight = 1.0, texts: Weight = 0.0,
        orthogonal: Weight = 0.0, features: Weight = 0.0, count: Count = 64, pool: Count = 1000, longest: Count = 2,
        words: list[str] | None = None, classes: bool = False,
        images: Literal["batch", "mixed", "distorted"] = "batch", alpha: Positive = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        factors = {"logits": logits, "texts": texts, "orthogonal": orthogonal, "features": features}
        refuse(self, check_preserving(factors))
        self.weight, self.temperature = weight, temperature
        self.logits, self.texts, self.orthogonal, self.features = logits, texts, orthogonal, features
        self.count, self.pool, self.longest = count, pool, longest
        self.words = words
        self.classes = classes
        self._needs_sentences = bool(logits or texts or orthogonal)
        self.images = images
        self.alpha = alpha
        self._tokens = torch.empty(0, 0, dtype=torch.long)
        """The sentences of this task, [pool, L]."""
        self._length = 0
        self._known = torch.empty(0, 0)
        """v⁰ [pool, d]: the teacher's features of them."""
        self._drawn = torch.empty(0, dtype=torch.long)
        """The sentences drawn in this step, [count], among those of the task."""

    def before_training_exp(self, strategy: Strategy, **kwargs: Any) -> None:
        if not self.weight or not self._needs_sentences:
            return
        model, teachers = classifier_of(strategy, self), Teachers.of(strategy, self)
        if model.routes.adapter is not None and (self.texts or self.orthogonal):
            what = f"preserving: sentences of no task take no route through the adapter {type(model.routes.adapter).__name__}"
            raise MulkiError(f"{what}, so they stay as they are", "set its texts and orthogonal to 0")
        tasks = [model.prompts[task] for task in sorted(teachers.seen)]
        learned = words_of([name for task in tasks for name in task.class_names])
        words = vocabulary_words(model.tokenizer) if self.words is None else self.words
        generic = [word for word in words if word.casefold() not in learned]
        templates = ["{}", *dict.fromkeys(template for task in tasks for template in task.templates)]
        tokens = model.tokenizer(generic_sentences(generic, templates, self.pool, self.longest)).cpu()
        self._length, self._tokens = length_needed(model.clip, tokens), tokens.to(strategy.device)
        teacher = teachers.active[0].model
        with torch.no_grad(), torch.autocast(strategy.device.type, enabled=False):
            parts = [sentence_features(teacher, each, self._length) for each in torch.split(self._tokens, 256)]
        self._known = torch.cat(parts)

    def before_forward(self, strategy: Strategy, **kwargs: Any) -> None:
        if self.weight and self._needs_sentences:
            drawn = torch.randperm(len(self._tokens))[: self.count]
            self._drawn = drawn.to(strategy.device, non_blocking=True)

    def after_forward(self, strategy: Strategy, **kwargs: Any) -> None:
        loss = self.preserved(strategy) if self.weight else strategy.loss.new_zeros(())
        self.add_loss(strategy, self.term, loss, self.weight)

    def preserved(self, strategy: Strategy) -> Tensor:
        """L of this step, a scalar."""
        model, teachers = classifier_of(strategy, self), Teachers.of(strategy, self)
        features = features_of(strategy, self)
        loss = features.image.new_zeros(())
        if self._needs_sentences:
            with autocast_of(strategy):
                v = sentence_features(model, self._tokens[self._drawn], self._length)
            known = self._known[self._drawn].to(v)
            if self.texts:
                loss = loss + self.texts * (v - known).square().sum(1).mean()
        if self.logits or self.orthogonal or self.features:
            z, of_teacher = self._image_features(strategy)
            if self.orthogonal:
                loss = loss + self.orthogonal * movement_along(v, known, of_teacher)
            if self.features:
                loss = loss + self.features * feature_distillation(z, of_teacher, z.new_ones(()))
            if self.logits:
                if self.classes:
                    v = torch.cat([v, *features.text.values()])
                    known = torch.cat([known, *(teachers.active[0].text(task).to(v) for task in features.text)])
                student, teacher = (
                    features.scale * images @ texts.T for images, texts in ((z, v), (of_teacher, known))
                )
                loss = loss + self.logits * distillation(student, teacher, self.temperature).mean()
        return loss

    def _image_features(self, strategy: Strategy) -> tuple[Tensor, Tensor]:
        """The features [B, d] of this step's images by the student, with their gradient, and by the teacher."""
        teachers, z = Teachers.of(strategy, self), features_of(strategy, self).image
        if self.images == "batch":
            return z, teachers.images(strategy)[0].to(z)
        x = mixed(strategy.mb_x if self.images == "mixed" else distorted(strategy.mb_x), self.alpha)
        with autocast_of(strategy):
            z = classifier_of(strategy, self).encode_image(x)
        return z, teachers.active[0].images(x).to(z)
