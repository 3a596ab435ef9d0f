"""`mulki cache`: what the cache folder holds, and clearing it."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mulki_plugins.characters import printable
from mulki_plugins.cli.common import UserPath, echo_json, report_errors
from mulki_plugins.errors import MulkiError

if TYPE_CHECKING:
    from mulki_plugins.streams.cache_folder import CacheFile

DAY = 24 * 60 * 60


@click.command()
@click.option("--clear", is_flag=True, help="Remove the files; a later run makes those that it needs again.")
@click.option(
    "--older-than", type=click.FloatRange(min=0), metavar="DAYS", help="With --clear: only those not used for so long."
)
@click.option(
    "--folder",
    type=UserPath(path_type=Path),
    help="The folder of a recipe's `evaluate.cache`, instead of MulKI's own.",
)
@click.option("--json", "as_json", is_flag=True, help="Print {folder, limit, size, files, ...} as JSON.")
@report_errors
def cache(clear: bool, older_than: float | None, folder: Path | None, as_json: bool) -> None:
    """List the files of the cache, the last used first: decoded and resized test images, and pictures drawn for mtil-mini.

    The cache is in ~/.cache/mulki, or in the folder MULKI_CACHE. Test images take at most 64 GiB, or MULKI_CACHE_LIMIT
    (such as 20GB; 0: none are cached); those used longest ago make room for others.
    """
    from mulki_plugins.files import cache_folder
    from mulki_plugins.streams.cache_folder import clear_cache, list_cache, pixel_folder, size_limit

    if older_than is not None and not clear:
        raise MulkiError("--older-than needs --clear", "type: mulki cache --clear --older-than 30")
    if folder is not None and not folder.is_dir():
        raise MulkiError(f"{folder}: no such folder", "type: mulki cache, for MulKI's own")
    folders = [folder] if folder is not None else [pixel_folder(), cache_folder()]
    top = folders[-1]
    try:
        if clear:
            files = [file for each in folders for file in clear_cache(each, (older_than or 0) * DAY)]
        else:
            files = [file for each in folders for file in list_cache(each)]
    except OSError as error:
        raise MulkiError(f"{error.filename or top}: {error.strerror or error}") from error
    size = sum(file.size for file in files)
    if as_json:
        key = "removed" if clear else "files"
        echo_json({"folder": str(top), "limit": size_limit(), "size": size, key: [_as_data(file) for file in files]})
    elif clear:
        click.echo(f"{top}: {_count(files)} removed")
    else:
        _print(top, files, size_limit())


def _as_data(file: CacheFile) -> dict[str, object]:
    return {
        "path": str(file.path),
        "what": file.what,
        "images": file.images,
        "stored": file.stored,
        "size": file.size,
        "last_used": _moment(file).isoformat(timespec="seconds"),
    }


def _moment(file: CacheFile) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(file.last_used).astimezone()


def _count(files: list[CacheFile]) -> str:
    from mulki_plugins.streams.cache_folder import format_size

    return f"{len(files)} {'file' if len(files) == 1 else 'files'}, {format_size(sum(file.size for file in files))}"


def _print(folder: Path, files: list[CacheFile], limit: int) -> None:
    from mulki_plugins.report.tables import columns
    from mulki_plugins.streams.cache_folder import format_size

    click.echo(printable(f"{folder}: {_count(files)}; test images may take {format_size(limit)} (MULKI_CACHE_LIMIT)"))
    if not files:
        return
    rows = [["size", "last used", "what", "file"]]
    for file in files:
        partly = f" ({file.stored:,} of them so far)" if file.stored != file.images else ""
        rows.append([format_size(file.size), f"{_moment(file):%Y-%m-%d %H:%M}", file.what + partly, file.path.name])
    click.echo("\n".join(columns(rows, "><")))
