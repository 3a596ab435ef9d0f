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
        self._host: dict[tuple[int, bool], Tensor] = {}
        self._device: dict[tuple[tuple[int, ...], bool], Tensor] = {}
        self._lengths: dict[tuple[int, bool], int] = {}

    def of(self, task: int, all_templates: bool) -> Tensor:
        """One task's sentences on the host, template after template: [templates · C, L]. IndexError for an unknown task."""
        if not 0 <= task < len(self.prompts):
            raise IndexError(f"task {task}: the model knows the tasks 0 to {len(self.prompts) - 1}")
        key = task, all_templates
        if key not in self._host:
            texts = [text for group in sentences(self.prompts[task], all_templates) for text in group]
            self._host[key] = self.tokenizer(texts).cpu()
        return self._host[key]

    def on(self, device: torch.device, tasks: Sequence[int], all_templates: bool) -> Tensor:
        """The sentences of several tasks on a device, one task after the other: [N, L]."""
        key = tuple(tasks), all_templates
        if key not in self._device or self._device[key].device != device:
            self._device[key] = torch.cat([self.of(task, all_templates) for task in tasks]).to(device)
        return self._device[key]

    def length(self, clip: nn.Module, tasks: Sequence[int], all_templates: bool) -> int:
        """How many leading tokens of these tasks' sentences the model's text features depend on."""
        for key in ((task, all_templates) for task in tasks):
            if key not in self._lengths:
                self._lengths[key] = length_needed(clip, self.of(*key))
        return max(self._lengths[task, all_templates] for task in tasks)
