"""Avalanche's own plugins, with a state for checkpoints, and with copies where Avalanche keeps views by mistake."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from avalanche.models.utils import avalanche_forward
from avalanche.training.plugins import (
    EWCPlugin,
    LwFPlugin,
    MASPlugin,
    ReplayPlugin,
    SynapticIntelligencePlugin,
)
from avalanche.training.plugins.mas import tqdm
from avalanche.training.storage_policy import ReservoirSamplingBuffer
from avalanche.training.utils import ParamData, zerolike_params_dict
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mulki_plugins.baselines.exemplars import images_at, indices_of
from mulki_plugins.errors import MulkiError
from mulki_plugins.losses import squared_distance
from mulki_plugins.ranks import collectives
from mulki_plugins.ranks.batches import own_batches
from mulki_plugins.stages.protocols import Strategy


def _tensors(params: dict[str, Any]) -> dict[str, Any]:
    return {name: entry.data for name, entry in params.items()}


def _params(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: ParamData(name, init_tensor=tensor, device=tensor.device) for name, tensor in tensors.items()}


def _mean_over_batches(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Any, loss_of: Callable[[Sequence[Tensor]], Tensor],
    importance: Callable[[Tensor], Tensor],
) -> dict[str, ParamData]:  # fmt: skip
    """The mean over the batches of what each weight's gradient says of its importance, computed on all ranks together."""
    importances = dict(zerolike_params_dict(model))
    for _, batch in own_batches(batches):
        optimizer.zero_grad()
        loss_of(batch).backward()  # type: ignore[no-untyped-call]  # torch has no type for it
        for name, weight in model.named_parameters():
            if weight.grad is not None:
                importances[name].data += importance(weight.grad)
    for each in importances.values():
        collectives.add_up(each.data)
        each.data /= float(len(batches))
    return importances


def _penalty(model: nn.Module, before: dict[str, Any], importances: dict[str, Any]) -> Tensor:
    """Σ F·(θ − θ_before)² over the weights that were there before; one that has grown since counts with its old part."""
    known = {name: p for name, p in model.named_parameters() if name in before}
    anchors, factors = ([kept[name].expand(p.shape) for name, p in known.items()] for kept in (before, importances))
    return squared_distance(list(known.values()), anchors, factors)


def _refuse_merging(model: Any, name: str) -> None:
    """MulkiError if an adapter starts anew with each task: what was important would no longer be there."""
    if any(getattr(each, "merge_each_task", False) for each in getattr(model, "adapters", ())):
        what = f"{name}: holds the weights that learn, and an adapter merges these into others after each task"
        raise MulkiError(what, "use l2, or an adapter that trains through all tasks, such as lora")


class EWC(EWCPlugin):
    """Elastic weight consolidation: holds the weights that mattered to earlier tasks.

    L = ewc_lambda·Σ F(θ − θ_before)², summed over the tasks before. Kirkpatrick et al., 2017, arXiv 1612.00796.

    Args:
        ewc_lambda: Factor of the penalty.
        mode: Keep the importances of each task (`separate`) or one decaying sum (`online`).
        decay_factor: Factor of the earlier importances, for `online`.
        keep_importance_data: Keep the importances of all tasks, for `online`.
    """

    sequential = True
    per_sample = True
    paper = "arXiv 1612.00796"

    def compute_importances(
        self, model: nn.Module, criterion: Any, optimizer: Any, dataset: Any, device: Any, batch_size: int,
        num_workers: int = 0,
    ) -> dict[str, ParamData]:  # fmt: skip
        """The mean over the batches of the squared gradient of their loss; on several ranks each batch is on one of them."""
        model.eval()
        loader = DataLoader(dataset, batch_size=batch_size, collate_fn=dataset.collate_fn, num_workers=num_workers)

        def loss_of(batch: Sequence[Tensor]) -> Tensor:
            loss: Tensor = criterion(avalanche_forward(model, batch[0].to(device), batch[-1]), batch[1].to(device))
            return loss

        importances = _mean_over_batches(model, optimizer, loader, loss_of, lambda gradient: gradient.pow(2))
        model.train()
        return importances

    def before_training_exp(self, strategy: Strategy, **kwargs: Any) -> None:
        super().before_training_exp(strategy, **kwargs)
        _refuse_merging(strategy.model, "avalanche.ewc")

    def before_backward(self, strategy: Strategy, **kwargs: Any) -> None:
        """Add the penalty: Avalanche's, which goes through the weights one by one, in a few kernels."""
        done = strategy.clock.train_exp_counter
        tasks = range(done) if self.mode == "separate" else range(max(0, done - 1), done)
        if penalties := [_penalty(strategy.model, self.saved_params[i], self.importances[i]) for i in tasks]:
            strategy.loss = strategy.loss + self.ewc_lambda * sum(penalties[1:], penalties[0])

    def state_dict(self) -> dict[str, Any]:
        kept = {"saved_params": self.saved_params, "importances": self.importances}
        return {name: {task: _tensors(params) for task, params in by_task.items()} for name, by_task in kept.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for by_task, name in ((self.saved_params, "saved_params"), (self.importances, "importances")):
            by_task.clear()
            by_task.update({task: _params(tensors) for task, tensors in state[name].items()})


class MAS(MASPlugin):
    """Memory-aware synapses: like EWC, with importances from the outputs' sensitivity.

    L = lambda_reg·Σ Ω(θ − θ_before)². Aljundi et al., 2018, arXiv 1711.09601.

    Args:
        lambda_reg: Factor of the penalty.
        alpha: Share of the earlier importances in their running mean; the new ones have 1 - alpha.
        verbose: Print progress while the importances are computed.
    """

    sequential = True
    per_sample = True
    paper = "arXiv 1711.09601"

    def before_training_exp(self, strategy: Strategy, **kwargs: Any) -> None:
        super().before_training_exp(strategy, **kwargs)
        _refuse_merging(strategy.model, "avalanche.mas")

    def _get_importance(self, strategy: Any) -> dict[str, ParamData]:
        """The mean over the batches of the absolute gradient of the logits' mean squared norm; each batch is on one rank."""
        dataset, model = strategy.experience.dataset, strategy.model
        model.train()
        loader = DataLoader(dataset, batch_size=strategy.train_mb_size, collate_fn=dataset.collate_fn)

        def loss_of(batch: Sequence[Tensor]) -> Tensor:
            logits = avalanche_forward(model, batch[0].to(strategy.device), batch[-1])
            loss: Tensor = torch.norm(logits, p="fro", dim=1).pow(2).mean()
            return loss

        batches = tqdm(loader) if self.verbose and collectives.is_first() else loader
        return _mean_over_batches(model, strategy.optimizer, batches, loss_of, Tensor.abs)

    def before_backward(self, strategy: Strategy, **kwargs: Any) -> None:
        """Add the penalty: Avalanche's, which goes through the weights one by one and waits for the device."""
        if strategy.clock.train_exp_counter:
            penalty = _penalty(strategy.model, self.params or {}, self.importance or {})
            strategy.loss = strategy.loss + self._lambda * penalty

    def state_dict(self) -> dict[str, Any]:
        return {"params": _tensors(self.params or {}), "importance": _tensors(self.importance or {})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.params, self.importance = _params(state["params"]) or None, _params(state["importance"]) or None


class SynapticIntelligence(SynapticIntelligencePlugin):
    """Synaptic intelligence: like EWC, with importances gathered along the path of training.

    L = ½·si_lambda·Σ Ω(θ − θ_before)². Avalanche 0.6 keeps weights by `.detach().cpu().flatten()`, which on a CPU is a view
    that moves with the weights, so that every path, and the penalty, is 0; here they are copied. It also caps each Ω at
    0.001, which the paper does not.
    Zenke et al., 2017, arXiv 1703.04200.

    Args:
        si_lambda: Factor of the penalty, or one for each task, the last of which also counts for further tasks.
        eps: Added to the squared path length before dividing.
        excluded_parameters: Names of weights to leave out.
        device: Where to keep the importances.
    """

    sequential = True
    per_sample = True
    paper = "arXiv 1703.04200"

    def before_training_exp(self, strategy: Strategy, **kwargs: Any) -> None:
        super().before_training_exp(strategy, **kwargs)
        _refuse_merging(strategy.model, "avalanche.si")
        _copy(self.ewc_data[0])

    def before_training_iteration(self, strategy: Strategy, **kwargs: Any) -> None:
        super().before_training_iteration(strategy, **kwargs)
        _copy(self.syn_data["old_theta"])

    def after_training_iteration(self, strategy: Strategy, **kwargs: Any) -> None:
        """Add the step to the path. A step that half precision leaves out, since its gradients overflowed, adds nothing."""
        kept = {name: entry.data.clone() for name, entry in dict(self.syn_data["trajectory"]).items()}
        super().after_training_iteration(strategy, **kwargs)
        for name, entry in dict(self.syn_data["trajectory"]).items():
            entry.data = torch.where(entry.data.isfinite(), entry.data, kept[name])

    def state_dict(self) -> dict[str, Any]:
        """Everything but the weights and gradients of the last step."""
        paths: dict[str, Any] = dict(self.syn_data)
        return {
            "weights": _tensors(self.ewc_data[0]), "importances": _tensors(self.ewc_data[1]),
            **{name: _tensors(paths[name]) for name in ("trajectory", "cum_trajectory")},
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ewc_data = _params(state["weights"]), _params(state["importances"])
        paths: dict[str, Any] = {name: _params(state[name]) for name in ("trajectory", "cum_trajectory")}
        for name in ("old_theta", "new_theta", "grad"):
            paths[name] = _params({n: t.clone() for n, t in state["weights"].items()})
        self.syn_data.update(paths)


def _copy(params: dict[str, Any]) -> None:
    for entry in params.values():
        entry.data = entry.data.clone()


class LwF(LwFPlugin):
    """Learning without forgetting: distils the previous model's outputs on this task's images.

    L = alpha·KL(previous model ‖ model) over the classes of earlier tasks. Li and Hoiem, 2016, arXiv 1606.09282.

    Args:
        alpha: Factor of the distillation, or one for each task, the last of which also counts for further tasks.
        temperature: T of the softened outputs.
    """

    sequential = True
    per_sample = True
    paper = "arXiv 1606.09282"

    def __init__(self, alpha: float = 1, temperature: float = 2) -> None:
        super().__init__(alpha, temperature)
        self._loaded: dict[str, Any] = {}

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
            self._loaded = state["model"]
        self.lwf.expcount = state["experiences"]
        self.lwf.prev_classes_by_task.update({task: set(classes) for task, classes in state["classes"].items()})

    def before_training_exp(self, strategy: Strategy, **kwargs: Any) -> None:
        if self._loaded:
            self.lwf.prev_model = copy.deepcopy(strategy.model)
            self.lwf.prev_model.load_state_dict(self._loaded)
            self._loaded = {}
        factors = self.lwf.alpha
        if isinstance(factors, list):
            factors += factors[-1:] * (self.lwf.expcount + 1 - len(factors))


class Replay(ReplayPlugin):
    """Rehearsal: keeps images of earlier tasks and mixes them into every batch.

    The images are drawn at random, the same number from each task. Chaudhry et al., 2019, arXiv 1902.10486.

    Args:
        mem_size: Number of images to keep in all.
        batch_size: Images of the task per batch; null for the recipe's batch size.
        batch_size_mem: Kept images per batch; null for as many.
        task_balanced_dataloader: Draw the same number of images from each task for a batch.
    """

    keeps_images = True
    per_sample = True
    paper = "arXiv 1902.10486"

    def __init__(
        self, mem_size: int = 200, batch_size: int | None = None, batch_size_mem: int | None = None,
        task_balanced_dataloader: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(mem_size, batch_size, batch_size_mem, task_balanced_dataloader)
        self._loaded: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """The task and index of each image; no image is stored."""
        policy = self.storage_policy
        groups = [
            {"size": group.max_size, "weights": group._buffer_weights, "places": indices_of(group.buffer)}
            for group in policy.buffer_groups.values()
        ]
        return self._loaded or {"experiences": policy._num_exps, "groups": groups}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loaded = state

    def before_training_exp(self, strategy: Strategy, *args: Any, **kwargs: Any) -> None:
        self._restore(strategy)
        super().before_training_exp(strategy, *args, **kwargs)

    def after_training_exp(self, strategy: Strategy, **kwargs: Any) -> None:
        self._restore(strategy)
        self.storage_policy.post_adapt(strategy, strategy.experience)

    def _restore(self, strategy: Strategy) -> None:
        if not self._loaded:
            return
        policy = self.storage_policy
        policy._num_exps = self._loaded["experiences"]
        policy.buffer_groups.clear()
        for number, loaded in enumerate(self._loaded["groups"]):
            group = policy.buffer_groups[number] = ReservoirSamplingBuffer(loaded["size"])
            group.buffer, group._buffer_weights = images_at(loaded["places"], strategy), loaded["weights"]
        self._loaded = {}
