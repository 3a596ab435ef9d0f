"""What is known of each data set before a look at the disk: its folder, its sizes, its class names and templates."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml
from attrs import frozen

Split = Literal["zscl", "coop"]

ORDERS = {
    "I": (
        "Aircraft", "Caltech101", "CIFAR100", "DTD", "EuroSAT", "Flowers", "Food", "MNIST", "OxfordPet", "StanfordCars",
        "SUN397",
    ),
    "II": (
        "StanfordCars", "Food", "MNIST", "OxfordPet", "Flowers", "SUN397", "Aircraft", "Caltech101", "DTD", "EuroSAT",
        "CIFAR100",
    ),
}  # fmt: skip
"""Orders I and II of the published MTIL (arXiv 2303.06628)."""


@frozen(kw_only=True)
class Declaration:
    """One data set, as its file in the folder `declared` says."""

    name: str
    title: str
    torchvision: str
    """The class of torchvision that reads the same layout, and by which it is downloaded."""
    folder: str
    """Below the root."""
    needs: tuple[str, ...]
    """What must be there, in that folder."""
    split: Literal["official", "random"]
    images: Mapping[str, tuple[int, int]]
    """Training and test images, for each of the two splits."""
    templates: tuple[str, ...]
    classes: Mapping[str, str]
    """What the data set itself calls a class: what a prompt calls it; in the published order."""
    split_file: str = ""
    """CoOp's file; none where CoOp's split follows from the official one."""
    split_images: str = ""
    classes_coop: int = 0
    gigabytes: float
    page: str
    get: str = ""
    """Why it cannot be downloaded, and what to do instead; empty where it can."""

    def expected(self, split: Split) -> dict[str, int]:
        """Published numbers: classes, training images, test images."""
        train, test = self.images[split]
        classes = (self.classes_coop if split == "coop" else 0) or len(self.classes)
        return {"classes": classes, "train": train, "test": test}

    def how_to_get(self, root: Path) -> str:
        """What to do where it is missing."""
        holds = f"so that {root / self.folder} holds {', '.join(self.needs)}"
        if self.get:
            return f"{self.get}; {holds}"
        size = f"about {self.gigabytes:g} GB, and as much again unpacked"
        return f"`mulki data fetch RECIPE` downloads it ({size}), or by hand from {self.page}, {holds}"


@functools.cache
def declaration(name: str) -> Declaration:
    """The data set of that name, one of ORDERS."""
    text = (files("mulki_plugins.streams.mtil") / "declared" / f"{name}.yaml").read_text("utf-8")
    said: dict[str, Any] = yaml.safe_load(text)
    classes = said.pop("classes")
    if isinstance(classes, list):
        classes = {key: readable(key) for key in classes}
    said["images"] = {split: tuple(sizes) for split, sizes in said["images"].items()}
    for key in ("needs", "templates"):
        said[key] = tuple(said[key])
    return Declaration(name=name, classes=classes, **said)


def readable(key: str) -> str:
    """A class's own name as it stands in a sentence."""
    return key.replace("_", " ")
