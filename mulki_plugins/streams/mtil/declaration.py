"""The published data sets, as known without reading the disk: folders, sizes, class names and templates.

Imports neither torch nor numpy.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml
from attrs import frozen

from mulki_plugins.errors import MulkiError, OptionError

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
    """One data set, from its file in the folder `declared`."""

    name: str
    title: str
    torchvision: str
    """The class of torchvision that reads the same layout and downloads it."""
    folder: str
    """Relative to the root."""
    needs: tuple[str, ...]
    """Files and folders that it must hold."""
    split: Literal["official", "random"]
    images: Mapping[str, tuple[int, int]]
    """Numbers of training and test images for each of the two splits."""
    templates: tuple[str, ...]
    classes: Mapping[str, str]
    """From the data set's own class names to those of prompts, in the published order."""
    split_file: str = ""
    """CoOp's file; empty if CoOp's split follows from the official one."""
    split_images: str = ""
    """The folder to which the paths in the split file are relative."""
    classes_coop: int = 0
    gigabytes: float
    page: str
    get: str = ""
    """Why it cannot be downloaded and what to do instead; empty if it can."""

    def expected(self, split: Split) -> dict[str, int]:
        """Published numbers of classes, training images and test images."""
        train, test = self.images[split]
        classes = (self.classes_coop if split == "coop" else 0) or len(self.classes)
        return {"classes": classes, "train": train, "test": test}

    def how_to_get(self, root: Path) -> str:
        """Advice if it is missing."""
        holds = f"so that {root / self.folder} holds {', '.join(self.needs)}"
        if self.get:
            return f"{self.get}; {holds}"
        size = f"about {self.gigabytes:g} GB, and as much again unpacked"
        return f"`mulki data fetch RECIPE` downloads it ({size}), or by hand from {self.page}, {holds}"


@functools.cache
def declaration(name: str) -> Declaration:
    """The data set of that name, one of ORDERS."""
    text = (files("mulki_plugins.streams.mtil") / "declared" / f"{name}.yaml").read_text("utf-8")
    entry: dict[str, Any] = yaml.safe_load(text)
    classes = entry.pop("classes")
    if isinstance(classes, list):
        classes = {key: prompt_name(key) for key in classes}
    entry["images"] = {split: tuple(sizes) for split, sizes in entry["images"].items()}
    for key in ("needs", "templates"):
        entry[key] = tuple(entry[key])
    return Declaration(name=name, classes=classes, **entry)


def prompt_name(key: str) -> str:
    """A data set's own class name as it reads in a sentence."""
    return key.replace("_", " ")


def root_folder(path: str) -> Path:
    """The folder of the data sets, with `~` expanded. MulkiError if it names the home of an unknown user."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise MulkiError(f"{path}: this machine has no user of that name") from error


def check_options(options: Mapping[str, Any]) -> list[OptionError]:
    """Mistakes in the option `root` itself, whatever the folder holds."""
    try:
        root_folder(str(options.get("root", "")))
    except MulkiError as error:
        return [OptionError(error.message, ("root",))]
    return []
