"""The stream mtil: every loader on a miniature of its layout, the declarations, the splits, and what is refused."""

import importlib.util
import io
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import scipy.io
import torch
from PIL import Image
from torchvision import datasets, transforms
from torchvision.transforms import InterpolationMode

from mulki_plugins.errors import Mistakes, MulkiError, UnreadableImage
from mulki_plugins.models import LoadedClip
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.streams import as_benchmark, split
from mulki_plugins.streams.mtil.dataset import look
from mulki_plugins.streams.mtil.declaration import ORDERS, declaration
from mulki_plugins.streams.mtil.stream import mtil

ROOT = Path(__file__).parent.parent
PUBLISHED = {  # arXiv 2303.06628: classes, training and test images, templates
    "Aircraft": (100, 3334, 3333, 2), "Caltech101": (101, 6941, 1736, 34), "CIFAR100": (100, 50000, 10000, 18),
    "DTD": (47, 1880, 1880, 8), "EuroSAT": (10, 21600, 5400, 3), "Flowers": (102, 1020, 6149, 1),
    "Food": (101, 75750, 25250, 1), "MNIST": (10, 60000, 10000, 1), "OxfordPet": (37, 3680, 3669, 1),
    "StanfordCars": (196, 8144, 8041, 9), "SUN397": (397, 87003, 21751, 2),
}  # fmt: skip
CLASSES = {
    "Aircraft": ["707-320", "737-200", "BAE 146-200", "F-16A/B"],
    "Caltech101": ["Faces", "Faces_easy", "accordion", "yin_yang"],
    "CIFAR100": ["apple", "aquarium_fish", "maple_tree"],
    "DTD": ["banded", "polka-dotted", "zigzagged"],
    "EuroSAT": ["AnnualCrop", "HerbaceousVegetation", "SeaLake"],
    "Food": ["apple_pie", "pho", "waffles"],
    "OxfordPet": ["Abyssinian", "american_bulldog", "american_pit_bull_terrier"],
    "StanfordCars": ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Ram C/V Cargo Van Minivan 2012"],
    "SUN397": ["abbey", "apse/indoor", "jail_cell", "jail/indoor", "theater/indoor_procenium"],
}
TRAIN, TEST = [0, 2, 1, 1, 2, 0, 0], [2, 1, 0, 1]
TOGETHER = [i % 3 for i in range(10)] + [0]


@pytest.fixture(scope="module")
def layouts():
    spec = importlib.util.spec_from_file_location("mtil_layouts", ROOT / "tools" / "mtil_layouts.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def colour(label):
    return (40 * label, 255 - 40 * label, 90)


def write(path, label):
    Image.new("RGB", (24, 20), colour(label)).save(path, quality=95)


def miniatures(layouts, root):
    """All eleven, with few classes and few images."""
    layouts.aircraft(root, CLASSES["Aircraft"], [*TRAIN, 3], [*TEST, 3], write)
    layouts.caltech101(root, CLASSES["Caltech101"], [*TOGETHER, 3], write)
    layouts.cifar100(
        root, CLASSES["CIFAR100"], TRAIN, TEST, lambda c: np.repeat(np.array(colour(c), dtype=np.uint8), 1024)
    )
    layouts.dtd(root, CLASSES["DTD"], TRAIN, TEST, write)
    layouts.eurosat(root, CLASSES["EuroSAT"], TOGETHER, write)
    layouts.flowers102(root, TRAIN, TEST, write)
    layouts.food101(root, CLASSES["Food"], TRAIN, TEST, write)
    layouts.mnist(root, TRAIN, TEST, lambda c: np.full((28, 28), 20 * c))
    layouts.oxford_pet(root, CLASSES["OxfordPet"], TRAIN, TEST, write)
    layouts.stanford_cars(root, CLASSES["StanfordCars"], TRAIN, TEST, write)
    layouts.sun397(root, CLASSES["SUN397"], [*TOGETHER, 3, 4, 4], write)
    return root


@pytest.fixture(scope="module")
def root(layouts, tmp_path_factory):
    return miniatures(layouts, tmp_path_factory.mktemp("data"))


@pytest.fixture
def own(root, tmp_path):
    """A copy to spoil."""
    shutil.copytree(root, tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture(scope="module")
def stream(root):
    return mtil(root=str(root))


# what is declared


def test_declared_classes_and_templates():
    assert ORDERS["I"] == tuple(PUBLISHED) == catalog().find("stream", "mtil").tasks
    assert [ORDERS["I"].index(name) for name in ORDERS["II"]] == [9, 6, 7, 8, 5, 10, 0, 1, 3, 4, 2]
    total = 0
    for name, (classes, train, test, templates) in PUBLISHED.items():
        declared = declaration(name)
        assert declared.expected("zscl") == {"classes": classes, "train": train, "test": test}
        assert len(declared.classes) == classes
        assert len(declared.templates) == len(set(declared.templates)) == templates
        names = list(declared.classes.values())
        assert len({" ".join(text.lower().split()) for text in names}) == len(names), name
        assert all(text.strip() == text and text for text in [*names, *declared.classes]), name
        assert all(template.count("{}") == 1 for template in declared.templates), name
        assert (
            "source" in (ROOT / "mulki_plugins/streams/mtil/declared" / f"{name}.yaml").read_text().lower()
            or "http" in declared.page
        )
        total += classes
    assert total == 1201


def test_first_templates_and_odd_names_are_the_published_ones():
    said = {name: declaration(name) for name in PUBLISHED}
    assert [d.templates[0].replace("{}", "c") for d in said.values()] == [
        "a photo of a c, a type of aircraft.", "a photo of a c.", "a photo of a c.", "a photo of a c texture.",
        "a centered satellite photo of c.", "a photo of a c, a type of flower.", "a photo of a c, a type of food.",
        'a photo of the number: "c".', "a photo of a c, a type of pet.", "a photo of a c, a type of car.", "a photo of a c.",
    ]  # fmt: skip
    assert said["Caltech101"].classes["crocodile_head"] == "head of a  crocodile"
    assert said["EuroSAT"].classes["SeaLake"] == "lake or sea"
    assert said["SUN397"].classes["theater/indoor_procenium"] == "theater/indoor procenium"
    assert said["OxfordPet"].classes["american_pit_bull_terrier"] == "American Pit Bull Terrier"
    assert list(said["MNIST"].classes.values()) == datasets.MNIST.classes
    flowers = [name.rstrip("?") for name in datasets.Flowers102.classes]
    assert list(said["Flowers"].classes.values()) == flowers


def test_every_sentence_fits_into_clips_context():
    tokenizer = open_clip.SimpleTokenizer()
    longest = 0
    for name in PUBLISHED:
        declared = declaration(name)
        template = max(declared.templates, key=lambda text: len(tokenizer.encode(text)))
        longest = max(
            longest, *(len(tokenizer.encode(template.replace("{}", text))) + 2 for text in declared.classes.values())
        )
    assert 20 < longest <= 77


# every loader on its layout


def torchvisions(name, root, train, monkeypatch):
    """torchvision's own class on the same folder: (labels, the files, without the root); its checksums are the originals'."""
    monkeypatch.setattr(datasets.CIFAR100, "train_list", [["train", None]])
    monkeypatch.setattr(datasets.CIFAR100, "test_list", [["test", None]])
    monkeypatch.setattr(datasets.CIFAR100, "meta", {**datasets.CIFAR100.meta, "md5": None})
    files = {key: (file, None) for key, (file, _) in datasets.Flowers102._file_dict.items()}
    monkeypatch.setattr(datasets.Flowers102, "_file_dict", files)
    part = "train" if train else "test"
    whole = {"Caltech101": datasets.Caltech101, "EuroSAT": datasets.EuroSAT, "SUN397": datasets.SUN397}
    if name in whole:
        return whole[name](root)
    if name in ("CIFAR100", "MNIST"):
        return getattr(datasets, name)(root, train=train)
    if name == "OxfordPet":
        return datasets.OxfordIIITPet(root, split="trainval" if train else "test")
    kinds = {"Aircraft": "FGVCAircraft", "Flowers": "Flowers102", "Food": "Food101"}
    return getattr(datasets, kinds.get(name, name))(root, split=part)


def labels_of(dataset):
    for attribute in ("_labels", "targets", "y"):
        if hasattr(dataset, attribute):
            return [int(label) for label in getattr(dataset, attribute)]
    return [int(label) for _, label in dataset._samples]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_miniature_loads_with_torchvisions_labels_and_images(name, root, stream, monkeypatch):
    task = next(task for task in stream.tasks if task.name == name)
    published = list(declaration(name).classes.values())
    keys = CLASSES.get(name)
    assert task.class_names == tuple(declaration(name).classes[key] for key in keys) if keys else tuple(published)
    if name in ("Caltech101", "EuroSAT", "SUN397"):
        theirs = torchvisions(name, root, True, monkeypatch)
        order = (
            sorted(range(len(theirs)), key=lambda i: str(theirs._image_files[i]).split("/"))
            if name == "SUN397"
            else range(len(theirs))
        )
        halves = torch.utils.data.random_split(  # as ZSCL's code does
            list(order),
            [int(0.8 * len(order)), len(order) - int(0.8 * len(order))],
            generator=torch.Generator().manual_seed(42),
        )
        expected = [[(theirs, i) for i in half] for half in halves]
    else:
        expected = [
            [(them, i) for i in range(len(them))]
            for them in (torchvisions(name, root, part, monkeypatch) for part in (True, False))
        ]
    for ours, pairs in zip((task.train, task.test), expected, strict=True):
        assert list(ours.targets) == [labels_of(them)[i] for them, i in pairs]
        assert len(ours) == len(pairs) > 0
        assert set(ours.targets) <= set(range(len(task.class_names)))
        for i, (them, j) in enumerate(pairs):
            image, label = ours[i]
            assert label == ours.targets[i]
            assert image.mode == "RGB"
            assert np.array_equal(np.asarray(image), np.asarray(them[j][0].convert("RGB")))
            expected_colour = (20 * label,) * 3 if name == "MNIST" else colour(label)
            assert np.abs(np.asarray(image, dtype=int).mean((0, 1)) - expected_colour).max() < 6, (
                f"{name}: another class's image"
            )


def test_nothing_is_opened_before_an_image_is_asked_for(root, monkeypatch):
    opened = []
    monkeypatch.setattr(
        Image, "open", lambda *args, **kwargs: opened.append(args) or (_ for _ in ()).throw(AssertionError)
    )
    stream = mtil(root=str(root))
    benchmark = as_benchmark(stream, lambda image: image, lambda image: image)
    assert [list(e.dataset.targets) for e in benchmark.train_stream] == [
        list(task.train.targets) for task in stream.tasks
    ]
    assert not opened


def test_a_miniature_is_said_to_be_no_published_data_set(stream):
    assert len(stream.incomparable) == 11
    assert not stream.notices
    assert "Aircraft is not the published data set" in stream.incomparable[0]


def test_orders_tasks_and_few_shots(root):
    assert [task.name for task in mtil(root=str(root), order="II").tasks] == list(ORDERS["II"])
    assert [t.name for t in mtil(root=str(root), order="II", tasks=["Caltech101", "MNIST"]).tasks] == [
        "MNIST",
        "Caltech101",
    ]
    with pytest.raises(MulkiError, match=r"no task 'Flowers102' \(did you mean 'Flowers'\?\)"):
        mtil(root=str(root), tasks=["Flowers102"])
    few = mtil(root=str(root), tasks=["DTD"], shots=2)
    assert sorted(few.tasks[0].train.targets) == [0, 0, 1, 1, 2, 2]
    assert len(few.tasks[0].test) == len(TEST)
    assert few.tasks[0].train.targets == mtil(root=str(root), tasks=["DTD", "MNIST"], shots=2).tasks[0].train.targets
    short = mtil(root=str(root), tasks=["DTD"], shots=3)
    assert "2 of 3 classes have fewer than 3 training images, such as 'polka-dotted' with 2" in short.notices[-1]
    assert sorted(short.tasks[0].train.targets) == [0, 0, 0, 1, 1, 2, 2]


def test_shots_and_four_fifths():
    labels = np.random.default_rng(0).integers(0, 7, 1000)
    five, sixteen = split.few(labels, 5), split.few(labels, 16)
    assert np.bincount(labels[five]).tolist() == [5] * 7
    assert set(five) <= set(sixteen)
    assert (np.diff(five) > 0).all()
    kept = split.four_fifths(labels)
    counts = np.bincount(labels)
    assert np.bincount(labels[kept]).tolist() == [n - round(0.2 * n) for n in counts]
    assert split.few(np.zeros(0, dtype=np.int64), 5).tolist() == []


# CoOp's splits


@pytest.fixture
def coop_root(own):
    images = own / "dtd" / "dtd" / "images"
    files = [str(path.relative_to(images)) for path in sorted(images.rglob("*.jpg"))]
    entries = [[file, i % 3, ["zig_zag", "dots", "bands"][i % 3]] for i, file in enumerate(files)]
    said = {"train": entries[:6], "val": entries[6:8], "test": entries[8:]}
    (own / "dtd" / "split_zhou_DescribableTextures.json").write_text(json.dumps(said))
    return own


def test_coops_split_has_its_own_labels_names_and_one_template(coop_root):
    [task] = mtil(root=str(coop_root), tasks=["DTD"], split="coop").tasks
    assert task.class_names == ("zig zag", "dots", "bands")
    assert task.templates == ("a photo of a {} texture.",)
    assert task.train.targets == [0, 1, 2, 0, 1, 2]
    assert task.test.targets == [2, 0, 1]
    assert not {task.train.path(i) for i in range(6)} & {task.test.path(i) for i in range(3)}
    aircraft, cifar = mtil(root=str(coop_root), tasks=["Aircraft", "CIFAR100"], split="coop").tasks
    assert len(aircraft.train) == 8
    assert len(cifar.train) == len(TRAIN) - 1
    image, label = cifar.train[2]
    assert np.abs(np.asarray(image, dtype=int)[0, 0] - colour(label)).max() == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "split_zhou_DescribableTextures.json: "),
        ('{"train": []}', "lists named 'train' and 'test'"),
        ('{"train": [["../../x.jpg", 0, "a"]], "test": []}', "expected \\[image, label, class name\\]"),
        (
            '{"train": [["a/b.jpg", 1, "a"]], "test": [["a/c.jpg", 3, "b"]]}',
            "expected classes from 0 to 1, got 1 to 3|not there",
        ),
        (
            '{"train": [["banded/banded_0001.jpg", 0, "a"], ["banded/banded_0001.jpg", 0, "b"]], "test": []}',
            "'a' and 'b'",
        ),
        (
            f'{{"train": [["banded/banded_0001.jpg", {10**25}, "a"]], "test": []}}',
            "expected \\[image, label, class name\\]",
        ),
        ('{"train": [["banded/banded_0001.jpg", 0, " "]], "test": []}', "expected \\[image, label, class name\\]"),
        ('{"train": [["banded/banded_0001.jpg", 0, "a\\nb"]], "test": []}', "expected \\[image, label, class name\\]"),
    ],
)
def test_a_split_file_that_is_none_is_named(coop_root, text, said):
    (coop_root / "dtd" / "split_zhou_DescribableTextures.json").write_text(text)
    with pytest.raises(Mistakes, match=said):
        mtil(root=str(coop_root), tasks=["DTD"], split="coop")


def test_a_split_file_of_which_the_test_knows_the_training_is_no_published_one(coop_root):
    below = coop_root / "dtd" / "dtd" / "images"
    first, second = [path.relative_to(below) for path in sorted(below.rglob("*.jpg"))][:2]
    images = [[f"./{first}", 0, "a"], [str(second), 1, "a"]]
    said = json.dumps({"train": images, "test": images})
    (coop_root / "dtd" / "split_zhou_DescribableTextures.json").write_text(said)
    [notice] = mtil(root=str(coop_root), tasks=["DTD"], split="coop").incomparable
    assert "2 classes are called 'a'" in notice
    assert "2 images are both training and test images" in notice


def test_annotations_may_begin_with_a_mark(own):
    before = mtil(root=str(own), tasks=["Aircraft", "Food"]).tasks
    for file in (f"{AIRCRAFT}/variants.txt", f"{AIRCRAFT}/images_variant_test.txt", "food-101/meta/train.json"):
        (own / file).write_bytes(b"\xef\xbb\xbf" + (own / file).read_bytes())
    after = mtil(root=str(own), tasks=["Aircraft", "Food"]).tasks
    assert [(t.class_names, t.train.targets, t.test.targets) for t in after] == [
        (t.class_names, t.train.targets, t.test.targets) for t in before
    ]


def test_a_missing_split_file_says_where_it_belongs(own):
    with pytest.raises(
        Mistakes, match=r"dtd/split_zhou_DescribableTextures.json: not there; CoOp's split files are linked from"
    ):
        mtil(root=str(own), tasks=["DTD"], split="coop")


# what is refused


def test_all_missing_data_sets_at_once(tmp_path):
    with pytest.raises(Mistakes) as caught:
        mtil(root=str(tmp_path / "nothing here"))
    lines = caught.value.lines()
    assert len(lines) == 12
    assert str(tmp_path / "nothing here" / "fgvc-aircraft-2013b") in lines[0]
    assert "`mulki data fetch RECIPE` downloads it (about 2.8 GB" in lines[0]
    assert "cars_test_annos_withlabels.mat" in lines[9]
    assert "`mulki data fetch" not in lines[9]
    assert "37 GB" in lines[10]
    assert "`mulki run mtil` needs none" in lines[11]
    assert not (tmp_path / "nothing here").exists()


def matlab(**variables):
    file = io.BytesIO()
    scipy.io.savemat(file, {name: np.array(value) for name, value in variables.items()})
    return file.getvalue()


AIRCRAFT = "fgvc-aircraft-2013b/data"
SPOILT = [
    ("Aircraft", f"{AIRCRAFT}/images_variant_train.txt", "1000007\n", "_train.txt:1: expected an image and one"),
    (
        "Aircraft",
        f"{AIRCRAFT}/images/1000007.jpg",
        None,
        "images_variant_train.txt names an image that is not there",
    ),
    ("Aircraft", f"{AIRCRAFT}/variants.txt", b"\xff\xfe", "variants.txt: "),
    ("CIFAR100", "cifar-100-python/train", b"junk", "cifar-100-python/train: not a readable pickle"),
    ("CIFAR100", "cifar-100-python/test", None, "cifar-100-python/test: not there"),
    (
        "CIFAR100",
        "cifar-100-python/test",
        pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "fine_labels": ["a"]}),
        "expected a list of 1 whole",
    ),
    (
        "CIFAR100",
        "cifar-100-python/test",
        pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "fine_labels": [1.5]}),
        "expected a list of 1 whole",
    ),
    (
        "CIFAR100",
        "cifar-100-python/test",
        pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "fine_labels": [10**30]}),
        "expected classes from 0 to",
    ),
    ("DTD", "dtd/dtd/labels/test1.txt", "banded_0001.jpg\n", "test1.txt:1: expected class/image.jpg"),
    (
        "Flowers",
        "flowers-102/imagelabels.mat",
        b"MATLAB 5.0 MAT-file, cut",
        "imagelabels.mat: not a readable MATLAB file",
    ),
    ("Flowers", "flowers-102/setid.mat", b"", "setid.mat: not a readable MATLAB file"),
    ("Flowers", "flowers-102/setid.mat", matlab(trnid=[[1, 2], [3, 4]], tstid=[1]), "whole numbers named 'trnid'"),
    ("Flowers", "flowers-102/imagelabels.mat", matlab(labels=[1.0, float("nan")]), "whole numbers named 'labels'"),
    ("Flowers", "flowers-102/imagelabels.mat", matlab(labels=[1.5, 2.0]), "whole numbers named 'labels'"),
    ("Flowers", "flowers-102/imagelabels.mat", matlab(others=[1]), "whole numbers named 'labels'"),
    ("Food", "food-101/meta/train.json", '{"apple_pie": ["\\ud800"]}', "train.json names an image that is not there"),
    ("Food", "food-101/meta/train.json", '{"pho": ["pho/1", ', "train.json: "),
    ("Food", "food-101/meta/test.json", "[1, 2]", "test.json: expected a mapping from classes"),
    (
        "MNIST",
        "MNIST/raw/train-images-idx3-ubyte",
        b"\0\0\x08\x03" + b"\0\0\0\x1c" * 3,
        "expected 21,968 bytes",
    ),
    ("MNIST", "MNIST/raw/t10k-labels-idx1-ubyte", b"<html>", "t10k-labels-idx1-ubyte: not an idx file"),
    (
        "OxfordPet",
        "oxford-iiit-pet/annotations/test.txt",
        "Abyssinian_1 cat 1 1\n",
        "test.txt:1: expected an image, its class",
    ),
    ("OxfordPet", "oxford-iiit-pet/annotations/trainval.txt", "beagle_1 1 1 1\nPug_1 1 1 1\n", "is 'beagle' elsewhere"),
    ("StanfordCars", "stanford_cars/devkit/cars_meta.mat", b"x" * 200, "cars_meta.mat: not a readable MATLAB file"),
    (
        "StanfordCars",
        "stanford_cars/cars_test/00002.jpg",
        None,
        "00002.jpg: cars_test_annos_withlabels.mat names an image",
    ),
    ("SUN397", "SUN397/ClassName.txt", "abbey\n", "ClassName.txt:1: expected a class as /a/abbey"),
    ("SUN397", "SUN397/z/zoo/sun_aaaa.jpg", b"x", "SUN397/z/zoo: a class folder that ClassName.txt does not name"),
]


@pytest.mark.parametrize(
    ("name", "file", "content", "said"), SPOILT, ids=[f"{n}-{Path(f).name}-{i}" for i, (n, f, *_) in enumerate(SPOILT)]
)
def test_damaged_data_is_named(own, name, file, content, said):
    path = own / file
    if content is None:
        path.unlink()
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content)
    with pytest.raises(Mistakes) as caught:
        mtil(root=str(own), tasks=[name, "EuroSAT"])
    assert any(line.startswith(f"{name}: {own}") and said in line for line in caught.value.lines()), (
        caught.value.lines()
    )


def test_a_pickle_that_would_run_code_is_refused(own, tmp_path):
    class Runs:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    (own / "cifar-100-python" / "meta").write_bytes(pickle.dumps(Runs()))
    with pytest.raises(Mistakes, match="which no copy of CIFAR-100 does"):
        mtil(root=str(own), tasks=["CIFAR100"])
    assert not (tmp_path / "ran").exists()


def test_a_damaged_image_is_named_also_by_a_worker(own):
    path = min((own / "eurosat" / "2750" / "SeaLake").iterdir())
    path.write_bytes(path.read_bytes()[:300])
    stream = mtil(root=str(own), tasks=["EuroSAT"])
    parts = stream.tasks[0].train, stream.tasks[0].test
    part, at = next((part, i) for part in parts for i in range(len(part)) if part.path(i) == str(path))
    with pytest.raises(UnreadableImage, match=f"^{path}: this image cannot be read"):
        part[at]
    to_tensor = transforms.ToTensor()
    loader = torch.utils.data.DataLoader([0], num_workers=1, collate_fn=lambda _: to_tensor(part[at][0]))
    with pytest.raises(UnreadableImage) as caught:
        next(iter(loader))
    assert caught.value.message.startswith(f"{path}: this image cannot be read")


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16"])
def test_every_kind_of_image_becomes_rgb(own, mode):
    for path in (own / "eurosat" / "2750").rglob("*.jpg"):
        picture = Image.new("RGB", (8, 6), (200, 10, 10))
        kind = "JPEG" if mode in ("L", "CMYK") else "PNG"
        (Image.new("I;16", (8, 6), 9) if mode == "I;16" else picture.convert(mode)).save(path, kind)
    task = mtil(root=str(own), tasks=["EuroSAT"]).tasks[0]
    assert task.train[0][0].mode == "RGB"
    assert task.train[0][0].size == (8, 6)


# listings


def test_the_order_is_that_of_the_names_whatever_the_file_system_says(own, monkeypatch):
    import os

    before = mtil(root=str(own), tasks=["SUN397", "Caltech101"])
    scandir = os.scandir

    class Backwards:
        def __init__(self, path):
            with scandir(path) as entries:
                self.entries = sorted(entries, key=lambda entry: entry.name, reverse=True)

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(os, "scandir", Backwards)
    after = mtil(root=str(own), tasks=["SUN397", "Caltech101"])
    for a, b in zip(before.tasks, after.tasks, strict=True):
        assert [a.train.path(i) for i in range(len(a.train))] == [b.train.path(i) for i in range(len(b.train))]
        assert a.test.targets == b.test.targets


def test_hidden_files_and_folders_are_no_images_and_no_classes(own):
    before = look("Caltech101", own, "zscl").sizes
    folder = own / "caltech101" / "101_ObjectCategories"
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / "accordion" / "._image_0001.jpg").write_bytes(b"x")
    (folder / "accordion" / "Thumbs.db").write_bytes(b"x")
    (folder / ".cache").mkdir()
    assert look("Caltech101", own, "zscl").sizes == before


# transforms


def test_the_transforms_are_the_protocols():
    loaded = LoadedClip(
        clip=torch.nn.Identity(), tokenizer=lambda texts: torch.zeros(1), image_size=224,
        mean=open_clip.OPENAI_DATASET_MEAN, std=open_clip.OPENAI_DATASET_STD,
    )  # fmt: skip
    rest = [
        transforms.ToTensor(),
        transforms.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    ]
    bicubic = InterpolationMode.BICUBIC
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 260, 3), dtype=np.uint8))
    evaluation = transforms.Compose([transforms.Resize(224, interpolation=bicubic), transforms.CenterCrop(224), *rest])
    assert torch.equal(loaded.transform(train=False)(image), evaluation(image))
    crop = transforms.RandomResizedCrop(224, scale=(0.9, 1.0), interpolation=bicubic)
    for seed in range(5):
        torch.manual_seed(seed)
        ours = loaded.transform(train=True)(image)
        torch.manual_seed(seed)
        assert torch.equal(ours, transforms.Compose([crop, *rest])(image))
