"""The stream `folders`: names, odd contents, splits, pictures, mistakes, and whole runs over files that are written here."""

import json
import os
import pickle
import random
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from torch.utils.data import DataLoader

from mulki_plugins.cli import main
from mulki_plugins.errors import Mistakes, MulkiError, UnreadableImage
from mulki_plugins.models import load_clip
from mulki_plugins.streams import as_reference, entries
from mulki_plugins.streams.folders import classes, draft
from mulki_plugins.streams.folders.classes import readable_names
from mulki_plugins.streams.folders.stream import folders
from mulki_plugins.streams.images import open_picture
from mulki_plugins.streams.split import split_by_hash

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 60, 220)}


def mulki(*arguments, ok=True):
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    if ok:
        assert done.exit_code == 0, done.output + done.stderr
    else:
        assert done.exit_code == 2, done.output
        assert "Traceback" not in done.output
    return done


def write(path, colour="red", size=(24, 20), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, COLOURS[colour]).convert(mode).save(path, **options)


def fill(root, classes=("red", "green"), each=5):
    for name in classes:
        for i in range(each):
            write(root / name / f"{i}.png", name if name in COLOURS else "red")
    return root


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("golden_retriever", "golden retriever"),
        ("001.Black_footed_Albatross", "Black footed Albatross"),
        ("n02099601-golden_retriever", "golden retriever"),
        ("n02105855-Shetland_sheepdog", "Shetland sheepdog"),
        ("012_grizzly bear", "grizzly bear"),
        ("12. grizzly bear", "grizzly bear"),
        ("0 - zero", "zero"),
        ("golden-retriever", "golden retriever"),
        ("wire-haired_fox_terrier", "wire-haired fox terrier"),
        ("t-shirt", "t-shirt"),
        ("747-400", "747-400"),
        ("747-SP", "747-SP"),
        ("A340-300", "A340-300"),
        ("7", "7"),
        ("00014", "00014"),
        ("2012 Audi S4", "2012 Audi S4"),
        ("3.5mm jack", "3.5mm jack"),
        ("AnnualCrop", "Annual Crop"),
        ("HerbaceousVegetation", "Herbaceous Vegetation"),
        ("DVDPlayer", "DVD Player"),
        ("iPhone", "iPhone"),
        ("McDonald", "McDonald"),
        ("F150SuperCrew", "F150SuperCrew"),
        ("USB", "USB"),
        ("ÉcoleNormale", "École Normale"),
        ("pain+au+chocolat", "pain au chocolat"),
        ("  two   spaces ", "two spaces"),
        ("Żubr_biały", "Żubr biały"),
        ("柴犬", "柴犬"),
        ("кошка", "кошка"),
        (unicodedata.normalize("NFD", "müsli"), "müsli"),
        ("___", ""),
    ],
)
def test_readable_names(folder, name):
    assert readable_names([folder]) == [name]


def test_an_index_without_zeros_goes_only_where_every_folder_has_one():
    assert readable_names(["1_cat", "2_dog", "10-horse"]) == ["cat", "dog", "horse"]
    assert readable_names(["1_cat", "7-up", "dog"]) == ["1 cat", "7-up", "dog"]
    assert readable_names(["1_2", "2_3"]) == ["1 2", "2 3"]


def test_what_lies_in_folders(tmp_path):
    """Hidden files, other files, deeper folders, capitals, links, circles and spaces."""
    root = tmp_path / "my photos"
    elsewhere = tmp_path / "elsewhere"
    write(elsewhere / "x.png")
    write(root / "black bear" / "A.JPG")
    write(root / "black bear" / "2019" / "summer" / "b.Jpeg", format="JPEG")
    write(root / "black bear" / "a.png")
    for name in ("notes.txt", ".hidden.jpg", "Thumbs.db", "no_suffix"):
        (root / "black bear" / name).write_text("no image")
    write(root / "black bear" / ".thumbnails" / "t.png")
    (root / "black bear" / "again").symlink_to(root / "black bear")
    (root / "linked").symlink_to(elsewhere)
    (root / "linked.png").write_text("lies beside the classes")
    for name in (".git", "__MACOSX"):
        write(root / name / "x.png")
    write(elsewhere / "y.png")
    [task] = folders(
        tasks=[{"name": "photos", "train": str(root), "test": str(fill(tmp_path / "t", ["black bear", "linked"], 1))}]
    ).tasks
    assert task.class_names == ("black bear", "linked")
    assert task.train.files == [f"black bear/{f}" for f in ("2019/summer/b.Jpeg", "A.JPG", "a.png")] + [
        "linked/x.png",
        "linked/y.png",
    ]
    assert task.train.targets == [0, 0, 0, 1, 1]
    assert len(task.train) == 5
    assert [task.train[i][0].size for i in range(5)] == [(24, 20)] * 5
    assert task.templates == ("a photo of a {}.",)


def test_no_image_is_opened_and_the_order_of_the_file_system_never_shows(tmp_path, monkeypatch):
    root = fill(tmp_path / "a", ["red", "green", "blue"], 11)
    declared = [{"name": "a", "images": str(root), "test_share": 0.3, "seed": 4}]

    def parts():
        [task] = folders(tasks=declared).tasks
        return [(list(part.files), list(part.targets)) for part in (task.train, task.test)]

    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", lambda *_: pytest.fail("an image was opened"))
        expected = parts()
        real = os.scandir

        class Shuffled:
            def __init__(self, path):
                with real(path) as entries:
                    self.entries = list(entries)
                random.shuffle(self.entries)

            def __enter__(self):
                return iter(self.entries)

            def __exit__(self, *_):
                pass

        patch.setattr(classes.os, "scandir", Shuffled)
        assert [parts() for _ in range(5)] == [expected] * 5
    (train, labels), (test, test_labels) = expected
    assert [test_labels.count(label) for label in range(3)] == [3, 3, 3], "a share of each class"
    assert not {*train} & {*test}
    assert len({*train, *test}) == 33
    assert all(file.startswith(("blue", "green", "red")[label]) for file, label in zip(train, labels, strict=True))
    moved = tmp_path / "b"
    root.rename(moved)
    declared[0]["images"] = str(moved)
    assert parts() == expected, "nor where the folder lies"
    declared[0]["seed"] = 5
    assert parts() != expected
    declared[0] |= {"seed": None, "test_share": None}
    assert [len(part[0]) for part in parts()] == [27, 6]


def test_the_split_of_a_class():
    files = [f"x/{i}.png" for i in range(40)]
    for share, count in ((0.2, 8), (0.01, 1), (0.99, 39), (0.5, 20)):
        train, test = split_by_hash(files, share, 0)
        assert len(test) == count
        assert sorted(train + test) == sorted(files)
    assert [len(part) for part in split_by_hash(["a", "b"], 0.9, 3)] == [1, 1]
    test = set(split_by_hash(files, 0.2, 0)[1])
    for i in range(20):
        assert len(test ^ set(split_by_hash([*files, f"x/new{i}.png"], 0.2, 0)[1])) <= 2, "a new file moves at most one"


def test_pictures_of_every_kind_are_rgb(tmp_path):
    red = COLOURS["red"]
    for name, mode, options in (
        ("a.jpg", "RGB", {"quality": 100}), ("b.jpg", "CMYK", {"quality": 100}), ("c.png", "RGBA", {}), ("d.gif", "P", {}),
        ("e.png", "P", {}), ("f.bmp", "RGB", {}), ("g.webp", "RGB", {"lossless": True}), ("h.tiff", "CMYK", {}),
    ):  # fmt: skip
        write(tmp_path / name, mode=mode, **options)
        picture = open_picture(str(tmp_path / name))
        assert picture.mode == "RGB"
        assert np.abs(np.array(picture).mean((0, 1)) - red).max() <= 26, name
    for name, mode in (("l.png", "L"), ("la.png", "LA"), ("1.png", "1"), ("grey.jpg", "L")):
        write(tmp_path / name, mode=mode)
        picture = np.array(open_picture(str(tmp_path / name)))
        assert picture.shape == (20, 24, 3)
        assert (picture[..., 0] == picture[..., 2]).all()


def test_what_is_transparent_lies_on_white(tmp_path):
    clear = np.zeros((4, 6, 4), dtype=np.uint8)
    clear[:, 3:] = (10, 20, 30, 255)
    Image.fromarray(clear).save(tmp_path / "a.png")
    palette = Image.new("P", (6, 4), 1)
    palette.putpalette([9, 9, 9, 10, 20, 30])
    palette.paste(0, (0, 0, 3, 4))
    palette.save(tmp_path / "b.png", transparency=0)
    palette.save(tmp_path / "c.gif", transparency=0)
    colour_key = Image.fromarray(clear[..., :3].copy())
    colour_key.save(tmp_path / "d.png", transparency=(0, 0, 0))
    for name in ("a.png", "b.png", "c.gif", "d.png"):
        picture = np.array(open_picture(str(tmp_path / name)))
        assert (picture[:, :3] == 255).all(), name
        assert (picture[:, 3:] == (10, 20, 30)).all(), name


def test_sixteen_bits_of_grey_are_not_clipped(tmp_path):
    Image.fromarray(np.full((4, 4), 65535 // 2, dtype=np.uint16)).save(tmp_path / "a.png")
    assert np.array(open_picture(str(tmp_path / "a.png")))[0, 0].tolist() == pytest.approx([127] * 3, abs=1)
    Image.fromarray(np.full((4, 4), 200, dtype=np.int32)).save(tmp_path / "bytes.tiff")
    assert np.array(open_picture(str(tmp_path / "bytes.tiff")))[0, 0].tolist() == [200] * 3
    Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32)).save(tmp_path / "b.tiff")
    with pytest.raises(MulkiError, match=r"b\.tiff.*floating-point"):
        open_picture(str(tmp_path / "b.tiff"))


def test_a_camera_held_sideways(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = np.zeros((10, 30, 3), dtype=np.uint8)
    picture[:, :15] = 255
    Image.fromarray(picture).save(tmp_path / "a.jpg", exif=exif, quality=100)
    turned = open_picture(str(tmp_path / "a.jpg"))
    assert turned.size == (10, 30)
    assert np.array(turned)[2].mean() > 250
    assert np.array(turned)[-2].mean() < 5


@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_a_damaged_image_is_named(damage, tmp_path):
    path = tmp_path / "x.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    data = {"truncated": path.read_bytes()[:700], "text": b"<html>not found</html>", "empty": b""}[damage]
    path.write_bytes(data)
    with pytest.raises(MulkiError, match=r"x\.jpg: this image cannot be read: "):
        open_picture(str(path))


def test_an_image_that_is_gone_is_said_to_be_gone(tmp_path):
    with pytest.raises(MulkiError, match=r"x\.jpg: this image cannot be read: No such file or directory$"):
        open_picture(str(tmp_path / "x.jpg"))


def test_a_damaged_image_is_named_by_a_worker_too(tmp_path):
    root = fill(tmp_path / "a", ["red", "green"], 2)
    (root / "red" / "1.png").write_bytes(b"nothing")
    [task] = folders(tasks=[{"name": "a", "train": str(root), "test": str(fill(tmp_path / "b", each=1))}]).tasks
    with pytest.raises(MulkiError) as caught:
        list(DataLoader(task.train, batch_size=1, num_workers=1, collate_fn=len))
    assert re.fullmatch(r"\S*red/1\.png: this image cannot be read: .+", caught.value.message)


RECIPE = """\
name: own
stream:
  name: folders
  tasks:
    - {%s}
model: mulki-tiny
strategy: finetune
train:
  iterations: 2
  batch_size: 4
  optimizer: {lr: 1e-4}
"""


def wrong(tmp_path, monkeypatch, *tasks):
    """The errors of `mulki validate`, without what they all begin with."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text(RECIPE % "}\n    - {".join(tasks))
    lines = mulki("validate", "own.yaml", ok=False).stderr.splitlines()
    assert all(line.startswith("error: own.yaml:") for line in lines)
    return [line.removeprefix("error: own.yaml:") for line in lines]


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("name: a", ": names no folder: give `train` and `test`, or `images`"),
        ("images: good", ".name: missing"),
        ("name: a/b, images: good", ".name: expected a text without '/'"),
        ("name: '', images: good", ".name: expected a text"),
        ("name: 'a\\b', images: good", ".name: expected a text"),
        ("name: .., images: good", ".name: expected a text"),
        ("name: a, images: god", ".images: 'god': no such folder (a path begins in the current folder, "),
        ("name: a, images: own.yaml", ".images: 'own.yaml': this is a file"),
        ("name: a, images: ''", ".images: '': no such folder"),
        ("name: a, images: 7", ".images: expected a text or null, got 7"),
        ("name: a, images: good, train: good", ".train: stands beside `images`"),
        ("name: a, train: good", ".test: missing, beside `train`"),
        ("name: a, train: good, test: good", ".test: this is the folder of `train`"),
        ("name: a, train: good, test: other, seed: 1", ".seed: is an option of `images`"),
        ("name: a, images: good, test_share: 1", ".test_share: expected a number, above 0 and below 1"),
        ("name: a, images: good, seed: -1", ".seed: expected a whole number, at least 0"),
        ("name: a, images: good, shots: 1", ".shots: unknown option"),
        ("name: a, images: good, templates: []", ".templates: expected at least one template"),
        ("name: a, images: good, templates: ['a {name}.']", ".templates[0]: expected '{}' in the class name's"),
        ("name: a, images: good, templates: ['a {} in {place}.']", ".templates[0]: expected '{}' in the class name's"),
        ("name: a, images: good, templates: [a photo]", ".templates[0]: expected '{}' in the class name's"),
        ("name: a, images: flat", ".images: flat: images lie in it, but no folder"),
        ("name: a, images: nothing", ".images: nothing: there is no folder in it"),
        ("name: a, images: parts", ".images: parts: its folders 'test', 'train' are splits, not classes"),
        ("name: a, images: hollow", ".images: hollow: no image (.jpg, .png and the like) lies in 'blue', but 1 .txt ("),
        ("name: a, images: lonely", ".images: lonely: only one image lies in 'green', but train and test need"),
        ("name: a, images: good, leave_out: [rad]", ".leave_out[0]: there is no folder 'rad' beside the classes"),
        ("name: a, images: good, leave_out: [red, green]", ".images: good: `leave_out` leaves no folder in it"),
        ("name: a, images: broken", ".images: broken/red/x.png: this is no file, or a link that leads"),
        ("name: a, train: good, test: less", ".train: good: the class folder 'green' is not in `test`, less"),
        ("name: a, train: less, test: good", ".test: good: the class folder 'green' is not in `train`, less; add or"),
        ("name: a, images: twins", ".images: the class folders '001.red', 'Red' get the same name"),
        ("name: a, images: mute", ".images: the name of the class folder '___' is empty; give a better name in class_names"),
        ("name: a, images: good, class_names: [x]", ".class_names: expected 2 names, in the order of the folders 'green', 'red'"),
        ("name: a, images: good, class_names: [x, X]", ".class_names: the class folders 'green', 'red' get the same name"),
        ("name: a, images: good, class_names: [x, ' ']", ".class_names: the name of the class folder 'red' is empty"),
        ("name: a, images: good, class_names: {rad: x}", ".class_names.rad: there is no such class folder (did you mean 'red'?)"),
    ],
)  # fmt: skip
def test_mistakes(task, expected, tmp_path, monkeypatch):
    for name in ("good", "other", "hollow"):
        fill(tmp_path / name)
    (tmp_path / "hollow" / "blue").mkdir()
    (tmp_path / "hollow" / "blue" / "readme.txt").write_text("")
    (tmp_path / "nothing").mkdir()
    write(tmp_path / "flat" / "x.png")
    for part in ("train", "test"):
        fill(tmp_path / "parts" / part)
    fill(tmp_path / "lonely", ["red"])
    fill(tmp_path / "lonely", ["green"], 1)
    fill(tmp_path / "less", ["red"])
    fill(tmp_path / "twins", ["001.red", "Red"])
    fill(tmp_path / "mute", ["___", "red"])
    fill(tmp_path / "broken")
    (tmp_path / "broken" / "red" / "x.png").symlink_to(tmp_path / "gone.png")
    for image in (tmp_path / "broken" / "red").glob("?.png"):
        if not image.is_symlink():
            image.unlink()
    lines = wrong(tmp_path, monkeypatch, task)
    assert any(line.startswith(f"5: $.stream.tasks[0]{expected}") for line in lines), lines


def test_all_mistakes_of_all_tasks_at_once(tmp_path, monkeypatch):
    fill(tmp_path / "good")
    lines = wrong(
        tmp_path, monkeypatch, "name: a, images: x", "name: a, images: good", "nam: b", "name: c, images: good, seed: x"
    )
    assert [line.split(":")[0] for line in lines] == ["5", "6", "7", "7", "8"]
    assert "$.stream.tasks[1].name: the task 'a' is named twice" in lines[1]
    lines = wrong(tmp_path, monkeypatch, "name: a, images: x, test_share: 1.5, templates: [nobody], foo: 1")
    keys = ("foo", "images", "templates[0]", "test_share")
    assert [any(f"$.stream.tasks[0].{key}: " in line for line in lines) for key in keys] == [True] * 4
    assert len(lines) == 4
    (tmp_path / "own.yaml").write_text(RECIPE % "name: a, images: good" + "  per_task: {b: {lr: 1}}\n")
    assert "$.train.per_task.b: the stream folders has no task 'b'" in mulki("validate", "own.yaml", ok=False).stderr
    with pytest.raises(Mistakes, match=r"folders: tasks\[0\]\.images: .*no such folder"):
        folders(tasks=[{"name": "a", "images": "x"}])


@pytest.mark.parametrize("tasks", ["[]", "3", "{name: a}", "null"])
def test_no_tasks(tasks, tmp_path):
    recipe = tmp_path / "own.yaml"
    recipe.write_text(RECIPE.replace("\n    - {%s}", f" {tasks}"))
    assert ":4: $.stream.tasks: expected " in mulki("validate", recipe, ok=False).stderr


def test_class_names_given(tmp_path):
    root = fill(tmp_path / "a", ["001.red", "Red", "blue"])
    names = lambda given: folders(tasks=[{"name": "a", "images": str(root), "class_names": given}]).tasks[0].class_names  # noqa: E731
    assert names(["x", "y", "z"]) == ("x", "y", "z")
    assert names({"Red": "crimson"}) == ("red", "crimson", "blue")


def test_train_and_test_may_spell_accents_differently(tmp_path):
    fill(tmp_path / "train", [unicodedata.normalize("NFC", "Käse"), "red"])
    fill(tmp_path / "test", [unicodedata.normalize("NFD", "Käse"), "red"], 2)
    [task] = folders(tasks=[{"name": "a", "train": str(tmp_path / "train"), "test": str(tmp_path / "test")}]).tasks
    assert task.class_names == ("Käse", "red")
    assert task.test.targets == [0, 0, 1, 1]
    assert task.test[0][1] == 0


def test_a_folder_whose_name_is_no_text(tmp_path):
    root = fill(tmp_path / "a", [os.fsdecode(b"caf\xe9"), "tea"])
    with pytest.raises(Mistakes, match=r"the name of the class folder 'caf\\udce9' is not valid text; rename it"):
        folders(tasks=[{"name": "a", "images": str(root)}])
    [task] = folders(tasks=[{"name": "a", "images": str(root), "class_names": ["café", "tea"]}]).tasks
    assert task.train[0][0].size == (24, 20)


def test_tasks_can_be_handed_to_other_processes(tmp_path):
    [task] = folders(tasks=[{"name": "a", "images": str(fill(tmp_path / "a"))}]).tasks
    again = pickle.loads(pickle.dumps(task.train))
    assert (again.files, again.targets) == (task.train.files, task.train.targets)


def test_a_reference_image_that_cannot_be_read_is_left_out(tmp_path, monkeypatch):
    fill(tmp_path / "shop", each=20)
    broken = sorted((tmp_path / "shop").rglob("*.png"))[0]
    broken.write_bytes(b"no image")
    monkeypatch.chdir(tmp_path)
    made = folders(tasks=[{"name": "shop", "images": "shop"}])
    stopping, skipping = (as_reference(made, np.asarray, unreadable=each).images for each in ("stop", "skip"))
    with pytest.raises(UnreadableImage, match=broken.name):
        [stopping[i] for i in range(len(stopping))]
    assert len([skipping[i] for i in range(len(skipping))]) == len(made.tasks[0].train)


def test_folders_as_reference_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "a")
    fill(tmp_path / "b", ["x", "y"])
    reference = "reference: {name: folders, tasks: [{name: %s, images: %s}]}\n"
    text = RECIPE.replace("finetune", "zscl") % "name: a, images: a"
    (tmp_path / "own.yaml").write_text(text + reference % ("b", "b"))
    mulki("validate", "own.yaml")
    (tmp_path / "own.yaml").write_text(text + reference % ("b", "./a"))
    assert "shares no task" in mulki("validate", "own.yaml", ok=False).stderr
    (tmp_path / "own.yaml").write_text(text + reference % ("b", "c"))
    assert (
        "own.yaml:12: $.reference.tasks[0].images: 'c': no such folder"
        in mulki("validate", "own.yaml", ok=False).stderr
    )


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    fill(tmp_path / "a")
    [task] = folders(tasks=[{"name": "a", "images": "~/a"}]).tasks
    assert len(task.train) == 8


def test_what_is_shown_is_a_recipe_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "good")
    (tmp_path / "own.yaml").write_text(RECIPE % "name: a, images: good, class_names: {red: 'yes: no'}")
    shown = mulki("show", "own.yaml").stdout
    assert re.search(r"^  - name: a +# own.yaml:5$", shown, re.M)
    (tmp_path / "again.yaml").write_text(shown)
    first, second = (json.loads(mulki("show", name, "--json").stdout)["recipe"] for name in ("own.yaml", "again.yaml"))
    assert first == second
    assert "stream    folders (tasks: a)" in mulki("run", "own.yaml", "--dry-run").stdout


@pytest.fixture
def three(tmp_path, monkeypatch):
    """Three folders of tasks of three layouts, in the current folder."""
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "data" / "plain colours", ["01_red", "02_green"], 6)
    for part, each in (("train", 5), ("val", 2)):
        fill(tmp_path / "data" / "parted" / part, ["red", "blue"], each)
    fill(tmp_path / "data" / "alone" / "Train", ["red", "green", "blue"], 4)
    return ["data/plain colours", "data/parted", "data/alone"]


def test_a_recipe_for_folders_validates_and_runs(three, tmp_path):
    done = mulki("new", "recipe", "--from-folders", *three, "--out", "own.yaml", "--name", "own")
    assert "mulki run own.yaml" in done.stdout
    assert "there is only 'Train'" in done.stderr
    assert "valid; stream folders" in mulki("validate", "own.yaml").stdout
    text = (tmp_path / "own.yaml").read_text()
    assert "01_red: red" in text
    assert "test: data/parted/val" in text
    before = text
    assert "already exists and is not overwritten" in mulki(
        "new", "recipe", "--from-folders", *three, "--out", "own.yaml", ok=False
    ).stderr  # fmt: skip
    assert (tmp_path / "own.yaml").read_text() == before
    few = ["--set", "train.iterations=2", "--set", "train.schedule.warmup=0", "--set", "train.workers=0", "--seed", 1]
    done = mulki("run", "own.yaml", *few, "--out", tmp_path / "runs")
    assert done.stdout.splitlines()[1].split("  ")[0] == "after"
    [folder] = tmp_path.glob("runs/own/mulki-plus+*/seed-1")
    data = json.loads((folder / "result.json").read_text())
    assert data["tasks"] == ["plain colours", "parted", "alone"]
    assert data["status"] == "complete"
    assert data["protocol"] == {"stream": "folders", "model": "mulki-tiny", "classes": "seen"}
    assert data["budget"] == {"iterations": 2, "batch_size": 32}
    assert len((folder / "matrix.csv").read_text().splitlines()) == 5
    mulki("run", folder / "recipe.yaml", "--dry-run")


def test_a_damaged_image_ends_a_run_and_leaves_what_was_finished(three, tmp_path):
    mulki("new", "recipe", "--from-folders", *three[:2], "--out", "own.yaml", "--name", "own")
    for image in (tmp_path / "data" / "parted" / "train" / "red").iterdir():
        image.write_bytes(image.read_bytes()[:50])
    few = ["--set", "train.iterations=2", "--set", "train.schedule.warmup=0", "--strategy", "finetune"]
    done = mulki("run", "own.yaml", *few, ok=False)
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert re.match(r"error: task parted, step 1: data/parted/train/red/\d\.png: this image cannot be read", line)
    [file] = tmp_path.glob("runs/own/finetune+*/seed-0/result.json")
    data = json.loads(file.read_text())
    assert (data["status"], len(data["matrix"])) == ("failed", 1)
    assert "red" in data["error"]


def test_recipes_for_odd_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in ("a/images", "b/images"):
        fill(tmp_path / place, ["dog", "Dog", "012.cat"])
    fill(tmp_path / "vehicles", ["train", "car"])
    fill(tmp_path / "ünï: c'ode", ["no", "7", "#x", "a: b"])
    fill(tmp_path / "nested" / "p", ["x", "y"])
    fill(tmp_path / "nested" / "q", ["x", "y"])
    done = mulki("new", "recipe", "--from-folders", "a/images", "b/images/", "vehicles", "ünï: c'ode", "nested")
    assert done.stderr.count("'Dog', 'dog' cannot be told apart by their names") == 2
    assert "mulki new recipe nested/p nested/q" in done.stderr
    [file] = tmp_path.glob("*.yaml")
    assert file.name == "a-images-and-4-more.yaml"
    shown = json.loads(mulki("show", file, "--json").stdout)["recipe"]["stream"]["tasks"]
    assert [task["name"] for task in shown] == ["a-images", "b-images", "vehicles", "ünï: c'ode", "nested"]
    assert shown[0]["class_names"] == {"012.cat": "cat", "Dog": "Dog 1", "dog": "dog 2"}
    assert shown[3]["class_names"] == {"no": "no", "7": "7", "#x": "#x", "a: b": "a: b"}


def test_a_recipe_of_many_long_names_can_be_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "<<", ["<<", "x"])
    mulki("new", "recipe", "<<", "--name", "odd", "--out", "odd.yaml")
    mulki("validate", "odd.yaml")
    monkeypatch.setattr(draft, "MAX_BYTES", 2000)
    fill(tmp_path / "many", [f"{i:05} {'Lumbricus terrestris ' * 3}" for i in range(20)])
    done = mulki("new", "recipe", "many", "--out", "many.yaml")
    assert Path("many.yaml").read_text().count("Lumbricus") == 0, "too many bytes of names"
    assert "check its class names, then: mulki run many.yaml" in done.stdout
    mulki("validate", "many.yaml")


def test_recipes_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    for arguments, why in (
        ([], "expected the folders of the tasks"),
        ([], "type: mulki new recipe DIR..."),
        (["--from-folders"], "expected the folders of the tasks"),
        (["--from-folders", "b"], "b: no such folder"),
        (["--from-folders", "a", "--name", "x/y"], "--name: 'x/y' names a folder"),
        (["--from-folders", "a", "--out", "gone/x.yaml"], "gone/x.yaml: cannot be written: No such file"),
        (["--from-folders", "a", "--out", "empty"], "empty: already exists"),
    ):
        assert why in mulki("new", "recipe", *arguments, ok=False).stderr
    fill(tmp_path / "latin", [os.fsdecode(b"caf\xe9"), "tea"])
    assert r"latin: the name of 'caf\udce9' is not UTF-8; rename it" in mulki(
        "new", "recipe", "--from-folders", "latin", ok=False
    ).stderr  # fmt: skip
    lines = mulki("new", "recipe", "--from-folders", "b", "empty", "a", ok=False).stderr.splitlines()
    assert len(lines) == 2
    assert not list(tmp_path.glob("*.yaml"))
    assert mulki("new", "recipe", "--from-folders", "a", "--out", "-").stdout.startswith("# Your own images")


def test_folders_are_checked_without_torch(tmp_path, monkeypatch):
    fill(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    mulki("new", "recipe", "--from-folders", "a", "--out", "own.yaml")
    for command in (
        ["validate", "own.yaml"],
        ["new", "recipe", "--from-folders", "a", "--out", "-"],
        ["new", "--help"],
    ):
        code = (
            "import sys\nfrom mulki_plugins.cli import main\n"
            f"try: main({command!r})\nexcept SystemExit as e: assert not e.code, e.code\n"
            "heavy = {'torch', 'avalanche', 'open_clip', 'numpy', 'matplotlib', 'rich'} & set(sys.modules)\n"
            "assert not heavy, heavy\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_the_models_transform_takes_the_pictures(tmp_path):
    root = fill(tmp_path / "a")
    write(root / "red" / "grey.png", mode="L", size=(7, 300))
    [task] = folders(tasks=[{"name": "a", "images": str(root)}]).tasks
    transform = load_clip("mulki-tiny").transform(train=True)
    assert {transform(task.train[i][0]).shape for i in range(len(task.train))} == {(3, 48, 48)}


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("A+", "A+"),
        ("AB-", "AB-"),
        ("A+ve", "A+ve"),
        ("AB+ve", "AB+ve"),
        ("C++", "C++"),
        ("C#", "C#"),
        ("R&D", "R&D"),
        ("Disney+", "Disney+"),
        ("Disney+_Hulu", "Disney+ Hulu"),
        ("C++_code", "C++ code"),
        ("grade_A--", "grade A--"),
        ("gold--fish", "gold fish"),
    ],
)
def test_signs_that_belong_to_a_name_stay(folder, name):
    assert readable_names([folder]) == [name]


def test_a_number_without_which_names_are_the_same_stays():
    assert readable_names(["1_euro", "2_euro", "1_cent"]) == ["1 euro", "2 euro", "1 cent"]
    assert readable_names(["01_cent", "10_cent"]) == ["01 cent", "10 cent"]


def test_every_format_that_pillow_decodes_is_an_image(tmp_path):
    names = ["a.JPG", "b.jpe", "c.jfif", "d.TIF", "e.bmp", "f.gif", "g.ppm", "h.tga", "i.ico", "j.webp"]
    names += [f"k{suffix}" for suffix in (".avif", ".jp2") if entries.is_image(suffix)]
    for colour in ("red", "green"):
        for name in names:
            write(tmp_path / "a" / colour / name, colour)
        Image.new("RGB", (24, 20), COLOURS[colour]).save(
            tmp_path / "a" / colour / "m.MPO", "MPO", save_all=True, append_images=[Image.new("RGB", (24, 20))]
        )
    [task] = folders(tasks=[{"name": "a", "images": str(tmp_path / "a")}]).tasks
    assert len(task.train) + len(task.test) == 2 * (len(names) + 1)
    for part in (task.train, task.test):
        for i in range(len(part)):
            picture, label = part[i]
            assert np.abs(np.array(picture).mean((0, 1)) - COLOURS["green" if label == 0 else "red"]).max() < 40, (
                part.path(i)
            )


@pytest.mark.parametrize("name", ["a.pdf", "a.eps", "a.h5", "a.mpg", "a.txt", "a.heic", "jpg", "a.jpg.bak", "a"])
def test_what_pillow_does_not_decode_is_no_image(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    assert not entries.is_image(name)


def test_heic_is_read_where_pillow_heif_is_installed(tmp_path, monkeypatch):
    """A stand-in for the package, which reads a PNG under the name."""

    class Opener:
        @staticmethod
        def register_heif_opener():
            Image.register_extension("PNG", ".heic")

    Image.init()
    monkeypatch.setattr(Image, "EXTENSION", dict(Image.EXTENSION))
    monkeypatch.setitem(sys.modules, "pillow_heif", Opener)
    entries.suffixes.cache_clear()
    entries.register_openers.cache_clear()
    try:
        assert entries.is_image("IMG_1.HEIC")
    finally:
        entries.suffixes.cache_clear()
        entries.register_openers.cache_clear()


def test_the_first_of_several_pictures_in_a_file_is_taken(tmp_path):
    red, blue = (Image.new("RGB", (24, 20), COLOURS[name]) for name in ("red", "blue"))
    for name in ("a.gif", "b.webp", "c.tif", "d.png"):
        red.save(tmp_path / name, save_all=True, append_images=[blue])
        assert np.array(open_picture(str(tmp_path / name)))[0, 0, 0] > 180


@pytest.fixture
def cluttered(tmp_path, monkeypatch):
    """Classes among what systems, tools and phones leave beside them and in them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    root = fill(tmp_path / "data")
    for name in (
        "annotations",
        "labels",
        "$RECYCLE.BIN",
        "System Volume Information",
        "lost+found",
        ".ipynb_checkpoints",
    ):
        (root / name).mkdir()
    for name in ("__MACOSX/red", "@eaDir"):
        write(root / name / "x.png")
    (root / "annotations" / "a.xml").write_text("x")
    for name in ("Thumbs.db", "desktop.ini", "._0.png", "IMG_1.HEIC", "IMG_2.heic", "notes.txt", "no_suffix"):
        (root / "red" / name).write_text("x")
    write(root / "beside.jpg")
    return root


PASSED_OVER = (
    "data: ignored, since Pillow cannot read them: 4 files: 2 .heic (such as red/IMG_1.HEIC), "
    "1 without a suffix (such as red/no_suffix), 1 .txt (such as red/notes.txt); to read .heic: pip install pillow-heif"
)


def test_folders_that_are_no_classes_are_left_out_with_a_word(cluttered, tmp_path):
    done = mulki("new", "recipe", "data", "--out", "own.yaml")
    for line in (
        "no image lies in 'annotations', 'labels'; left out of the classes (leave_out)",
        "ignored, since hidden or made by the system: '$RECYCLE.BIN', '.ipynb_checkpoints', '@eaDir', 'System Volume",
        "ignored, since in no class folder: 1 image (such as beside.jpg)",
        PASSED_OVER,
    ):
        assert line in done.stderr
    assert "Thumbs.db" not in done.stderr
    [task] = json.loads(mulki("show", "own.yaml", "--json").stdout)["recipe"]["stream"]["tasks"]
    assert task["leave_out"] == ["annotations", "labels"]
    assert list(task["class_names"]) == ["green", "red"]
    assert PASSED_OVER in mulki("validate", "own.yaml").stderr
    done = mulki("data", "check", "own.yaml", ok=True)
    assert PASSED_OVER in done.stderr
    assert any(PASSED_OVER in notice for notice in folders(tasks=[task]).notices)


def test_what_the_error_says_makes_the_recipe_valid(cluttered, tmp_path, monkeypatch):
    [line] = wrong(tmp_path, monkeypatch, "name: a, images: data")
    advice = re.search(r"leave_out: \[.*\]", line)[0]
    (tmp_path / "own.yaml").write_text(RECIPE % f"name: a, images: data, {advice}")
    mulki("validate", "own.yaml")


def test_a_class_of_pictures_that_cannot_be_read_is_not_left_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    fill(tmp_path / "data")
    (tmp_path / "data" / "phone").mkdir()
    (tmp_path / "data" / "phone" / "1.heic").write_text("x")
    said = mulki("new", "recipe", "data", ok=False).stderr
    assert "no image (.jpg, .png and the like) lies in 'phone', but 1 .heic" in said
    assert "pip install pillow-heif" in said


def test_a_folder_left_out_may_read_like_a_class(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "train", ["Dog", "cat"])
    fill(tmp_path / "test", ["dog", "DOG", "cat"], 2)
    (tmp_path / "own.yaml").write_text(RECIPE % "name: a, train: train, test: test, leave_out: [DOG]")
    mulki("validate", "own.yaml")
    assert "DOG" not in mulki("data", "check", "own.yaml").stderr


def test_classes_further_down_are_all_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for part in "abcde":
        fill(tmp_path / "all" / "inner" / part, ["red", "green"])
    said = mulki("new", "recipe", "all", "--out", "-").stderr
    paths = " ".join(f"all/inner/{part}" for part in "abcde")
    assert f"if those are the classes: mulki new recipe {paths}\n" in said
    mulki("new", "recipe", *paths.split(), "--out", "own.yaml")
    mulki("validate", "own.yaml")


def test_only_a_recycling_bin_is_the_systems(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "waste", ["recycled", "$RECYCLE.BIN", "paper"])
    mulki("new", "recipe", "waste", "--out", "own.yaml")
    [task] = json.loads(mulki("show", "own.yaml", "--json").stdout)["recipe"]["stream"]["tasks"]
    assert list(task["class_names"]) == ["paper", "recycled"]


@pytest.mark.parametrize(
    "stream", ["{name: folders, tasks: [%s]}", "{name: mixed, of: [{name: folders, tasks: [%s]}]}"]
)
def test_names_that_read_alike_are_found_inside_another_stream(tmp_path, monkeypatch, stream):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "data", ["x", "y"])
    names = ", ".join(f"{kind}: '{'very ' * 80}{kind}'" for kind in "xy")
    own = stream % f"{{name: a, images: data, class_names: {{{names}}}}}"
    said = mulki("validate", "mtil", "--set", f"stream={own}", "--strategy", "finetune", ok=False).stderr
    assert "2 classes read the same" in said


def test_a_recipe_that_cannot_be_written_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "data", ["x", "y"])
    monkeypatch.setattr(draft.Draft, "text", lambda self, file: "\udcff")
    assert "cannot be written" in mulki("new", "recipe", "data", "--out", "own.yaml", ok=False).stderr
    assert not (tmp_path / "own.yaml").exists()
    assert "cannot be written" in mulki("new", "recipe", "data", "--out", "~nobody/own.yaml", ok=False).stderr


def test_classes_that_cannot_be_parted_are_left_out_with_a_word(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "a", ["red", "green"])
    fill(tmp_path / "a", ["lone"], 1)
    fill(tmp_path / "b" / "train", ["Red", "green", "fish"])
    fill(tmp_path / "b" / "test", ["red", "green"], 2)
    done = mulki("new", "recipe", "a", "b", "--out", "own.yaml")
    assert "a: 'lone': only one image" in done.stderr
    assert "b: 'fish': not in both train and test" in done.stderr
    tasks = json.loads(mulki("show", "own.yaml", "--json").stdout)["recipe"]["stream"]["tasks"]
    assert [task["leave_out"] for task in tasks] == [["lone"], ["fish"]]
    b = folders(tasks=tasks).tasks[1]
    assert b.class_names == ("Red", "green")
    assert b.test.files == ["red/0.png", "red/1.png", "green/0.png", "green/1.png"], "spelt in another case"


@pytest.mark.parametrize("place", ["x/x", "x/images", "x/data/train"])
def test_classes_in_a_folder_in_the_folder(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / place, ["red", "green"])
    (tmp_path / "x" / "annotations").mkdir()
    mulki("new", "recipe", "x", "--out", "own.yaml")
    [task] = json.loads(mulki("show", "own.yaml", "--json").stdout)["recipe"]["stream"]["tasks"]
    assert task["images"] == place
    assert list(task["class_names"]) == ["green", "red"]


@pytest.mark.parametrize("typed", ["data", "data/", "./data", "../here/data", "~/data", "{absolute}"])
def test_paths_stay_as_they_were_typed(typed, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "here"))
    fill(tmp_path / "here" / "data")
    mulki("new", "recipe", typed.replace("{absolute}", str(tmp_path / "here" / "data")), "--out", "own.yaml")
    [task] = json.loads(mulki("show", "own.yaml", "--json").stdout)["recipe"]["stream"]["tasks"]
    kept = {"data/": "data", "./data": "data", "{absolute}": str(tmp_path / "here" / "data")}
    assert task["images"] == kept.get(typed, typed)
    mulki("validate", "own.yaml")


def test_the_recipe_works_as_it_stands_and_so_does_its_advice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "data")
    mulki("new", "recipe", "data", "--out", "own.yaml")
    text = (tmp_path / "own.yaml").read_text()
    assert "..." not in text
    assert "classes: seen" in text
    assert str(tmp_path) not in text
    for command in re.findall(r"^#   mulki (.*?)(?: +#.*)?$", text, re.M):
        words = command.split()
        mulki(*words, *["--dry-run"] * (words[0] == "run"))
    lines = text.splitlines()
    large = [line.removeprefix("#   ") for line in lines if line.startswith(("#   model:", "#   train:"))]
    start, end = lines.index("train:"), lines.index("evaluate:")
    kept = [line for line in lines[:start] + lines[end:] if not line.startswith("model:")]
    (tmp_path / "large.yaml").write_text("\n".join([*kept, *large]) + "\n")
    assert len(large) == 2
    mulki("validate", "large.yaml")


def test_data_check_opens_the_images_of_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "a", ["red", "green"])
    fill(tmp_path / "b", ["red", "blue"])
    (tmp_path / "own.yaml").write_text(RECIPE % "name: a, images: a}\n    - {name: b, images: b")
    for i, path in enumerate(sorted((tmp_path / "a").rglob("*.png")) + sorted((tmp_path / "b").rglob("*.png"))):
        write(path, size=(20 + i, 20))
    assert re.search(r"^b +found +2 +8 +2 +b$", mulki("data", "check", "own.yaml").stdout, re.M)
    damaged = tmp_path / "b" / "red" / "1.png"
    damaged.write_bytes(damaged.read_bytes()[:50])
    done = mulki("data", "check", "own.yaml", ok=False)
    assert re.search(r"^b +damaged", done.stdout, re.M)
    assert "error: b: b/red/1.png: this image cannot be read: " in done.stderr
    report = json.loads(mulki("data", "check", "own.yaml", "--json", ok=False).stdout)
    assert [entry["state"] for entry in report["datasets"]] == ["found", "damaged"]
    mulki("data", "fetch", "own.yaml")


def test_left_out_images_are_recorded_by_name(three, tmp_path):
    mulki("new", "recipe", *three[:2], "--out", "own.yaml", "--name", "own")
    for name in ("train/red/0.png", "val/red/1.png"):
        (tmp_path / "data" / "parted" / name).write_bytes(b"no image")
    few = ["--set", "train.epochs=1", "--set", "train.iterations=null", "--set", "train.schedule.warmup=0"]
    few += ["--set", "train.workers=0", "--set", "train.unreadable=skip", "--strategy", "finetune"]
    done = mulki("run", "own.yaml", *few)
    assert "1 images cannot be read and are left out, such as data/parted/val/red/1.png" in done.stderr
    [file] = tmp_path.glob("runs/own/finetune+*/seed-0/result.json")
    result = json.loads(file.read_text())
    assert result["left_out"] == {
        "parted/train": ["data/parted/train/red/0.png"],
        "parted/test": ["data/parted/val/red/1.png"],
    }
    mulki("results", "runs")


def test_the_advice_on_an_image_that_cannot_be_read_lets_the_run_go_on(three, tmp_path):
    """Where it was removed instead, the data would be others, and a resume would refuse them."""
    mulki("new", "recipe", *three[:2], "--out", "own.yaml", "--name", "own")
    (tmp_path / "data" / "parted" / "train" / "red" / "0.png").write_bytes(b"no image")
    few = ["--set", "train.iterations=4", "--set", "train.schedule.warmup=0", "--set", "train.workers=0"]
    few += ["--set", "train.batch_size=10", "--strategy", "finetune"]
    error = mulki("run", "own.yaml", *few, ok=False).stderr.splitlines()[-1]
    advice = re.search(r"(--resume --set \S+)", error)[1]
    done = mulki("run", "own.yaml", *few, *advice.split())
    assert "resuming from" in done.stderr
    assert "such as data/parted/train/red/0.png" in done.stderr


def test_folders_whose_names_cannot_name_a_task(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    typed = ["a\\b", "x" * 240, "bell\a", "$1_$5"]
    for name in typed:
        fill(tmp_path / name)
    mulki("new", "recipe", *typed, "--out", "own.yaml")
    mulki("validate", "own.yaml")
    tasks = json.loads(mulki("show", "own.yaml", "--json").stdout)["recipe"]["stream"]["tasks"]
    assert [task["name"] for task in tasks] == ["a-b", "x" * 100, "bell-", "$1_$5"]


def test_a_name_with_a_line_end_is_refused_as_a_name(tmp_path):
    root = fill(tmp_path / "a", ["c1", "tea"])
    with pytest.raises(Mistakes, match=r"the name of the class folder 'c1' must be one line .*, got 'new\\nline'"):
        folders(tasks=[{"name": "a", "images": str(root), "class_names": {"c1": "new\nline"}}])
