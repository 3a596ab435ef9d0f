"""The layout of each data set on disk, as torchvision downloads and reads it: its annotations as labels, no image opened.

torchvision's own classes are not used to read: they stop at the first mistake without saying where it is, list SUN397 in the
file system's order, take half a minute to hash what they trust, and need torch. The tests hold each reader to the labels and
files of torchvision's class.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mulki_plugins.streams.entries import is_image
from mulki_plugins.streams.mtil.arrays import cifar100, mnist
from mulki_plugins.streams.mtil.contents import (
    Contents,
    Unreadable,
    below,
    files_of,
    json_of,
    lines_of,
    mat_of,
    some,
    unlabelled_folders,
)
from mulki_plugins.streams.mtil.declaration import Declaration
from mulki_plugins.streams.mtil.images import FileImages


def aircraft(folder: Path, declared: Declaration) -> Contents:
    """FGVCAircraft: `images_variant_train.txt` says `1025794 707-320` of images/1025794.jpg."""
    data = folder / "data"
    names = [line for _, line in lines_of(data / "variants.txt")]
    into = Contents(classes=names, parts={}, named_in=data / "variants.txt")
    number = {name: i for i, name in enumerate(names)}
    for part in ("train", "test"):
        path, files, labels, wrong = data / f"images_variant_{part}.txt", [], [], []
        for place, line in lines_of(path):
            image, _, variant = line.partition(" ")
            if variant in number:
                files.append(f"{image}.jpg")
                labels.append(number[variant])
            else:
                wrong.append(f"{place}: expected an image and one of the variants of variants.txt, got {line!r}")
        into.damage += some(wrong)
        into.parts[part] = files_of(data / "images", files, labels, path, into)
    return into


def caltech101(folder: Path, declared: Declaration) -> Contents:
    """Caltech101: a folder for each class and one for the background, which is no class."""
    return _class_folders(folder / "101_ObjectCategories", but="BACKGROUND_Google")


def eurosat(folder: Path, declared: Declaration) -> Contents:
    """EuroSAT: a folder for each class."""
    return _class_folders(folder / "2750")


def _class_folders(folder: Path, but: str = "") -> Contents:
    found = below(folder)
    classes = [name for name in found.folders if "/" not in name and name != but]
    number = {name: i for i, name in enumerate(classes)}
    files, labels = [], []
    for file in found.files:
        name, _, rest = file.partition("/")
        if rest and "/" not in rest and name in number and is_image(rest):
            files.append(file)
            labels.append(number[name])
    into = Contents(classes=classes, parts={"all": FileImages.of(folder, files, labels)}, named_in=folder)
    empty = sorted(set(classes) - {classes[i] for i in set(labels)})
    into.odd += [f"{folder / name}: a class folder without an image" for name in empty]
    return into


def dtd(folder: Path, declared: Declaration) -> Contents:
    """DTD: `labels/train1.txt` says `banded/banded_0002.jpg` of that image below images."""
    folder = folder / "dtd"
    said: dict[str, list[tuple[str, str]]] = {}
    wrong = []
    for part in ("train", "test"):
        said[part] = []
        for place, line in lines_of(folder / "labels" / f"{part}1.txt"):
            if re.fullmatch(r"[^/]+/[^/]+", line):
                said[part].append((line.partition("/")[0], line))
            else:
                wrong.append(f"{place}: expected class/image.jpg, got {line!r}")
    into = _by_name(said, folder / "images", folder / "labels", lambda part: folder / "labels" / f"{part}1.txt")
    into.damage += some(wrong)
    return into


def food101(folder: Path, declared: Declaration) -> Contents:
    """Food101: `meta/train.json` is a mapping from classes to lists of `apple_pie/1005649`, an image below images."""
    said: dict[str, list[tuple[str, str]]] = {}
    for part in ("train", "test"):
        path = folder / "meta" / f"{part}.json"
        value = json_of(path)
        fine = isinstance(value, dict) and all(
            isinstance(images, list) and all(isinstance(image, str) for image in images) for images in value.values()
        )
        if not fine:
            raise Unreadable(f"{path}: expected a mapping from classes to lists of images")
        said[part] = [(name, f"{image}.jpg") for name, images in value.items() for image in images]
    return _by_name(said, folder / "images", folder / "meta", lambda part: folder / "meta" / f"{part}.json")


def _by_name(
    said: Mapping[str, list[tuple[str, str]]], images: Path, named_in: Path, said_by: Callable[[str], Path]
) -> Contents:
    """Classes sorted by name, from the (class, file) of each part; images lie in a folder for each class."""
    classes = sorted({name for pairs in said.values() for name, _ in pairs})
    number = {name: i for i, name in enumerate(classes)}
    into = Contents(classes=classes, parts={}, named_in=named_in)
    for part, pairs in said.items():
        files, labels = [file for _, file in pairs], [number[name] for name, _ in pairs]
        into.parts[part] = files_of(images, files, labels, said_by(part), into)
        gone = sorted(set(classes) - {name for name, _ in pairs})
        into.odd += some([f"{said_by(part)}: it has no image of the class {name!r}" for name in gone])
    unlabelled_folders(images, classes, into)
    return into


def flowers102(folder: Path, declared: Declaration) -> Contents:
    """Flowers102: imagelabels.mat has the class of jpg/image_00001.jpg and so on, from 1; setid.mat the images of each part."""
    labels = _vector(folder / "imagelabels.mat", "labels")
    classes = list(declared.classes)
    into = Contents(classes=classes, parts={}, named_in=folder / "imagelabels.mat")
    if len(labels) and not (labels.min() >= 1 and labels.max() <= len(classes)):
        raise Unreadable(
            f"{folder / 'imagelabels.mat'}: expected classes from 1 to {len(classes)}, got {labels.min()} to {labels.max()}"
        )
    for part, variable in (("train", "trnid"), ("test", "tstid")):
        images = _vector(folder / "setid.mat", variable)
        if len(images) and not (images.min() >= 1 and images.max() <= len(labels)):
            raise Unreadable(
                f"{folder / 'setid.mat'}: {variable} names image {images.max()}, and imagelabels.mat knows 1 to {len(labels)}"
            )
        files = [f"image_{image:05d}.jpg" for image in images.tolist()]
        into.parts[part] = files_of(
            folder / "jpg", files, (labels[images - 1] - 1).tolist(), folder / "setid.mat", into
        )
    return into


def _vector(path: Path, variable: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    found = np.atleast_1d(np.asarray(mat_of(path).get(variable)))
    whole = found.ndim == 1 and found.dtype.kind in "iuf" and bool((np.abs(found) < 2**53).all())
    if not whole or (found != np.floor(found)).any():
        raise Unreadable(f"{path}: expected a vector of whole numbers named {variable!r}")
    return found.astype(np.int64)


def oxford_pet(folder: Path, declared: Declaration) -> Contents:
    """OxfordIIITPet: `annotations/trainval.txt` says `Abyssinian_100 1 1 1`: image, class from 1, species, breed."""
    said: dict[str, list[tuple[str, int]]] = {}
    breeds: dict[int, str] = {}
    wrong = []
    for part, name in (("train", "trainval"), ("test", "test")):
        said[part] = []
        for place, line in lines_of(folder / "annotations" / f"{name}.txt"):
            if line.startswith("#"):
                continue
            match = re.fullmatch(r"(\S+)_(\S+)\s+([1-9]\d{0,3})\s+\d+\s+\d+", line)
            if not match:
                wrong.append(f"{place}: expected an image, its class from 1, species and breed, got {line!r}")
            elif breeds.setdefault(int(match[3]), match[1]) != match[1]:
                wrong.append(f"{place}: the class {match[3]} is {breeds[int(match[3])]!r} elsewhere, got {match[1]!r}")
            else:
                said[part].append((f"{match[1]}_{match[2]}.jpg", int(match[3]) - 1))
    published = list(declared.classes)
    classes = [
        breeds.get(i + 1) or (published[i] if i < len(published) else f"class {i + 1}")
        for i in range(max(breeds, default=0))
    ]
    into = Contents(classes=classes, parts={}, named_in=folder / "annotations", damage=some(wrong))
    for part, name in (("train", "trainval"), ("test", "test")):
        files, labels = [file for file, _ in said[part]], [label for _, label in said[part]]
        into.parts[part] = files_of(folder / "images", files, labels, folder / "annotations" / f"{name}.txt", into)
    return into


def stanford_cars(folder: Path, declared: Declaration) -> Contents:
    """StanfordCars: the devkit's MATLAB files have the names of the classes, and of each image its file and class from 1."""
    meta = folder / "devkit" / "cars_meta.mat"
    names = mat_of(meta).get("class_names")
    if names is None:
        raise Unreadable(f"{meta}: expected a vector of texts named 'class_names'")
    classes = [str(name) for name in np.atleast_1d(names).tolist()]
    into = Contents(classes=classes, parts={}, named_in=meta)
    where = {
        "train": (folder / "devkit" / "cars_train_annos.mat", folder / "cars_train"),
        "test": (folder / "cars_test_annos_withlabels.mat", folder / "cars_test"),
    }
    for part, (path, images) in where.items():
        try:
            annotations = np.atleast_1d(mat_of(path)["annotations"])
            files = [str(name) for name in np.atleast_1d(annotations["fname"]).tolist()]
            numbers = np.atleast_1d(annotations["class"]).tolist()
            labels = [int(number) - 1 for number in numbers]
            if any(label + 1 != number for label, number in zip(labels, numbers, strict=True)):
                raise ValueError("no whole number")
        except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
            raise Unreadable(f"{path}: expected 'annotations' with the fields 'fname' and 'class'") from error
        if labels and not 0 <= min(labels) <= max(labels) < len(classes):
            raise Unreadable(
                f"{path}: expected classes from 1 to {len(classes)}, got {min(labels) + 1} to {max(labels) + 1}"
            )
        into.parts[part] = files_of(images, files, labels, path, into)
    return into


def sun397(folder: Path, declared: Declaration) -> Contents:
    """SUN397: ClassName.txt says `/a/apse/indoor` of the images sun_*.jpg in that folder.

    Sorted by path; torchvision takes them as the file system gives them, so that the published random split of this one data
    set cannot be repeated.
    """
    path = folder / "ClassName.txt"
    classes, wrong = [], []
    for place, line in lines_of(path):
        if re.fullmatch(r"/[^/]/.*[^/]", line):
            classes.append(line[3:])
        else:
            wrong.append(f"{place}: expected a class as /a/abbey, got {line!r}")
    into = Contents(classes=classes, parts={}, named_in=path, damage=some(wrong))
    number = {name: i for i, name in enumerate(classes)}
    files, labels = [], []
    strange: dict[str, str] = {}
    for file in below(folder).files:
        above, _, image = file.rpartition("/")
        if not (image.startswith("sun_") and image.endswith(".jpg")):
            continue
        name = above.partition("/")[2]
        if name in number:
            files.append(file)
            labels.append(number[name])
        else:
            strange.setdefault(above, file)
    into.damage += some([f"{folder / above}: a class folder that ClassName.txt does not name" for above in strange])
    empty = sorted(set(classes) - {classes[i] for i in set(labels)})
    into.odd += some(
        [f"{folder / name[:1] / name}: no image of the class {name!r}, which ClassName.txt names" for name in empty]
    )
    into.parts["all"] = FileImages.of(folder, files, labels)
    return into


READERS: dict[str, Callable[[Path, Declaration], Contents]] = {
    "Aircraft": aircraft,
    "Caltech101": caltech101,
    "CIFAR100": cifar100,
    "DTD": dtd,
    "EuroSAT": eurosat,
    "Flowers": flowers102,
    "Food": food101,
    "MNIST": mnist,
    "OxfordPet": oxford_pet,
    "StanfordCars": stanford_cars,
    "SUN397": sun397,
}
"""By the names of the stream's tasks. Each raises Unreadable or MissingData where it cannot go on."""
