"""The tokens of every task's sentences: made once, kept on the host and on the model's device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mulki_plugins.models.text import Prompts, sentences
from mulki_plugins.models.text_tower import length_needed


class Tokens:
    """The token ids of the sentences of each task's classes, for the training prompt alone or for all templates.

    tokenizer: texts -> token ids [N, L], the same L in every call.
    """

    def __init__(self, tokenizer: Callable[[list[str]], Tensor], prompts: Sequence[Prompts]) -> None:
        self.tokenizer = tokenizer
        self.prompts = prompts
        self._host: dict[bool, dict[int, Tensor]] = {False: {}, True: {}}
        """By whether all templates are meant, then by task; so are the next two, by task or by several."""
        self._device: dict[bool, dict[tuple[int, ...], Tensor]] = {False: {}, True: {}}
        self._lengths: dict[bool, dict[int, int]] = {False: {}, True: {}}

    def __deepcopy__(self, memo: dict[int, object]) -> Tokens:
        """Copies of a model share them: they depend on no weight."""
        return self

    def of(self, task: int, all_templates: bool) -> Tensor:
        """One task's sentences on the host, template after template: [templates · C, L]. IndexError for an unknown task."""
        if not 0 <= task < len(self.prompts):
            raise IndexError(f"task {task}: the model knows the tasks 0 to {len(self.prompts) - 1}")
        host = self._host[all_templates]
        if task not in host:
            texts = [text for group in sentences(self.prompts[task], all_templates) for text in group]
            host[task] = self.tokenizer(texts).cpu()
        return host[task]

    def on(self, device: torch.device, tasks: Sequence[int], all_templates: bool) -> Tensor:
        """The sentences of several tasks on a device, one task after the other: [N, L]."""
        key, placed = tuple(tasks), self._device[all_templates]
        if key not in placed or placed[key].device != device:
            placed[key] = torch.cat([self.of(task, all_templates) for task in tasks]).to(device)
        return placed[key]

    def length(self, clip: nn.Module, tasks: Sequence[int], all_templates: bool) -> int:
        """How many leading tokens of these tasks' sentences the model's text features depend on."""
        lengths = self._lengths[all_templates]
        for task in tasks:
            if task not in lengths:
                lengths[task] = length_needed(clip, self.of(task, all_templates))
        return max(lengths[task] for task in tasks)
