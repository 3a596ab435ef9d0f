"""Avalanche's own plugins with what they lack: a state that a checkpoint can keep, and copies where they take views."""

from __future__ import annotations

import copy
from typing import Any

from avalanche.training.plugins import (
    EWCPlugin,
    LwFPlugin,
    MASPlugin,
    ReplayPlugin,
    SynapticIntelligencePlugin,
)
from avalanche.training.storage_policy import ReservoirSamplingBuffer
from avalanche.training.utils import ParamData

from mulki_plugins.baselines.stored import images_at, places_of


def _tensors(params: dict[str, Any]) -> dict[str, Any]:
    return {name: entry.data for name, entry in params.items()}


def _params(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: ParamData(name, init_tensor=tensor, device=tensor.device) for name, tensor in tensors.items()}


class EWC(EWCPlugin):
    """Adds ewc_lambda·Σ F(θ − θ_before)² for each task before. Kirkpatrick et al., 2017, arXiv 1612.00796."""

    def state_dict(self) -> dict[str, Any]:
        noted = {"saved_params": self.saved_params, "importances": self.importances}
        return {name: {task: _tensors(params) for task, params in each.items()} for name, each in noted.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for noted, name in ((self.saved_params, "saved_params"), (self.importances, "importances")):
            noted.clear()
            noted.update({task: _params(tensors) for task, tensors in state[name].items()})


class MAS(MASPlugin):
    """Adds lambda_reg·Σ Ω(θ − θ_before)², with the outputs' sensitivity as Ω. Aljundi et al., 2018, arXiv 1711.09601."""

    def state_dict(self) -> dict[str, Any]:
        return {"params": _tensors(self.params or {}), "importance": _tensors(self.importance or {})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.params, self.importance = _params(state["params"]) or None, _params(state["importance"]) or None


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

    def state_dict(self) -> dict[str, Any]:
        """Of what is noted, all but the weights and gradients of the last step."""
        return {
            "weights": _tensors(self.ewc_data[0]), "importances": _tensors(self.ewc_data[1]),
            **{name: _tensors(self.syn_data[name]) for name in ("trajectory", "cum_trajectory")},  # type: ignore[literal-required]
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ewc_data = _params(state["weights"]), _params(state["importances"])
        for name in ("trajectory", "cum_trajectory"):
            self.syn_data[name] = _params(state[name])  # type: ignore[literal-required]
        for name in ("old_theta", "new_theta", "grad"):
            self.syn_data[name] = _params({n: t.clone() for n, t in state["weights"].items()})  # type: ignore[literal-required]


def _copied(noted: dict[str, Any]) -> None:
    for entry in noted.values():
        entry.data = entry.data.clone()


class LwF(LwFPlugin):
    """Adds alpha·KL(previous model ‖ model) on this task's images, of earlier tasks' classes. arXiv 1606.09282."""

    def __init__(self, alpha: float = 1, temperature: float = 2) -> None:
        super().__init__(alpha, temperature)
        self._kept: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        lwf = self.lwf
        return {
            "model": lwf.prev_model.state_dict() if lwf.prev_model is not None else {},
            "experiences": lwf.expcount,
            "classes": {int(task): sorted(map(int, classes)) for task, classes in lwf.prev_classes_by_task.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.lwf.prev_model is not None and state["model"]:
            self.lwf.prev_model.load_state_dict(state["model"])
        else:
            self._kept = state["model"]
        self.lwf.expcount = state["experiences"]
        self.lwf.prev_classes_by_task.update({task: set(classes) for task, classes in state["classes"].items()})

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        if self._kept:
            self.lwf.prev_model = copy.deepcopy(strategy.model)
            self.lwf.prev_model.load_state_dict(self._kept)
            self._kept = {}


class Replay(ReplayPlugin):
    """Keeps mem_size images of earlier tasks, as many of each, and mixes them into every batch. arXiv 1902.10486."""

    def __init__(
        self, mem_size: int = 200, batch_size: int | None = None, batch_size_mem: int | None = None,
        task_balanced_dataloader: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(mem_size, batch_size, batch_size_mem, task_balanced_dataloader)
        self._kept: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """Of each image its task and index; none is stored."""
        policy = self.storage_policy
        groups = [
            {"size": group.max_size, "weights": group._buffer_weights, "places": places_of(group.buffer)}
            for group in policy.buffer_groups.values()
        ]
        return self._kept or {"experiences": policy._num_exps, "groups": groups}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._kept = state

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        self._found_again(strategy)
        super().before_training_exp(strategy, *args, **kwargs)

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self._found_again(strategy)
        self.storage_policy.post_adapt(strategy, strategy.experience)

    def _found_again(self, strategy: Any) -> None:
        if not self._kept:
            return
        policy = self.storage_policy
        policy._num_exps = self._kept["experiences"]
        policy.buffer_groups.clear()
        for number, kept in enumerate(self._kept["groups"]):
            group = policy.buffer_groups[number] = ReservoirSamplingBuffer(kept["size"])
            group.buffer, group._buffer_weights = images_at(kept["places"], strategy), kept["weights"]
        self._kept = {}
