"""The keys of a recipe and of a strategy file: frozen classes, one for each mapping in the YAML."""

from __future__ import annotations

from typing import Any, Literal

from attrs import field, frozen

from mulki_plugins.errors import OptionError, format_value
from mulki_plugins.types import CONVERTER, BelowOne, Count, Natural, Positive, Weight, convert


@frozen
class Choice:
    """A registered part and its options; in YAML `name` or `{name: ..., option: ...}`."""

    name: str
    options: dict[str, Any] = field(factory=dict)


@frozen
class Entry:
    """A plugin of a stack and its options; in YAML `- name` or `- name: {option: ...}`."""

    name: str
    options: dict[str, Any] = field(factory=dict)


Precision = Literal["fp32", "tf32", "bf16", "fp16"]


@frozen(kw_only=True)
class Optimizer:
    """A registered optimizer and its options, created anew for each task."""

    name: str = "adamw"
    lr: Weight
    """0: each step is made, and moves no weight."""
    weight_decay: Weight = 0.0
    options: dict[str, Any] = field(factory=dict)
    """Those of this optimizer; in YAML they stand beside `lr`."""


GROUP_WORDS = ("image", "text", "adapters", "head", "plugins")
"""The words for the parts of a model that `train.groups` may name: the towers, what adapters add, a head, and what plugins add
outside of the CLIP."""


@frozen(kw_only=True)
class ParameterGroup:
    """Weights with a learning rate and a weight decay of their own, by factors.

    `match` is one or several words (image, text, adapters, head, plugins) or patterns of names, such as `visual.*`.
    """

    match: str | list[str]
    lr: Positive = 1.0
    decay: Weight = 1.0

    @property
    def patterns(self) -> list[str]:
        return [self.match] if isinstance(self.match, str) else self.match

    @property
    def label(self) -> str:
        """Its name in curves and messages."""
        return ",".join(self.patterns)


@frozen(kw_only=True)
class Schedule:
    """The learning rate over a task: `warmup` steps up from 0, then along a curve down to 0, or constant."""

    name: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Natural = 0

    def warmup_within(self, steps: int) -> int:
        """The warm-up for a task of `steps` steps: a tenth of them if it would otherwise take them all."""
        return self.warmup if self.warmup < steps else steps // 10

    def shortened(self, steps: int) -> str:
        """The notice if a task of `steps` steps has no room for the warm-up, else empty."""
        if self.warmup < steps:
            return ""
        short = self.warmup_within(steps)
        now = f"it is shortened to {short}, a tenth of them" if short else "it is left out"
        return f"the warm-up of {self.warmup} steps (train.schedule.warmup) would take all {steps} steps; {now}"


@frozen(kw_only=True)
class TaskBudget:
    """Settings that differ for one task."""

    lr: Weight | None = None
    iterations: Count | None = None
    epochs: Count | None = None


@frozen(kw_only=True)
class Checkpointing:
    """A checkpoint after each task; within it every `minutes` and every `every` steps (null: none); `keep` are kept (0: none)."""

    minutes: Positive | None = 10.0
    every: Count | None = None
    keep: Natural = 2
    weights: Literal["all", "last"] = "all"
    """The weights kept beside the checkpoints: those after each task, or the last alone. `mulki extend` needs all of them."""


@frozen(kw_only=True)
class Train:
    """The training of one task. Exactly one of `iterations` and `epochs` is given."""

    iterations: Count | None = None
    epochs: Count | None = None
    batch_size: Count = 64
    optimizer: Optimizer
    groups: list[ParameterGroup] = field(factory=list)
    """Factors of the learning rate and the weight decay for some of the weights; the first group that matches takes a weight."""
    schedule: Schedule = field(factory=Schedule)
    label_smoothing: BelowOne = 0.0
    gradient_clip: Positive | None = None
    precision: Precision = "fp32"
    """tf32: single precision with faster matrix products, on GPUs that have them; bf16, fp16: mixed precision."""
    compile: bool = False
    """Compile the towers of the model and the teachers' image towers with torch.compile, for the training."""
    accumulate: Count = 1
    """Parts in which a batch passes through the model, to save memory; their gradients add up to one step."""
    workers: Literal["auto"] | Natural = 0
    """Processes that read images; `auto`: one for each core but one, none for small images in memory."""
    per_task: dict[str, TaskBudget] = field(factory=dict)
    unreadable: Literal["stop", "skip"] = "stop"
    """What to do about an unreadable image: end with an error, or skip and count it."""
    checkpoint: Checkpointing = field(factory=Checkpointing)


@frozen(kw_only=True)
class Evaluate:
    """`classes`: the classes a test image is classified among: its task's own, all learned so far, or all of the stream.

    `predictions`: keep in the run's folder what was predicted for each test image.
    `cache`: where test images are kept once they are decoded and resized: auto (MulKI's cache folder), off, or a folder.
    `held_out`: tasks of the stream that are tested after each task and never learned; they enter no metric.
    `template`: one sentence with `{}` for the classes of all tasks, in training too; null for each task's own templates.
    """

    classes: Literal["task", "seen", "all"] = "task"
    metrics: list[str] = field(factory=lambda: ["transfer", "average", "last", "forgetting"])
    batch_size: Count = 256
    predictions: bool = True
    cache: str = "auto"
    held_out: list[str] = field(factory=list)
    template: str | None = None


Base = Literal["naive", "cumulative", "joint", "none"]
"""What a task trains on: its own images (naive), those of all tasks so far (cumulative), those of all tasks at once (joint),
or nothing (none). With plugins or a head, `none` is short for `naive` with `model.train: none`."""


@frozen(kw_only=True)
class Strategy:
    """A method: its stack of plugins, and the base that decides what each task trains on."""

    name: str
    base: Base = "naive"
    plugins: list[Entry] = field(factory=list)


@frozen(kw_only=True)
class Recipe:
    """A whole experiment."""

    name: str
    summary: str = ""
    stream: Choice
    reference: Choice | None = None
    """A stream of other images and class names; built only for methods that need reference data."""
    model: Choice
    strategy: Strategy
    train: Train
    evaluate: Evaluate = field(factory=Evaluate)
    seeds: list[Natural] = field(factory=lambda: [0])
    loggers: list[str] = field(factory=lambda: ["tensorboard", "csv"])
    device: str = "auto"


@frozen(kw_only=True)
class StrategyFile:
    """strategies/*.yaml: one method. The recipe's own values override `defaults`."""

    name: str
    summary: str = ""
    paper: str = ""
    base: Base = "naive"
    plugins: list[Entry] = field(factory=list)
    defaults: dict[str, Any] = field(factory=dict)


def _structure_choice(value: Any, _: Any) -> Choice:
    if not isinstance(value, dict):
        raise OptionError(f"expected a name or a mapping with a name, got {format_value(value)}")
    if "name" not in value:
        raise OptionError("missing; it has no default", ("name",))
    if not isinstance(value["name"], str):
        raise OptionError(f"expected a text, got {format_value(value['name'])}", ("name",))
    return Choice(value["name"], {key: item for key, item in value.items() if key != "name"})


def _structure_entry(value: Any, _: Any) -> Entry:
    if not isinstance(value, dict) or len(value) != 1:
        raise OptionError(f"expected a plugin as `name` or `name: {{options}}`, got {format_value(value)}")
    [(name, options)] = value.items()
    if not isinstance(options, dict):
        raise OptionError(f"expected a mapping of options, got {format_value(options)}", (name,))
    return Entry(name, dict(options))


@frozen(kw_only=True)
class _OfEveryOptimizer:
    """What every optimizer takes."""

    name: str = "adamw"
    lr: Weight
    weight_decay: Weight = 0.0


OF_EVERY_OPTIMIZER = ("name", "lr", "weight_decay")


def _structure_optimizer(value: Any, _: Any) -> Optimizer:
    if not isinstance(value, dict):
        raise OptionError(f"expected an optimizer's name or a mapping, got {format_value(value)}")
    common: _OfEveryOptimizer = convert({k: v for k, v in value.items() if k in OF_EVERY_OPTIMIZER}, _OfEveryOptimizer)
    own = {key: item for key, item in value.items() if key not in OF_EVERY_OPTIMIZER}
    return Optimizer(name=common.name, lr=common.lr, weight_decay=common.weight_decay, options=own)


def _unstructure_optimizer(optimizer: Optimizer) -> dict[str, Any]:
    common = {"name": optimizer.name, "lr": optimizer.lr, "weight_decay": optimizer.weight_decay}
    return {**common, **optimizer.options}


CONVERTER.register_structure_hook(Optimizer, _structure_optimizer)
CONVERTER.register_unstructure_hook(Optimizer, _unstructure_optimizer)
CONVERTER.register_structure_hook(Choice, _structure_choice)
CONVERTER.register_structure_hook(Entry, _structure_entry)
CONVERTER.register_unstructure_hook(Choice, lambda choice: {"name": choice.name, **choice.options})
CONVERTER.register_unstructure_hook(Entry, lambda entry: {entry.name: dict(entry.options)})


def as_recipe(value: Any) -> Recipe:
    """The plain data of a whole recipe as a Recipe. Raises an error for `collect_mistakes`."""
    recipe: Recipe = convert(value, Recipe)
    return recipe


def as_data(recipe: Recipe) -> dict[str, Any]:
    """A Recipe as plain data; the inverse of `as_recipe`."""
    data: dict[str, Any] = CONVERTER.unstructure(recipe)
    data["train"] = {key: value for key, value in data["train"].items() if value is not None}
    return data


def is_yaml_value(value: Any) -> bool:
    """Whether a YAML file can hold the value."""
    if isinstance(value, (list, tuple)):
        return all(map(is_yaml_value, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_yaml_value(item) for key, item in value.items())
    return value is None or isinstance(value, (bool, int, float, str))
