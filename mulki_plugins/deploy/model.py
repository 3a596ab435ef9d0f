"""A trained CLIP without Avalanche: unit-norm features of images and sentences, as the run's evaluation computes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from attrs import frozen
from PIL import Image
from torch import Tensor, nn

from mulki_plugins.deploy.adapted import all_merge, apply_trained, merged_file, own_file, refuse_unmerged
from mulki_plugins.deploy.candidates import Candidates
from mulki_plugins.deploy.exported_head import exported_head
from mulki_plugins.deploy.head import head_of
from mulki_plugins.deploy.skip_init import SkipInitialisation
from mulki_plugins.deploy.source import CONFIG, Source
from mulki_plugins.errors import MulkiError, describe_error
from mulki_plugins.models.check import TINY
from mulki_plugins.models.head import HEAD, Head, Scope, logits_of, width_for
from mulki_plugins.models.load import LoadedClip, load_clip, quiet_open_clip
from mulki_plugins.models.pooled import encode_with_pooled
from mulki_plugins.models.precision import autocast, matrix_products
from mulki_plugins.models.routes import Routes
from mulki_plugins.models.tensors import added_to, left_out_of, load_state, read_state
from mulki_plugins.models.text import Prompts, sentences
from mulki_plugins.models.text_tower import encode_sentences, length_needed
from mulki_plugins.models.tiny import mulki_tiny
from mulki_plugins.models.unit import unit
from mulki_plugins.models.weights import WEIGHTS, weight_file
from mulki_plugins.recipe.schema import Precision
from mulki_plugins.registry.discovery import catalog

MERGES = "merges.txt.gz"
"""The vocabulary of a tokenizer that is not open_clip's own, in an exported folder."""
_SENTENCES = 256
"""Sentences that are encoded at once."""
_TOKENIZER_OPTIONS = ("bpe_path", "clean", "strip_sep_token", "language", "reduction_mask", "additional_special_tokens")
"""Options of a tokenizer that an exported folder may set: none of them runs code."""


@frozen(kw_only=True, eq=False)
class DeployedClip:
    """A model for inference with its tokenizer and the preparation of its images."""

    clip: Any
    """open_clip's model."""
    tokenizer: Callable[[list[str]], Tensor]
    transform: Callable[[Image.Image], Tensor]
    """An image in RGB -> [3, H, W]."""
    device: torch.device
    precision: Precision = "fp32"
    head: Head | None = None
    """What turns features into logits; None for the cosines with the sentences."""
    routes: Routes | None = None
    """The routes of an adapter that could not be merged; None for a plain model."""

    @property
    def scale(self) -> Tensor:
        """The factor of the cosines, a scalar."""
        scale: Tensor = self.clip.logit_scale.detach().exp().squeeze()
        return scale

    @torch.inference_mode()
    def encode_images(self, batch: Tensor) -> Tensor:
        """Unit-norm features [B, d] of prepared images [B, 3, H, W]."""
        with matrix_products(self.precision), self._autocast():
            return self._encode(batch.to(self.device))

    @torch.inference_mode()
    def answer_images(self, batch: Tensor, candidates: Candidates) -> Tensor:
        """Logits [B, C] of prepared images over the candidates; each image by the route that it chooses, if there are any."""
        with matrix_products(self.precision):
            if self.routes is None:
                with self._autocast():
                    z = self._encode_for_head(batch.to(self.device))
                return self._answer(z, candidates, candidates.features)
            with self._autocast():
                z, routes = self.routes.encode(self._encode_for_head, batch.to(self.device))
            return self.routes.select(routes, lambda: self._answer(z, candidates, candidates.of_route(self)))

    def _encode(self, batch: Tensor) -> Tensor:
        return unit(self.clip.encode_image(batch))

    def _encode_for_head(self, batch: Tensor) -> Tensor:
        if self.head is None or not self.head.reads_pooled:
            return self._encode(batch)
        return encode_with_pooled(self.clip.visual, lambda: self._encode(batch))

    @torch.inference_mode()
    def encode_classes(self, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Unit-norm features [C, d] of classes: the renormalised mean over the templates.

        Radford et al., 2021, arXiv 2103.00020, section 3.1.4.
        """
        tokens = self.tokenise(class_names, templates)
        length = length_needed(self.clip, tokens)
        with matrix_products(self.precision), self._autocast():
            parts = torch.split(tokens.to(self.device), _SENTENCES)
            t = unit(torch.cat([encode_sentences(self.clip, part, length) for part in parts]))
            return unit(t.reshape(len(templates), len(class_names), -1).mean(0)) if len(templates) > 1 else t

    def tokenise(self, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Token ids of all sentences, template after template: [templates · C, length]."""
        prompts = Prompts(tuple(class_names), tuple(templates))
        return self.tokenizer([text for group in sentences(prompts, all_templates=True) for text in group])

    @torch.inference_mode()
    def logits(self, z: Tensor, t: Tensor) -> Tensor:
        """Scaled cosines s·z·tᵀ: [B, d], [C, d] -> [B, C]."""
        return self.scale.to(z.dtype) * z @ t.to(z).T

    def _answer(self, z: Tensor, candidates: Candidates, t: Tensor) -> Tensor:
        """The head's logits [B, C] of what it reads of images over the candidates, whose text features are t [C, d]."""
        if self.head is None:
            return self.logits(z, t)
        return logits_of(self.head, z, Scope(t.to(z), self.scale, candidates.places))

    def _autocast(self) -> AbstractContextManager[Any]:
        return autocast(self.precision, self.device)


def choose_device(name: str) -> torch.device:
    """The device of that name; `auto` is a CUDA GPU if the machine has one, else the CPU. MulkiError if it is missing."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "meta":  # it has no numbers
            raise NotImplementedError(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise MulkiError(f"--device: {name!r} is not on this machine", "type --device auto") from error
    return device


def load_model(source: Source, device: torch.device) -> DeployedClip:
    """The model of a run or of an exported folder, on a device, for inference. MulkiError if it cannot be loaded."""
    head = None
    routes = None
    if source.exported:
        clip, tokenizer, transform = load_export(source.folder)
        head = exported_head(source, lambda each: width_for(each, clip, tokenizer))
    else:
        loaded, routes = load_adapted(source)
        clip, tokenizer, transform = loaded.clip, loaded.tokenizer, loaded.transform(train=False)
        head = load_head(source, loaded)
    if head is not None and device.type == "mps":
        raise MulkiError(
            "--device: mps has no double precision, in which the model's head computes", "type --device cpu"
        )
    return DeployedClip(
        clip=clip.to(device).eval().requires_grad_(False),
        tokenizer=tokenizer,
        transform=transform,
        device=device,
        precision=source.precision,
        head=None if head is None else head.to(device),
        routes=routes,
    )


def load_head(source: Source, loaded: LoadedClip) -> Head | None:
    """The head of a run's model; None for the default. MulkiError if it cannot be loaded."""
    state = {} if source.weights is None else _read_state(source.weights)
    tokenizer: Callable[[list[str]], Tensor] = loaded.tokenizer
    return head_of(source, state, lambda each: width_for(each, loaded.clip, tokenizer))


def load_adapted(source: Source) -> tuple[LoadedClip, Routes | None]:
    """The model of a run with its trained weights; with its adapters, and their routes, if they cannot be merged."""
    assert source.recipe is not None
    name, options, entries = _model_of(source)
    if source.weights is None or all_merge(entries):
        return load_trained(source), None
    state = _read_state(source.weights)
    _refuse_added_weights(source.weights, state)
    with own_file(source, _base(source, name, options)) as weights:
        loaded = _load_weights(name, options, weights)
    adapters, own = apply_trained(source, loaded.clip, entries, state)
    loaded.clip.requires_grad_(False)
    routes = Routes(loaded.clip, adapters, own)
    routes.tasks = set(range(len(source.tasks)))
    return loaded, routes


def _model_of(source: Source) -> tuple[str, dict[str, Any], list[dict[str, Any]]]:
    """The name of a run's model, its options, and its adapters."""
    assert source.recipe is not None
    options = dict(source.recipe.model.options)
    options.pop("train", None)
    entries = options.pop("adapters", [])
    options.pop("head", None)
    return source.recipe.model.name, options, entries


def _base(source: Source, name: str, options: dict[str, Any]) -> nn.Module:
    """The model before any training; with random weights if that is quicker and no weight of it is asked for."""
    ours = name == TINY or ("model", name) not in catalog().parts
    return load_clip(name, **({"pretrained": "random"} if ours and not _leaves_out(source) else options)).clip


def _leaves_out(source: Source) -> bool:
    """Whether the weights are a checkpoint's that leaves out those that are as pre-trained."""
    assert source.weights is not None
    return source.weights.name == WEIGHTS and bool(left_out_of(source.weights))


def load_trained(source: Source) -> LoadedClip:
    """The model of a run with its trained weights, adapters merged into them.

    MulkiError if a plugin has added weights, which no other code knows, or if an adapter cannot be merged.
    """
    name, options, entries = _model_of(source)
    if source.weights is None:
        return _load_untrained(source, name, options)
    refuse_unmerged(entries, source.folder)
    state = _read_state(source.weights)
    _refuse_added_weights(source.weights, state)
    if source.weights.name == WEIGHTS and (entries or _leaves_out(source)):  # weights and adapters are kept apart
        with merged_file(source, _base(source, name, options), entries, state) as weights:
            return _load_weights(name, options, weights)
    return _load_weights(name, options, source.weights)


def _load_weights(name: str, options: dict[str, Any], weights: Path) -> LoadedClip:
    if name == TINY:
        with SkipInitialisation():
            return mulki_tiny(pretrained=str(weights))
    if ("model", name) not in catalog().parts:  # an architecture of open_clip: the file says what it was trained with
        with SkipInitialisation():
            return load_clip(name, **options | {"pretrained": str(weights)})
    loaded = load_clip(name, **options)
    load_state(loaded.clip, read_state(weight_file(str(weights))), weights, name)
    return loaded


def _load_untrained(source: Source, name: str, options: dict[str, Any]) -> LoadedClip:
    """The pre-trained model of a run that trained nothing. MulkiError if its weights were random, since none were kept."""
    if options.get("pretrained") == "random":
        what = f"{source.folder}: the run trained nothing, and its model has random weights, which it did not keep"
        raise MulkiError(what, "use a run that trains, or pre-trained weights")
    return mulki_tiny(**options) if name == TINY else load_clip(name, **options)


def _read_state(weights: Path) -> dict[str, Any]:
    """What a checkpoint keeps beside these weights; nothing if they are not in a checkpoint."""
    state = weights.parent / "state.pt"
    if not state.is_file():
        return {}
    try:
        return dict(torch.load(state, map_location="cpu", weights_only=True, mmap=True))
    except Exception as error:  # torch.load raises errors of many kinds
        raise MulkiError(f"{state}: the checkpoint is damaged: {describe_error(error)}") from error


def _refuse_added_weights(weights: Path, state: dict[str, Any]) -> None:
    """MulkiError if the run has weights outside the model: they belong to a plugin."""
    if kept := [name for name in state.get("model", {}) if not name.startswith(HEAD)] or added_to(weights):
        first = kept[0]
        what = f"{weights.parent}: a plugin has added weights to the model ({first!r}), which open_clip does not know"
        raise MulkiError(what, "only models of open_clip's own architectures can be used outside of a run")


def load_export(folder: Path) -> tuple[nn.Module, Callable[[list[str]], Tensor], Callable[[Image.Image], Tensor]]:
    """Model, tokenizer and preparation of an exported folder, by open_clip alone. MulkiError if it cannot be loaded."""
    _refuse_foreign_options(folder)
    try:
        with quiet_open_clip(), SkipInitialisation():
            clip, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
            merges = folder / MERGES
            options = {"bpe_path": str(merges)} if merges.is_file() else {}
            tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}", **options)
    except MemoryError:
        raise
    except Exception as error:  # damaged files can make its readers raise anything
        raise MulkiError(f"{folder}: open_clip cannot load it: {describe_error(error)}", "export it again") from error
    return clip, tokenizer, transform


def _refuse_foreign_options(folder: Path) -> None:
    """MulkiError if the configuration passes a tokenizer options that could run code."""
    try:
        text = json.loads((folder / CONFIG).read_text("utf-8"))["model_cfg"]["text_cfg"]
        options = text.get("tokenizer_kwargs") or {}
        unknown = [name for name in options if name not in _TOKENIZER_OPTIONS]
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise MulkiError(
            f"{folder / CONFIG}: not open_clip's description of a model: {describe_error(error)}"
        ) from error
    if unknown:
        raise MulkiError(f"{folder / CONFIG}: tokenizer_kwargs has {unknown[0]!r}, which `mulki export` never writes")


def class_keys(model: DeployedClip, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """A number [C] for each class, int64: equal for classes whose sentences the tokenizer cannot tell apart."""
    import hashlib

    tokens = model.tokenise(class_names, templates).cpu()
    rows = tokens.reshape(len(templates), len(class_names), -1).transpose(0, 1).contiguous().numpy()
    digests = [hashlib.sha256(row.tobytes()).digest()[:8] for row in rows]
    return torch.from_numpy(np.frombuffer(b"".join(digests), dtype=np.int64).copy())
