"""`mulki bench`: measure a recipe's speed on this machine, and predict how long the whole run takes."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mulki_plugins.cli.common import (
    echo_json,
    echo_note,
    import_with_notice,
    read_changes,
    recipe_options,
    report_errors,
    resolve_recipe,
)
from mulki_plugins.errors import MulkiError

if TYPE_CHECKING:
    from mulki_plugins.bench.measure import Measured
    from mulki_plugins.bench.predict import Prediction
    from mulki_plugins.recipe.schema import Recipe

STEPS = 12
ESTIMATE_STEPS = 5
"""Steps of each task for `mulki run --dry-run --estimate`."""


@click.command()
@recipe_options
@click.option("--steps", type=click.IntRange(min=2), default=STEPS, show_default=True, help="Timed steps of each task.")
@click.option(
    "--synthetic", is_flag=True, help="Draw images of the real number and size in place of the stream mtil's data."
)
@click.option("--json", "as_json", is_flag=True, help="Print the measurements as JSON instead of a table.")
@report_errors
def bench(recipe: str, steps: int, synthetic: bool, as_json: bool, **options: Any) -> None:
    """Measure how fast RECIPE runs on this machine, and predict the time of the whole run.

    Trains a few steps of the first two tasks with the run's own code, evaluates a sample of the test images, writes a
    checkpoint, and prints how long each part takes: medians after a warm-up. Nothing is written into `runs`. Weights
    that would be downloaded are replaced by random ones, which take the same time, and missing data of the stream mtil
    by drawn images.
    """
    resolved = resolve_recipe(recipe, read_changes(options)).recipe
    measured, prediction = measure_recipe(resolved, steps, synthetic=synthetic)
    from mulki_plugins.bench.table import as_plain, as_text

    if as_json:
        echo_json(as_plain(measured, prediction))
    else:
        click.echo(as_text(measured, prediction))


def measure_recipe(
    recipe: Recipe, steps: int, *, synthetic: bool = False, count: bool = True
) -> tuple[Measured, Prediction]:
    """Measure a recipe with its first seed, and predict the time of a whole run. Says on stderr what it is doing."""
    imports = import_with_notice()
    from mulki_plugins.bench.measure import measure
    from mulki_plugins.bench.predict import predict
    from mulki_plugins.bench.synthetic import without_weights

    recipe, replaced = without_weights(recipe)
    if replaced:
        echo_note(f"note: {recipe.model.name} is measured with random weights, which take the same time")
    with tempfile.TemporaryDirectory(prefix="mulki-bench-") as folder, contextlib.redirect_stdout(sys.stderr):
        stream = _stream(recipe, synthetic, Path(folder))
        measured = measure(recipe, recipe.seeds[0], stream=stream, steps=steps, count=count, say=echo_note)
    return measured, predict(measured, imports)


def _stream(recipe: Recipe, synthetic: bool, folder: Path) -> Any:
    """A stream in place of the recipe's own, or None for that."""
    from mulki_plugins.bench.synthetic import synthetic as draw
    from mulki_plugins.training.build import make_stream

    if not synthetic:
        try:
            return make_stream(recipe.stream)
        except MulkiError as error:
            if recipe.stream.name != "mtil":
                raise
            echo_note(
                f"note: measured with drawn images (--synthetic), since the data are not there: {error.lines()[0]}"
            )
    return draw(recipe.stream, folder)
