"""`mulki export`: a trained model as a folder that open_clip loads without MulKI."""

from __future__ import annotations

import copy
import gzip
import json
import os
import shutil
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import QuickGELU
from PIL import Image
from safetensors.torch import save_file

from mulki_plugins.deploy.card import FILE as CARD
from mulki_plugins.deploy.card import write_card
from mulki_plugins.deploy.exported_head import FILES as HEAD_FILES
from mulki_plugins.deploy.exported_head import check_portable, write_head
from mulki_plugins.deploy.features import FILE as FEATURES
from mulki_plugins.deploy.features import TextFeatures, as_tensors, compute_features
from mulki_plugins.deploy.head import begun_tasks
from mulki_plugins.deploy.model import MERGES, DeployedClip, load_export, load_head, load_trained
from mulki_plugins.deploy.onnx_files import IMAGE, TEXT, require_onnx, write_onnx
from mulki_plugins.deploy.source import CONFIG, RECIPE, Source, is_export
from mulki_plugins.errors import MulkiError
from mulki_plugins.files import sync, umask, write_text
from mulki_plugins.models.load import LoadedClip
from mulki_plugins.models.weights import EXPORTED
from mulki_plugins.report.classes import FILE as CLASSES
from mulki_plugins.report.classes import write_classes

SCRIPT = "classify.py"
_TOKENIZERS = (
    "added_tokens.json", "chat_template.jinja", "merges.txt", "sentencepiece.bpe.model", "special_tokens_map.json",
    "spiece.model", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt",
)  # fmt: skip
"""Files of transformers' tokenizers."""
_OURS = frozenset(
    [
        EXPORTED, CONFIG, CLASSES, FEATURES, RECIPE, CARD, SCRIPT, MERGES, IMAGE, TEXT, f"{IMAGE}.data", f"{TEXT}.data",
        "__pycache__", *_TOKENIZERS, *HEAD_FILES,
    ]
)  # fmt: skip
"""The files that an export may hold; `--force` takes away no other."""
_TOLERANCE = 1e-4
"""Between features of the trained model and of the one that was read back, both of unit norm."""


def check_target(to: Path, source: Source, *, force: bool) -> None:
    """MulkiError if the folder must not be written. An earlier export is replaced with `force`, any other never."""
    target, run = Path(os.path.abspath(to)), source.folder.resolve()
    if to.is_symlink() or (to.exists() and not to.is_dir()):
        raise MulkiError(f"--to {to}: this is a {'link' if to.is_symlink() else 'file'}", "name a folder")
    if target.resolve() == run or target.resolve() in run.parents:
        raise MulkiError(f"--to {to}: the run itself lies there", "name another folder")
    if to.exists() and any(to.iterdir()):
        if not is_export(to):
            raise MulkiError(f"--to {to}: this folder holds other files, and they stay", "name a new folder")
        if not force:
            hint = "replace it with --force, or name a new folder"
            raise MulkiError(f"--to {to}: an exported model lies there", hint)
        if others := sorted(path.name for path in to.iterdir() if path.name not in _OURS):
            what = f"--to {to}: beside an exported model lies {others[0]!r}, and --force would take it away"
            raise MulkiError(what, "name a new folder")


def export_model(source: Source, to: Path, device: torch.device, *, force: bool = False, onnx: bool = False) -> None:
    """Write the model of a run into a folder, read it back and compare it; only then it gets its name.

    onnx: write both towers as ONNX too. MulkiError if the folder must not be written, or open_clip cannot express the model.
    """
    check_target(to, source, force=force)
    if onnx:
        require_onnx()
    loaded = load_trained(source)
    if (head := load_head(source, loaded)) is not None:
        check_portable(source, head, onnx=onnx)
    model = DeployedClip(
        clip=loaded.clip.to(device).eval().requires_grad_(False),
        tokenizer=loaded.tokenizer,
        transform=loaded.transform(train=False),
        device=device,
        precision=source.precision,
        head=None if head is None else head.to(device),
    )
    config = describe_model(source, loaded)
    target = Path(os.path.abspath(to))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    except OSError as error:
        raise MulkiError(f"--to {to}: cannot be written: {error.strerror or error}", "name another folder") from error
    try:
        _write(part, source, loaded, model, config, target)
        _compare(part, source, model)
        if onnx:
            write_onnx(part, model, source.tasks)
        write_card(part, source, str(to), onnx=float(model.scale) if onnx else None)
        _put_in_place(part, target)
    except OSError as error:
        raise MulkiError(f"--to {to}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write(
    part: Path, source: Source, loaded: LoadedClip, model: DeployedClip, config: dict[str, Any], target: Path
) -> None:
    assert source.recipe is not None
    state = {name: value.detach().cpu().contiguous().clone() for name, value in model.clip.state_dict().items()}
    save_file(
        state, part / EXPORTED, metadata={"format": "pt", **loaded.trained_with(source.recipe.model.name).metadata()}
    )
    _write_tokenizer(part, loaded, config, target)
    write_text(part / CONFIG, json.dumps(config, indent=2) + "\n")
    write_classes(part, source.tasks, source.learned)
    features: dict[int, TextFeatures] = {i: compute_features(model, task) for i, task in enumerate(source.tasks)}
    save_file(as_tensors(features), part / FEATURES)
    shutil.copyfile(source.folder / RECIPE, part / RECIPE)
    if model.head is not None:
        write_head(part, model.head, source.recipe.model.options["head"], begun_tasks(source))
    write_text(part / SCRIPT, files("mulki_plugins.deploy").joinpath(f"{SCRIPT}.template").read_text("utf-8"))


def describe_model(source: Source, loaded: LoadedClip) -> dict[str, Any]:
    """open_clip's configuration of the model. MulkiError if open_clip has no such architecture."""
    assert source.recipe is not None
    name = source.recipe.model.name
    model = copy.deepcopy(dict(loaded.config)) if loaded.config else open_clip.get_model_config(name)
    if model is None:
        what = f"the model {name!r} cannot be exported: its package does not say how open_clip builds it"
        raise MulkiError(what, "its LoadedClip must have a `config`, open_clip's configuration of a model")
    model["quick_gelu"] = any(isinstance(module, QuickGELU) for module in loaded.clip.modules())
    prepare = {
        "mean": list(loaded.mean), "std": list(loaded.std),
        "interpolation": loaded.interpolation, "resize_mode": loaded.resize_mode,
    }  # fmt: skip
    return {"model_cfg": model, "preprocess_cfg": prepare}


def _write_tokenizer(part: Path, loaded: LoadedClip, config: dict[str, Any], target: Path) -> None:
    """Write the tokenizer, unless it is open_clip's own. MulkiError if open_clip has no tokenizer of its kind."""
    tokenizer: Any = loaded.tokenizer
    text = config["model_cfg"]["text_cfg"]
    if isinstance(tokenizer, SimpleTokenizer):
        if tokenizer.bpe_ranks != SimpleTokenizer().bpe_ranks:
            merges = "\n".join(["#", *(" ".join(pair) for pair in tokenizer.bpe_ranks)])
            (part / MERGES).write_bytes(gzip.compress(merges.encode(), mtime=0))
            # open_clip looks for a relative path in the current folder, wherever the model lies
            text["tokenizer_kwargs"] = {**(text.get("tokenizer_kwargs") or {}), "bpe_path": str(target / MERGES)}
    elif hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(str(part))
        text.setdefault("hf_tokenizer_name", target.name)
    else:
        what = f"the model cannot be exported: open_clip cannot load its tokenizer, a {type(tokenizer).__name__}"
        raise MulkiError(what, "it needs open_clip's SimpleTokenizer or HFTokenizer")


def _compare(part: Path, source: Source, model: DeployedClip) -> None:
    """MulkiError unless open_clip reads back the same weights, tokens, preparation and features."""
    clip, tokenizer, transform = load_export(part)
    clip = clip.to(model.device).eval().requires_grad_(False)
    before, after = model.clip.state_dict(), clip.state_dict()
    if before.keys() != after.keys() or not all(torch.equal(before[name], after[name]) for name in before):
        raise _different("the weights")
    again = DeployedClip(
        clip=clip, tokenizer=tokenizer, transform=transform, device=model.device, precision=model.precision
    )
    for task in source.tasks:
        mine, other = (each.tokenise(task.class_names, task.templates) for each in (model, again))
        if not torch.equal(mine.cpu(), other.cpu()):
            raise _different("the tokens of its sentences")
    picture = Image.effect_noise((97, 61), 80).convert("RGB")
    if not torch.equal(model.transform(picture), transform(picture)):
        raise _different("the preparation of images")
    batch = model.transform(picture)[None]
    names, templates = source.tasks[0].class_names[:2], source.tasks[0].templates[:1]
    pairs = [
        (model.encode_images(batch), again.encode_images(batch)),
        (model.encode_classes(names, templates), again.encode_classes(names, templates)),
    ]
    if any((one - two).abs().max() > _TOLERANCE for one, two in pairs):
        raise _different("its features")


def _different(what: str) -> MulkiError:
    return MulkiError(f"the exported model differs from the trained one in {what}; nothing was written")


def _put_in_place(part: Path, target: Path) -> None:
    """Give the finished folder its name. An earlier export moves aside first and goes when the new one is in place."""
    mask = umask()
    os.chmod(part, 0o777 & ~mask)
    for path in part.iterdir():
        os.chmod(path, 0o666 & ~mask)
        sync(path)
    if not target.exists():
        part.rename(target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    old = aside / target.name
    target.rename(old)
    try:
        part.rename(target)
    except OSError:
        old.rename(target)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
