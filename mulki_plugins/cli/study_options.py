"""What the commands of `mulki study` have in common: the study itself, and the options of those that run something."""

from __future__ import annotations

import functools
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mulki_plugins.cli.common import UserPath, echo_note
from mulki_plugins.cli.complete import complete_studies

if TYPE_CHECKING:
    from mulki_plugins.study.conduct import Conductor


class StudyCommands(click.Group):
    """A group whose first word may also be a study: `mulki study mini` is `mulki study run mini`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        known = args and (args[0] in self.commands or args[0] in ("-h", "--help"))
        meant = len(args) > 1 and not args[1].startswith("-") and get_close_matches(args[0], self.commands)
        if args and not known and not meant:
            args = ["run", *args]
        return super().parse_args(ctx, args)


def study_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The argument STUDY, its folder and its table, as a Conductor."""

    @functools.wraps(function)
    def wrapper(*args: Any, study: str, out: Path, table: Path | None, **kwargs: Any) -> Any:
        return function(*args, conductor=_open(study, out, table), **kwargs)

    for decorate in (
        click.option(
            "--table", type=UserPath(dir_okay=False, path_type=Path),
            help="The CSV file with a line for each finished run; by default study.csv in the study's folder.",
        ),
        click.option(
            "--out", type=UserPath(file_okay=False, path_type=Path), default=Path("runs/studies"), show_default=True,
            help="Folder of the studies: this one is in OUT/NAME.",
        ),
        click.argument("study", shell_complete=complete_studies),
    ):  # fmt: skip
        wrapper = decorate(wrapper)
    return wrapper


def only_option(function: Callable[..., Any]) -> Callable[..., Any]:
    help_ = "Only runs with this word in their part, order, strategy or label, or seed-N; repeatable: all of the words."
    return click.option("--only", multiple=True, metavar="WORD", help=help_)(function)


def into_option(name: str) -> Callable[..., Any]:
    help_ = f"Also write into this document, between `<!-- {name}: begin -->` and `<!-- {name}: end -->`."
    return click.option("--into", type=UserPath(exists=True, dir_okay=False, path_type=Path), help=help_)


def running_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Where and how runs go; what is not given is the study's."""
    count = click.IntRange(min=1)
    for decorate in (
        click.option("--no-wait", is_flag=True, help="Slurm: end after the submission."),
        click.option(
            "--slurm", "options", multiple=True, metavar="KEY=VALUE",
            help="Slurm: another option of sbatch, such as account=lab; repeatable.",
        ),
        click.option("--at-once", type=count, help="Slurm: the most jobs at the same time."),
        click.option("--nodes", type=count, help="Slurm: nodes of a run."),
        click.option("--gpus", type=click.IntRange(min=0), help="Slurm: GPUs of each node, through torchrun if several."),
        click.option("--memory", metavar="SIZE", help="Slurm: memory of each node, such as 16GB."),
        click.option("--time", metavar="TIME", help="Slurm: the limit of a job, such as 4:00:00; it is requeued then."),
        click.option("--partition", help="Slurm: the partition."),
        click.option("--gpus-per-run", type=count, help="With --on gpus: several GPUs share a run through torchrun."),
        click.option("--threads", type=count, help="Threads of each run.  [default: 1, or the cores shared out]"),
        click.option("--processes", type=count, help="With --on local: runs at the same time.  [default: one per core]"),
        click.option(
            "--on", type=click.Choice(["local", "gpus", "slurm"]),
            help="This machine, its GPUs with one run each, or Slurm.  [default: the study's, else local]",
        ),
        click.option("--dry-run", is_flag=True, help="Print what would run, as commands; run nothing."),
    ):  # fmt: skip
        function = decorate(function)
    return function


def _open(name: str, out: Path, table: Path | None) -> Conductor:
    from mulki_plugins.study.conduct import Conductor
    from mulki_plugins.study.read import read_study

    file = read_study(name)
    if file.file.notice:
        echo_note(file.file.notice)
    if (measured := file.measured) is not None and not measured.is_file():
        echo_note(f"note: {measured}: no such file, so no earlier run counts")
    root = out / file.study.name
    return Conductor(file=file, root=root, table=table or root / "study.csv", say=echo_note)
