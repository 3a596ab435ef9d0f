"""LwF for CLIP-like models, and LwF-VR: distil the previous model on the task's own images."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from mulki_plugins.baselines.reference import encode_tokens
from mulki_plugins.errors import MulkiError
from mulki_plugins.losses import contrastive_distillation
from mulki_plugins.ranks.collectives import gathered
from mulki_plugins.stages.stage import Part, Stage, Strategy, classifier_of
from mulki_plugins.stages.teachers import Teachers
from mulki_plugins.types import Count, Positive, Weight, checked


class LearningWithoutForgetting(Stage):
    """Distils the previous model's image-text similarities on this task's images; over random texts it is LwF-VR.

    L = mean over the teachers of image·KD over the texts + text·KD over the images, on this batch. Teacher and student are
    both compared with the teacher's texts, so that only the student's image tower is taught. LwF: Li and Hoiem, 2016,
    arXiv 1606.09282; LwF-VR, which needs no class names: Ding et al., 2022, arXiv 2207.09248. Both in the form of Zheng et
    al., 2023 (arXiv 2303.06628), but on the training batch itself instead of a second one, and without start or end tokens
    inside a random string.

    Args:
        image: Factor of the distillation over the texts.
        text: Factor of the distillation over the images.
        temperature: T of the softened similarities.
        texts: The sentences of the task's `classes` (LwF), or `random` strings, drawn once per task (LwF-VR).
        count: Number of random strings.
        length: Tokens of a random string.
    """

    requires = ("teachers",)
    paper = "arXiv 1606.09282, arXiv 2207.09248"
    term = "lwf"
    joins_ranks = True

    @checked
    def __init__(
        self,
        *,
        image: Weight = 1.0,
        text: Weight = 1.0,
        temperature: Positive = 2.0,
        texts: Literal["classes", "random"] = "classes",
        count: Count = 1000,
        length: Count = 10,
    ) -> None:
        super().__init__()
        self.image, self.text, self.temperature = image, text, temperature
        self.texts: Literal["classes", "random"] = texts
        self.count, self.length = count, length
        self._random: list[Tensor] = []

    def before_training_exp(self, strategy: Strategy, **kwargs: Any) -> None:
        if self.texts == "random":
            model = classifier_of(strategy, self)
            tokens = random_tokens(model.tokenizer, self.count, self.length)
            self._random = [encode_tokens(teacher.model, tokens) for teacher in Teachers.of(strategy, self).active]

    def loss(self, part: Part) -> Tensor:
        z, s, teachers = gathered(part.z), part.s, part.teachers  # a text is compared with all images of the batch
        total = z.new_zeros(())
        for i, (teacher, features) in enumerate(zip(teachers.active, teachers.images(part.strategy), strict=True)):
            t = (self._random[i] if self.texts == "random" else teacher.text(part.task)).to(z)
            z_teacher = gathered(part.of(features).to(z))
            over_texts, over_images = contrastive_distillation(s * z @ t.T, s * z_teacher @ t.T, self.temperature)
            total = total + (self.image * over_texts + self.text * over_images) / len(teachers.active)
        return total


def random_tokens(tokenizer: Any, count: int, length: int) -> Tensor:
    """Token ids [count, context]: start, `length` random tokens without special meaning, end, padding with 0.

    tokenizer: one of open_clip's with a start and an end token; MulkiError for another kind. Strings longer than the context
    are cut before their end token.
    """
    try:
        start, end, size = int(tokenizer.sot_token_id), int(tokenizer.eot_token_id), int(tokenizer.vocab_size)
    except AttributeError:
        problem = f"random texts need open_clip's SimpleTokenizer, the model has a {type(tokenizer).__name__}"
        raise MulkiError(f"lwf: {problem}", "use `texts: classes`") from None
    special = {0, *tokenizer.all_special_ids}
    ordinary = torch.tensor([token for token in range(size) if token not in special])
    length = min(length, tokenizer.context_length - 2)
    tokens = torch.zeros(count, tokenizer.context_length, dtype=torch.long)
    tokens[:, 0], tokens[:, length + 1] = start, end
    tokens[:, 1 : length + 1] = ordinary[torch.randint(len(ordinary), (count, length))]
    return tokens
