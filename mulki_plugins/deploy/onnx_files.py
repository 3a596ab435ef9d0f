"""Both towers as ONNX, checked against the model with onnxruntime."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mulki_plugins.deploy.model import DeployedClip
from mulki_plugins.errors import MulkiError, describe_error
from mulki_plugins.models.text import HasPrompts

IMAGE, TEXT = "image.onnx", "text.onnx"
TOLERANCE = 1e-4
"""Largest difference between a feature of the ONNX file and the model's, both of unit norm."""
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_LARGE = 1_500_000_000
"""Bytes of weights that fit into an ONNX file, whose limit is 2 GB; more go into a second file."""


def require_onnx() -> None:
    """MulkiError unless the packages are installed that write and check ONNX."""
    if missing := [name for name in _PACKAGES if find_spec(name) is None]:
        raise MulkiError(f"--onnx needs {', '.join(missing)}", "pip install 'mulki[onnx]'")


class _Tower(nn.Module):
    """One tower of a CLIP, with unit-norm features [N, d]."""

    def __init__(self, clip: Any, image: bool) -> None:
        super().__init__()
        self.clip, self.image = clip, image

    def forward(self, batch: Tensor) -> Tensor:
        features = self.clip.encode_image(batch) if self.image else self.clip.encode_text(batch)
        return nn.functional.normalize(features, dim=-1)


def write_onnx(folder: Path, model: DeployedClip, tasks: Sequence[HasPrompts]) -> None:
    """Write `image.onnx` and `text.onnx`, in single precision and for batches of any size, and compare both with the model.

    MulkiError if torch cannot export a tower, or if its features differ by more than TOLERANCE.
    """
    clip = model.clip.to("cpu")
    try:
        picture = model.transform(_picture())
        images = torch.stack([picture, picture.flip(2), picture.flip(1)])
        tokens = model.tokenise(tasks[0].class_names, tasks[0].templates[:1])
        tokens = tokens[[i % len(tokens) for i in range(3)]]
        for name, tower, batch in ((IMAGE, _Tower(clip, True), images), (TEXT, _Tower(clip, False), tokens)):
            _export(folder / name, tower.eval(), batch)
            for size in (1, 3):
                _check(folder / name, tower, batch[:size])
    finally:
        model.clip.to(model.device)


def _picture() -> Any:
    from PIL import Image

    return Image.effect_noise((97, 61), 80).convert("RGB")


def _export(path: Path, tower: nn.Module, batch: Tensor) -> None:
    large = sum(p.numel() * p.element_size() for p in tower.parameters()) > _LARGE
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                tower, (batch,), str(path), input_names=["input"], output_names=["features"], dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("n")},), external_data=large, verbose=False,
            )  # fmt: skip
    except MemoryError:
        raise
    except Exception as error:  # the exporter raises errors of many kinds
        hint = "export the model without --onnx"
        raise MulkiError(f"torch cannot write {path.name} for this model: {describe_error(error)}", hint) from error
    finally:
        logging.disable(before)


def _check(path: Path, tower: nn.Module, batch: Tensor) -> None:
    import onnxruntime  # type: ignore[import-not-found, unused-ignore]  # an extra

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    [features] = session.run(None, {"input": batch.numpy()})
    with torch.no_grad():
        difference = float((torch.from_numpy(features) - tower(batch)).abs().max())
    if not difference <= TOLERANCE:
        raise MulkiError(f"{path.name} differs from the model by {difference:.2g}", "export the model without --onnx")
