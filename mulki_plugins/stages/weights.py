"""The weights that learn, as the model uses them: a weight that an adapter computes counts as one, not as its factors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class WeightsInUse:
    """The weights that learn in a model, by name.

    A parametrized weight, such as W + BA of LoRA, is included if anything that it is computed from learns; its factors are
    not. So means, interpolations and distances are those of the weights that act on the images. Make it anew for each task.
    """

    def __init__(self, model: nn.Module) -> None:
        self._plain = {
            name: p for name, p in model.named_parameters() if p.requires_grad and "parametrizations." not in name
        }
        self._computed: dict[str, tuple[nn.Module, str]] = {}
        for path, module in model.named_modules():
            if not parametrize.is_parametrized(module):
                continue
            lists: Mapping[str, nn.Module] = module.parametrizations
            for name, parts in lists.items():
                if any(p.requires_grad for p in parts.parameters()):
                    self._computed[f"{path}.{name}" if path else name] = module, name

    @property
    def are_computed(self) -> bool:
        """Whether some of them are computed from others."""
        return bool(self._computed)

    def now(self) -> dict[str, Tensor]:
        """Their current values, with the graph of those that are computed."""
        return {**self._plain, **{name: getattr(*place) for name, place in self._computed.items()}}

    @torch.no_grad()
    def assign(self, values: Mapping[str, Tensor]) -> None:
        """Give some of them new values. A computed one gets it through the model's own weight; its factors stay."""
        plain = [name for name in values if name in self._plain]
        if plain:
            torch._foreach_copy_([self._plain[name] for name in plain], [values[name] for name in plain])
        for name, (module, tensor) in self._computed.items():
            if name in values:
                setattr(module, tensor, values[name])
