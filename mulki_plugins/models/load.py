"""Models by name: MulKI's own, and every architecture of open_clip, with weights from a tag or a file."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import open_clip
from attrs import frozen
from torch import Tensor, nn

from mulki_plugins.errors import MissingData, MulkiError, did_you_mean
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.registry.guard import called
from mulki_plugins.registry.open_clip_names import open_clip_models


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
        return result


def load_clip(name: str, **options: Any) -> LoadedClip:
    """The model of that name, registered or of open_clip: `load_clip("ViT-B-16", pretrained="openai")`.

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


def open_clip_model(name: str, *, pretrained: str | None = None) -> LoadedClip:
    """An architecture of open_clip; `pretrained` is one of its tags, a file of weights, or null for random weights."""
    if pretrained is not None and not os.path.isfile(pretrained):
        tags = open_clip.list_pretrained_tags_by_model(name)
        if pretrained not in tags:
            raise MissingData(
                f"model {name}: no such file and no such tag of open_clip: {pretrained!r} ({did_you_mean(pretrained, tags)})"
            )
    try:
        clip = open_clip.create_model(name, pretrained=pretrained, weights_only=True)
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # a hub out of reach, a package that the text tower needs, a file of another shape
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        hint = "give `model.pretrained` as the path of a file with the weights" if pretrained else ""
        raise MissingData(f"model {name} cannot be made with pretrained={pretrained!r}: {reason}", hint) from error
    prepare = clip.visual.preprocess_cfg
    size = prepare["size"]
    return LoadedClip(
        clip=clip,
        tokenizer=tokenizer,
        image_size=size[0] if isinstance(size, (tuple, list)) else size,
        mean=tuple(prepare["mean"]),
        std=tuple(prepare["std"]),
        interpolation=prepare.get("interpolation", "bicubic"),
        resize_mode=prepare.get("resize_mode", "shortest"),
    )
