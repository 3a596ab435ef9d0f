"""A study's file: found, read and checked together with the recipe of each of its runs. All mistakes are collected."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from attrs import evolve, frozen

from mulki_plugins.errors import Location, Mistakes, MulkiError, OptionError, did_you_mean
from mulki_plugins.recipe.check import check_name
from mulki_plugins.recipe.files import YamlFile, find, refuse_other_kind
from mulki_plugins.recipe.layers import get
from mulki_plugins.recipe.tasks import known_tasks
from mulki_plugins.recipe.yaml import Tree, locate, read_yaml, sort_by_line
from mulki_plugins.study.plan import (
    CHOICE,
    COST,
    Job,
    choice_jobs,
    cost_jobs,
    method_of,
    plan_run,
    reported_jobs,
    reported_jobs_of_any_choice,
    reported_jobs_of_every_choice,
)
from mulki_plugins.study.schema import Block, Choice, Study
from mulki_plugins.types import collect_mistakes, convert

_RESERVED = (CHOICE, COST, "jobs")
"""Names of parts that would share a folder with something else."""
_NAMED_BY_OTHERS = {"recipes", "strategies", "seeds", "orders", "variants", "parts", "choice", "cost"}
"""Keys without whose values those of other keys cannot be checked."""


@frozen(kw_only=True)
class StudyFile:
    """A checked study, and the file it was read from."""

    study: Study
    file: YamlFile

    @property
    def measured(self) -> Path | None:
        """The table of earlier runs that the study names."""
        return None if self.study.measured is None else self.file.path.parent / self.study.measured


def read_study(name: str) -> StudyFile:
    """The study of that path or name, with every run's recipe checked. Raises Mistakes."""
    file = find("studies", name)
    tree = read_yaml(file.path, file.shown)
    refuse_other_kind(tree, file, "studies")
    study, wrong = _convert(tree.value)
    whole = not _NAMED_BY_OTHERS & {e.path[0] for e in wrong if e.path}
    lines: list[str] = []
    if study is not None:
        if whole:
            wrong += [*_check_values(study), *_check_runs(study)]
        lines = [line for job in _every_job(study) for line in _mistakes_of(job, tree)]
        if not wrong and not lines:
            wrong += _check_metrics(study)
    lines += [locate(tree.origin(e.path), e.path, str(e)) for e in wrong]
    if lines or study is None:
        raise Mistakes(sort_by_line(dict.fromkeys(lines)))
    return StudyFile(study=study, file=file)


def _convert(value: Any) -> tuple[Study | None, list[OptionError]]:
    """The study, and what is wrong with its values; without these, if any, so that the rest can be checked too."""
    try:
        return convert(value, Study), []
    except Exception as error:
        wrong = list(collect_mistakes(error))
    rest = copy.deepcopy(value)
    for mistake in wrong:
        path = mistake.path
        while path and not isinstance(path[-1], str):
            path = path[:-1]
        holder = get(rest, path[:-1])
        if path and isinstance(holder, dict):
            holder.pop(path[-1], None)
    try:
        return convert(rest, Study), wrong
    except Exception:
        return None, wrong


def _all_jobs(study: Study) -> Iterator[Job]:
    """Every run that the file can lead to, whatever settings are chosen."""
    yield from reported_jobs_of_any_choice(study)
    yield from choice_jobs(study)
    yield from cost_jobs(study)


def _every_job(study: Study) -> Iterator[Job]:
    """These, and the reported runs with each of the candidates."""
    yield from _all_jobs(study)
    yield from reported_jobs_of_every_choice(study)


def _mistakes_of(job: Job, tree: Tree) -> list[str]:
    """What is wrong with the recipe of a run, located in the study's file."""
    try:
        plan_run(job, Path())
    except MulkiError as error:
        return [_relocate(line, job, tree) for line in error.lines()]
    return []


def _relocate(line: str, job: Job, tree: Tree) -> str:
    """`--set key=value: $.key: wrong` as `file:line: $.place: key=value: $.key: wrong`."""
    for flag, place in sorted(job.places.items(), key=lambda pair: -len(pair[0])):
        if line.startswith(f"{flag}: "):
            rest = line[len(flag) + 2 :]
            what = flag.removeprefix("--set ") if flag.startswith("--set ") else ""
            return locate(tree.origin(place), place, f"{what}: {rest}" if what else rest.partition(": ")[2] or rest)
    place = _place_of_recipe(job, tree)
    return locate(tree.origin(place), place, line)


def _place_of_recipe(job: Job, tree: Tree) -> Location:
    names = get(tree.value, ("recipes",))
    if isinstance(names, list) and job.recipe in names:
        return ("recipes", names.index(job.recipe))
    return ("recipes",)


def _check_values(study: Study) -> Iterator[OptionError]:
    """What only shows across the values of the file."""
    if problem := check_name(study.name):
        yield OptionError(problem, ("name",))
    if not study.recipes:
        yield OptionError("expected at least one recipe", ("recipes",))
    yield from _check_seeds(study)
    for part in study.parts:
        if part in _RESERVED:
            yield OptionError(f"a part cannot be called {part!r}; choose another name", ("parts", part))
    yield from _check_orders(study)
    for name, part_ in study.parts.items():
        if not part_.runs:
            yield OptionError("expected at least one block of runs", ("parts", name, "runs"))
        if part_.beside is not None and part_.beside.part not in study.parts:
            hint = did_you_mean(part_.beside.part, study.parts)
            yield OptionError(f"no part is named {part_.beside.part!r} ({hint})", ("parts", name, "beside", "part"))
    yield from _check_choice(study)
    if study.cost is not None and study.cost.base not in study.cost.strategies:
        yield OptionError("expected one of the strategies that are measured", ("cost", "base"))


def _check_seeds(study: Study) -> Iterator[OptionError]:
    blocks = {("parts", name, "runs", i): b for name, part in study.parts.items() for i, b in enumerate(part.runs)}
    for place, seeds in [((), study.seeds), *((place, block.seeds) for place, block in blocks.items())]:
        if seeds == []:
            yield OptionError("expected at least one seed", (*place, "seeds"))


def _check_orders(study: Study) -> Iterator[OptionError]:
    named: list[tuple[str, Location]] = [
        (order, ("parts", name, "runs", i, "orders", k))
        for name, part in study.parts.items()
        for i, block in enumerate(part.runs)
        for k, order in enumerate(block.orders or ())
    ]
    if study.choice is not None and study.choice.order is not None:
        named.append((study.choice.order, ("choice", "order")))
    for order, place in named:
        if order not in study.orders:
            hint = did_you_mean(order, study.orders) or "the study has no `orders`"
            yield OptionError(f"no order is named {order!r} ({hint})", place)


def _check_choice(study: Study) -> Iterator[OptionError]:
    rule = study.choice
    if rule is None:
        return
    if not rule.by:
        yield OptionError("expected at least one metric", ("choice", "by"))
    for strategy, candidates in rule.settings.items():
        place: Location = ("choice", "settings", strategy)
        if not candidates:
            yield OptionError("expected at least one candidate", place)
        if rule.budget is not None and len(candidates) > rule.budget:
            message = f"{len(candidates)} candidates, but the budget (choice.budget) is {rule.budget}"
            yield OptionError(message, place)
    blocks = [block for part in study.parts.values() for block in part.runs] or [Block()]
    seeds = {seed for block in blocks for seed in (study.seeds if block.seeds is None else block.seeds)}
    if rule.seed in seeds:
        message = f"the seed {rule.seed} is one of the reported runs; settings must be chosen with another one"
        yield OptionError(message, ("choice", "seed"))
    if rule.apply:
        yield from _check_applied(study, rule)


def _check_applied(study: Study, rule: Choice) -> Iterator[OptionError]:
    """Runs that would get no settings from the choice, and choices whose settings no run would get."""
    methods = {(job.part, *method_of(job)) for job in reported_jobs(evolve(study, choice=None))}
    strategies = {strategy for *_, strategy in methods}
    for strategy in rule.settings:
        if strategy not in strategies:
            hint = did_you_mean(strategy, strategies)
            yield OptionError(f"no run names the strategy {strategy!r} ({hint})", ("choice", "settings", strategy))
    for part, recipe, strategy in sorted(methods):
        if strategy in rule.settings and recipe not in study.recipes:
            where = ", ".join(map(repr, study.recipes))
            message = f"the settings of {strategy!r} are chosen on {where} alone, and its runs of {recipe!r} get none"
            yield OptionError(f"{message}; name the recipe in the study's `recipes`", ("parts", part))


def _check_metrics(study: Study) -> Iterator[OptionError]:
    """Metrics that a candidate will not have: one task has neither Transfer nor Average nor Forgetting."""
    rule = study.choice
    wanted = [name for name in rule.by if name in ("transfer", "average", "forgetting")] if rule is not None else []
    for job in choice_jobs(study) if wanted else ():
        recipe = plan_run(job, Path()).recipe
        stream = {"name": recipe.stream.name, **recipe.stream.options}
        if recipe.strategy.base == "joint" or len(known_tasks(stream)) == 1:
            message = f"{job.changes.strategy} learns one task here, and has no {' and no '.join(wanted)}"
            yield OptionError(f"{message}; name metrics that it has, such as `by: [last]`", ("choice", "by"))


def _check_runs(study: Study) -> Iterator[OptionError]:
    """Two runs that would be one line of the table, or share a folder; rows of runs with different settings."""
    jobs = list(_all_jobs(study))
    yield from _check_labels(study, jobs)
    count = Counter((job.part, job.order, job.label, job.seed) for job in jobs)
    for (part, order, label, seed), times in count.items():
        if times > 1:
            message = f"{label!r} with seed {seed}{_in_order(order)} is there {times} times; name variants apart"
            yield OptionError(message, _place_of_part(part, study))
    same_row: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    for job in jobs:
        with suppress(MulkiError):  # reported with the other mistakes of its recipe
            same_row[job.part, job.order, job.label].add(plan_run(job, Path()).fingerprint)
    for (part, order, label), settings in same_row.items():
        if len(settings) > 1:
            message = f"the runs of {label!r}{_in_order(order)} differ in more than their seed; name variants apart"
            yield OptionError(message, _place_of_part(part, study))


def _check_labels(study: Study, jobs: Sequence[Job]) -> Iterator[OptionError]:
    """Labels that no run has, and rows of another part that would be one with a row of the part itself."""
    labels = {(job.part, job.label) for job in jobs if job.part not in (CHOICE, COST)}
    if study.main and study.main not in {label for _, label in labels}:
        hint = did_you_mean(study.main, {label for _, label in labels})
        yield OptionError(f"no run has the label {study.main!r} ({hint})", ("main",))
    for name, part_ in study.parts.items():
        if (beside := part_.beside) is None:
            continue
        at: Location = ("parts", name, "beside", "label")
        own = {job.order for job in jobs if (job.part, job.label) == (name, beside.label) and job.in_tables}
        joining = {job.order for job in jobs if (job.part, job.label) == (beside.part, beside.label)}
        if not joining:
            hint = did_you_mean(beside.label, {label for part, label in labels if part == beside.part})
            yield OptionError(f"no run of {beside.part!r} has the label {beside.label!r} ({hint})", at)
        elif own & joining:
            yield OptionError(f"{name!r} has runs with the label {beside.label!r} itself; name variants apart", at)


def _in_order(order: str) -> str:
    return f" in order {order}" if order else ""


def _place_of_part(part: str, study: Study) -> Location:
    return ("parts", part) if part in study.parts else (part,) if part in (CHOICE, COST) else ()
