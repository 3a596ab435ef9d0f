"""`mulki data check` and `mulki data fetch`, and runs over miniatures of the published data sets."""

import functools
import hashlib
import http.server
import importlib.util
import io
import json
import shutil
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image
from torchvision import datasets

from mulki_plugins.cli import main
from mulki_plugins.errors import MulkiError
from mulki_plugins.streams.mtil.declaration import declaration
from mulki_plugins.streams.mtil.fetch import ASIDE, fetch

ROOT = Path(__file__).parent.parent
RECIPE = "mtil-vitb16"
CLASSES = ["banded", "polka-dotted", "zigzagged"]


def mulki(*arguments, status=0):
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    assert done.exit_code == status, done.output + done.stderr
    return done


@pytest.fixture(scope="module")
def layouts():
    spec = importlib.util.spec_from_file_location("mtil_layouts", ROOT / "tools" / "mtil_layouts.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(path, label):
    Image.new("RGB", (30, 26), (80 * label, 200, 255 - 80 * label)).save(path)


@pytest.fixture
def root(layouts, tmp_path):
    """Two of the eleven, small."""
    layouts.dtd(tmp_path / "data", CLASSES, [0, 1, 2] * 4, [2, 1, 0, 0], write)
    layouts.eurosat(tmp_path / "data", ["Forest", "River"], [0, 1] * 5, write)
    return tmp_path / "data"


@pytest.fixture
def cars(layouts, root):
    layouts.stanford_cars(root, ["Acura RL Sedan 2012", "Ram Van 2012"], [0, 1], [1, 0], write)
    return root / "stanford_cars"


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def checked(*arguments, status=2):
    return json.loads(mulki("data", "check", RECIPE, "--json", *arguments, status=status).stdout)


def test_each_data_set_is_found_or_missing_with_how_to_get_it(root):
    before = tree(root)
    said = checked("--set", f"stream.root={root}")
    assert [e["name"] for e in said["datasets"] if e["state"] != "missing"] == ["DTD", "EuroSAT"]
    assert not said["ok"]
    by_name = {e["name"]: e for e in said["datasets"]}
    assert len(by_name) == 11
    assert by_name["DTD"]["images"] == {
        "train": {"found": 12, "expected": 1880},
        "test": {"found": 4, "expected": 1880},
    }
    assert by_name["EuroSAT"]["images"]["train"] == {"found": 8, "expected": 21600}
    assert by_name["SUN397"]["folder"] == str(root / "SUN397")
    assert "37 GB" in by_name["SUN397"]["get"]
    assert "devkit/cars_meta.mat" in by_name["StanfordCars"]["get"]
    text = mulki("data", "check", RECIPE, "--set", f"stream.root={root}", status=2)
    for word in (str(root / "cifar-100-python"), "12 / 1,880", "to get the missing data sets"):
        assert word in text.stdout
    assert "9 of 11 data sets are missing: Aircraft, Caltech101" in text.stderr
    assert f"DTD: {root / 'dtd/dtd/labels'}: 12 train images, expected 1,880" in text.stderr
    assert tree(root) == before


def test_class_folders_too_many_and_too_few_are_named(root):
    shutil.copytree(root / "eurosat" / "2750" / "River", root / "eurosat" / "2750" / "Rivers")
    (root / "dtd" / "dtd" / "images" / "knitted").mkdir()
    [dtd, eurosat] = checked("--set", f"stream.root={root}", "--set", "stream.tasks=[DTD,EuroSAT]")["datasets"]
    assert f"{root / 'eurosat/2750/Rivers'}: a class too many: 'Rivers'" in eurosat["wrong"]
    assert f"{root / 'eurosat/2750/Pasture'}: a class too few: 'Pasture'" in eurosat["wrong"]
    assert f"{root / 'dtd/dtd/images/knitted'}: a class folder that no annotation names" in dtd["wrong"]


def with_thumbnail_cut_off(path):
    """A photograph whose first part ends as a JPEG does, in its small copy for previews."""
    small, large = io.BytesIO(), io.BytesIO()
    Image.effect_noise((80, 60), 60).save(small, "JPEG")
    exif = b"Exif\0\0" + b"II*\0" + bytes(8) + small.getvalue()
    Image.effect_noise((400, 300), 60).save(large, "JPEG", exif=exif)
    path.write_bytes(large.getvalue()[: len(large.getvalue()) // 2])


def test_what_a_camera_appends_is_no_damage(root):
    path = root / "eurosat" / "2750" / "Forest" / "Forest_2.jpg"
    path.write_bytes(path.read_bytes() + bytes(70_000))
    [entry] = checked("--set", f"stream.root={root}", "--set", "stream.tasks=[EuroSAT]")["datasets"]
    assert entry["state"] == "differs"


@pytest.mark.parametrize(
    ("spoil", "said", "decode"),
    [
        (lambda path: path.write_bytes(b""), "this image is empty", False),
        (
            lambda path: path.write_bytes(path.read_bytes()[:-40]),
            "this image cannot be read",
            False,
        ),
        (lambda path: path.write_text("<html>404</html>"), "this image cannot be read: it is not an image", False),
        (with_thumbnail_cut_off, "this image cannot be read: image file is truncated", False),
        (lambda path: path.write_bytes(path.read_bytes()[:200] + b"\xff\xd9"), "this image cannot be read", True),
    ],
)
def test_a_damaged_image_is_named(root, spoil, said, decode):
    path = root / "eurosat" / "2750" / "Forest" / "Forest_2.jpg"
    spoil(path)
    [entry] = checked("--set", f"stream.root={root}", "--set", "stream.tasks=[EuroSAT]", *["--decode"] * decode)[
        "datasets"
    ]
    assert entry["state"] == "damaged"
    assert any(line.startswith(f"{path}: {said}") for line in entry["wrong"]), entry["wrong"]


def test_a_data_set_as_published_is_fine(root, monkeypatch):
    from mulki_plugins.streams.mtil import dataset

    def small(name):
        from attrs import evolve

        return evolve(declaration(name), images={"zscl": (8, 2)}, classes={"Forest": "forest", "River": "river"})

    monkeypatch.setattr(dataset, "declaration", small)
    said = checked("--set", f"stream.root={root}", "--set", "stream.tasks=[EuroSAT]", status=0)
    assert said["ok"]
    assert said["datasets"][0]["state"] == "found"
    assert said["datasets"][0]["wrong"] == []


def test_what_may_not_be_read_hides_nothing_else(root, monkeypatch):
    real = Path.exists

    def exists(path):
        if "eurosat" in path.parts:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "exists", exists)
    eurosat, dtd = checked("--set", f"stream.root={root}", "--set", "stream.tasks=[EuroSAT, DTD]")["datasets"]
    assert eurosat["wrong"] == [f"{root / 'eurosat/2750'}: Permission denied"]
    assert dtd["classes"]["found"]


def test_the_home_of_nobody_is_said_when_a_recipe_is_validated():
    for command in ("validate", "show"):
        done = mulki(command, RECIPE, "--set", "stream.root=~no-such-user/data", status=2)
        assert "$.stream.root: ~no-such-user/data: this machine has no user of that name" in done.stderr


def test_a_data_set_in_part_says_how_to_get_it(root, cars):
    (cars / "deeper").mkdir()
    (cars / "cars_test_annos_withlabels.mat").rename(cars / "deeper" / "cars_test_annos_withlabels.mat")
    arguments = ("--set", f"stream.root={root}", "--set", "stream.tasks=[StanfordCars]")
    [entry] = checked(*arguments)["datasets"]
    first, second = entry["wrong"]
    assert first.endswith(f"not there, but {cars / 'deeper' / 'cars_test_annos_withlabels.mat'} is; move it up")
    assert "is not whole: " in second
    assert "devkit" in second
    done = mulki("data", "fetch", RECIPE, *arguments, status=2)
    assert "away first" not in done.stderr


def test_images_one_folder_too_deep_are_found(root, cars):
    aside = (cars / "cars_train").rename(cars / "aside")
    (cars / "cars_train").mkdir()
    aside.rename(cars / "cars_train" / "cars_train")
    [entry] = checked("--set", f"stream.root={root}", "--set", "stream.tasks=[StanfordCars]")["datasets"]
    assert any(
        line.endswith(f"it is in {cars / 'cars_train' / 'cars_train'}: move the images up") for line in entry["wrong"]
    )


def test_a_recipe_of_another_stream_has_nothing_to_check():
    assert "nothing to do" in mulki("data", "check", "mtil").stdout
    assert json.loads(mulki("data", "check", "mtil", "--json").stdout) == {"ok": True, "datasets": []}
    assert "nothing to do" in mulki("data", "fetch", "mtil").stdout
    assert "no such file" in mulki("data", "check", "mtill", status=2).stderr
    assert "unknown option" in mulki("data", "check", RECIPE, "--set", "stream.rot=x", status=2).stderr


def test_reference_data_are_checked_if_a_plugin_needs_them(tmp_path):
    reference = f"reference={{name: mtil, root: {tmp_path}, tasks: [DTD]}}"
    done = mulki("data", "check", "mtil", "--strategy", "zscl", "--set", reference, status=2)
    assert "1 of 1 data sets are missing: DTD" in done.stderr
    assert "nothing to do" in mulki("data", "check", "mtil", "--set", reference).stdout


def test_checking_imports_neither_torch_nor_avalanche(root):
    code = (
        "import sys; from mulki_plugins.cli import main\n"
        f"try: main(['data', 'check', '{RECIPE}', '--set', 'stream.root={root}'])\n"
        "except SystemExit as end: assert end.code == 2\n"
        "print(sorted({'torch', 'torchvision', 'avalanche', 'open_clip'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr.splitlines()[-1] == "[]", done.stderr


@pytest.fixture
def archive(layouts, tmp_path, monkeypatch):
    """DTD's archive on a server of this machine, in place of the one from which torchvision would download it."""
    layouts.dtd(tmp_path / "made", CLASSES, [0, 1, 2], [2, 1, 0], write)
    path = tmp_path / "served" / "dtd-r1.0.1.tar.gz"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as file:
        file.add(tmp_path / "made" / "dtd" / "dtd", "dtd")
    handler = functools.partial(Quiet, directory=path.parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(datasets.DTD, "_URL", f"http://127.0.0.1:{server.server_port}/{path.name}")
        monkeypatch.setattr(datasets.DTD, "_MD5", hashlib.md5(path.read_bytes()).hexdigest())
        yield path
        server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def fetched(root, *tasks, status=0):
    return mulki(
        "data",
        "fetch",
        RECIPE,
        "--set",
        f"stream.root={root}",
        "--set",
        f"stream.tasks=[{','.join(tasks)}]",
        status=status,
    )


def test_fetching_puts_what_was_downloaded_in_its_place(archive, tmp_path):
    root = tmp_path / "new"
    done = fetched(root, "DTD")
    assert done.stdout == ""
    assert str(root / "dtd") in done.stderr
    assert (root / "dtd" / "dtd" / "labels" / "train1.txt").is_file()
    assert (
        checked("--set", f"stream.root={root}", "--set", "stream.tasks=[DTD]")["datasets"][0]["classes"]["found"] == 3
    )
    before = tree(root)
    fetched(root, "DTD")
    assert tree(root) == before


def test_fetching_overwrites_nothing_and_says_what_it_cannot_get(archive, root):
    shutil.rmtree(root / "dtd" / "dtd" / "labels")
    before = tree(root)
    done = fetched(root, "DTD", "EuroSAT", "StanfordCars", status=2)
    assert (
        f"DTD: {root / 'dtd/dtd/labels/train1.txt'}: not there; nothing is overwritten: move {root / 'dtd'} away"
        in done.stderr
    )
    assert "StanfordCars: its address is gone" in done.stderr
    assert "cars_test_annos_withlabels.mat" in done.stderr
    assert tree(root) == before
    (root / "dtd").rename(root / "dtd-old")
    (root / "dtd").mkdir()
    (root / "dtd" / "mine.txt").write_text("mine")
    assert f"{root / 'dtd/dtd/images'}: not there; nothing is overwritten" in fetched(root, "DTD", status=2).stderr
    with pytest.raises(MulkiError, match="is there but is not whole, and nothing is overwritten"):
        fetch(declaration("DTD"), root)
    (root / "dtd" / "mine.txt").unlink()
    fetched(root, "DTD")
    assert (root / "dtd" / "dtd" / "images").is_dir()


def test_a_broken_download_is_no_traceback_and_leaves_nothing_in_place(archive, tmp_path, monkeypatch):
    whole = datasets.DTD._MD5
    monkeypatch.setattr(datasets.DTD, "_MD5", "0" * 32)
    done = fetched(tmp_path / "new", "DTD", status=2)
    assert "DTD cannot be downloaded: " in done.stderr
    assert "by hand: https://www.robots.ox.ac.uk" in done.stderr
    assert "corrupted" in done.stderr
    assert [p.name for p in (tmp_path / "new").iterdir()] == [ASIDE]
    monkeypatch.setattr(datasets.DTD, "_MD5", whole)
    fetched(tmp_path / "new", "DTD")
    assert (tmp_path / "new" / "dtd" / "dtd" / "images").is_dir()


SMALL = [
    "--set", "model.name=mulki-tiny", "--set", "train.iterations=3", "--set", "train.schedule.warmup=1",
    "--set", "train.batch_size=4", "--set", "strategy.connecting.every=2", "--set", "stream.tasks=[DTD,EuroSAT]",
    "--set", "train.compile=false",
]  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "tasks"), [("mtil-vitb16", ["DTD", "EuroSAT"]), ("mtil-vitb16-5shot", ["DTD", "EuroSAT"])]
)
def test_a_miniature_runs_and_is_said_not_to_be_the_published_one(root, tmp_path, recipe, tasks):
    workers = ["--set", "train.workers=1"] if recipe.endswith("shot") else ["--set", "train.workers=0"]
    done = mulki("run", recipe, *SMALL, *workers, "--set", f"stream.root={root}", "--out", tmp_path / "runs")
    assert "ignoring the recipe's `pretrained: openai`, which is for ViT-B-16-quickgelu" in done.stderr
    assert "warning: DTD is not the published data set" in done.stderr
    assert ("have fewer than 5 training images" in done.stderr) == recipe.endswith("shot")
    [path] = (tmp_path / "runs").rglob("result.json")
    result = json.loads(path.read_text())
    assert result["status"] == "complete"
    assert result["tasks"] == tasks
    beside = mulki("results", tmp_path / "runs", "--against", "published").stdout
    assert "warning: DTD is not the published data set, and no number on it can be compared" in beside


def test_a_run_without_data_says_everything_at_once(tmp_path):
    done = mulki("run", "mtil-vitb16-order2", "--set", f"stream.root={tmp_path}", "--out", tmp_path / "runs", status=2)
    lines = done.stderr.splitlines()
    assert sum("is missing: expected in" in line for line in lines) == 11
    assert "`mulki run mtil` needs none" in lines[-1]
    assert not list(tmp_path.iterdir())


def test_a_damaged_image_ends_a_run_with_its_name(root, tmp_path):
    for path in (root / "dtd" / "dtd" / "images" / "banded").iterdir():
        path.write_bytes(path.read_bytes()[:200])
    workers = ["--set", "train.workers=1"]
    done = mulki("run", RECIPE, *SMALL, *workers, "--set", f"stream.root={root}", "--out", tmp_path / "runs", status=2)
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert line.startswith("error: task DTD, evaluation: ")  # the zero-shot one meets it first
    assert str(root / "dtd/dtd/images/banded") in line
    assert "cannot be read" in line


@pytest.mark.parametrize("recipe", ["mtil-vitb16", "mtil-vitb16-order2", "mtil-vitb16-5shot"])
def test_the_recipes_say_what_the_protocol_says(recipe):
    text = (ROOT / "recipes" / f"{recipe}.yaml").read_text()
    said = json.loads(mulki("show", recipe, "--json").stdout)["recipe"]
    assert "Nobody has measured its time and memory yet." in text
    written = {key: value for key, value in said["model"].items() if value is not None}
    assert written == {"name": "ViT-B-16-quickgelu", "train": "all", "pretrained": "openai"}
    train = said["train"]
    assert train["iterations"] == (500 if "5shot" in recipe else 1000)
    assert train["batch_size"] == 64
    assert (train["optimizer"]["name"], train["optimizer"]["lr"], train["optimizer"]["weight_decay"]) == (
        "adamw",
        1e-5,
        0.0,
    )
    assert train["schedule"] == {"name": "cosine", "warmup": 100}
    assert train["label_smoothing"] == 0.2
    assert {task: budget["lr"] for task, budget in train["per_task"].items()} == {"Aircraft": 5e-5, "MNIST": 5e-5}
    assert said["stream"]["order"] == ("II" if "order2" in recipe else "I")
    assert said["stream"]["shots"] == (5 if "5shot" in recipe else None)
    assert said["stream"]["split"] == "zscl"
