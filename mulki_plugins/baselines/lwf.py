"""LwF for CLIP-like models, and LwF-VR: distil the previous model on the task's own images."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mulki_plugins.errors import MulkiError
from mulki_plugins.losses import contrastive_distillation
from mulki_plugins.stages.stage import Stage, by_task, classifier_of, features_of
from mulki_plugins.stages.teachers import Teachers
from mulki_plugins.types import Count, Positive, Weight, checked


class LearningWithoutForgetting(Stage):
    """Adds image·KD over the texts and text·KD over the images between each teacher and the student, on this batch.

    Both sides are compared with the teacher's texts, so that only the student's image tower is taught. texts: `classes`,
    the sentences of the task's classes (LwF), or `random`, `count` random strings of `length` tokens, drawn once per task
    (LwF-VR, which needs no class names). LwF: Li and Hoiem, 2016, arXiv 1606.09282; LwF-VR: Ding et al., 2022, arXiv
    2207.09248; both in the form that Zheng et al., 2023 (arXiv 2303.06628) give them, but on the training batch itself
    instead of a second one, and with no start or end token inside a random string.
    """

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

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        if self.texts == "random":
            model = classifier_of(strategy, self)
            tokens = random_tokens(model.tokenizer, self.count, self.length).to(model.scale.device)
            self._random = [encoded(teacher.model, tokens) for teacher in Teachers.of(strategy, self).active]

    def after_forward(self, strategy: Any, **kwargs: Any) -> None:
        features = features_of(strategy, self)
        teachers = Teachers.of(strategy, self)
        images = teachers.images(strategy)
        total = features.image.new_zeros(())
        for task, rows in by_task(features):
            z, s = features.image[rows], features.scale
            for i, (teacher, known) in enumerate(zip(teachers.active, images, strict=True)):
                t = (self._random[i] if self.texts == "random" else teacher.text(task)).to(z)
                over_texts, over_images = contrastive_distillation(
                    s * z @ t.T, s * known[rows].to(z) @ t.T, self.temperature
                )
                share = len(rows) / len(features.image) / len(images)
                total = total + share * (self.image * over_texts + self.text * over_images)
        self.add_loss(strategy, "lwf", total)


def random_tokens(tokenizer: Any, count: int, length: int) -> Tensor:
    """Token ids [count, context]: start, `length` random tokens of no special meaning, end, padding with 0.

    tokenizer: one of open_clip's with start and end token. MulkiError for another sort; a string that is longer than the
    context is cut before its end token.
    """
    try:
        start, end, size = int(tokenizer.sot_token_id), int(tokenizer.eot_token_id), int(tokenizer.vocab_size)
    except AttributeError:
        what = f"random texts need open_clip's SimpleTokenizer, the model has a {type(tokenizer).__name__}"
        raise MulkiError(f"lwf: {what}", "use `texts: classes`") from None
    special = {0, *tokenizer.all_special_ids}
    ordinary = torch.tensor([token for token in range(size) if token not in special])
    length = min(length, tokenizer.context_length - 2)
    tokens = torch.zeros(count, tokenizer.context_length, dtype=torch.long)
    tokens[:, 0], tokens[:, length + 1] = start, end
    tokens[:, 1 : length + 1] = ordinary[torch.randint(len(ordinary), (count, length))]
    return tokens


@torch.no_grad()
def encoded(model: Any, tokens: Tensor, batch_size: int = 256) -> Tensor:
    """Unit-norm text features [N, d] of token ids [N, context], without gradient."""
    with torch.autocast(tokens.device.type, enabled=False):
        parts = [model.clip.encode_text(part) for part in torch.split(tokens, batch_size)]
    return F.normalize(torch.cat(parts).float(), dim=1)
