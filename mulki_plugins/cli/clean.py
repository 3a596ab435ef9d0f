"""`mulki clean`: free the disk of what finished runs no longer need."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from attrs import asdict, field, frozen

from mulki_plugins.characters import printable
from mulki_plugins.cli.common import UserPath, echo_json, echo_note, report_errors
from mulki_plugins.errors import Mistakes, MulkiError
from mulki_plugins.streams.cache_folder import format_size

if TYPE_CHECKING:
    from mulki_plugins.report.result import Result

CHECKPOINTS, WEIGHTS = "checkpoints", "weights"
"""The folders in a run's that hold checkpoints, and the weights after each task."""


@frozen(kw_only=True)
class Cleaning:
    """What goes from one run's folder."""

    folder: str
    removed: list[str] = field(factory=list)
    """Folders, relative to the run's."""
    freed: int = 0
    """Bytes. A file that keeps another name frees none."""
    kept: int = 0
    """Bytes that stay only for `mulki extend`."""


@click.command()
@click.argument("folders", nargs=-1, required=True, type=UserPath(path_type=Path), metavar="RUN...")
@click.option(
    "--all",
    "everything",
    is_flag=True,
    help="Also remove what only `mulki extend` needs: the run can then not be taught another task.",
)
@click.option("--force", is_flag=True, help="Also clean unfinished runs: they can then not be resumed.")
@click.option("--dry-run", is_flag=True, help="Say what would be removed; remove nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print what was removed as JSON.")
@report_errors
def clean(folders: tuple[Path, ...], everything: bool, force: bool, dry_run: bool, as_json: bool) -> None:
    """Free the disk of what finished runs no longer need.

    These are the checkpoints with which a run is resumed. The final weights stay, as model.safetensors, and so does
    everything that `results`, `report`, `export` and `predict` read. Unless --all is given, the state at the end of the last
    task and the weights after each task stay too, for `mulki extend`. RUN is a run's folder, or any folder above several.
    """
    cleanings = []
    for result in _choose(folders, force):
        cleanings.append(_clean(result, everything=everything, dry_run=dry_run))
        if not as_json:
            _say(cleanings[-1], dry_run)
    freed = sum(cleaning.freed for cleaning in cleanings)
    if as_json:
        echo_json({"runs": [asdict(cleaning) for cleaning in cleanings], "freed": freed, "dry_run": dry_run})
    elif len(cleanings) > 1:
        click.echo(f"{len(cleanings)} runs: {format_size(freed)} {'would be freed' if dry_run else 'freed'}")


def _choose(folders: Sequence[Path], force: bool) -> list[Result]:
    """The runs to clean. MulkiError if one that was named itself is unfinished; others below a folder are passed over."""
    from mulki_plugins.report.result import find_results

    results, errors = find_results(folders)
    for line in errors:
        echo_note(f"warning: left as it is: {line}")
    named = {path.resolve() for path in folders}
    chosen, mistakes = [], []
    for result in results:
        if result.status == "complete" or (force and result.status != "running"):
            chosen.append(result)
        elif result.status == "running":
            mistakes.append(f"{result.folder}: the run is still going; stop it or wait until it ends")
        elif Path(result.folder).resolve() in named:
            mistakes.append(
                f"{result.folder}: the run is not finished ({result.status}), and its checkpoints are needed to resume it; "
                f"type `mulki resume {shlex.quote(result.folder)}`, or give it up with --force"
            )
        else:
            echo_note(f"note: left as it is: {result.folder}: not finished ({result.status}); --force cleans it too")
    if mistakes:
        raise Mistakes(mistakes)
    return chosen


def _clean(result: Result, *, everything: bool, dry_run: bool) -> Cleaning:
    from mulki_plugins.files import locked
    from mulki_plugins.report.folder import refuse_links
    from mulki_plugins.training.checkpoint import to_extend
    from mulki_plugins.training.final_weights import find_end, secure_final_weights

    run, complete = Path(result.folder), result.status == "complete"
    with locked(run):
        refuse_links(run)
        end = find_end(run, len(result.tasks)) if complete else None
        folders = _below(run)
        can_be_extended = complete and result.base != "joint"
        state = to_extend(run, result.base, len(result.tasks)) if can_be_extended else None
        kept = [
            folder
            for folder in folders
            if not everything and state is not None and (folder.startswith(WEIGHTS) or run / folder == state.path)
        ]
        removed = [folder for folder in folders if folder not in kept]
        if removed and not dry_run and complete and result.base != "none":
            secure_final_weights(run, len(result.tasks))
        # they stay, as model.safetensors, which an older run does not have yet
        final = [end.path / "weights.safetensors"] if end and not (run / "model.safetensors").is_file() else []
        freed = _bytes(run, removed, final)
        cleaning = Cleaning(folder=str(run), removed=removed, freed=freed, kept=_bytes(run, folders, final) - freed)
        if not dry_run:
            for folder in removed:
                _remove(run / folder)
            for name in (CHECKPOINTS, WEIGHTS):
                if (run / name).is_dir() and not any((run / name).iterdir()):
                    (run / name).rmdir()
    return cleaning


def _below(run: Path) -> list[str]:
    """The folders of checkpoints and of weights, relative to the run's."""
    return [
        f"{name}/{path.name}"
        for name in (CHECKPOINTS, WEIGHTS)
        if (run / name).is_dir()
        for path in sorted((run / name).iterdir())
    ]


def _bytes(run: Path, folders: Sequence[str], final: Sequence[Path]) -> int:
    """The bytes that go with these folders, without the final weights. A file goes with the last of its names."""
    names: dict[tuple[int, int], int] = {}
    stats: dict[tuple[int, int], os.stat_result] = {}
    for path in _files(run / folder for folder in folders):
        stat = path.lstat()
        file = stat.st_dev, stat.st_ino
        names[file], stats[file] = names.get(file, 0) + 1, stat
    for path in final:
        stats.pop((path.stat().st_dev, path.stat().st_ino), None)
    return sum(stat.st_size for file, stat in stats.items() if names[file] >= stat.st_nlink)


def _files(folders: Iterator[Path]) -> Iterator[Path]:
    for folder in folders:
        for root, _, files in os.walk(folder):
            yield from (Path(root) / file for file in files)


def _remove(folder: Path) -> None:
    """Remove a checkpoint. It is renamed first: one that is half gone is never read."""
    half = folder.with_name(f".{folder.name}.part") if not folder.name.startswith(".") else folder
    try:
        folder.rename(half)
        shutil.rmtree(half) if half.is_dir() else half.unlink()
    except OSError as error:
        raise MulkiError(f"{folder}: cannot be removed: {error.strerror or error}") from error


def _say(cleaning: Cleaning, dry_run: bool) -> None:
    done = "would be freed" if dry_run else "freed"
    click.echo(f"{printable(cleaning.folder)}: {format_size(cleaning.freed)} {done}")
    for folder in cleaning.removed:
        click.echo(f"  {'would remove' if dry_run else 'removed'} {printable(folder)}")
    if cleaning.kept:
        click.echo(f"  kept for `mulki extend`: {format_size(cleaning.kept)}; --all removes that too")
