"""Streams that would give wrong numbers: refused or warned of before a run trains, by the code that the kit uses."""

import os

import numpy as np
import pytest
from PIL import Image

from mulki_plugins.errors import Mistakes, MulkiError
from mulki_plugins.recipe.resolve import Changes, resolve
from mulki_plugins.registry.catalog import Catalog, Provenance
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.registry.register import Register
from mulki_plugins.streams import ArrayImages, Task, TaskStream
from mulki_plugins.streams.benchmark import ReadableImages
from mulki_plugins.streams.check import check_stream
from mulki_plugins.streams.folders.stream import folders
from mulki_plugins.streams.images import FileImages
from mulki_plugins.streams.mixed import mixed
from mulki_plugins.training.build import build

WHO = "the stream 'shades' of somebodys-streams 1.2"


def images(values, labels):
    pixels = np.array(values, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), dtype=np.uint8)
    return ArrayImages(pixels, np.array(labels))


class Labelled(ArrayImages):
    """Images whose targets are what a test says."""

    def __init__(self, targets, count=None):
        count = len(targets) if count is None else count
        super().__init__(np.zeros((count, 8, 8, 3), dtype=np.uint8), np.zeros(count, dtype=np.int64))
        object.__setattr__(self, "said", targets)

    @property
    def targets(self):
        if isinstance(self.said, Exception):
            raise self.said
        return self.said


def task(name="shades", **changes):
    train, test = images([10, 200, 20, 210], [0, 1, 0, 1]), images([30, 220], [0, 1])
    said = {"class_names": ("dark", "bright"), "templates": ("a {} one.",), "train": train, "test": test}
    return Task(name=name, **(said | changes))


def stream(*tasks):
    return TaskStream(name="shades", tasks=tasks or (task(),))


def test_a_stream_without_faults():
    assert check_stream(stream(task(), task("other")), WHO) == ()


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (TaskStream(name="none", tasks=()), "it has no task"),
        (TaskStream(name="texts", tasks=("dark",)), "something else among its tasks"),
        (stream(task(), task()), "two tasks are called 'shades'; give every task a name of its own"),
        (stream(task("a  b"), task("a b")), "two tasks are called 'a b'"),
        *(
            (stream(task(name)), "a task is called ")
            for name in ("", "  ", "../../x", "a/b", "a\\b", "..", "a\nb", "a\x1b[2J", " a", "x" * 300, None, 7)
        ),
        (stream(task(class_names=("dark", "dark"))), "two classes are called 'dark'"),
        (stream(task(class_names=("Dark", "dark"))), "'Dark' and 'dark' read the same"),
        (stream(task(class_names=("dark blue", "dark_blue"))), "'dark blue' and 'dark_blue' read the same"),
        (stream(task(class_names=("dark", " dark  "))), "read the same"),
        (stream(task(class_names=("dark", ""))), "a class has no name"),
        (stream(task(class_names=("dark", 3))), "a class has no name"),
        (stream(task(class_names=())), "it has no classes"),
        (stream(task(class_names=None)), "it has no classes"),
        (stream(task(class_names="ab")), "it has no classes"),
        (stream(task(templates=())), "a template has no {}, or there is none"),
        (stream(task(templates="a {}.")), "a template has no {}, or there is none"),
        *(
            (stream(task(templates=("a {}.", template))), "a template has no {} in the class name's place")
            for template in ("a photo", "a {0}.", "a {name}.", "a { }.", "a %s.", 5)
        ),
        (stream(task(templates=("a {} in {place}.",))), "in a template only {} is replaced"),
        (stream(task(train=images([1, 2], [1, 2]))), "shades, train: target 1 is 2, expected a number from 0 to 1"),
        (stream(task(test=images([1, 2], [0, -1]))), "shades, test: target 1 is -1"),
        (stream(task(train=Labelled([0, 1.0]))), "target 1 is 1.0"),
        (stream(task(train=Labelled([0, True]))), "target 1 is True"),
        (stream(task(train=Labelled(["dark", "bright"]))), "target 0 is 'dark'"),
        (stream(task(train=Labelled([[1, 0], [0, 1]]))), "its targets have 2 dimensions"),
        (stream(task(train=Labelled([0, 1], count=3))), "2 targets for 3 images"),
        (stream(task(train=Labelled(OSError("gone"), count=2))), "its images and targets cannot be counted"),
        (stream(task(train=Labelled([]))), "shades, train: there are no images"),
        (stream(task(test=Labelled([]))), "shades, test: there are no images"),
    ],
)
def test_a_stream_that_is_refused(broken, said):
    with pytest.raises(Mistakes) as caught:
        check_stream(broken, WHO)
    assert any(line.startswith(f"{WHO}: ") and said in line and "; " in line for line in caught.value.lines())


def test_all_faults_of_all_tasks_at_once():
    with pytest.raises(Mistakes) as caught:
        check_stream(stream(task(templates=("x",)), task("b", class_names=("x", "X"))), WHO)
    assert len(caught.value.lines()) == 2


def test_classes_without_images_are_warned_of():
    [one] = check_stream(stream(task(train=images([1, 2], [0, 0]))), WHO)
    assert one.startswith(f"{WHO}: shades, train: there is no image of 'bright'; ")
    [two] = check_stream(
        stream(task(class_names=("dark", "bright", "grey", "x"), test=images([1, 2, 3, 4], range(4)))), WHO
    )
    assert "train: there is no image of 'grey' and 1 other classes" in two


def test_test_images_in_memory_that_are_training_images():
    [line] = check_stream(stream(task(test=images([10, 220], [0, 1]))), WHO)
    assert "shades: 1 test image is among the training images too, such as test image 0" in line


def write(path, value, size=9):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), (value, 0, 0)).save(path)


@pytest.mark.parametrize("how", ["copy", "symbolic link", "hard link"])
def test_test_files_that_are_training_files(tmp_path, how):
    for part, first in (("train", 10), ("test", 50)):
        for k, name in enumerate(("cat", "dog")):
            for i in range(3):
                write(tmp_path / part / name / f"{i}.png", first + 10 * k + i)
    declared = {"name": "pets", "train": str(tmp_path / "train"), "test": str(tmp_path / "test")}
    assert check_stream(folders(tasks=[declared]), WHO) == ()
    source, copy = tmp_path / "train" / "cat" / "1.png", tmp_path / "test" / "dog" / "again.png"
    if how == "copy":
        copy.write_bytes(source.read_bytes())
    elif how == "hard link":
        os.link(source, copy)
    else:
        copy.symlink_to(source)
    for stream in (folders(tasks=[declared]), mixed(of=[{"name": "folders", "tasks": [declared]}])):
        [line] = check_stream(stream, WHO)
        assert f"pets: 1 test image is among the training images too, such as {copy}" in line


def test_a_large_stream_is_checked_without_comparing_all_pairs(tmp_path):
    files = [f"some class/{i:07d}.jpg" for i in range(400_000)]
    labels = np.arange(400_000) % 100
    large = task(
        class_names=tuple(f"class {i}" for i in range(100)),
        train=FileImages.of(tmp_path, files[:300_000], labels[:300_000]),
        test=FileImages.of(tmp_path, files[299_999:], labels[299_999:]),
    )
    [line] = check_stream(stream(large), WHO)  # comparing each file with each other would take hours
    assert "1 test image is" in line


def test_reference_data_may_name_a_class_twice_but_must_have_sentences():
    assert check_stream(stream(task(class_names=("dark", "dark"), test=Labelled([]))), WHO, reference=True) == ()
    with pytest.raises(Mistakes, match="a template has no"):
        check_stream(stream(task(templates=("x",))), WHO, reference=True)


@pytest.fixture
def register(small_parts):
    mine = Catalog()

    def add(factory):
        Register(mine, Provenance(distribution="somebodys-streams", version="1.2")).stream(
            "shades", factory, summary="x"
        )
        catalog().parts.update(mine.parts)

    yield add
    for key in mine.parts:
        catalog().parts.pop(key, None)


def built():
    settings = ("stream={name: shades}", "model={name: small-clip}", "device=cpu")
    return build(resolve("recipes/mtil.yaml", Changes(strategy="finetune", settings=settings)).recipe)


def test_a_run_is_refused(register):
    register(lambda: stream(task(), task()))
    with pytest.raises(
        MulkiError, match=r"the stream 'shades' of somebodys-streams 1\.2: two tasks are called 'shades'"
    ):
        built()


def test_a_run_is_warned_and_its_result_says_so(register):
    register(lambda: stream(task(test=images([10, 220], [0, 1]))))
    [warning] = built().stream.incomparable
    assert warning.startswith(
        "the stream 'shades' of somebodys-streams 1.2: shades: 1 test image is among the training"
    )


class Shifted(ArrayImages):
    def __getitem__(self, index):
        return Image.fromarray(self.images[index]), 1 - int(self.labels[index])


@pytest.mark.parametrize("training", [True, False])
def test_an_image_that_comes_with_another_class_than_its_target(training):
    plain = images([10, 200], [0, 1])
    read = ReadableImages(Shifted(plain.images, plain.labels), "shades", training=training, unreadable="skip")
    with pytest.raises(MulkiError, match="image 1 comes with class 0, but its target is 1"):
        read[1]
