"""The runs of a study: every combination that its file asks for, each with its place in the file, its recipe and its folder."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from attrs import evolve, field, frozen

from mulki_plugins.errors import Location, MulkiError
from mulki_plugins.recipe.check import check_name
from mulki_plugins.recipe.resolve import Changes, resolve
from mulki_plugins.recipe.schema import Recipe
from mulki_plugins.recipe.settings import fingerprint, known_fingerprints
from mulki_plugins.study.schema import Block, Study, Variant

STUDY, CHOICE, COST = "study", "choice", "cost"
"""The part of a study without `parts`, and the parts that its keys of these names make."""
Chosen = Mapping[tuple[str, str], Sequence[str]]
"""For a recipe and a strategy, as the file names them, the settings that were chosen."""


@frozen(kw_only=True)
class Job:
    """One run: what it is called in the table, and how it differs from its recipe."""

    part: str
    order: str
    label: str
    seed: int
    recipe: str
    """As the study names it: a name or a path."""
    changes: Changes
    in_tables: bool = True
    candidate: tuple[str, ...] = ()
    """The settings that this run tries for the choice."""
    places: Mapping[str, Location] = field(factory=dict, eq=False)
    """Where the study says so: for `--strategy`, `--set key=value` and so on, the path in its file."""

    @property
    def title(self) -> str:
        """The run in a line of text."""
        return " ".join(filter(None, (self.part, self.order, self.label, f"seed {self.seed}")))


@frozen(kw_only=True)
class PlannedRun:
    """A job with its checked recipe, what its results are recognised by, and where it runs."""

    job: Job
    recipe: Recipe
    fingerprint: str
    known: frozenset[str]
    """Its fingerprint, and those that earlier versions gave the same settings."""
    out: Path
    name: str

    @property
    def folder(self) -> Path:
        """Where `mulki run --out OUT --name NAME` puts it."""
        return self.out / self.recipe.name / self.name / f"seed-{self.job.seed}"

    @property
    def key(self) -> str:
        """The name of its files in the study's folder `jobs`."""
        where = (self.job.part, self.job.order, self.recipe.name, self.name)
        return f"{self.name[:60]}-{self.job.seed}-{_digest(json.dumps(where))[:8]}"


def reported_jobs(study: Study, chosen: Chosen | None = None) -> Iterator[Job]:
    """The runs of the study's parts, in the order of the file.

    chosen: settings for the strategies that `choice` decides about; with `choice.apply`, those without are left out.
    """
    blocks: Iterable[tuple[str, Block, Location]] = (
        (name, block, ("parts", name, "runs", i))
        for name, part in study.parts.items()
        for i, block in enumerate(part.runs)
    )
    if not study.parts:
        blocks = [(STUDY, Block(), ())]
    for part, block, place in blocks:
        yield from _expand(study, part, block, place, chosen or {})


def reported_jobs_of_any_choice(study: Study) -> Iterator[Job]:
    """The runs of the study's parts, also those whose settings are still to be chosen; these have none."""
    methods = study.choice.settings if study.choice else {}
    return reported_jobs(study, {(recipe, strategy): () for recipe in study.recipes for strategy in methods})


def reported_jobs_of_every_choice(study: Study) -> Iterator[Job]:
    """The runs of the study's parts with each candidate that may become theirs (`choice.apply`)."""
    methods = study.choice.settings if study.choice and study.choice.apply else {}
    for i in range(max(map(len, methods.values()), default=0)):
        settings = {name: candidates[min(i, len(candidates) - 1)] for name, candidates in methods.items() if candidates}
        yield from reported_jobs(
            study, {(recipe, s): chosen for recipe in study.recipes for s, chosen in settings.items()}
        )


def choice_jobs(study: Study) -> Iterator[Job]:
    """Every candidate of every method, on the images that the rule names."""
    if (rule := study.choice) is None:
        return
    order = rule.order if rule.order is not None else next(iter(study.orders), "")
    for recipe in study.recipes:
        for strategy, candidates in rule.settings.items():
            for i, settings in enumerate(candidates):
                place: Location = ("choice", "settings", strategy)
                changed = Variant(settings=[*settings, f"stream.evaluate_on={rule.images}"])
                places = {f"--set {s}": (*place, i, k) for k, s in enumerate(settings)}
                places |= {f"--set stream.evaluate_on={rule.images}": ("choice", "images"), "--strategy": place}
                label = f"{_label_prefix(study, recipe)}{strategy}: {', '.join(settings)}"
                job = _job(study, CHOICE, order, label, rule.seed, recipe, strategy, changed, places)
                yield evolve(job, candidate=tuple(settings))


def candidates_of(study: Study, jobs: Iterable[Job]) -> list[Job]:
    """The candidates of `choice` that decide about the settings of these runs."""
    methods = set(map(method_of, jobs))
    return [job for job in choice_jobs(study) if (job.recipe, job.changes.strategy) in methods]


def method_of(job: Job) -> tuple[str, str]:
    """The recipe and the strategy of a run, as the study names them."""
    return job.recipe, job.changes.strategy or _own_strategy(job.recipe, job.changes.settings)


def cost_jobs(study: Study) -> Iterator[Job]:
    """Each strategy in turn, round after round. The settings of `cost` prevail over the study's."""
    if (cost := study.cost) is None:
        return
    places: dict[str, Location] = {f"--set {s}": ("cost", "settings", k) for k, s in enumerate(cost.settings)}
    for seed, recipe in itertools.product(range(cost.rounds), study.recipes[:1]):
        for i, strategy in enumerate(cost.strategies):
            job = _job(
                study, COST, "", strategy, seed, recipe, strategy, Variant(), {"--strategy": ("cost", "strategies", i)}
            )
            changes = evolve(job.changes, settings=(*job.changes.settings, *cost.settings))
            yield evolve(job, changes=changes, places={**job.places, **places})


def _expand(study: Study, part: str, block: Block, place: Location, chosen: Chosen) -> Iterator[Job]:
    """All combinations of a block, seeds outermost: whoever stops early has whole comparisons."""
    recipes = study.recipes if block.recipes is None else block.recipes
    strategies: Sequence[str | None] = (study.strategies if block.strategies is None else block.strategies) or (None,)
    orders = (list(study.orders) if block.orders is None else block.orders) or [""]
    seeds = study.seeds if block.seeds is None else block.seeds
    variants = (study.variants if block.variants is None else block.variants) or {"": Variant()}
    of_block = {f"--set {s}": (*place, "settings", k) for k, s in enumerate(block.settings)} if place else {}
    at_variants: Location = ("variants",) if block.variants is None else (*place, "variants")
    at_strategies: Location = ("strategies",) if block.strategies is None else (*place, "strategies")
    at_orders: Location = ("orders",) if block.orders is None else (*place, "orders")
    for order, seed, recipe, (name, variant) in itertools.product(orders, seeds, recipes, variants.items()):
        for i, strategy in enumerate(strategies):
            places: dict[str, Location] = {"--strategy": (*at_strategies, i), "order": at_orders, **of_block}
            places |= {f"--set {s}": (*at_variants, name, "settings", k) for k, s in enumerate(variant.settings)}
            places |= {f"--without {p}": (*at_variants, name, "without", k) for k, p in enumerate(variant.without)}
            places |= {f"--with {p}": (*at_variants, name, "add", k) for k, p in enumerate(variant.add)}
            settings = (*study.settings, *block.settings, *variant.settings)
            label = own = strategy or _own_strategy(recipe, settings)
            candidate: Sequence[str] | None = ()
            if study.choice and study.choice.apply and own in study.choice.settings:
                candidate = chosen.get((recipe, own))
            if candidate is None:
                continue
            places |= {f"--set {s}": ("choice", "settings", own) for s in candidate}
            if name:
                label = name if len(strategies) == 1 else f"{label}: {name}"
            changed = evolve(variant, settings=[*candidate, *block.settings, *variant.settings])
            job = _job(
                study, part, order, _label_prefix(study, recipe) + label, seed, recipe, strategy, changed, places
            )
            yield evolve(job, in_tables=block.in_tables)


def _job(
    study: Study, part: str, order: str, label: str, seed: int, recipe: str, strategy: str | None, changed: Variant,
    places: Mapping[str, Location],
) -> Job:  # fmt: skip
    # a later setting prevails: those of one run over those of all
    settings, places = list(study.settings), dict(places)
    if order in study.orders:
        setting = f"stream.order={json.dumps(study.orders[order])}"
        settings.append(setting)
        places[f"--set {setting}"] = ("orders", order)
    settings += changed.settings
    places = {f"--set {s}": ("settings", k) for k, s in enumerate(study.settings)} | places
    if study.device != "auto":
        settings.append(f"device={study.device}")
        places[f"--set device={study.device}"] = ("device",)
    changes = Changes(
        strategy=strategy, with_plugins=tuple(changed.add), without_plugins=tuple(changed.without),
        settings=tuple(settings), seeds=(seed,),
    )  # fmt: skip
    return Job(part=part, order=order, label=label, seed=seed, recipe=recipe, changes=changes, places=places)


def _label_prefix(study: Study, recipe: str) -> str:
    """The recipe's name before a label, in a study of several recipes; else empty."""
    blocks = [block for part in study.parts.values() for block in part.runs]
    names = {*study.recipes, *(name for block in blocks for name in block.recipes or ())}
    return f"{Path(recipe).stem}: " if len(names) > 1 else ""


@functools.cache
def _own_strategy(recipe: str, settings: tuple[str, ...]) -> str:
    """The strategy that the recipe has with these settings. What is wrong with them is reported for each run."""
    try:
        return resolve(recipe, Changes(settings=settings)).recipe.strategy.name
    except MulkiError:
        return _own_strategy(recipe, ()) if settings else ""


def plan_run(job: Job, root: Path) -> PlannedRun:
    """A job with its recipe. Raises Mistakes."""
    recipe, own, known = _resolved(job.recipe, evolve(job.changes, seeds=(0,)))
    out = root / _folder_name(job.part) / _folder_name(job.order) if job.order else root / _folder_name(job.part)
    return PlannedRun(
        job=job, recipe=evolve(recipe, seeds=[job.seed]), fingerprint=own, known=known, out=out,
        name=_folder_name(job.label),
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _resolved(recipe: str, changes: Changes) -> tuple[Recipe, str, frozenset[str]]:
    """The recipe, the same for all seeds, its fingerprint, and all that it is known by."""
    resolved = resolve(recipe, changes).recipe
    return resolved, fingerprint(resolved), frozenset(known_fingerprints(resolved))


def _folder_name(text: str) -> str:
    """A text as the name of a folder; different texts get different names."""
    if not check_name(text) and len(text) <= 80:
        return text
    safe = re.sub(r"[^A-Za-z0-9._=+-]+", "-", text).strip("-.=+_")[:80] or "run"
    safe = re.sub(r"[^A-Za-z0-9._-]", "-", safe)
    return f"{safe}-{_digest(text)[:6]}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
