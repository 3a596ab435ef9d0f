"""The layout of each data set on disk, as torchvision downloads it: annotations become labels, no image is opened.

torchvision's own classes are not used to read: they stop at the first mistake without its place, list SUN397 in the file
system's order, spend half a minute on checksums, and need torch. The tests compare each reader with torchvision's class.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from mulki_plugins.streams.entries import is_image
from mulki_plugins.streams.images import FileImages
from mulki_plugins.streams.mtil.contents import (
    Contents,
    PixelImages,
    Unreadable,
    check_labels,
    list_below,
    read_idx,
    read_json,
    read_lines,
    read_mat,
    read_mat_vector,
    read_pickle,
    shorten,
)
from mulki_plugins.streams.mtil.declaration import Declaration


def aircraft(folder: Path, declared: Declaration) -> Contents:
    """FGVCAircraft: a line `1025794 707-320` of `images_variant_train.txt` labels images/1025794.jpg."""
    data = folder / "data"
    names = [line for _, line in read_lines(data / "variants.txt")]
    contents = Contents(classes=names, parts={}, named_in=data / "variants.txt")
    number = {name: i for i, name in enumerate(names)}
    for part in ("train", "test"):
        path, files, labels, mistakes = data / f"images_variant_{part}.txt", [], [], []
        for place, line in read_lines(path):
            image, _, variant = line.partition(" ")
            if variant in number:
                files.append(f"{image}.jpg")
                labels.append(number[variant])
            else:
                mistakes.append(f"{place}: expected an image and one of the variants of variants.txt, got {line!r}")
        contents.damage += shorten(mistakes)
        contents.add_files(part, data / "images", files, labels, path)
    return contents


def caltech101(folder: Path, declared: Declaration) -> Contents:
    """Caltech101: one folder per class, and one of backgrounds, which is not a class."""
    return _class_folders(folder / "101_ObjectCategories", but="BACKGROUND_Google")


def eurosat(folder: Path, declared: Declaration) -> Contents:
    """EuroSAT: one folder per class."""
    return _class_folders(folder / "2750")


def _class_folders(folder: Path, but: str = "") -> Contents:
    paths, folders = list_below(folder)
    classes = [name for name in folders if "/" not in name and name != but]
    number = {name: i for i, name in enumerate(classes)}
    files, labels = [], []
    for path in paths:
        name, _, rest = path.partition("/")
        if rest and "/" not in rest and name in number and is_image(rest):
            files.append(path)
            labels.append(number[name])
    contents = Contents(classes=classes, parts={"all": FileImages.of(folder, files, labels)}, named_in=folder)
    empty = sorted(set(classes) - {classes[i] for i in set(labels)})
    contents.odd += [f"{folder / name}: a class folder without an image" for name in empty]
    return contents


def cifar100(folder: Path, declared: Declaration) -> Contents:
    """CIFAR100: the pickles `train` and `test` hold `data`, uint8 [N, 3072], and `fine_labels`; `meta` names the classes."""
    names = read_pickle(folder / "meta").get("fine_label_names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise Unreadable(f"{folder / 'meta'}: expected a list of texts named 'fine_label_names'")
    contents = Contents(classes=names, parts={}, named_in=folder / "meta")
    for part in ("train", "test"):
        path = folder / part
        entry = read_pickle(path)
        data, labels = entry.get("data"), entry.get("fine_labels")
        if not (isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.ndim == 2 and data.shape[1] == 3072):
            raise Unreadable(f"{path}: expected bytes [N, 3072] named 'data'")
        if not (isinstance(labels, list) and len(labels) == len(data) and all(type(n) is int for n in labels)):
            raise Unreadable(f"{path}: expected a list of {len(data):,} whole numbers named 'fine_labels'")
        pixels = data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        contents.parts[part] = PixelImages(pixels, check_labels(path, np.asarray(labels, dtype=object), len(names)))
    return contents


def dtd(folder: Path, declared: Declaration) -> Contents:
    """DTD: each line of `labels/train1.txt` is the path of an image below images, such as `banded/banded_0002.jpg`."""
    folder = folder / "dtd"
    images: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
    mistakes = []
    for part, pairs in images.items():
        for place, line in read_lines(folder / "labels" / f"{part}1.txt"):
            if re.fullmatch(r"[^/]+/[^/]+", line):
                pairs.append((line.partition("/")[0], line))
            else:
                mistakes.append(f"{place}: expected class/image.jpg, got {line!r}")
    contents = _by_class_name(images, folder / "images", folder / "labels", "{}1.txt")
    contents.damage += shorten(mistakes)
    return contents


def food101(folder: Path, declared: Declaration) -> Contents:
    """Food101: `meta/train.json` maps each class to its images below images, such as `apple_pie/1005649`."""
    images: dict[str, list[tuple[str, str]]] = {}
    for part in ("train", "test"):
        path = folder / "meta" / f"{part}.json"
        value = read_json(path)
        valid = isinstance(value, dict) and all(
            isinstance(files, list) and all(isinstance(file, str) for file in files) for files in value.values()
        )
        if not valid:
            raise Unreadable(f"{path}: expected a mapping from classes to lists of images")
        images[part] = [(name, f"{file}.jpg") for name, files in value.items() for file in files]
    return _by_class_name(images, folder / "images", folder / "meta", "{}.json")


def _by_class_name(
    images: Mapping[str, list[tuple[str, str]]], folder: Path, annotations: Path, annotation: str
) -> Contents:
    """From the (class, file) pairs of each part; classes are sorted by name, and have one folder each in `folder`."""
    classes = sorted({name for pairs in images.values() for name, _ in pairs})
    number = {name: i for i, name in enumerate(classes)}
    contents = Contents(classes=classes, parts={}, named_in=annotations)
    for part, pairs in images.items():
        path = annotations / annotation.format(part)
        contents.add_files(part, folder, [file for _, file in pairs], [number[name] for name, _ in pairs], path)
        absent = sorted(set(classes) - {name for name, _ in pairs})
        contents.odd += shorten([f"{path}: it has no image of the class {name!r}" for name in absent])
    contents.note_unknown_folders(folder, classes)
    return contents


def flowers102(folder: Path, declared: Declaration) -> Contents:
    """Flowers102: imagelabels.mat has the classes, from 1, of jpg/image_00001.jpg and so on; setid.mat has each part's images."""
    path, parts = folder / "imagelabels.mat", folder / "setid.mat"
    classes = list(declared.classes)
    labels = check_labels(path, read_mat_vector(path, "labels"), len(classes), first=1)
    contents = Contents(classes=classes, parts={}, named_in=path)
    for part, variable in (("train", "trnid"), ("test", "tstid")):
        images = read_mat_vector(parts, variable)
        if len(images) and not 1 <= images.min() <= images.max() <= len(labels):
            known = f"imagelabels.mat knows 1 to {len(labels)}"
            raise Unreadable(f"{parts}: {variable} names images {images.min()} to {images.max()}, and {known}")
        files = [f"image_{image:05d}.jpg" for image in images.tolist()]
        contents.add_files(part, folder / "jpg", files, labels[images - 1].tolist(), parts)
    return contents


def mnist(folder: Path, declared: Declaration) -> Contents:
    """MNIST: idx files in `raw`."""
    classes = list(declared.classes)
    contents = Contents(classes=classes, parts={}, named_in=folder / "raw")
    for part, name in (("train", "train"), ("test", "t10k")):
        pixels = read_idx(folder / "raw" / f"{name}-images-idx3-ubyte", 3)
        path = folder / "raw" / f"{name}-labels-idx1-ubyte"
        labels = read_idx(path, 1)
        if len(pixels) != len(labels):
            raise Unreadable(f"{path}: expected a label for each of {len(pixels):,} images, got {len(labels):,}")
        contents.parts[part] = PixelImages(pixels, check_labels(path, labels, len(classes)))
    return contents


def oxford_pet(folder: Path, declared: Declaration) -> Contents:
    """OxfordIIITPet: a line `Abyssinian_100 1 1 1` of `annotations/trainval.txt` has image, class from 1, species, breed."""
    images: dict[str, list[tuple[str, int]]] = {"trainval": [], "test": []}
    breeds: dict[int, str] = {}
    mistakes = []
    for file, pairs in images.items():
        for place, line in read_lines(folder / "annotations" / f"{file}.txt"):
            if line.startswith("#"):
                continue
            match = re.fullmatch(r"(\S+)_(\S+)\s+([1-9]\d{0,3})\s+\d+\s+\d+", line)
            if not match:
                mistakes.append(f"{place}: expected an image, its class from 1, species and breed, got {line!r}")
                continue
            breed, class_number = match[1], int(match[3])
            if (known := breeds.setdefault(class_number, breed)) != breed:
                mistakes.append(f"{place}: the class {class_number} is {known!r} elsewhere, got {breed!r}")
            else:
                pairs.append((f"{breed}_{match[2]}.jpg", class_number - 1))
    published = dict(enumerate(declared.classes, 1))
    numbers = range(1, max(breeds, default=0) + 1)
    classes = [breeds.get(i) or published.get(i) or f"class {i}" for i in numbers]
    contents = Contents(classes=classes, parts={}, named_in=folder / "annotations", damage=shorten(mistakes))
    for part, file in (("train", "trainval"), ("test", "test")):
        path = folder / "annotations" / f"{file}.txt"
        names, labels = [name for name, _ in images[file]], [label for _, label in images[file]]
        contents.add_files(part, folder / "images", names, labels, path)
    return contents


def stanford_cars(folder: Path, declared: Declaration) -> Contents:
    """StanfordCars: the devkit's MATLAB files hold the class names, and each image's file and class from 1."""
    meta = folder / "devkit" / "cars_meta.mat"
    names = read_mat(meta).get("class_names")
    if names is None:
        raise Unreadable(f"{meta}: expected a vector of texts named 'class_names'")
    classes = [str(name) for name in np.atleast_1d(names).tolist()]
    contents = Contents(classes=classes, parts={}, named_in=meta)
    parts = {
        "train": (folder / "devkit" / "cars_train_annos.mat", folder / "cars_train"),
        "test": (folder / "cars_test_annos_withlabels.mat", folder / "cars_test"),
    }
    for part, (path, images) in parts.items():
        try:
            annotations = np.atleast_1d(read_mat(path)["annotations"])
            files = [str(name) for name in np.atleast_1d(annotations["fname"]).tolist()]
            numbers = np.atleast_1d(annotations["class"]).tolist()
            labels = np.array([int(number) for number in numbers], dtype=object)
            if any(label != number for label, number in zip(labels, numbers, strict=True)):
                raise ValueError("not a whole number")
        except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
            raise Unreadable(f"{path}: expected 'annotations' with the fields 'fname' and 'class'") from error
        contents.add_files(part, images, files, check_labels(path, labels, len(classes), first=1).tolist(), path)
    return contents


def sun397(folder: Path, declared: Declaration) -> Contents:
    """SUN397: a line `/a/apse/indoor` of ClassName.txt is a class, with images sun_*.jpg in that folder.

    Images are sorted by path. torchvision takes them in the file system's order, so the published random split of this data
    set cannot be repeated.
    """
    path = folder / "ClassName.txt"
    classes, mistakes = [], []
    for place, line in read_lines(path):
        if re.fullmatch(r"/[^/]/.*[^/]", line):
            classes.append(line[3:])
        else:
            mistakes.append(f"{place}: expected a class as /a/abbey, got {line!r}")
    contents = Contents(classes=classes, parts={}, named_in=path, damage=shorten(mistakes))
    number = {name: i for i, name in enumerate(classes)}
    files, labels = [], []
    unknown: dict[str, None] = {}
    for file in list_below(folder)[0]:
        above, _, image = file.rpartition("/")
        if not (image.startswith("sun_") and image.endswith(".jpg")):
            continue
        name = above.partition("/")[2]
        if name in number:
            files.append(file)
            labels.append(number[name])
        else:
            unknown[above] = None
    contents.damage += shorten(
        [f"{folder / above}: a class folder that ClassName.txt does not name" for above in unknown]
    )
    empty = sorted(set(classes) - {classes[i] for i in set(labels)})
    contents.odd += shorten(
        [f"{folder / name[:1] / name}: no image of the class {name!r}, which ClassName.txt names" for name in empty]
    )
    contents.parts["all"] = FileImages.of(folder, files, labels)
    return contents


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
"""By the names of the stream's tasks. Each raises Unreadable or MissingData if it cannot go on."""
