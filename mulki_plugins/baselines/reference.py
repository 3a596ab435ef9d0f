"""What methods on reference data share: endless batches of reference images, and features of reference texts."""

from __future__ import annotations

from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, default_collate

from mulki_plugins.models.classifier import ClipClassifier
from mulki_plugins.models.text_tower import encode_sentences, length_needed
from mulki_plugins.ranks import collectives
from mulki_plugins.ranks.batches import OwnRows
from mulki_plugins.ranks.draws import computing
from mulki_plugins.stages.stage import Stage, Strategy, autocast_of, classifier_of
from mulki_plugins.streams.benchmark import Reference


class OnReference(Stage):
    """A stage whose term is computed on a batch of reference images in each step.

    A subclass defines `reference_loss(strategy, x, z)`. A checkpoint keeps the position among the batches.
    """

    needs_reference = True

    def __init__(self, reference: Reference, batch_size: int | None) -> None:
        """batch_size: reference images per step; None for `default_batch_size`."""
        super().__init__()
        self.reference = reference
        self.batch_size = batch_size
        self._batches: ReferenceBatches | None = None

    def default_batch_size(self, strategy: Strategy) -> int:
        return strategy.train_mb_size

    def reference_loss(self, strategy: Strategy, x: Tensor, z: Tensor) -> Tensor:
        """The term for reference images x [B, 3, H, W] with the student's features z [B, d], a scalar.

        On several ranks x and z are this rank's images of the batch, and the term is that of the images of all ranks.
        """
        raise NotImplementedError

    def before_training_exp(self, strategy: Strategy, **kwargs: Any) -> None:
        size = self.batch_size or self.default_batch_size(strategy)
        pinned = strategy.device.type == "cuda"
        self._batches = ReferenceBatches(self.reference, size, int(kwargs.get("num_workers") or 0), pinned=pinned)

    def after_forward(self, strategy: Strategy, **kwargs: Any) -> None:
        assert self._batches is not None
        x = next(self._batches).to(strategy.device, non_blocking=True)
        with computing(self._batches.rows), autocast_of(strategy):
            z = classifier_of(strategy, self).encode_image(x)
        self.add_loss(strategy, self.term, self.reference_loss(strategy, x, z))

    def after_training_exp(self, strategy: Strategy, **kwargs: Any) -> None:
        self._batches = None

    def state_dict(self) -> dict[str, Any]:
        """The number of batches used in this task; their order follows from the random state at its start."""
        return {"used": self._batches.used if self._batches else 0}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._batches:
            self._batches.skip_to(state["used"])


class ReferenceBatches:
    """Endless batches of reference images, reshuffled in each round; the last batch of a round may be smaller.

    The order follows from torch's random state at construction, which advances by one draw. pinned: in memory from which a
    GPU can copy on its own. On several ranks each reads its own images of a batch, except if every rank computes the whole
    step.
    """

    def __init__(self, reference: Reference, batch_size: int, workers: int = 0, *, pinned: bool = False) -> None:
        images: Any = reference.images  # torch's data sets have no length by type
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        order = RandomSampler(images, generator=generator)
        self._own = OwnRows(BatchSampler(order, batch_size, drop_last=False))
        loader: DataLoader[Tensor] = DataLoader(
            images, batch_sampler=self._own, generator=generator, num_workers=workers,
            persistent_workers=workers > 0, pin_memory=pinned,
        )  # fmt: skip
        self._images = images
        self._batches = (batch for _ in count() for batch in loader)
        self.used = self.rows = 0
        """The number of batches so far, and of the images, on all ranks, of the last one."""

    def __next__(self) -> Tensor:
        """The images of this rank [B, 3, H, W]; there may be none."""
        self.used += 1
        batch: Tensor = next(self._batches)
        whole = self._own.batches_read.popleft()
        self.rows = len(whole)
        if collectives.count() > 1 and collectives.world() == 1:
            return default_collate([self._images[index] for index in whole])  # type: ignore[no-any-return]
        return batch[: len(self._own.of(whole))]

    def skip_to(self, used: int) -> None:
        """Skip batches until `used` have been used."""
        while self.used < used:
            next(self)


@torch.no_grad()
def encode_tokens(model: ClipClassifier, tokens: Tensor, batch_size: int = 256) -> Tensor:
    """Unit-norm text features [N, d] of token ids [N, context] on the host, on the model's device, without gradient."""
    length, device = length_needed(model.clip, tokens), model.clip.logit_scale.device
    with torch.autocast(device.type, enabled=False):
        parts = [encode_sentences(model.clip, part, length) for part in torch.split(tokens.to(device), batch_size)]
    return F.normalize(torch.cat(parts).float(), dim=1)
