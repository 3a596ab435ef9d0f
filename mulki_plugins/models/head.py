"""What a model asks of its head: logits from the features of images. The text head compares them with sentences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from attrs import frozen
from torch import Tensor, nn

from mulki_plugins.errors import MulkiError
from mulki_plugins.models.pooled import encode_with_pooled, no_pooled_features
from mulki_plugins.models.routes import Route, Routes
from mulki_plugins.models.text import Prompts, Union

HEAD = "head."
"""Prefix of a head's parameters and buffers among those of the model."""


@frozen(eq=False)
class Scope:
    """The classes among which images are classified, the candidates: those of one task, of several, or any others."""

    text: Tensor
    """t [C, d], the unit-norm text features of the candidates."""
    scale: Tensor
    """The factor of the cosines, a scalar."""
    places: Mapping[int, Sequence[int]]
    """For each task in the scope, the place among the candidates of each of its classes. Two tasks share a candidate if the
    model cannot tell their classes apart. Empty if the candidates belong to no task."""

    def text_logits(self, z: Tensor) -> Tensor:
        """The logits of zero-shot classification, s·z·tᵀ: [B, d] -> [B, C], at least in single precision.

        Pooled features behind z are left out.
        """
        with torch.autocast(z.device.type, enabled=False):
            return self.scale.to(z.dtype) * z[:, : self.text.shape[1]] @ self.text.to(z.dtype).T


Term = Callable[[Tensor, Tensor], Mapping[str, Tensor]]
"""(z [B, d] of unit norm, y [B]) of one batch -> the tensors that are added up over all batches."""


class TrainingImages(Protocol):
    """The training images of one task through the frozen model, in the evaluation transform."""

    @property
    def classes(self) -> int:
        """The number of classes of the task."""

    @property
    def text(self) -> Tensor:
        """Unit-norm text features [C, d] of the task's classes, the mean over all templates."""

    def sum(self, term: Term) -> dict[str, Tensor]:
        """Σ over all images of what `term` returns for each batch; floating-point tensors in double precision."""


class Head(nn.Module):
    """Turns the features of images into logits over the classes of a scope. A subclass defines `forward`.

    A head answers for each image by itself, whatever else is in the batch, and only of classes that it has learned: for
    others `scope.text_logits(z)` is there. All that it keeps are parameters and buffers, so that checkpoints, the final
    weights, `mulki predict` and `mulki evaluate` have them. A buffer may take another shape at any time; register it in
    `__init__`, with None if there is nothing to keep yet. A parameter gets its shape in `__init__`, `begin` or `before_task`
    and learns with the model, also if `model.train` is `none`, unless the head freezes it.
    """

    paper: ClassVar[str] = ""
    reads_pooled: bool = False
    """Whether z is [B, d + p]: behind the image features the pooled ones, which the tower's last projection reads, of unit norm.
    Such a head is not asked in training, where images are compared with sentences."""
    asked_in_training: bool = True
    """Whether the loss of a training is over this head's logits; otherwise images are compared with sentences there."""

    portable: str = ""
    """The file beside the head's module whose Python answers like the head, with torch alone; `mulki export` copies it. It
    defines `logits(kept, options, z, zero_shot, owners)`, as `rail.py.template` does. Empty: it cannot be exported."""
    portable_state: tuple[str, ...] = ()
    """What that file needs of the head's parameters and buffers; they must be enough to load the head, too."""

    def __init__(self) -> None:
        """A head without options; a subclass may take some."""
        super().__init__()

    def forward(self, z: Tensor, scope: Scope) -> Tensor:
        """Logits [B, C] over the candidates of the scope, in their order. z: image features [B, d], unit norm.

        Called outside of mixed precision, with features in single precision.
        """
        raise NotImplementedError

    def begin(self, width: int) -> None:
        """Draw or allocate what depends on the width of the features, once, when the model is built.

        width: d, or p if the head reads pooled features.
        """

    def before_task(self, task: int, classes: int) -> None:
        """Grow, or prepare, for a task that is about to begin. A resumed run calls it again for each task that had begun."""

    def after_task(self, task: int, images: TrainingImages) -> None:
        """Learn from a task's training images, at its end, after all plugins and adapters. Not called again by a resumed run."""

    def learns_from_images(self) -> bool:
        """Whether `after_task` is more than nothing."""
        return type(self).after_task is not Head.after_task

    def make_room(self, state: Mapping[str, Tensor]) -> None:
        """Give the registered buffers the shapes of a kept state, by name, before that is loaded strictly."""
        for path, module in self.named_modules():
            for name, buffer in list(module._buffers.items()):
                full = f"{path}.{name}" if path else name
                kept = state.get(full)
                if kept is not None and (buffer is None or buffer.shape != kept.shape or buffer.dtype != kept.dtype):
                    module._buffers[name] = torch.empty_like(kept, device=self._device(kept))

    def _device(self, kept: Tensor) -> torch.device:
        """Where the head's other tensors lie."""
        own: Any = next((t for t in (*self.parameters(), *self.buffers())), kept)
        device: torch.device = own.device
        return device


class TextHead(Head):
    """Compares images with the sentences of the classes.

    The logits are s·z·tᵀ, as CLIP was trained.
    Radford et al., 2021, arXiv 2103.00020.
    """

    paper = "arXiv 2103.00020"

    def forward(self, z: Tensor, scope: Scope) -> Tensor:
        return scope.text_logits(z)


def logits_of(head: Head, z: Tensor, scope: Scope) -> Tensor:
    """A head's logits [B, C], at least in single precision. MulkiError if what it returns has another shape."""
    with torch.autocast(z.device.type, enabled=False):
        logits: Tensor = head(z, scope)
    if logits.shape != (expected := (len(z), len(scope.text))):
        what = f"the head {type(head).__name__} returned logits of shape {tuple(logits.shape)}, expected {expected}"
        raise MulkiError(what, "one row for each image, one column for each candidate of the scope, in their order")
    return logits


@torch.no_grad()
def width_for(head: Head, clip: Any, tokenizer: Callable[[list[str]], Tensor]) -> int:
    """The width of the features that a head reads: d, or p if it reads pooled ones. MulkiError if the model has none."""
    device = clip.logit_scale.device
    d = int(clip.encode_text(tokenizer([""]).to(device)).shape[-1])
    if not head.reads_pooled:
        return d
    visual, size = clip.visual, getattr(clip.visual, "image_size", None)
    if size is None:
        raise no_pooled_features(visual)
    size = tuple(size) if isinstance(size, Sequence) else (size, size)
    weight = next(visual.parameters())
    blank = torch.zeros(1, 3, *size, device=weight.device, dtype=weight.dtype)
    training = visual.training
    visual.eval()  # a blank image must not move BatchNorm's statistics
    try:
        return int(encode_with_pooled(visual, lambda: clip.encode_image(blank)).shape[1]) - d
    finally:
        visual.train(training)


class Headed(nn.Module):
    """The part of a classifier that classifies through its head."""

    clip: Any
    prompts: tuple[Prompts, ...]
    tokenizer: Callable[[list[str]], Tensor]
    head: Head
    image_features: Tensor | None = None
    """What the head read of the batch of the last forward in evaluation mode: `classify` takes it, so nobody encodes again."""
    features_from: Callable[[Callable[[], Tensor]], Tensor] | None = None
    """In an evaluation: returns what the head reads of the batch, and encodes that, by the function it gets, if it has to."""
    image_routes: Sequence[Route] = ()
    """Their routes, if an adapter chooses one for each image."""
    routes: Routes

    @property
    def scale(self) -> Tensor:
        raise NotImplementedError

    def text_features(self, task: int) -> Tensor:
        raise NotImplementedError

    def union(self, tasks: Sequence[int]) -> Union:
        raise NotImplementedError

    def encode_directly(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def put_on(self, head: Head) -> None:
        """Classify with this head, which has learned nothing yet, from here on."""
        if head.reads_pooled and self.routes.adapter is not None:
            what = f"the head {type(head).__name__} reads pooled features, and those differ by the adapter's routes"
            raise MulkiError(what, "let it read the projected ones, or use an adapter without routes")
        self.head = head
        if type(head).begin is not Head.begin:
            head.begin(width_for(head, self.clip, self.tokenizer))

    def encode_for_head(self, x: Tensor) -> Tensor:
        """What the head reads of images, by the current route: features [B, d], or [B, d + p] with the pooled ones."""

        def encode() -> Tensor:
            if not self.head.reads_pooled:
                return self.encode_directly(x)
            return encode_with_pooled(self.clip.visual, lambda: self.encode_directly(x))

        return encode() if self.features_from is None or self.training else self.features_from(encode)

    def answer(self, z: Tensor, task: int, t: Tensor) -> Tensor:
        """The head's logits [B, C] over the classes of one task, whose text features are t [C, d]."""
        scope = Scope(t, self.scale, {task: range(len(t))})
        asked = self.head.asked_in_training and not self.head.reads_pooled
        return scope.text_logits(z) if self.training and not asked else logits_of(self.head, z, scope)

    def answer_by_route(self, z: Tensor, routes: Sequence[Route], task: int) -> Tensor:
        """Logits [B, C] over a task's classes, each image by the sentences of its route."""
        return self.routes.select(routes, lambda: self.answer(z, task, self.text_features(task)))

    def classify(self, z: Tensor, tasks: Sequence[int], routes: Sequence[Route] = ()) -> Tensor:
        """Logits [B, C] of encoded images over the classes of one task, or over the union of those of several.

        z: [B, d], or what `encode_for_head` returns for a head that reads more.
        routes: the images' routes if an adapter chooses them: `classify(model.image_features, tasks, model.image_routes)`.
        """

        def logits() -> Tensor:
            union, texts = self.union(tasks), torch.cat([self.text_features(task) for task in tasks])
            scope = Scope(texts[union.first], self.scale, dict(zip(tasks, union.places, strict=True)))
            return logits_of(self.head, z, scope)

        return self.routes.select(routes, logits)

    def union_logits(self, x: Tensor, tasks: Sequence[int]) -> Tensor:
        """Logits [B, C] of images over the classes of one task, or over the union of those of several."""
        z, routes = self.routes.encode(self.encode_for_head, x)
        if not self.training:
            self.image_features, self.image_routes = z.detach(), routes
        return self.classify(z, tasks, routes)

    def make_room(self, weights: Mapping[str, Tensor]) -> None:
        """Give the head's buffers the shapes of kept weights, which are then loaded strictly."""
        self.head.make_room({n.removeprefix(HEAD): w for n, w in weights.items() if n.startswith(HEAD)})
