"""A CLIP as a classifier for Avalanche: compares images with the sentences of their task's classes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, cast

import torch
from avalanche.models import MultiTaskModule
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mulki_plugins.models.adapter import Adapter, apply_adapters, is_parametrized, merge_adapters, plain_name
from mulki_plugins.models.features import Features, Request
from mulki_plugins.models.fixed_images import way_to_features
from mulki_plugins.models.head import Head, Headed, Scope, TextHead
from mulki_plugins.models.routes import Route, Routes
from mulki_plugins.models.text import HasPrompts, Union, as_prompts, union_of
from mulki_plugins.models.text_tower import encode_sentences
from mulki_plugins.models.tokens import Tokens
from mulki_plugins.models.unit import unit

MASKED = -1e4
"""Logit of classes outside the sample's task: finite in every dtype, zero after softmax."""

Learns = Literal["all", "image", "text", "adapters", "none"]
"""What learns: both towers, one of them, only what adapters add, or nothing. Adapters learn in all but the last."""
Templates = Literal["first", "all"]
"""The sentences of a class: the task's first template (the training prompt), or the mean over all templates."""


class ClipClassifier(Headed, MultiTaskModule):
    """Classifies each sample among the classes of its task; keeps no state about the current task.

    `templates` selects the sentences of a class: the `first` template, for training, or the renormalised mean over `all`
    templates, for evaluation (Radford et al., 2021, arXiv 2103.00020, section 3.1.4). `mulki run` sets it; in your own code
    use `with model.using("all"):`. None, the default, means `all` in evaluation mode without gradients, else `first`: a
    plugin that calls `eval()` to differentiate the loss gets the training prompt. Text features that need no gradient are
    cached until a weight they depend on changes.

    Args:
        clip: An open_clip model (`encode_image`, `encode_text`, `logit_scale`); it is not copied.
        tokenizer: Texts -> token ids, as returned by `open_clip.get_tokenizer`.
        tasks: Class names and templates of each task; the task id is the position. A stream's tasks or `Prompts`, one or
            several.
        train: What learns. The logit scale is always frozen.
        adapters: Weights to add inside the model; they are applied here.
        head: Turns image features into logits; by default by their cosines with the sentences. Its parameters always learn.
    """

    def __init__(
        self,
        clip: nn.Module,
        tokenizer: Callable[[list[str]], Tensor],
        tasks: HasPrompts | Sequence[HasPrompts],
        *,
        train: Learns = "all",
        adapters: Sequence[Adapter] = (),
        head: Head | None = None,
    ) -> None:
        super().__init__()
        if not tasks:
            raise ValueError("tasks: expected at least one, got none")
        self.clip: Any = clip
        self.tokenizer = tokenizer
        self.use_prompts(tasks)
        self.features: Features | None = None
        self.templates: Templates | None = None
        self.weights_metadata: dict[str, str] = {}
        """The metadata to store with the weights: what they were trained with."""
        self.batch_labels: Sequence[int] | None = None
        """The task label of each sample of the batch, if the caller knows them; else the device is asked, which waits."""
        self.batch_tasks: Sequence[int] = ()
        """Tasks whose texts the next forward encodes beside those of its batch: of samples that other ranks have."""
        self._requests: dict[object, Request] = {}
        self._cache: dict[tuple[int, Templates, bool, Route], tuple[tuple[int, ...], Tensor]] = {}
        self._unions: dict[tuple[int, ...], Union] = {}
        for name, parameter in clip.named_parameters():
            parameter.requires_grad_(_learns(name, train))
        self.built_way = way_to_features(self)
        """What images passed through before there were adapters and plugins."""
        self.adapters = list(adapters)
        self._own = apply_adapters(clip, self.adapters)
        self.routes = Routes(clip, self.adapters, self._own)
        self._prepared: list[int] = []
        self._fixed = train == "none"
        if self._fixed:
            clip.requires_grad_(False)
        self.put_on(head or TextHead())

    def use_prompts(self, tasks: HasPrompts | Sequence[HasPrompts]) -> None:
        """Describe the classes by the names and templates of these tasks from here on."""
        self.prompts = as_prompts(tasks)
        self._tokens = Tokens(self.tokenizer, self.prompts)

    def before_task(self, task: int) -> None:
        """Let the adapters prepare for a task that is about to begin; only once for each task."""
        if task not in self._prepared:
            self._prepared.append(task)
            learned = [p for p in self.clip.parameters() if p.requires_grad]  # what a plugin has added
            for adapter in self.adapters:
                adapter.before_task(self.clip, task)
            if self._fixed:  # nor does what an adapter has grown learn
                self.clip.requires_grad_(False)
                for parameter in learned:
                    parameter.requires_grad_(True)
            self.head.before_task(task, len(self.prompts[task].class_names))
            self.train(self.training)  # what has grown may learn in a tower that did not
            self.to(self.clip.logit_scale.device)
            self.routes.tasks.add(task)

    def after_task(self, task: int) -> None:
        """Let the adapters react to the end of a task."""
        for adapter in self.adapters:
            adapter.after_task(self.clip, task)

    def added_weights(self) -> dict[str, nn.Parameter]:
        """The parameters that the adapters have added, by name."""
        return {name: p for name, p in self.clip.named_parameters() if plain_name(name) not in self._own}

    def own_weights(self) -> dict[str, Tensor]:
        """The weights and buffers of the open_clip model itself, without what adapters have added, by their present names."""
        return {name: w for name, w in self.clip.state_dict().items() if plain_name(name) in self._own}

    def merged_weights(self) -> dict[str, Tensor]:
        """The weights and buffers by open_clip's names, with the adapters merged. MulkiError if one cannot be."""
        copied = copy.deepcopy(self)
        return merge_adapters(copied.clip, copied.adapters, self._own)

    @property
    def scale(self) -> Tensor:
        """The factor of the cosines: exp of the frozen logit scale, a scalar."""
        return cast(Tensor, self.clip.logit_scale).detach().exp().squeeze()

    def forward(self, x: Tensor, task_labels: Tensor | int | None = None) -> Tensor | dict[int, Tensor]:
        """Logits over the classes of each sample's task.

        x: [B, 3, H, W]. task_labels: one id, or one per sample, [B].
        Returns [B, C], C being the largest number of classes of the tasks in the batch; logits of classes outside a sample's
        task are MASKED. Without task labels: the logits of the only task, or a dict of logits by task id, as Avalanche
        expects of a MultiTaskModule.
        """
        if task_labels is None and len(self.prompts) > 1:
            z, routes = self.routes.encode(self.encode_for_head, x)
            return {task: self.answer_by_route(z, routes, task) for task in range(len(self.prompts))}
        if isinstance(task_labels, Tensor):
            labels = task_labels.tolist() if self.batch_labels is None else self.batch_labels
        else:
            labels = [task_labels or 0] * len(x)
        if self.routes.adapter is not None and not self.training:
            return self._logits_by_route(x, labels)
        z = self.routes.encode_by_task(self.encode_directly if self.training else self.encode_for_head, x, labels)
        ids = tuple(sorted({*labels, *self.batch_tasks}))
        texts, requested = self._texts(ids)
        features = Features(image=z, text=texts, task_labels=labels, scale=self.scale, x=x, classes=requested)
        if self.training:
            self.features = features
        else:
            self.image_features = z.detach()
        if len(ids) == 1:
            return self.answer(z, ids[0], texts[ids[0]])
        out = z.new_full((len(z), max(len(t) for t in texts.values())), MASKED)
        for task, rows in features.rows.items():
            out[rows, : len(texts[task])] = self.answer(z[rows], task, texts[task])
        return out

    def request(self, plugin: object, tasks: Sequence[int], indices: Tensor) -> None:
        """Encode single classes in each training forward from now on, in the same pass as the batch's own texts.

        indices: [N], on the host, among the concatenated classes of `tasks`; their features, from the first template, are
        in `Features.classes[plugin]`. A plugin's next request replaces the one before; without indices it only ends it.
        """
        self._requests.pop(plugin, None)
        if len(indices):
            self._requests[plugin] = Request(tuple(tasks), indices)

    def _logits_by_route(self, x: Tensor, labels: Sequence[int]) -> Tensor:
        """What `forward` returns outside of training if an adapter chooses a route for each image."""
        z, routes = self.routes.encode(self.encode_for_head, x)
        self.image_features, self.image_routes = z.detach(), routes
        logits = {task: self.answer_by_route(z, routes, task) for task in sorted(set(labels))}
        out = z.new_full((len(z), max(each.shape[1] for each in logits.values())), MASKED)
        for row, task in enumerate(labels):
            out[row, : logits[task].shape[1]] = logits[task][row]
        return out

    def union(self, tasks: Sequence[int]) -> Union:
        """The union of the classes of several tasks, in the order of the tasks.

        Classes of two tasks are one if all their sentences tokenise identically: no model could tell them apart, so either
        answer counts.
        """
        key = tuple(tasks)
        if key not in self._unions:
            self._unions[key] = union_of([self._descriptions(task) for task in tasks])
        return self._unions[key]

    def _descriptions(self, task: int) -> list[bytes]:
        """The tokens of all sentences of each class."""
        classes = len(self.prompts[task].class_names)
        tokens = self._tokens.of(task, all_templates=True)
        return [
            row.contiguous().numpy().tobytes() for row in tokens.reshape(-1, classes, tokens.shape[1]).transpose(0, 1)
        ]

    def encode_image(self, x: Tensor) -> Tensor:
        """Unit-norm image features [B, d], at least in single precision; each image by the route that it chooses."""
        return self.routes.encode(self.encode_directly, x)[0]

    def encode_directly(self, x: Tensor) -> Tensor:
        """Unit-norm image features [B, d] by the current route; without one, an adapter with routes is switched off."""
        with self._parametrized_once():
            return unit(self.clip.encode_image(x))

    @contextmanager
    def using(self, templates: Templates | None) -> Iterator[None]:
        """Use these templates within a `with` block; None for the default."""
        before, self.templates = self.templates, templates
        try:
            yield
        finally:
            self.templates = before

    @property
    def templates_in_use(self) -> Templates:
        """The templates that a forward would use now."""
        if self.templates is not None:
            return self.templates
        return "first" if self.training or torch.is_grad_enabled() else "all"

    def text_features(self, task: int, templates: Templates | None = None) -> Tensor:
        """Unit-norm features [C, d] of the task's class sentences, cached if they need no gradient.

        templates: None for `templates_in_use`.
        """
        templates = templates or self.templates_in_use
        every, gradients = templates == "all", torch.is_grad_enabled()
        if gradients and self._text_learns():
            return self.encode_text(task, all_templates=every)
        key, version = (task, templates, gradients, self.routes.of_texts(task)), self._text_version()
        cached = self._cache.get(key)
        if cached is None or cached[0] != version:
            texts = self.encode_text(task, all_templates=every)
            if texts.requires_grad:  # a gradient through weights that a plugin keeps outside the model
                return texts
            cached = self._cache[key] = (version, texts)
        return cached[1]

    def _texts(self, tasks: Sequence[int]) -> tuple[dict[int, Tensor], dict[object, Tensor]]:
        """The text features of a batch's tasks, and in training those of the classes that plugins requested.

        Features that need a gradient come from one pass of the text tower over all sentences.
        """
        requests = self._requests if self.training else {}
        together = (len(tasks) > 1 or bool(requests)) and self.routes.adapter is None  # else each task has a route
        if not together or self.templates_in_use == "all" or not (torch.is_grad_enabled() and self._text_learns()):
            every = {task: self.text_features(task) for task in tasks}
            return every, {plugin: self._requested(request) for plugin, request in requests.items()}
        device = self.clip.logit_scale.device
        tokens = [self._tokens.on(device, [task], all_templates=False) for task in tasks]
        for request in requests.values():
            chosen = request.indices.to(device, non_blocking=True)
            tokens.append(self._tokens.on(device, request.tasks, all_templates=False)[chosen])
        involved = [*tasks, *(task for request in requests.values() for task in request.tasks)]
        features = self._encode(torch.cat(tokens), involved, all_templates=False)
        parts = torch.split(features, [len(each) for each in tokens])
        return dict(zip(tasks, parts, strict=False)), dict(zip(requests, parts[len(tasks) :], strict=True))

    def _requested(self, request: Request) -> Tensor:
        texts = torch.cat([self.text_features(task, "first") for task in request.tasks])
        return texts[request.indices.to(texts.device, non_blocking=True)]

    def encode_text(self, task: int, *, all_templates: bool) -> Tensor:
        """Unit-norm features [C, d], at least in single precision: of the first template, or the renormalised mean over all.

        All sentences pass the text tower at once. IndexError for an unknown task.
        """
        tokens = self._tokens.on(self.clip.logit_scale.device, [task], all_templates)
        with self.routes.taking(self.routes.of_texts(task)):
            t = self._encode(tokens, [task], all_templates)
        classes = len(self.prompts[task].class_names)
        return unit(t.reshape(-1, classes, t.shape[1]).mean(0)) if len(t) > classes else t

    def _parametrized_once(self) -> AbstractContextManager[None]:
        """Compute each parametrized weight once per forward: torch's attention asks for its weight several times."""
        cached: AbstractContextManager[None] = parametrize.cached() if is_parametrized(self.clip) else nullcontext()
        return cached

    def _encode(self, tokens: Tensor, tasks: Sequence[int], all_templates: bool) -> Tensor:
        """Unit-norm features of sentences of these tasks, cut to the longest of all their sentences.

        So the length does not depend on which of the sentences a step draws.
        """
        with self._parametrized_once():
            return unit(encode_sentences(self.clip, tokens, self._tokens.length(self.clip, tasks, all_templates)))

    def logits(self, z: Tensor, t: Tensor) -> Tensor:
        """Scaled cosines s·z·tᵀ: [B, d], [C, d] -> [B, C], at least in single precision."""
        return Scope(t, self.scale, {}).text_logits(z)

    def _text_learns(self) -> bool:
        """Whether a weight learns that text features may depend on."""
        return any(t.requires_grad for t in self._text_tensors())

    def _text_version(self) -> tuple[int, ...]:
        """Changes with every weight that text features depend on: its address and its count of in-place writes."""
        return tuple(n for t in self._text_tensors() for n in (t.data_ptr(), t._version, t.requires_grad))

    def _text_tensors(self) -> Iterator[Tensor]:
        """What text features may depend on: the text tower, and whatever plugins added outside the image tower."""
        for inside in (self, self.clip):  # the image tower has most of the modules, so nothing goes through it
            for name, tensor in (*inside._parameters.items(), *inside._buffers.items()):
                if tensor is not None and _tower(name) == "text":
                    yield tensor
            for name, part in inside.named_children():
                if part not in (self.clip, self.head) and not (inside is self.clip and name == "visual"):
                    yield from part.parameters()
                    yield from part.buffers()

    def train(self, mode: bool = True) -> ClipClassifier:
        self._cache.clear()  # writes through `.data` do not count as a version
        super().train(mode)
        for part in self.clip.children():  # keep BatchNorm's statistics in a frozen tower
            if not any(p.requires_grad for p in part.parameters()):
                part.eval()
        return self

    def adaptation(self, experience: Any) -> None:
        """Do nothing: all class names are known from the start, so nested evaluation and replay cannot interfere."""

    def __getstate__(self) -> dict[str, Any]:
        """The state without features, caches and requests: tensors with a graph cannot be copied, plugins must not be."""
        dropped: dict[str, Any] = {
            "features": None, "image_features": None, "features_from": None, "batch_labels": None, "_cache": {}, "_requests": {},
        }  # fmt: skip
        return self.__dict__ | dropped


def _tower(name: str) -> str:
    """The part of an open_clip model that a parameter belongs to: `image`, `text` or `scale`."""
    if name.startswith(("logit_scale", "logit_bias")):
        return "scale"
    return "image" if name.startswith("visual.") else "text"


def _learns(name: str, train: Learns) -> bool:
    return _tower(name) == train or (train == "all" and _tower(name) != "scale")
