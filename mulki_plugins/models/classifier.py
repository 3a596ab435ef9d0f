"""A CLIP as a task-aware classifier for Avalanche: images against the sentences that name a task's classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from attrs import frozen
from avalanche.models import MultiTaskModule
from torch import Tensor, nn

from mulki_plugins.models.text import HasPrompts, Union, as_prompts, sentences, union_of

MASKED = -1e4
"""The logit of a class that a sample's task has not: no probability in any dtype, and finite in each."""

Towers = Literal["all", "image", "text"]
Templates = Literal["first", "all"]
"""Which sentences stand for a class: its task's first template (the training prompt), or the mean over all templates."""


@frozen(eq=False)
class Features:
    """What the last training forward computed, with its graph, so that no plugin encodes the batch again."""

    image: Tensor
    """[B, d], unit norm."""
    text: dict[int, Tensor]
    """For each task in the batch [C, d], unit norm."""
    task_labels: Tensor
    """[B]"""
    scale: Tensor
    """The factor of the cosines, a scalar."""


class ClipClassifier(MultiTaskModule):
    """Classifies among the classes of each sample's task; knows nothing of which task is current.

    clip: an open_clip model (`encode_image`, `encode_text`, `logit_scale`); it is not copied.
    tokenizer: texts -> token ids, as `open_clip.get_tokenizer` returns.
    tasks: class names and templates of each task, task id = position. A stream's tasks, or `Prompts`, one or several.
    train: which towers learn. The logit scale is frozen always.

    `templates` says whose sentences stand for a class: the `first` template's, which is what training uses, or the
    renormalised mean over `all` templates, which is what evaluation uses (Radford et al., 2021, arXiv 2103.00020, section
    3.1.4). `mulki run` sets it; `with model.using("all"):` sets it by hand. None, the default, means `all` only in
    evaluation mode and without gradients: a plugin that calls `eval()` to differentiate the loss sees the training prompt.
    Text features that need no gradient are computed once and kept until a weight that they depend on changes.
    """

    def __init__(
        self,
        clip: nn.Module,
        tokenizer: Callable[[list[str]], Tensor],
        tasks: HasPrompts | Sequence[HasPrompts],
        *,
        train: Towers = "all",
    ) -> None:
        super().__init__()
        if not tasks:
            raise ValueError("tasks: expected at least one, got none")
        self.clip: Any = clip
        self.tokenizer = tokenizer
        self.prompts = as_prompts(tasks)
        self.features: Features | None = None
        self.templates: Templates | None = None
        self.weights_metadata: dict[str, str] = {}
        """What stands beside the weights in a file of them: what they were trained with."""
        self._tokens: dict[tuple[int, bool], Tensor] = {}
        self._cache: dict[tuple[int, Templates, bool], tuple[tuple[int, ...], Tensor]] = {}
        self._unions: dict[tuple[int, ...], Union] = {}
        for name, parameter in clip.named_parameters():
            parameter.requires_grad_(_learns(name, train))

    @property
    def scale(self) -> Tensor:
        """The factor of the cosines: exp of the frozen logit scale, a scalar."""
        return cast(Tensor, self.clip.logit_scale).detach().exp().squeeze()

    def forward(self, x: Tensor, task_labels: Tensor | int | None = None) -> Tensor | dict[int, Tensor]:  # type: ignore[override]
        """Logits over the classes of each sample's task.

        x: [B, 3, H, W]. task_labels: one id, or one for each sample, [B].
        Returns [B, C], C being the largest number of classes of the tasks in the batch; the places of classes that a
        sample's task has not are filled with MASKED. Without task labels: the logits of the one task, or, where there are
        several, a dict of them by task id (what Avalanche asks of a MultiTaskModule).
        """
        z = self.encode_image(x)
        if task_labels is None and len(self.prompts) > 1:
            return {task: self.logits(z, self.text_features(task)) for task in range(len(self.prompts))}
        task_labels = 0 if task_labels is None else task_labels
        if isinstance(task_labels, int):
            task_labels = torch.full((len(x),), task_labels, device=x.device)
        ids = [int(task) for task in torch.unique(task_labels).tolist()]
        texts = {task: self.text_features(task) for task in ids}
        if self.training:
            self.features = Features(image=z, text=texts, task_labels=task_labels, scale=self.scale)
        if len(ids) == 1:
            return self.logits(z, texts[ids[0]])
        out = z.new_full((len(z), max(len(t) for t in texts.values())), MASKED)
        for task, t in texts.items():
            rows = (task_labels == task).nonzero()[:, 0]
            out[rows, : len(t)] = self.logits(z[rows], t)
        return out

    def union_logits(self, x: Tensor, tasks: Sequence[int]) -> Tensor:
        """Logits over the union of the classes of several tasks: [B, size of the union], each class at its place in it."""
        texts = torch.cat([self.text_features(task) for task in tasks])
        return self.logits(self.encode_image(x), texts[self.union(tasks).first])

    def union(self, tasks: Sequence[int]) -> Union:
        """The union of the classes of several tasks, which follow one another in it.

        Classes of two tasks whose sentences are the same token for token are one: the model is told the same of both, so
        that an answer for the one is an answer for the other.
        """
        key = tuple(tasks)
        if key not in self._unions:
            self._unions[key] = union_of([self._descriptions(task) for task in tasks])
        return self._unions[key]

    def _descriptions(self, task: int) -> list[bytes]:
        """For each class the tokens of all its sentences."""
        classes = len(self.prompts[task].class_names)
        tokens = self._tokenised(task, all_templates=True).cpu()
        return [
            row.contiguous().numpy().tobytes() for row in tokens.reshape(-1, classes, tokens.shape[1]).transpose(0, 1)
        ]

    def encode_image(self, x: Tensor) -> Tensor:
        """Unit-norm image features [B, d], at least in single precision."""
        return _unit(self.clip.encode_image(x))

    @contextmanager
    def using(self, templates: Templates | None) -> Iterator[None]:
        """Answer from these templates for a while; a model without `templates` set is asked as the class says."""
        before, self.templates = self.templates, templates
        try:
            yield
        finally:
            self.templates = before

    @property
    def templates_in_use(self) -> Templates:
        """The templates that a forward uses now."""
        if self.templates is not None:
            return self.templates
        return "first" if self.training or torch.is_grad_enabled() else "all"

    def text_features(self, task: int, templates: Templates | None = None) -> Tensor:
        """Unit-norm features [C, d] of the task's class sentences, kept where they need no gradient.

        templates: those in use where it is None.
        """
        templates = templates or self.templates_in_use
        every, gradients = templates == "all", torch.is_grad_enabled()
        if gradients and any(p.requires_grad for p in self._text_parameters()):
            return self.encode_text(task, all_templates=every)
        key, version = (task, templates, gradients), self._text_version()
        kept = self._cache.get(key)
        if kept is None or kept[0] != version:
            texts = self.encode_text(task, all_templates=every)
            if texts.requires_grad:  # through weights that a plugin keeps outside the model
                return texts
            kept = self._cache[key] = (version, texts)
        return kept[1]

    def encode_text(self, task: int, *, all_templates: bool) -> Tensor:
        """Unit-norm features [C, d], at least in single precision: of the first template, or the mean over all.

        All sentences pass the text tower at once; the mean over templates is normalised again.
        """
        if not 0 <= task < len(self.prompts):
            raise IndexError(f"task {task}: the model knows the tasks 0 to {len(self.prompts) - 1}")
        tokens = self._tokenised(task, all_templates).to(self.clip.logit_scale.device)
        t: Tensor = _unit(self.clip.encode_text(tokens))
        classes = len(self.prompts[task].class_names)
        return _unit(t.reshape(-1, classes, t.shape[1]).mean(0)) if len(t) > classes else t

    def encode_classes(self, classes: Sequence[tuple[int, int]]) -> Tensor:
        """Unit-norm features [N, d], at least in single precision, of single classes, each (task, class in the task)."""
        tokens = torch.stack([self._tokenised(task, False)[c] for task, c in classes])
        return _unit(self.clip.encode_text(tokens.to(self.clip.logit_scale.device)))

    def _tokenised(self, task: int, all_templates: bool) -> Tensor:
        """The token ids of the task's sentences, template after template: [templates · C, length]."""
        if (task, all_templates) not in self._tokens:
            texts = [text for group in sentences(self.prompts[task], all_templates) for text in group]
            self._tokens[task, all_templates] = self.tokenizer(texts)
        return self._tokens[task, all_templates]

    def logits(self, z: Tensor, t: Tensor) -> Tensor:
        """Scaled cosines s·z·tᵀ: [B, d], [C, d] -> [B, C], never in half precision."""
        with torch.autocast(z.device.type, enabled=False):
            return self.scale.to(z.dtype) * z @ t.T

    def _text_parameters(self) -> list[nn.Parameter]:
        """All that may shape a text: the text tower, and what plugins have added outside the image tower."""
        return [p for name, p in self.named_parameters() if _tower(name.removeprefix("clip.")) == "text"]

    def _text_version(self) -> tuple[int, ...]:
        """Changes whenever a weight that shapes texts does: where it lies, and how often it was written in place."""
        buffers = [b for name, b in self.named_buffers() if _tower(name.removeprefix("clip.")) == "text"]
        shaping = [*self._text_parameters(), *buffers]
        return tuple(n for t in shaping for n in (t.data_ptr(), t._version, t.requires_grad))

    def train(self, mode: bool = True) -> ClipClassifier:
        self._cache.clear()  # also after writes through `.data`, which count no version
        super().train(mode)
        for part in self.clip.children():  # nor do BatchNorm's statistics move in a tower that does not learn
            if not any(p.requires_grad for p in part.parameters()):
                part.eval()
        return self

    def adaptation(self, experience: Any) -> None:
        """Nothing: class names are known from the start, so that nested evaluation and replay cannot disturb it."""

    def __getstate__(self) -> dict[str, Any]:
        """Without what a forward left behind, which cannot be copied while it has a graph."""
        return {**self.__dict__, "features": None, "_cache": {}}


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def _tower(name: str) -> str:
    """To which part of an open_clip model a parameter belongs."""
    if name.startswith(("logit_scale", "logit_bias")):
        return "scale"
    return "image" if name.startswith("visual.") else "text"


def _learns(name: str, train: Towers) -> bool:
    return _tower(name) == train or (train == "all" and _tower(name) != "scale")
