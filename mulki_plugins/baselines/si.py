"""Synaptic intelligence: Avalanche's plugin, with copies where it takes views."""

from __future__ import annotations

from typing import Any

from avalanche.training.plugins import SynapticIntelligencePlugin


class SynapticIntelligence(SynapticIntelligencePlugin):
    """Adds ½·si_lambda·Σ Ω(θ − θ_before)², with importances Ω gathered along the path of training.

    Avalanche 0.6 notes weights by `.detach().cpu().flatten()`, which on a CPU is a view that moves with the weights: every
    path has then length 0, and the penalty too. Here what is noted is a copy.
    Zenke et al., 2017, arXiv 1703.04200.
    """

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        super().before_training_exp(strategy, **kwargs)
        _copied(self.ewc_data[0])

    def before_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        super().before_training_iteration(strategy, **kwargs)
        _copied(self.syn_data["old_theta"])


def _copied(noted: dict[str, Any]) -> None:
    for entry in noted.values():
        entry.data = entry.data.clone()
