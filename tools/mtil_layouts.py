"""Writes the eleven data sets' layouts on disk, in miniature or as large as the originals, for tests and measurements.

Same files, annotation formats and folders as the originals; what stands in the images is the caller's.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from scipy.io import savemat

Write = Callable[[Path, int], None]
"""Writes one image file, given its path and its class."""
Labels = Sequence[int]


def _lines(path: Path, lines: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def _image(path: Path, label: int, write: Write) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, label)


def aircraft(root: Path, classes: Sequence[str], train: Labels, test: Labels, write: Write) -> None:
    data = root / "fgvc-aircraft-2013b" / "data"
    _lines(data / "variants.txt", classes)
    number = 1000000
    for part, labels in (("train", train), ("test", test)):
        lines = []
        for label in labels:
            number += 7
            _image(data / "images" / f"{number}.jpg", label, write)
            lines.append(f"{number} {classes[label]}")
        _lines(data / f"images_variant_{part}.txt", lines)


def caltech101(root: Path, classes: Sequence[str], labels: Labels, write: Write) -> None:
    folder = root / "caltech101" / "101_ObjectCategories"
    _image(folder / "BACKGROUND_Google" / "image_0001.jpg", 0, write)
    _numbered(folder, classes, labels, "image_{:04d}.jpg", write)


def eurosat(root: Path, classes: Sequence[str], labels: Labels, write: Write) -> None:
    _numbered(root / "eurosat" / "2750", classes, labels, "{name}_{}.jpg", write)


def _numbered(folder: Path, classes: Sequence[str], labels: Labels, pattern: str, write: Write) -> None:
    count = [0] * len(classes)
    for label in labels:
        count[label] += 1
        _image(folder / classes[label] / pattern.format(count[label], name=classes[label]), label, write)


def cifar100(
    root: Path, classes: Sequence[str], train: Labels, test: Labels, pixels: Callable[[int], np.ndarray]
) -> None:
    """pixels: class -> uint8 [3072], red first."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    for part, labels in (("train", train), ("test", test)):
        data = np.stack([pixels(label) for label in labels]).astype(np.uint8)
        entry = {
            "filenames": [f"image_{i}.png" for i in range(len(labels))], "batch_label": "batch", "fine_labels": list(labels),
            "coarse_labels": [0] * len(labels), "data": data,
        }  # fmt: skip
        (folder / part).write_bytes(pickle.dumps(entry, protocol=2))
    (folder / "meta").write_bytes(
        pickle.dumps({"fine_label_names": list(classes), "coarse_label_names": ["x"]}, protocol=2)
    )


def dtd(root: Path, classes: Sequence[str], train: Labels, test: Labels, write: Write) -> None:
    folder = root / "dtd" / "dtd"
    number = 0
    for part, labels in (("train", train), ("test", test)):
        lines = []
        for label in labels:
            number += 1
            lines.append(f"{classes[label]}/{classes[label]}_{number:04d}.jpg")
            _image(folder / "images" / lines[-1], label, write)
        _lines(folder / "labels" / f"{part}1.txt", lines)


def flowers102(root: Path, train: Labels, test: Labels, write: Write) -> None:
    """Of each flower's images every second is one of `val`, so that the numbers of the parts do not follow each other."""
    folder = root / "flowers-102"
    labels, parts = [], {"trnid": [], "valid": [], "tstid": []}
    for part, said in (("trnid", train), ("tstid", test)):
        for label in said:
            for name in (part, "valid"):
                labels.append(label + 1)
                parts[name].append(len(labels))
                _image(folder / "jpg" / f"image_{len(labels):05d}.jpg", label, write)
    savemat(folder / "imagelabels.mat", {"labels": np.array([labels], dtype=np.uint8)})
    savemat(folder / "setid.mat", {name: np.array([ids], dtype=np.uint16) for name, ids in parts.items()})


def food101(root: Path, classes: Sequence[str], train: Labels, test: Labels, write: Write) -> None:
    folder = root / "food-101"
    number = 100000
    for part, labels in (("train", train), ("test", test)):
        said: dict[str, list[str]] = {}
        for label in labels:
            number += 3
            said.setdefault(classes[label], []).append(f"{classes[label]}/{number}")
            _image(folder / "images" / f"{said[classes[label]][-1]}.jpg", label, write)
        (folder / "meta").mkdir(exist_ok=True)
        (folder / "meta" / f"{part}.json").write_text(json.dumps(said))
    _lines(folder / "meta" / "classes.txt", classes)


def mnist(root: Path, train: Labels, test: Labels, pixels: Callable[[int], np.ndarray]) -> None:
    """pixels: class -> uint8 [28, 28]."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for part, labels in (("train", train), ("t10k", test)):
        images = np.stack([pixels(label) for label in labels]).astype(np.uint8)
        head = np.array([2051, len(labels), 28, 28], dtype=">i4").tobytes()
        (folder / f"{part}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        head = np.array([2049, len(labels)], dtype=">i4").tobytes()
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(head + np.array(labels, dtype=np.uint8).tobytes())


def oxford_pet(root: Path, breeds: Sequence[str], train: Labels, test: Labels, write: Write) -> None:
    folder = root / "oxford-iiit-pet"
    count = [0] * len(breeds)
    for part, labels in (("trainval", train), ("test", test)):
        lines = []
        for label in labels:
            count[label] += 1
            name = f"{breeds[label]}_{count[label]}"
            _image(folder / "images" / f"{name}.jpg", label, write)
            lines.append(f"{name} {label + 1} {1 if breeds[label][0].isupper() else 2} 1")
        _lines(folder / "annotations" / f"{part}.txt", lines)


def stanford_cars(root: Path, classes: Sequence[str], train: Labels, test: Labels, write: Write) -> None:
    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": np.array([list(classes)], dtype=object)})
    fields = [
        ("bbox_x1", "i4"),
        ("bbox_y1", "i4"),
        ("bbox_x2", "i4"),
        ("bbox_y2", "i4"),
        ("class", "i4"),
        ("fname", object),
    ]
    for path, images, labels in (
        (folder / "devkit" / "cars_train_annos.mat", folder / "cars_train", train),
        (folder / "cars_test_annos_withlabels.mat", folder / "cars_test", test),
    ):
        rows = [(1, 1, 9, 9, label + 1, f"{i:05d}.jpg") for i, label in enumerate(labels, 1)]
        for row in rows:
            _image(images / row[5], row[4] - 1, write)
        savemat(path, {"annotations": np.array([rows], dtype=fields)})


def sun397(root: Path, classes: Sequence[str], labels: Labels, write: Write) -> None:
    folder = root / "SUN397"
    _lines(folder / "ClassName.txt", [f"/{name[0]}/{name}" for name in classes])
    letters = "abcdefghijklmnopqrstuvwxyz"
    for i, label in enumerate(labels):
        code = "".join(letters[(i * 7919 // 26**k) % 26] for k in range(6)) + f"{i:06d}"
        _image(folder / classes[label][0] / classes[label] / f"sun_{code}.jpg", label, write)
