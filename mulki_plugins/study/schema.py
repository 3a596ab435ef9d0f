"""The keys of a study file: frozen classes, one for each mapping in the YAML."""

from __future__ import annotations

from typing import Literal

from attrs import field, frozen

from mulki_plugins.types import Count, Natural

Metric = Literal["transfer", "average", "last", "forgetting"]
Where = Literal["local", "gpus", "slurm"]


@frozen(kw_only=True)
class Variant:
    """What a variant changes: plugins taken out of the stack (`without`) or appended to it (`add`), and settings."""

    without: list[str] = field(factory=list)
    add: list[str] = field(factory=list)
    settings: list[str] = field(factory=list)
    """As after `--set`: `train.iterations=50`."""


@frozen(kw_only=True)
class Block:
    """Runs of one part: each recipe with each strategy, order, seed and variant. What is left out is the study's."""

    recipes: list[str] | None = None
    strategies: list[str] | None = None
    orders: list[str] | None = None
    """Names from the study's `orders`."""
    seeds: list[Natural] | None = None
    settings: list[str] = field(factory=list)
    variants: dict[str, Variant] | None = None
    in_tables: bool = True
    """Whether the report has a line for these runs."""


@frozen(kw_only=True)
class Beside:
    """Rows of another part that join a part's table: those with the same orders and seeds."""

    part: str
    label: str


@frozen(kw_only=True)
class Part:
    """Runs that are reported together."""

    title: str = ""
    """The heading; `{order}` stands for the order. By default the part's name and the order."""
    show: Literal["table", "sentence"] = "table"
    """A table for each order, or one sentence with the mean of Last."""
    beside: Beside | None = None
    runs: list[Block]


@frozen(kw_only=True)
class Choice:
    """How settings are chosen: each method tries its candidates on images held out of training; the best mean wins."""

    seed: Natural
    """A seed that no reported run has."""
    settings: dict[str, list[list[str]]]
    """For each strategy its candidates, each a list of settings."""
    order: str | None = None
    budget: Count | None = None
    """The most candidates that a method may have."""
    images: Literal["validation", "test"] = "validation"
    by: list[Metric] = field(factory=lambda: ["transfer", "average", "last"])
    """The metrics whose mean decides. Forgetting counts negatively."""
    apply: bool = False
    """Run the parts with the chosen settings. Otherwise they are only reported."""


@frozen(kw_only=True)
class Cost:
    """What each strategy costs, compared with `base`: measured in turn, one run at a time, round after round."""

    strategies: list[str]
    base: str = "finetune"
    rounds: Count = 3
    settings: list[str] = field(factory=list)
    """They prevail over the study's."""


@frozen(kw_only=True)
class Slurm:
    """What each run asks of Slurm."""

    partition: str | None = None
    time: str | Count | None = None
    """The limit, in minutes or as 90, 1:30:00 or 2-12:00:00. A run that reaches it is requeued and resumes."""
    memory: str | None = None
    """Of each node, such as 16GB."""
    gpus: Natural = 0
    """GPUs of each node; several share a run through torchrun."""
    nodes: Count = 1
    at_once: Count | None = None
    """The most jobs that run at the same time."""
    options: dict[str, str | int] = field(factory=dict)
    """Further options of sbatch without their dashes, such as `account: lab`."""


@frozen(kw_only=True)
class Execution:
    """Where the runs go unless the command line says otherwise."""

    on: Where = "local"
    processes: Count | None = None
    """With `on: local`: runs at the same time."""
    threads: Count | None = None
    """Of each run."""
    gpus_per_run: Count = 1
    """With `on: gpus`."""
    slurm: Slurm = field(factory=Slurm)


@frozen(kw_only=True)
class Study:
    """A study. Without `parts` it has one, called study, with all combinations of the lists."""

    name: str
    summary: str = ""
    recipes: list[str]
    strategies: list[str] = field(factory=list)
    """By default each recipe's own."""
    seeds: list[Natural] = field(factory=lambda: [0])
    orders: dict[str, str | list[str]] = field(factory=dict)
    """Names for values of `stream.order`: a name or a list of tasks. By default the recipe's own order."""
    settings: list[str] = field(factory=list)
    """Settings of all runs."""
    variants: dict[str, Variant] = field(factory=dict)
    parts: dict[str, Part] = field(factory=dict)
    choice: Choice | None = None
    cost: Cost | None = None
    main: str = ""
    """The label that the figure marks with a star."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """The device of all runs; runs on another one do not count as done. auto: the recipes' own, and any counts."""
    measured: str | None = None
    """A table of earlier runs, relative to this file, which are not measured again."""
    run: Execution = field(factory=Execution)
