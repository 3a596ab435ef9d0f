"""Models by name: MulKI's own, and every architecture of open_clip, with weights from a tag or a file."""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import open_clip
from attrs import evolve, frozen
from open_clip.transformer import QuickGELU
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode

from mulki_plugins.errors import MissingData, MulkiError, did_you_mean
from mulki_plugins.models.check import RANDOM, no_weights, refuse_another, unknown_tag
from mulki_plugins.models.tensors import load_state, read_state
from mulki_plugins.models.weights import (
    CLIP_MEAN,
    CLIP_STD,
    Interpolation,
    Numbers,
    ResizeMode,
    TrainedWith,
    WeightFile,
    in_words,
    looks_like_a_path,
    weight_file,
)
from mulki_plugins.registry.builtin import open_clip_config, open_clip_models, open_clip_tags
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.registry.guard import guarded_call


@frozen(kw_only=True, eq=False)
class LoadedClip:
    """A model with its tokenizer and the preparation of its images."""

    clip: nn.Module
    tokenizer: Callable[[list[str]], Tensor]
    image_size: int
    mean: Numbers
    std: Numbers
    interpolation: Interpolation = "bicubic"
    resize_mode: ResizeMode = "shortest"
    notices: tuple[str, ...] = ()
    """Remarks for the user, such as assumptions about the weights."""
    config: Mapping[str, Any] | None = None
    """How open_clip builds it (`model_cfg`), for `mulki export`; None for an architecture that open_clip knows by name."""

    def trained_with(self, architecture: str) -> TrainedWith:
        """What to store beside these weights; `architecture` is the model's name in the recipe."""
        return TrainedWith(
            architecture=architecture,
            quickgelu=any(isinstance(module, QuickGELU) for module in self.clip.modules()),
            mean=self.mean,
            std=self.std,
            interpolation=self.interpolation,
            resize_mode=self.resize_mode,
        )

    def transform(self, train: bool) -> Callable[[Any], Tensor]:
        """open_clip's transform, PIL image -> [3, H, W], as in the MTIL protocol.

        Training crops 90 to 100 % of the area at random. Evaluation resizes as in pre-training: for CLIP the shorter side,
        bicubic, and crops the centre.
        """
        result: Any = open_clip.image_transform(
            self.image_size,
            is_train=train,
            mean=self.mean,
            std=self.std,
            interpolation=self.interpolation,
            resize_mode=self.resize_mode,
        )
        if train and self.interpolation == "bilinear":  # open_clip honours it in evaluation only
            result.transforms[0].interpolation = InterpolationMode.BILINEAR
        transform: Callable[[Any], Tensor] = result
        return transform


def load_clip(name: str, **options: Any) -> LoadedClip:
    """Load a registered model or an open_clip architecture: `load_clip("ViT-B-16-quickgelu", pretrained="openai")`.

    MulkiError if no model has this name, MissingData if its weights are unavailable.
    """
    part = catalog().parts.get(("model", name))
    if part is not None:
        make = part.load()
        what = f"the model {name!r} of {part.provenance}"
        options = copy.deepcopy(options)
        loaded = make(**options) if part.is_ours else guarded_call(f"{what} cannot be made", make, **options)
        if not isinstance(loaded, LoadedClip):
            raise MulkiError(f"{what} cannot be used: returned a {type(loaded).__name__}, expected a LoadedClip")
        return loaded
    if name not in open_clip_models():
        known = [p.name for p in catalog().of_kind("model")] + open_clip_models()
        raise MulkiError(f"no model is named {name!r} ({did_you_mean(name, known)})")
    return open_clip_model(name, **options)


def open_clip_model(
    name: str,
    *,
    pretrained: str | None = None,
    quickgelu: bool | None = None,
    mean: Numbers | None = None,
    std: Numbers | None = None,
    interpolation: Interpolation | None = None,
    resize_mode: ResizeMode | None = None,
) -> LoadedClip:
    """An open_clip architecture, with the activation and image preparation that its weights were trained with.

    A tag, and most files, say what that is; the options after `pretrained` are for files that do not. MulkiError if they
    contradict the tag or the file.

    Args:
        pretrained: A tag of open_clip, a file of weights, the folder of a run, or `random` for random weights.
        quickgelu: For a file that does not say it: trained with QuickGELU, not GELU; null for what the name says.
        mean: For such a file: the mean of its images' red, green and blue; null for the architecture's usual one.
        std: For such a file: the standard deviation; null for the architecture's usual one.
        interpolation: For such a file: how its images were resized; null for the architecture's usual way.
        resize_mode: For such a file: to which side they were resized; null for the architecture's usual way.
    """
    stated = TrainedWith(
        quickgelu=quickgelu,
        mean=None if mean is None else (mean[0], mean[1], mean[2]),
        std=None if std is None else (std[0], std[1], std[2]),
        interpolation=interpolation,
        resize_mode=resize_mode,
    )
    if not pretrained:
        raise MulkiError(no_weights(name))
    if pretrained == RANDOM:
        settings = stated.over(_assumed(name))
        return _finish(name, _build(name, settings), settings)
    if pretrained in open_clip_tags(name) or open_clip.get_pretrained_cfg(name, pretrained):
        return _with_tag(name, pretrained, stated)
    if not looks_like_a_path(pretrained):
        raise MissingData(unknown_tag(name, pretrained))
    return _with_file(name, weight_file(pretrained), stated)


def settings_of_tag(name: str, tag: str) -> TrainedWith:
    """What the weights of a tag were trained with, from open_clip's table."""
    entry = open_clip.get_pretrained_cfg(open_clip_tags(name).get(tag, name), tag)
    return TrainedWith(
        quickgelu=bool(entry.get("quick_gelu", False)),
        mean=tuple(entry["mean"]),
        std=tuple(entry["std"]),
        interpolation=entry["interpolation"],
        resize_mode=entry["resize_mode"],
    )


def _with_tag(name: str, tag: str, stated: TrainedWith) -> LoadedClip:
    known = settings_of_tag(name, tag)
    built = bool(open_clip_config(name).get("quick_gelu", False))
    if stated.quickgelu and built and not name.endswith("-quickgelu"):
        # the architecture has QuickGELU and the table does not mention it: assume a gap in the table
        known = evolve(known, quickgelu=True)
    _refuse_conflicts(stated, known, f"model {name}: the weights {tag!r}")
    notices = []
    if built != known.quickgelu:
        have = in_words("quickgelu", known.quickgelu)
        notices.append(f"model {name}: the weights {tag!r} were trained with {have}, and the model is built with it")
    listed = open_clip_tags(name).get(tag, name)
    return _finish(name, _build(listed, known, pretrained=tag), known, notices)


def _with_file(name: str, file: WeightFile, stated: TrainedWith) -> LoadedClip:
    refuse_another(file, name)
    _refuse_conflicts(stated, file.known, f"{file.path}: the weights")
    known = file.known.over(stated)
    settings = known.over(_assumed(name))
    notices = [file.note] if file.note else []
    if (unknown := known.missing()) and file.kind != "numpy":
        listed = ", ".join(in_words(key, getattr(settings, key)) for key in unknown)
        what = f"{file.path} does not say what its weights were trained with; assumed: {listed}"
        notices.append(f"{what} (model.{', model.'.join(unknown)} say otherwise)")
    elif settings.quickgelu != bool(open_clip_config(name).get("quick_gelu", False)):
        have = in_words("quickgelu", settings.quickgelu)
        notices.append(
            f"model {name}: the weights {file.path} were trained with {have}, and the model is built with it"
        )
    clip = _build(name, settings)
    if file.kind == "numpy":
        _load_big_vision(clip, file, name)
    else:
        load_state(clip, _converted(clip, read_state(file)), file.path, name)
    return _finish(name, clip, settings, notices)


def _refuse_conflicts(stated: TrainedWith, known: TrainedWith, what: str) -> None:
    for key in stated.conflicts(known):
        have, want = in_words(key, getattr(known, key)), in_words(key, getattr(stated, key))
        raise MulkiError(f"{what} were trained with {have}, and the recipe says {want}", f"leave out model.{key}")


def _assumed(name: str) -> TrainedWith:
    """Assumptions about weights without metadata: the name's activation, and whatever all tags of the name share."""
    tags = [settings_of_tag(name, tag) for tag in open_clip_tags(name)]
    usual = TrainedWith(mean=CLIP_MEAN, std=CLIP_STD, interpolation="bicubic", resize_mode="shortest")
    if tags and not any(tag.conflicts(evolve(tags[0], quickgelu=None)) for tag in tags):
        usual = tags[0]
    return evolve(usual, quickgelu=bool(open_clip_config(name).get("quick_gelu", False)))


def _build(name: str, settings: TrainedWith, pretrained: str | None = None) -> nn.Module:
    """The model with the activation in `settings`, whatever its name implies; with random weights without `pretrained`."""
    prepare = {key: getattr(settings, key) for key in ("mean", "std", "interpolation", "resize_mode")}
    other = {} if settings.quickgelu else {"quick_gelu": False}
    try:
        with quiet_open_clip():
            clip: nn.Module = open_clip.create_model(
                name, pretrained=pretrained, weights_only=True, pretrained_text=False, force_preprocess_cfg=prepare,
                force_quick_gelu=bool(settings.quickgelu), **other,
            )  # fmt: skip
    except MemoryError:
        raise
    except Exception as error:  # usually an unreachable hub, or a missing package of the text tower
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        what = f"model {name} cannot be built" + (f" with the weights {pretrained!r}" if pretrained else "")
        hint = (
            "without a network, give `model.pretrained` as the path of a file with these weights" if pretrained else ""
        )
        raise MissingData(f"{what}: {reason}", hint) from error
    quick = any(isinstance(module, QuickGELU) for module in clip.modules())
    gelu = any(isinstance(module, nn.GELU) for module in clip.modules())
    if (quick and not settings.quickgelu) or (settings.quickgelu and gelu and not quick):
        raise MulkiError(f"model {name} cannot be built with {in_words('quickgelu', settings.quickgelu)}")
    return clip


@contextlib.contextmanager
def quiet_open_clip() -> Iterator[None]:
    """Silence open_clip's warnings about the activation and about missing weights: both are handled here."""

    def silent(record: logging.LogRecord) -> bool:
        return record.levelno > logging.WARNING

    root = logging.getLogger()
    root.addFilter(silent)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        root.removeFilter(silent)


def _converted(clip: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of another layout under this model's names, converted by open_clip."""
    try:
        state = open_clip.factory.convert_state_dict(clip, state)
        if "positional_embedding" in state and not hasattr(clip, "positional_embedding"):
            state = open_clip.factory.convert_to_custom_text_state_dict(state)
    except (LookupError, AttributeError, RuntimeError, ValueError):
        pass  # the weights of another model: load_state reports it
    return state


def _load_big_vision(clip: nn.Module, file: WeightFile, name: str) -> None:
    """Load SigLIP's weights as Google publishes them; numpy reads them without pickles."""
    try:
        open_clip.factory.load_checkpoint(clip, str(file.path))
    except Exception as error:
        raise MissingData(f"{file.path}: the arrays are not weights of {name}") from error


def _finish(name: str, clip: nn.Module, settings: TrainedWith, notices: list[str] | None = None) -> LoadedClip:
    try:
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # an unreachable hub, or a missing package of the tokenizer
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise MissingData(f"model {name}: its tokenizer is not available: {reason}") from error
    visual: Any = clip.visual
    size = visual.preprocess_cfg["size"]
    return LoadedClip(
        clip=clip,
        tokenizer=tokenizer,
        image_size=size[0] if isinstance(size, (tuple, list)) else size,
        mean=settings.mean or CLIP_MEAN,
        std=settings.std or CLIP_STD,
        interpolation=settings.interpolation or "bicubic",
        resize_mode=settings.resize_mode or "shortest",
        notices=tuple(notices or ()),
    )
