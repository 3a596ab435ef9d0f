"""`mulki export`: write a trained model as a folder for open_clip."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from mulki_plugins.characters import printable
from mulki_plugins.cli.common import UserPath, echo_note, report_errors
from mulki_plugins.errors import MulkiError


@click.command()
@click.argument("source", type=UserPath(path_type=Path), metavar="RUN")
@click.option("--to", type=UserPath(path_type=Path), metavar="DIR", help="The folder to write; required.")
@click.option("--force", is_flag=True, help="Replace an earlier export in DIR. Other folders are never replaced.")
@click.option("--onnx", is_flag=True, help="Write both towers as ONNX too; needs `pip install 'mulki[onnx]'`.")
@click.option(
    "--device", default="auto", show_default=True, help="Where to compute the text features: cpu, cuda, or auto."
)
@report_errors
def export(source: Path, to: Path | None, force: bool, onnx: bool, device: str) -> None:
    """Write the trained model of RUN into a folder that open_clip loads without MulKI.

    RUN is the folder of a run, or a checkpoint in it. A run that is not complete gives the model after its last finished
    task. DIR gets the weights, open_clip's configuration, the classes with their text features, a model card, and
    classify.py, which classifies images without MulKI. The model is read back and compared before DIR gets its name.
    """
    if to is None:
        raise MulkiError("--to is missing", f"type: mulki export {shlex.quote(str(source))} --to my-model")
    from mulki_plugins.deploy.source import find_source

    found = find_source(source)
    if found.exported:
        raise MulkiError(f"{source}: this is an exported model already", "copy the folder")
    for notice in found.notices:
        echo_note(f"note: {notice}")
    from mulki_plugins.deploy.quick_import import import_open_clip

    import_open_clip()
    if not found.tasks:  # a run that did not keep its class names
        from mulki_plugins.deploy.streams import with_texts

        found = with_texts(found)
    from mulki_plugins.deploy.export import export_model
    from mulki_plugins.deploy.model import choose_device

    export_model(found, to, choose_device(device), force=force, onnx=onnx)
    click.echo(printable(str(to)))
