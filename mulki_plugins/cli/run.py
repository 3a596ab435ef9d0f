"""`mulki run`: train and evaluate a recipe, once for each strategy and seed."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mulki_plugins.characters import printable
from mulki_plugins.cli.common import (
    UserPath,
    echo_json,
    import_with_notice,
    read_variants,
    recipe_options,
    report_errors,
    resolve_variants,
    verbosity_options,
)
from mulki_plugins.errors import MulkiError
from mulki_plugins.ranks.check import check_ranks
from mulki_plugins.ranks.session import fall_silent, joined

if TYPE_CHECKING:
    from mulki_plugins.recipe.resolve import Changes, Resolution
    from mulki_plugins.recipe.schema import Choice

    Plan = list[tuple[Resolution, dict[int, Path]]]
    """Each strategy's resolved recipe, with the folder of each seed's run."""


@click.command()
@recipe_options
@click.option(
    "--out",
    type=UserPath(path_type=Path, file_okay=False),
    default=Path("runs"),
    show_default=True,
    help="Folder for the runs: each gets RECIPE/STRATEGY/seed-N below it, other settings another folder.",
)
@click.option("--name", metavar="NAME", help="Replace the strategy in the run's folder: RECIPE/NAME/seed-N.")
@click.option("--resume", is_flag=True, help="Continue runs that were stopped, and skip those that are complete.")
@click.option(
    "--force", is_flag=True, help="With --resume: continue even if recipe, data, code or versions have changed."
)
@click.option("--dry-run", is_flag=True, help="Check everything and print what would run; train nothing.")
@click.option(
    "--estimate", is_flag=True, help="With --dry-run: train a few steps, and predict how long each strategy takes."
)
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON instead of tables.")
@verbosity_options
@report_errors
def run(
    recipe: str,
    out: Path,
    name: str | None,
    resume: bool,
    force: bool,
    dry_run: bool,
    estimate: bool,
    as_json: bool,
    verbosity: int,
    **options: Any,
) -> None:
    """Train and evaluate RECIPE.

    The model is trained on one task after another, and evaluated on all tasks after each. RECIPE is a path or the
    name of an installed recipe: `mulki run mtil`. Several strategies and seeds are all combined. Progress goes to
    stderr, results to stdout.
    """
    fall_silent()
    if force and not resume:
        raise MulkiError("--force needs --resume", "without --resume a run starts anew, whatever has changed")
    variants = read_variants(options)
    plan = _plan(recipe, variants, resolve_variants(recipe, variants), out, name, resume)
    if estimate and not dry_run:
        raise MulkiError("--estimate needs --dry-run", "`mulki bench RECIPE` measures more")
    if dry_run:
        _print_plan(plan, as_json, estimate)
        return
    check_ranks([resolved for resolved, _ in plan])
    import_with_notice(verbosity)
    with joined(plan[0][0].recipe.device):
        _run(plan, out, resume, force, as_json, verbosity)


def _run(plan: Plan, out: Path, resume: bool, force: bool, as_json: bool, verbosity: int) -> None:
    from mulki_plugins.ranks.collectives import of_all
    from mulki_plugins.report.compare import comparison_data
    from mulki_plugins.report.tables import comparison_text
    from mulki_plugins.training.resume import resume_experiment
    from mulki_plugins.training.run import run_experiment

    finished = []
    for resolved, folders in plan:
        for seed, folder in folders.items():
            with contextlib.redirect_stdout(sys.stderr):  # output of plugins is no result
                # as the first rank sees it, before any makes the folder
                [resuming, *_] = of_all(resume and folder.is_dir())
                if resuming:
                    finished.append(resume_experiment(resolved, seed, folder, force=force, verbosity=verbosity))
                else:
                    finished.append(run_experiment(resolved, seed, out, folder=folder, verbosity=verbosity))
            if not as_json:
                click.echo(comparison_text(finished[-1:]))
    if as_json:
        echo_json(comparison_data(finished))
    elif len(finished) > 1:
        click.echo("\n" + comparison_text(finished))


def _plan(
    recipe: str, variants: list[Changes], resolved: list[Resolution], out: Path, name: str | None, resuming: bool
) -> Plan:
    """Choose the folder of each run. MulkiError if two strategies would share one."""
    from mulki_plugins.recipe.check import check_name
    from mulki_plugins.recipe.settings import variant
    from mulki_plugins.report.folder import choose_folder

    if name is not None and (problem := check_name(name)):
        raise MulkiError(f"--name: {problem}")
    plan: Plan = []
    taken: set[Path] = set()
    for changes, result in zip(variants, resolved, strict=True):
        label = variant(recipe, changes, result.recipe)
        folders = {
            seed: choose_folder(out, result.recipe, seed, variant=label, name=name or "", resuming=resuming)
            for seed in result.recipe.seeds
        }
        if taken & set(folders.values()):
            hint = "run them one after another, each with a --name of its own" if name else "name each strategy once"
            raise MulkiError(f"two of these strategies would run in {next(iter(folders.values()))}", hint)
        taken |= set(folders.values())
        plan.append((result, folders))
    return plan


def _print_plan(plan: Plan, as_json: bool, estimate: bool) -> None:
    estimates = [_estimate(result, len(folders)) for result, folders in plan] if estimate else [None] * len(plan)
    if as_json:
        runs = [
            {"recipe": result.tree.value, "folders": list(map(str, folders.values()))}
            | ({"estimate": each[0]} if each else {})
            for (result, folders), each in zip(plan, estimates, strict=True)
        ]
        echo_json(runs[0] if len(runs) == 1 else {"runs": runs})
    else:
        blocks = [
            "\n".join([*_plan_lines(result, folders), *(each[1] if each else [])])
            for (result, folders), each in zip(plan, estimates, strict=True)
        ]
        click.echo("\n\n".join(blocks))


def _estimate(result: Resolution, runs: int) -> tuple[dict[str, Any], list[str]]:
    """The predicted time of one run, as plain data and as lines."""
    from mulki_plugins.cli.bench import ESTIMATE_STEPS, measure_recipe

    measured, prediction = measure_recipe(result.recipe, ESTIMATE_STEPS, count=False)
    from mulki_plugins.bench.table import as_plain, duration, prediction_lines

    lines = ["", *prediction_lines(prediction)]
    if runs > 1:
        lines.append(f"  {f'all {runs} seeds':44}{duration(runs * prediction.total):>12}")
    return as_plain(measured, prediction)["prediction"], lines


def _plan_lines(result: Resolution, folders: dict[int, Path]) -> list[str]:
    recipe = result.recipe
    train = recipe.train
    budget = f"{train.iterations} iterations" if train.iterations else f"{train.epochs} epochs"
    if recipe.strategy.base == "none":
        budget = "no training"
    elif recipe.model.options.get("train") == "none":
        budget = f"the model's weights stay as they are; at most {budget}"
    stack = ", ".join(entry.name for entry in recipe.strategy.plugins) or "no plugins"
    return [
        f"recipe    {recipe.name}{': ' if recipe.summary else ''}{printable(recipe.summary)}",
        f"stream    {_describe(recipe.stream)}",
        f"model     {_describe(recipe.model)}",
        f"strategy  {recipe.strategy.name}: {stack}",
        f"training  {budget} of {train.batch_size} images a task, lr {train.optimizer.lr:g}",
        *(f"folder    {printable(str(folder))}" for folder in folders.values()),
    ]


def _describe(choice: Choice) -> str:
    """A stream or model with its options."""
    options = [f"{key}: {_shorten(value)}" for key, value in choice.options.items() if value is not None]
    return printable(f"{choice.name} ({', '.join(options)})" if options else choice.name)


def _shorten(value: Any) -> Any:
    """The names of a list of mappings; other values unchanged."""
    if isinstance(value, list) and value and all(isinstance(item, dict) and "name" in item for item in value):
        return ", ".join(str(item["name"]) for item in value)
    return value
