"""Stage 3, distinguishing ideas: weigh the two teachers for each sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mulki_plugins.losses import Score, teacher_scores, teacher_weights
from mulki_plugins.stages.stage import Stage
from mulki_plugins.stages.teachers import Rows, Teachers
from mulki_plugins.types import Positive, checked


class Distinguishing(Stage):
    """Gives each teacher the share w^m ∝ exp(−ℓ^m/temperature), with ℓ^m how unsure it is of the sample.

    score: `likelihood` (its cross-entropy on the true class), `entropy` (of its prediction) or `margin` (how far the best
    wrong class is ahead of the true one). It adds no loss: the stages that distil ask the Teachers for the shares. Of an
    earlier task's class, the sample is its sentence, and what is to be found its visual prototype.
    """

    @checked
    def __init__(self, *, score: Score = "likelihood", temperature: Positive = 1.0) -> None:
        super().__init__()
        self.score = score
        self.temperature = temperature
        self._shares: dict[str, list[tuple[Tensor, int]]] = {}
        """What the initial teacher was given in this step: mean share and number of rows of each part, by tag."""

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self._shares = {}
        Teachers.of(strategy, self).weigh = self.weigh

    def after_backward(self, strategy: Any, **kwargs: Any) -> None:
        for tag, parts in self._shares.items():  # one value each, also where a batch was taken apart by task
            rows = sum(n for _, n in parts)
            self.log(strategy, tag, torch.stack([share * (n / rows) for share, n in parts]).sum())
        self._shares = {}

    def weigh(self, logits: list[Tensor], targets: Tensor, rows: Rows) -> Tensor:
        """The share [M, B] of each teacher, whose logits are [B, C]; the first is the pre-trained model."""
        shares = teacher_weights([teacher_scores(each, targets, self.score) for each in logits], self.temperature)
        of = "" if rows == "samples" else f"_of_{rows}"
        if len(targets):
            parts = self._shares.setdefault(f"train/share/initial{of}", [])
            parts.append((shares[0].detach().mean(), len(targets)))
        return shares
