"""What a task's optimizer trains, in groups with their own learning rate and weight decay."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from mulki_plugins.errors import MulkiError, did_you_mean
from mulki_plugins.models.adapter import plain_name
from mulki_plugins.models.classifier import ClipClassifier
from mulki_plugins.recipe.schema import GROUP_WORDS, Optimizer, ParameterGroup
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.registry.guard import guarded_call
from mulki_plugins.stages.protocols import unwrapped

CLIP = "clip."
"""Prefix of the model's weights; without it their names are open_clip's own."""
Weights = dict[str, nn.Parameter]
LABEL = "group"
"""The key of an optimizer's group that holds its pattern."""


def all_weights(model: nn.Module, plugins: Iterable[object] = (), names: Mapping[int, str] | None = None) -> Weights:
    """The weights that can be trained, by name: the model's, and those that plugins hold themselves.

    A plugin holds its attributes that are `nn.Parameter`s, and if it is an `nn.Module`, all its parameters; their names begin
    with the plugin's, from `names` by the plugin's id, else its class's.
    """
    weights = dict(model.named_parameters())
    known = {id(p) for p in weights.values()}
    for plugin in plugins:
        attributes = vars(plugin).items()
        held = plugin.named_parameters() if isinstance(plugin, nn.Module) else attributes
        name = (names or {}).get(id(plugin), type(plugin).__name__)
        for inner, weight in held:
            if isinstance(weight, nn.Parameter) and id(weight) not in known:
                weights[f"{name}.{inner}"] = weight
    return weights


def move_plugin_weights(plugins: Iterable[object], device: torch.device) -> None:
    """Move the weights that plugins hold to the device. They stay the same objects."""
    for plugin in plugins:
        if isinstance(plugin, nn.Module):
            plugin.to(device)
        else:
            for weight in vars(plugin).values():
                if isinstance(weight, nn.Parameter):
                    weight.data = weight.data.to(device)


class Grouping:
    """The groups of `train.groups`, and which weights of a model belong to which: the first that matches a weight takes it.

    A pattern is compared with a weight's name as open_clip writes it (`visual.conv1.weight`); weights outside the CLIP have
    the names they have in the model, such as `head.weight`.
    """

    def __init__(self, rules: Sequence[ParameterGroup], model: nn.Module) -> None:
        self.rules = rules
        inner = unwrapped(model)
        self._added = set(inner.added_weights()) if rules and isinstance(inner, ClipClassifier) else set()

    def of(self, name: str) -> ParameterGroup | None:
        """The group of a weight; None if no pattern matches it."""
        return next((rule for rule in self.rules if self._matches(rule, name)), None)

    def _matches(self, rule: ParameterGroup, name: str) -> bool:
        names = _plain_names(name)
        return any(
            self.part_of(name) == pattern if pattern in GROUP_WORDS else any(fnmatchcase(n, pattern) for n in names)
            for pattern in rule.patterns
        )

    def part_of(self, name: str) -> str:
        """The word for the part of the model that a weight belongs to."""
        inside = name.removeprefix(CLIP)
        if inside == name:
            return "head" if name.startswith("head.") else "plugins"
        if inside in self._added:
            return "adapters"
        return "image" if inside.startswith("visual.") else "text"

    def check(self, names: Collection[str], learning: Collection[str] | None = None) -> None:
        """MulkiError if a group has no weight among these. learning: those that learn; a group must have one of them, too."""
        taken: list[ParameterGroup | None] = [self.of(name) for name in names]
        for i, rule in enumerate(self.rules):
            where = f"$.train.groups[{i}].match: {rule.label!r}"
            mine = [name for name, group in zip(names, taken, strict=True) if group is rule]
            if not mine and any(self._matches(rule, name) for name in names):
                raise MulkiError(
                    f"{where} matches only weights of groups before it", "write the narrower pattern first"
                )
            if not mine:
                raise MulkiError(f"{where} matches no weight", self._known(names, rule))
            if learning is not None and not any(name in learning for name in mine):
                what = f"matches only weights that do not learn, such as {_plain_names(mine[0])[0]}"
                raise MulkiError(f"{where} {what}", "model.train says what learns")

    def _known(self, names: Collection[str], rule: ParameterGroup) -> str:
        """What a pattern can name: the parts that the model has, the beginnings of names, a similar name."""
        plain = [_plain_names(name)[0] for name in names]
        parts = [word for word in GROUP_WORDS if any(self.part_of(name) == word for name in names)]
        tops = list(dict.fromkeys(name.partition(".")[0] + (".*" if "." in name else "") for name in plain))
        similar = did_you_mean(rule.patterns[0], {*plain, *tops, *parts})
        hint = f"{similar}; " if similar.startswith("did") else ""
        return f"{hint}the model has the parts {', '.join(parts)} and the names {', '.join(tops)}"

    def groups_of(self, weights: Mapping[str, nn.Parameter], settings: Optimizer) -> list[dict[str, Any]]:
        """Parameter groups of an optimizer; `initial_lr` is the rate that the schedule multiplies.

        Gains and biases are not decayed, as in CLIP's training.
        """
        groups = []
        assigned = {name: self.of(name) for name in weights}
        for rule in (*self.rules, None):
            mine = [p for name, p in weights.items() if assigned[name] is rule]
            lr, decay = settings.lr, settings.weight_decay
            more: dict[str, Any] = {}
            if rule is not None:
                lr, decay, more = lr * rule.lr, decay * rule.decay, {LABEL: rule.label}
            rates = {"lr": lr, "initial_lr": lr, **more}
            groups += [
                {"params": [p for p in mine if p.ndim >= 2], "weight_decay": decay, **rates},
                {"params": [p for p in mine if p.ndim < 2], "weight_decay": 0.0, **rates},
            ]
        return [group for group in groups if group["params"]]


def _plain_names(name: str) -> tuple[str, ...]:
    """The names of a weight that a pattern may give: open_clip's own, and that of a parametrized weight's original."""
    inside = name.removeprefix(CLIP)
    plain = plain_name(inside)
    return (plain,) if plain == inside else (plain, inside)


def make_optimizer(
    weights: Mapping[str, nn.Parameter], settings: Optimizer, grouping: Grouping, *, fused: bool = False
) -> torch.optim.Optimizer:
    """The recipe's optimizer of those of these weights that require gradients.

    fused: in one kernel for all weights, if the optimizer can. The last digits differ from those of the loop over the weights
    that a CPU uses. MulkiError if another package's optimizer fails, or returns something else.
    """
    learning = {name: p for name, p in weights.items() if p.requires_grad}
    groups = grouping.groups_of(learning, settings) or [{"params": [], "lr": settings.lr}]  # a plugin may add weights
    part = catalog().find("optimizer", settings.name)
    factory = part.load()
    takes = inspect.signature(factory).parameters
    given: dict[str, Any] = {"lr": settings.lr, **settings.options}
    given |= {"weight_decay": settings.weight_decay} if "weight_decay" in takes else {}
    given |= {"fused": True} if fused and "fused" in takes else {}
    if "name_of" in takes:
        names = {id(p): name for name, p in weights.items()}
        given["name_of"] = lambda weight: names.get(id(weight), "")
    what = f"the optimizer {settings.name!r} of {part.provenance}"
    made = (
        factory(groups, **given) if part.is_ours else guarded_call(f"{what} cannot be made", factory, groups, **given)
    )
    if not isinstance(made, torch.optim.Optimizer):
        raise MulkiError(f"{what} cannot be used: returned a {type(made).__name__}, expected a torch.optim.Optimizer")
    return made


def step_unless(optimizer: torch.optim.Optimizer, left_out: Tensor) -> None:
    """Let a fused optimizer make its step unless `left_out`, a scalar on the device, is 1: nobody waits for the answer."""
    optimizer.found_inf = left_out  # type: ignore[attr-defined]  # as torch's GradScaler does
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]  # set for this step, as GradScaler does


def add_new_weights(
    optimizer: torch.optim.Optimizer,
    weights: Mapping[str, nn.Parameter],
    known: Sequence[nn.Parameter],
    settings: Optimizer,
    grouping: Grouping,
) -> None:
    """Let the optimizer train those of these weights that a plugin has added or unfrozen since it was made.

    known: the weights that it was made of; those that a plugin took out of it stay out.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]} | {id(p) for p in known}
    new = {name: p for name, p in weights.items() if p.requires_grad and id(p) not in held}
    for group in grouping.groups_of(new, settings):
        optimizer.add_param_group(group)


def leave_out_frozen(optimizer: torch.optim.Optimizer) -> None:
    """Remove the weights that a plugin has frozen since the optimizer was made.

    A resumed run makes it of a model in which they are not frozen yet, and the kept state must fit.
    """
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if p.requires_grad]
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
