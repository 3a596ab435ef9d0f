"""`mulki extend`: teach a finished run's model further tasks."""

from __future__ import annotations

import contextlib
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mulki_plugins.cli.common import UserPath, echo_json, echo_note, report_errors
from mulki_plugins.errors import Mistakes, MulkiError
from mulki_plugins.ranks.session import fall_silent

if TYPE_CHECKING:
    from mulki_plugins.recipe.resolve import Resolution
    from mulki_plugins.report.result import Result

RECIPE = "recipe.yaml"


@click.command()
@click.argument("folder", type=UserPath(path_type=Path), metavar="RUN")
@click.option(
    "--task",
    "folders",
    multiple=True,
    metavar="DIR",
    help="A folder of images, with one folder per class, or an entry such as '{name: birds, images: DIR}'; repeatable.",
)
@click.option(
    "--tasks", multiple=True, metavar="NAME,NAME", help="Further tasks of the run's stream by their names; repeatable."
)
@click.option(
    "--stream",
    metavar="STREAM",
    help="Another declaration of the stream, a name or '{name: ..., option: ...}'; it begins with the run's tasks.",
)
@click.option("--out", type=UserPath(path_type=Path), metavar="DIR", help="The new run's folder.")
@click.option("--force", is_flag=True, help="Go on even if recipe, data, code or versions have changed.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON instead of a table.")
@report_errors
def extend(
    folder: Path,
    folders: tuple[str, ...],
    tasks: tuple[str, ...],
    stream: str | None,
    out: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Teach the model of the finished RUN further tasks.

    \b
    mulki extend runs/mine/mulki-plus/seed-0 --task data/birds --task data/fish     your own images
    mulki extend runs/mtil/mulki-plus/seed-0 --tasks travel,textures                tasks of the run's stream

    The new run goes on where RUN ended, by the same recipe, and has a folder of its own: RUN's, with the names of the
    tasks after its strategy. Its weights and its matrix are those of one run of all these tasks. RUN stays as it is, and
    may be moved or deleted afterwards. `mulki resume` continues an extension that was stopped.
    """
    from mulki_plugins.ranks.launch import launched
    from mulki_plugins.recipe.resolve import resolve
    from mulki_plugins.report.compare import comparison_data
    from mulki_plugins.report.folder import named
    from mulki_plugins.report.result import FILE, read_result
    from mulki_plugins.report.tables import comparison_text

    if launched() is not None:
        fall_silent()
        raise MulkiError(
            "one process begins an extension",
            "start without torchrun; if it is stopped, `mulki resume` may go on with several",
        )
    folder = named(folder)
    if not (folder / RECIPE).is_file() or not (folder / FILE).is_file():
        raise MulkiError(
            f"{folder}: no run here", "give the folder of a finished run, such as runs/mtil/mulki-plus/seed-0"
        )
    parent = read_result(folder / FILE)
    declared = resolve(str(folder / RECIPE)).recipe.stream
    settings = _settings(parent, declared.name, declared.options, folders, tasks, stream)
    resolved = _resolve(folder / RECIPE, settings)
    target = named(out) if out else beside(folder, _further(parent, resolved, folders, tasks))
    _refuse_folder(target, folder)
    from mulki_plugins.training.extend import extend_experiment

    with contextlib.redirect_stdout(sys.stderr):  # output of plugins is no result
        result = extend_experiment(parent, resolved, target, force=force)
    if as_json:
        echo_json(comparison_data([result]))
    else:
        click.echo(comparison_text([result]))


def _refuse_folder(target: Path, run: Path) -> None:
    """MulkiError unless the new run's folder is free, or holds a run, which is moved aside."""
    one, other = target.resolve(), run.resolve()
    if one == other or one in other.parents or other in one.parents:
        raise MulkiError(
            f"{target}: is the folder of the run itself, or above or below it", "choose another one with --out"
        )
    from mulki_plugins.report.folder import holds_run

    if target.exists() and not holds_run(target):
        raise MulkiError(f"{target}: exists and is not the folder of a run", "choose another one with --out")


def _settings(
    parent: Result,
    name: str,
    options: dict[str, Any],
    folders: tuple[str, ...],
    tasks: tuple[str, ...],
    stream: str | None,
) -> dict[str, str]:
    """The changes to the run's recipe as `--set` takes them, each with the option that asks for it."""
    from mulki_plugins.recipe.emit import dump_inline

    if not (folders or tasks or stream):
        raise MulkiError("no further task", "name a folder with --task, or tasks of the run's stream with --tasks")
    if folders and (tasks or stream):
        raise MulkiError(
            "--task is for folders of images, --tasks and --stream are for other streams", "use one of them"
        )
    if folders:
        if name != "folders":
            hint = "name its tasks with --tasks, or declare a longer stream with --stream"
            raise MulkiError(f"--task: the run's stream is {name!r}, which is not made of folders", hint)
        entries, mistakes = list(options["tasks"]), list[str]()
        for text in folders:
            try:
                entries.append(_entry(text, {str(e["name"]) for e in entries if isinstance(e, dict) and "name" in e}))
            except MulkiError as error:
                mistakes += error.lines()
        if mistakes:
            raise Mistakes(mistakes)
        return {f"stream.tasks={dump_inline(entries)}": "--task"}
    settings = {f"stream={stream}": "--stream"} if stream else {}
    if tasks:
        further = [part.strip() for text in tasks for part in text.split(",") if part.strip()]
        if held_out := [task for task in further if task in parent.held_out]:
            what = f"--tasks: the run holds {', '.join(held_out)} out of its training (evaluate.held_out)"
            raise MulkiError(what, "learn it in a new run, without holding it out")
        if name == "folders" and not stream:
            raise MulkiError("--tasks: the run's stream is made of folders", "name a further folder with --task")
        settings[f"stream.tasks={dump_inline([*parent.tasks, *further, *parent.held_out])}"] = "--tasks"
        if not stream and options.get("order") is not None:
            settings["stream.order=null"] = "--tasks"
    return settings


def _entry(text: str, taken: set[str]) -> Any:
    """A recipe's entry for a folder, or the entry itself. MulkiError if a folder has the name of a task."""
    from mulki_plugins.recipe.emit import dump_inline
    from mulki_plugins.recipe.layers import parse_setting
    from mulki_plugins.recipe.yaml import Origin
    from mulki_plugins.streams.folders.draft import draft_options

    if text.lstrip().startswith("{"):
        return parse_setting(text, Origin("--task"), ("stream", "tasks"))
    try:
        entry, notices = draft_options(text)
    except MulkiError as error:
        raise Mistakes([f"--task: {line}" for line in error.lines()]) from None
    if entry["name"] in taken:
        places = {key: entry[key] for key in ("images", "train", "test") if key in entry}
        named = shlex.quote(dump_inline({"name": f"{entry['name']}-{len(taken) + 1}", **places}))
        hint = f"if it is another one, give it a name of its own: --task {named}"
        raise MulkiError(f"--task {text}: the task {entry['name']!r} is there already", hint)
    for notice in notices:
        echo_note(notice)
    return entry


def _resolve(path: Path, settings: dict[str, str]) -> Resolution:
    """The run's recipe with the further tasks. Mistakes that name the options of this command."""
    from mulki_plugins.recipe.resolve import Changes, resolve

    try:
        resolved = resolve(str(path), Changes(settings=tuple(settings)))
    except MulkiError as error:
        lines = error.lines()
        for setting, option in settings.items():
            lines = [line.replace(f"--set {setting}", option) for line in lines]
        raise Mistakes(dict.fromkeys(lines)) from None
    for notice in resolved.notices:
        echo_note(notice)
    return resolved


def _further(parent: Result, resolved: Resolution, folders: tuple[str, ...], tasks: tuple[str, ...]) -> list[str]:
    """What tells the new run's folder from the run's: the names of the further tasks, if they are written anywhere."""
    if not (folders or tasks):
        return []
    entries = resolved.recipe.stream.options["tasks"]
    names = [str(entry["name"] if isinstance(entry, dict) else entry) for entry in entries]
    return [name for name in names if name not in parent.tasks and name not in parent.held_out]


def beside(run: Path, tasks: list[str]) -> Path:
    """`runs/mine/mulki-plus+tasks=birds/seed-0` for the run `runs/mine/mulki-plus/seed-0` and the task `birds`."""
    from mulki_plugins.recipe.settings import folder_label
    from mulki_plugins.report.folder import is_aside

    label = f"+{folder_label({'tasks': tasks})}" if tasks else "+extended"
    if run.name.startswith("seed-") and not is_aside(run):
        return run.parent.with_name(run.parent.name + label) / run.name
    return run.with_name(run.name + label)
