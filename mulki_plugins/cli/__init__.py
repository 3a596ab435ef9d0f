"""The `mulki` command. Each of its commands has a module here; none imports torch before it needs it."""

from __future__ import annotations

import click

from mulki_plugins import __version__
from mulki_plugins.cli.bench import bench
from mulki_plugins.cli.cache import cache
from mulki_plugins.cli.clean import clean
from mulki_plugins.cli.completion import completion
from mulki_plugins.cli.data import data
from mulki_plugins.cli.doctor import doctor
from mulki_plugins.cli.evaluate import evaluate
from mulki_plugins.cli.export import export
from mulki_plugins.cli.extend import extend
from mulki_plugins.cli.lazy import switch_off
from mulki_plugins.cli.list import list_command
from mulki_plugins.cli.new import new
from mulki_plugins.cli.plugins import plugins
from mulki_plugins.cli.predict import predict
from mulki_plugins.cli.report import report
from mulki_plugins.cli.results import results
from mulki_plugins.cli.resume import resume
from mulki_plugins.cli.run import run
from mulki_plugins.cli.schema import schema
from mulki_plugins.cli.show import show
from mulki_plugins.cli.study import study
from mulki_plugins.cli.usage import HelpfulCommands
from mulki_plugins.cli.validate import validate


@click.group(
    "mulki", cls=HelpfulCommands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(__version__, prog_name="mulki")
@click.option(
    "--no-plugin",
    multiple=True,
    metavar="NAME",
    is_eager=True,
    expose_value=False,
    callback=switch_off,
    help="Ignore the plugins of a package; repeatable. MULKI_PLUGINS=a,b in the environment loads only these; empty: none.",
)
def main() -> None:
    """Keep CLIP-like models learning: task after task, without forgetting, without losing zero-shot ability.

    \b
    Start with:   mulki run mtil              the main experiment: about four minutes, no data or weights needed
                  mulki show mtil             its recipe, and where each value comes from
                  mulki list                  the parts of a recipe: strategies, plugins, streams, models
    """


for command in (
    run, resume, extend, validate, show, list_command, results, report, predict, evaluate, export, clean, data, cache,
    plugins, doctor, bench, study, new, schema, completion,
):  # fmt: skip
    main.add_command(command)
