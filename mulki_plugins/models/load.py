"""Models by name: MulKI's own, and every architecture of open_clip, with weights from a tag or a file."""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import open_clip
from attrs import evolve, frozen
from open_clip.transformer import QuickGELU
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode

from mulki_plugins.errors import MissingData, MulkiError, did_you_mean
from mulki_plugins.models.check import RANDOM, no_weights, options_as_known, refuse_another, unknown_tag
from mulki_plugins.models.state import load_state, read_state
from mulki_plugins.models.trained_with import (
    CLIP_MEAN,
    CLIP_STD,
    Interpolation,
    Numbers,
    ResizeMode,
    TrainedWith,
    words,
)
from mulki_plugins.models.weight_files import WeightFile, looks_like_a_path, weight_file
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.registry.guard import called
from mulki_plugins.registry.open_clip_names import open_clip_config, open_clip_models, open_clip_tags


@frozen(kw_only=True, eq=False)
class LoadedClip:
    """A model with what belongs to it: its tokenizer, and how its images are prepared."""

    clip: nn.Module
    tokenizer: Callable[[list[str]], Tensor]
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    notices: tuple[str, ...] = ()
    """What the user should know of the weights, such as what was assumed of them."""

    def trained_with(self, architecture: str) -> TrainedWith:
        """What these weights go with, to be kept beside them; `architecture` is the name that a recipe gives them."""
        return TrainedWith(
            architecture=architecture,
            quickgelu=any(isinstance(module, QuickGELU) for module in self.clip.modules()),
            mean=self.mean,
            std=self.std,
            interpolation=self.interpolation,  # type: ignore[arg-type]
            resize_mode=self.resize_mode,  # type: ignore[arg-type]
        )

    def transform(self, train: bool) -> Callable[[Any], Tensor]:
        """PIL image -> [3, H, W]: open_clip's own, which is the MTIL protocol's.

        Training crops 90 to 100 % of the area at random; evaluation resizes as the model was pre-trained, which for CLIP
        is bicubic, the shorter side first, then the centre.
        """
        result: Callable[[Any], Tensor] = open_clip.image_transform(
            self.image_size,
            is_train=train,
            mean=self.mean,
            std=self.std,
            interpolation=self.interpolation,
            resize_mode=self.resize_mode,
        )
        if train and self.interpolation == "bilinear":  # which open_clip heeds in evaluation only
            result.transforms[0].interpolation = InterpolationMode.BILINEAR  # type: ignore[attr-defined]
        return result


def load_clip(name: str, **options: Any) -> LoadedClip:
    """The model of that name, registered or of open_clip: `load_clip("ViT-B-16-quickgelu", pretrained="openai")`.

    MulkiError where there is none, MissingData where its weights are not to be had.
    """
    part = catalog().parts.get(("model", name))
    if part is not None:
        make = part.load()
        what = f"the model {name!r} of {part.provenance}"
        options = copy.deepcopy(options)
        loaded = make(**options) if part.is_ours else called(f"{what} cannot be made", make, **options)
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
    """An architecture of open_clip; `pretrained` is one of its tags, a file of weights, a run's folder, or `random`.

    The model is built with the activation, and its images are prepared with the mean, deviation, interpolation and
    resizing, that the weights were trained with: as their tag or their file says. The other options say so for a file that
    does not. MulkiError where they contradict it.
    """
    stated = options_as_known(
        {"quickgelu": quickgelu, "mean": mean, "std": std, "interpolation": interpolation, "resize_mode": resize_mode}
    )
    if not pretrained:
        raise MulkiError(no_weights(name))
    if pretrained == RANDOM:
        settings = stated.over(_assumed(name))
        return _loaded(name, _built(name, settings), settings)
    if pretrained in open_clip_tags(name) or open_clip.get_pretrained_cfg(name, pretrained):
        return _with_tag(name, pretrained, stated)
    if not looks_like_a_path(pretrained):
        raise MissingData(unknown_tag(name, pretrained))
    return _with_file(name, weight_file(pretrained), stated)


def settings_of_tag(name: str, tag: str) -> TrainedWith:
    """What the weights of a tag were trained with, as open_clip's table says."""
    said = open_clip.get_pretrained_cfg(open_clip_tags(name).get(tag, name), tag)
    return TrainedWith(
        quickgelu=bool(said.get("quick_gelu", False)),
        mean=tuple(said["mean"]),
        std=tuple(said["std"]),
        interpolation=said["interpolation"],
        resize_mode=said["resize_mode"],
    )


def _with_tag(name: str, tag: str, stated: TrainedWith) -> LoadedClip:
    known = settings_of_tag(name, tag)
    built = bool(open_clip_config(name).get("quick_gelu", False))
    if stated.quickgelu and built and not name.endswith("-quickgelu"):
        # the architecture says QuickGELU and the table says nothing, which may be a gap in the table
        known = evolve(known, quickgelu=True)
    _refuse_conflicts(stated, known, f"model {name}: the weights {tag!r}")
    notices = []
    if built != known.quickgelu:
        have = words("quickgelu", known.quickgelu)
        notices.append(f"model {name}: the weights {tag!r} were trained with {have}, and the model is built with it")
    listed = open_clip_tags(name).get(tag, name)
    return _loaded(name, _built(listed, known, pretrained=tag), known, notices)


def _with_file(name: str, file: WeightFile, stated: TrainedWith) -> LoadedClip:
    refuse_another(file, name)
    _refuse_conflicts(stated, file.known, f"{file.path}: the weights")
    known = file.known.over(stated)
    settings = known.over(_assumed(name))
    notices = [file.note] if file.note else []
    if (unknown := known.missing()) and file.kind != "numpy":
        listed = ", ".join(words(key, getattr(settings, key)) for key in unknown)
        what = f"{file.path} does not say what its weights were trained with; assumed: {listed}"
        notices.append(f"{what} (model.{', model.'.join(unknown)} say otherwise)")
    elif settings.quickgelu != bool(open_clip_config(name).get("quick_gelu", False)):
        have = words("quickgelu", settings.quickgelu)
        notices.append(
            f"model {name}: the weights {file.path} were trained with {have}, and the model is built with it"
        )
    clip = _built(name, settings)
    if file.kind == "numpy":
        _load_big_vision(clip, file, name)
    else:
        load_state(clip, _in_names_of(clip, read_state(file)), file.path, name)
    return _loaded(name, clip, settings, notices)


def _refuse_conflicts(stated: TrainedWith, known: TrainedWith, what: str) -> None:
    for key in stated.conflicts(known):
        have, want = words(key, getattr(known, key)), words(key, getattr(stated, key))
        raise MulkiError(f"{what} were trained with {have}, and the recipe says {want}", f"leave out model.{key}")


def _assumed(name: str) -> TrainedWith:
    """What is taken for weights that say nothing: the activation of the name, and what all tags of the name agree in."""
    tags = [settings_of_tag(name, tag) for tag in open_clip_tags(name)]
    usual = TrainedWith(mean=CLIP_MEAN, std=CLIP_STD, interpolation="bicubic", resize_mode="shortest")
    if tags and not any(tag.conflicts(evolve(tags[0], quickgelu=None)) for tag in tags):
        usual = tags[0]
    return evolve(usual, quickgelu=bool(open_clip_config(name).get("quick_gelu", False)))


def _built(name: str, settings: TrainedWith, pretrained: str | None = None) -> nn.Module:
    """The model with that activation, whatever its name says; with random weights where none are named."""
    prepare = {key: getattr(settings, key) for key in ("mean", "std", "interpolation", "resize_mode")}
    other = {} if settings.quickgelu else {"quick_gelu": False}
    try:
        with _without_advice():
            clip: nn.Module = open_clip.create_model(
                name, pretrained=pretrained, weights_only=True, pretrained_text=False, force_preprocess_cfg=prepare,
                force_quick_gelu=bool(settings.quickgelu), **other,
            )  # fmt: skip
    except MemoryError:
        raise
    except Exception as error:  # a hub out of reach, most of the time, or a package that the text tower needs
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        what = f"model {name} cannot be built" + (f" with the weights {pretrained!r}" if pretrained else "")
        hint = (
            "without a network, give `model.pretrained` as the path of a file with these weights" if pretrained else ""
        )
        raise MissingData(f"{what}: {reason}", hint) from error
    quick = any(isinstance(module, QuickGELU) for module in clip.modules())
    plain = any(isinstance(module, nn.GELU) for module in clip.modules())
    if (quick and not settings.quickgelu) or (settings.quickgelu and plain and not quick):
        raise MulkiError(f"model {name} cannot be built with {words('quickgelu', settings.quickgelu)}")
    return clip


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """Without open_clip's warnings of what is seen to here: the activation, and weights that follow later."""

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


def _in_names_of(clip: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of an older or another layout in the names of this model, as open_clip converts them."""
    try:
        state = open_clip.factory.convert_state_dict(clip, state)
        if "positional_embedding" in state and not hasattr(clip, "positional_embedding"):
            state = open_clip.factory.convert_to_custom_text_state_dict(state)
    except (
        LookupError,
        AttributeError,
        RuntimeError,
        ValueError,
    ):  # the weights of another model, as load_state will say
        pass
    return state


def _load_big_vision(clip: nn.Module, file: WeightFile, name: str) -> None:
    """SigLIP's weights as Google publishes them; numpy reads them without pickles."""
    try:
        open_clip.factory.load_checkpoint(clip, str(file.path))
    except Exception as error:
        raise MissingData(f"{file.path}: the arrays are no weights of {name}") from error


def _loaded(name: str, clip: nn.Module, settings: TrainedWith, notices: list[str] | None = None) -> LoadedClip:
    try:
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # a hub out of reach, or a package that the tokenizer needs
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise MissingData(f"model {name}: its tokenizer cannot be had: {reason}") from error
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
