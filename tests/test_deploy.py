"""The model after the run: export, predict and evaluate, on runs over folders that are written here."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import open_clip.factory as factory
import pytest
import torch
from click.testing import CliRunner
from open_clip.transform import image_transform
from open_clip.transformer import QuickGELU
from PIL import Image, ImageOps
from safetensors.torch import load_file

from mulki_plugins.cli import main
from mulki_plugins.deploy import card, features, onnx_files
from mulki_plugins.deploy.candidates import Candidates
from mulki_plugins.deploy.inputs import Input, find_images
from mulki_plugins.deploy.model import DeployedClip
from mulki_plugins.deploy.predict import classify
from mulki_plugins.deploy.source import find_source
from mulki_plugins.errors import MulkiError
from mulki_plugins.heads.rail import Rail
from mulki_plugins.models.weights import weight_file
from mulki_plugins.registry import builtin
from mulki_plugins.report.folder import prepare_folder
from mulki_plugins.streams.images import open_picture
from tests.conftest import small_clip, small_tokenizer, small_world
from tests.environments import ROOT

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 60, 220), "crane": (240, 240, 90)}
HOSTILE = (
    '"><script>alert(1)</script>', "`rm -rf`|[x](http://evil.example)", "\u202egnp.exe", "שלום", "long " * 60 + "name",
)  # fmt: skip
TASKS = {"birds": ("crane", "red", "green"), "sites": ("crane", "blue"), "odd |names|": HOSTILE}
ARCHITECTURE = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


def mulki(*arguments, status=0, **options):
    done = CliRunner().invoke(main, [str(a) for a in arguments], **options)
    assert done.exit_code == status, done.output + done.stderr
    assert "Traceback" not in done.output
    return done


def paint(path, colour, rng, size=(40, 52)):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.array(colour)[None, None] + rng.normal(0, 60, (*size, 3))
    Image.fromarray(np.clip(noise, 0, 255).astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Three tasks of folders, one with hostile class names; two architectures as if open_clip had them."""
    root = tmp_path_factory.mktemp("deploy")
    rng = np.random.default_rng(0)
    for task, names in TASKS.items():
        for c, name in enumerate(names):
            for part, count in (("train", 4), ("test", 6)):
                for i in range(count):
                    colour = COLOURS.get(name) or (rng.integers(255), 40 * c, 128)
                    paint(root / "data" / str(list(TASKS).index(task)) / part / f"{c}" / f"{i}.png", colour, rng)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for name, more in (("tower", {}), ("tower-quickgelu", {"quick_gelu": True})):
            patch.setitem(factory._MODEL_CONFIGS, name, {**ARCHITECTURE, **more})
        own = root / "open_clip"
        (own / "model_configs").mkdir(parents=True)
        shutil.copy(Path(open_clip.__file__).parent / "pretrained.py", own)
        for name in ("tower", "tower-quickgelu"):
            (own / "model_configs" / f"{name}.json").write_text(json.dumps(factory._MODEL_CONFIGS[name]))
        patch.setattr(builtin, "open_clip_folder", lambda: own)
        for cached in (builtin.open_clip_models, builtin._tags):
            cached.cache_clear()
        yield root
    for cached in (builtin.open_clip_models, builtin._tags):
        cached.cache_clear()


def recipe_for(root, model, **more):
    tasks = [
        {
            "name": task, "train": str(root / f"data/{i}/train"), "test": str(root / f"data/{i}/test"),
            "class_names": list(names), "templates": ["a photo of a {}.", "{}, seen."], "licence": f"CC <BY> {i}.0",
        }
        for i, (task, names) in enumerate(TASKS.items())
    ]  # fmt: skip
    return {
        "name": "mine", "stream": {"name": "folders", "tasks": tasks}, "model": model, "strategy": "finetune",
        "train": {"iterations": 3, "batch_size": 6, "optimizer": {"lr": 0.001}}, "device": "cpu", "loggers": [], **more,
    }  # fmt: skip


TINY = {"name": "mulki-tiny"}
TOWER = {
    "name": "tower-quickgelu", "pretrained": "random", "train": "image", "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4],
    "interpolation": "bilinear", "resize_mode": "squash",
}  # fmt: skip
KINDS = {
    "task": (TINY, {}),
    "seen": (TINY, {"evaluate": {"classes": "seen"}}),
    "all": (TINY, {"evaluate": {"classes": "all", "batch_size": 5}}),
    "tower": (TOWER, {}),
    "head": (TINY | {"head": {"rail": {"width": 40, "features": "pooled"}}, "train": "text"}, {}),
    "head-seen": (TINY | {"head": {"rail": {"width": 40}}, "train": "none"}, {"evaluate": {"classes": "seen"}}),
    "head-tower": (
        {
            "name": "tower",
            "pretrained": "random",
            "train": "text",
            "head": {"rail": {"width": 40, "features": "pooled"}},
        },
        {},
    ),
    "text": ({"name": "tower", "pretrained": "random", "train": "text"}, {"evaluate": {"classes": "all"}}),
}


@pytest.fixture(scope="module")
def runs(world):
    """A run for each kind of model and scope, and its export."""
    found = {}
    for kind, (model, more) in KINDS.items():
        path = world / f"{kind}.yaml"
        path.write_text(json.dumps(recipe_for(world, model, **more)))
        mulki("run", path, "--out", world / "runs", "--name", kind)
        run = world / "runs/mine" / kind / "seed-0"
        mulki("export", run, "--to", world / "exports" / kind)
        found[kind] = run
    return found


def exported(world, kind):
    return world / "exports" / kind


def last_row(run):
    return json.loads((run / "result.json").read_text())["matrix"][-1]


WITHOUT_MULKI = """
import importlib.util, json, sys
from pathlib import Path
for name in ("mulki_plugins", "mulki", "avalanche"):
    sys.modules[name] = None
import open_clip, torch
from PIL import Image
answers = {}
for folder, scope in json.loads(sys.argv[1]):
    spec = importlib.util.spec_from_file_location("classify", Path(folder, "classify.py"))
    model = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(model)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    again, row = [], []
    for i, task in enumerate(model.CLASSES["tasks"]):
        keys, names = model.FEATURES[f"key.{i}"].tolist(), task["class_names"]
        with torch.inference_mode():
            texts = [model.MODEL.encode_text(tokenizer([t.replace("{}", n) for n in names])) for t in task["templates"]]
            mean = torch.nn.functional.normalize(sum(torch.nn.functional.normalize(t, dim=-1) for t in texts), dim=-1)
        again.append(float((mean - model.FEATURES[f"text.{i}"]).abs().max()))
        classes = model.candidates(task["name"] if scope == "task" else None)
        files = sorted(Path(sys.argv[2], "data", str(i), "test").glob("*/*.png"))
        choice = model.classify([model.open_image(file) for file in files], classes).argmax(1).tolist()
        right = sum(classes[c][0] == keys[int(file.parent.name)] for c, file in zip(choice, files))
        row.append(100 * right / len(files))
    answers[folder] = row, max(again)
assert "mulki_plugins" not in [n for n, m in sys.modules.items() if m is not None]
print(json.dumps(answers))
"""


def test_a_process_without_mulki_reproduces_the_last_row_of_each_run(world, runs):
    asked = [
        (str(exported(world, kind)), json.loads((run / "result.json").read_text())["protocol"]["classes"])
        for kind, run in runs.items()
    ]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_MULKI, json.dumps(asked), str(world)], capture_output=True, text=True, cwd="/",
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    for kind, run in runs.items():
        row, difference = answers[str(exported(world, kind))]
        assert row == last_row(run), kind
        assert difference < 1e-5, f"{kind}: the tokenizer and the text tower give the text features"


def test_an_export_brings_its_head(world, runs, tmp_path):
    folder = tmp_path / "moved"
    shutil.copytree(exported(world, "head"), folder)
    kept = load_file(folder / "head.safetensors")
    assert kept.keys() == {"hidden", "weights", "learned"}, "the sums are not needed to answer"
    assert json.loads((folder / "head.json").read_text())["options"]["features"] == "pooled"
    assert "head.py" in (folder / "README.md").read_text()
    assert not (exported(world, "task") / "head.json").exists()
    assert "head.py" not in (exported(world, "task") / "README.md").read_text()
    picture = next((world / "data/0/test").glob("*/*.png"))
    answers = [mulki("predict", each, picture, "--json").stdout for each in (runs["head"], folder)]
    scores = [[p["probability"] for p in json.loads(answer)["predictions"]] for answer in answers]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    (folder / "head.safetensors").unlink()
    assert "without it the model lacks its head" in mulki("predict", folder, picture, status=2).stderr
    (folder / "head.json").write_text('{"name": "rail"')
    assert "head.json: damaged" in mulki("predict", folder, picture, status=2).stderr
    (folder / "head.json").write_text('{"name": "rial", "options": {}}')
    assert "rial" in mulki("predict", folder, picture, status=2).stderr
    (folder / "head.json").unlink()
    assert (
        "head.json: no such file; without it the model lacks its head"
        in mulki("predict", folder, picture, status=2).stderr
    )


def test_the_script_of_an_export_reads_images_as_predict_does(world, runs, tmp_path):
    spec = importlib.util.spec_from_file_location("classify", exported(world, "task") / "classify.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    grey = np.random.default_rng(2).integers(0, 2**16, (20, 30), dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / "deep.png")
    Image.fromarray(grey.astype(np.int32)).save(tmp_path / "long.tiff")
    Image.fromarray((grey // 257).astype(np.int32)).save(tmp_path / "bytes.tiff")
    Image.fromarray(np.dstack([grey // 257] * 4).astype(np.uint8)).save(tmp_path / "clear.png")
    for name in ("deep.png", "long.tiff", "bytes.tiff", "clear.png"):
        seen = np.asarray(script.open_image(tmp_path / name))
        assert np.array_equal(seen, np.asarray(open_picture(str(tmp_path / name)))), name
        assert seen.std() > 10, name
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112], exif[0x010F] = orientation, "Maker"
        good, odd = tmp_path / f"{orientation}.jpg", tmp_path / f"{orientation}-odd.jpg"
        Image.effect_noise((12, 9), 90).save(good, exif=exif)
        odd.write_bytes(good.read_bytes().replace(b"\x01\x0f\0\x02", b"\x01\0\0\x02"))  # the maker's name as the width
        upright = np.asarray(ImageOps.exif_transpose(Image.open(good)).convert("RGB"))
        for path in (good, odd):
            assert np.array_equal(np.asarray(script.open_image(path)), upright), path
            seen = open_picture(str(path))
            assert np.array_equal(np.asarray(seen), upright), path
            assert orientation == 1 or 0x0112 not in seen.getexif()
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(ValueError, match="floating-point"):
        script.open_image(tmp_path / "float.tiff")


def test_an_export_is_not_taken_for_a_run(world, runs, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(exported(world, "task"), folder)
    before = sorted(folder.iterdir())
    assert "it holds a recipe, but no run to resume; `mulki run" in mulki("resume", folder, status=2).stderr
    task = ("--task", world / "data/0/train")
    assert (
        "exists and is not the folder of a run"
        in mulki("extend", runs["task"], *task, "--out", folder, status=2).stderr
    )
    with pytest.raises(MulkiError, match="exists and is not the folder of a run"):
        prepare_folder(folder)
    assert sorted(folder.iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "nothing was moved aside"


def test_the_export_says_how_the_model_was_trained(world, runs):
    config = json.loads((exported(world, "tower") / "open_clip_config.json").read_text())
    assert config["model_cfg"]["quick_gelu"] is True
    assert config["preprocess_cfg"] == {
        "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear", "resize_mode": "squash",
    }  # fmt: skip
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{exported(world, 'tower')}")
    assert any(isinstance(module, QuickGELU) for module in model.modules())
    kept = load_file(runs["tower"] / "checkpoints" / "task-03-odd--names-" / "weights.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in model.state_dict().items())
    plain = json.loads((exported(world, "text") / "open_clip_config.json").read_text())
    assert plain["model_cfg"]["quick_gelu"] is False
    assert not (exported(world, "text") / "merges.txt.gz").exists(), "open_clip's own tokenizer is not copied"


def test_the_tokenizer_survives_a_move(world, runs, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(exported(world, "task"), moved)
    mine = open_clip.get_tokenizer(f"local-dir:{exported(world, 'task')}")(["a photo of a crane."])
    again = open_clip.get_tokenizer(f"local-dir:{moved}", bpe_path=str(moved / "merges.txt.gz"))(
        ["a photo of a crane."]
    )
    assert mine.shape == (1, 16)
    assert torch.equal(mine, again)
    assert not torch.equal(mine, open_clip.get_tokenizer("ViT-B-32", context_length=16)(["a photo of a crane."]))


# --- evaluate -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(KINDS))
def test_evaluate_repeats_the_last_row_from_the_run_and_from_the_export(world, runs, kind):
    for source in (runs[kind], exported(world, kind)):
        found = json.loads(mulki("evaluate", source, "--json").stdout)
        assert [task["accuracy"] for task in found["tasks"]] == last_row(runs[kind])
        assert [task["task"] for task in found["tasks"]] == list(TASKS)


def test_evaluate_in_another_scope_gives_that_run_s_last_row(world, runs):
    assert last_row(runs["task"]) != last_row(runs["all"]), "the scopes differ, or this shows nothing"
    for scope in ("task", "seen", "all"):
        found = json.loads(mulki("evaluate", runs["task"], "--classes", scope, "--json").stdout)
        assert [task["accuracy"] for task in found["tasks"]] == last_row(runs[scope])


def test_evaluate_on_the_user_s_folder(world, runs, tmp_path):
    rng = np.random.default_rng(1)
    for name, folder in (("crane", "Crane"), ("blue", "blue"), ("red", "003.red")):
        for i in range(3):
            paint(tmp_path / "own" / folder / f"{i}.png", COLOURS[name], rng)
    paint(tmp_path / "own" / "grean" / "0.png", (0, 0, 0), rng)
    (tmp_path / "own" / "blue" / "broken.jpg").write_bytes(b"\xff\xd8 no")
    done = mulki("evaluate", runs["task"], "--data", tmp_path / "own", "--json", status=3)
    found = json.loads(done.stdout)
    assert found["classes"] == "seen"
    assert {task["task"]: task["images"] for task in found["tasks"]} == {"birds": 6, "sites": 3}
    assert found["all"]["images"] == 9
    assert "grean: no class has this name (did you mean 'green'?)" in done.stderr
    assert "broken.jpg" in done.stderr
    deeper = mulki("evaluate", runs["task"], "--data", tmp_path, status=2)
    assert f"the class folders lie deeper; type --data {tmp_path / 'own'}" in deeper.stderr
    right = 0
    for folder, name in (("Crane", "crane"), ("blue", "blue"), ("003.red", "red")):
        lines = mulki("predict", runs["task"], tmp_path / "own" / folder / "[0-9].png", "--top", 1, "--json").stdout
        right += sum(json.loads(line)["predictions"][0]["class"] == name for line in lines.splitlines())
    assert found["all"]["right"] == right, "predict answers the same"
    low, high = found["all"]["interval"]
    assert 0 <= low < found["all"]["accuracy"] < high <= 100
    table = mulki("evaluate", runs["task"], "--data", tmp_path / "own", "--classes", "birds").stdout
    assert "birds" in table
    assert "sites" not in table


def test_numbered_folders_are_matched_in_every_scope(world, runs, tmp_path):
    rng = np.random.default_rng(3)
    for i, name in enumerate(("crane", "red", "green"), 1):
        for k in range(3):
            paint(tmp_path / f"{i}-{name}" / f"{k}.png", COLOURS[name], rng)
    (tmp_path / "1-crane").rename(tmp_path / "1-red one")  # no class: the numbers are recognised among all folders
    found = [
        json.loads(mulki("evaluate", runs["task"], "--data", tmp_path, "--classes", scope, "--json").stdout)["all"]
        for scope in ("birds", "task")
    ]
    assert found[0] == found[1]
    assert found[0]["images"] == 6


def test_evaluate_names_what_lies_in_the_folders_and_does_not_count(world, runs, tmp_path):
    rng = np.random.default_rng(4)
    paint(tmp_path / "1_red" / "0.png", COLOURS["red"], rng)
    (tmp_path / "1_red" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "1_red" / "raw.arw").write_bytes(b"raw")
    (tmp_path / "blue").mkdir()
    done = mulki("evaluate", runs["task"], "--data", tmp_path, "--json", status=3)
    found = json.loads(done.stdout)
    assert [(each["task"], each["images"]) for each in found["tasks"]] == [("birds", 1)], (
        "a number that counts is no name"
    )
    assert found["all"]["left_out"] == [str(tmp_path / "1_red" / "gone.png")]
    assert "ignored, since Pillow cannot read them: 1 .arw (such as 1_red/raw.arw)" in done.stderr
    assert "no image in the class folders 'blue'" in done.stderr


def test_evaluate_names_what_cannot_be(world, runs, tmp_path):
    (tmp_path / "flat").mkdir()
    paint(tmp_path / "flat" / "x.png", (0, 0, 0), np.random.default_rng(0))
    for words, part in (
        (["--data", tmp_path / "nowhere"], "no such folder"),
        (["--data", tmp_path / "flat"], "images lie in it, but no folder"),
        (["--data", world / "data/0"], "none of its 2 folders has the name of a class"),
        (["--classes", "birds"], "expected task, seen or all"),
        (["--stream", "mtil-minni"], "error: --stream: $.stream.name: no stream is named 'mtil-minni'"),
        (["--data", "x", "--stream", "y"], "exclude each other"),
        (["--data", ""], "--data: the text is empty"),
        (["--stream", " "], "--stream: the text is empty"),
        (["--classes", ""], "--classes: the text is empty"),
        (["--device", "meta"], "'meta' is not on this machine"),
    ):
        assert part in mulki("evaluate", runs["task"], *words, status=2).stderr


def test_another_stream_is_asked_with_its_own_classes_or_matched_by_name(world, runs):
    with small_world():
        found = json.loads(mulki("evaluate", runs["task"], "--stream", "small", "--json").stdout)
        assert [task["images"] for task in found["tasks"]] == [8, 12, 8]
        done = mulki("evaluate", runs["task"], "--stream", "small", "--classes", "seen", "--json")
        found = json.loads(done.stdout)
        assert {task["task"]: task["images"] for task in found["tasks"]} == {"first": 8, "second": 4}
        assert "second: yellow: no class has this name" in done.stderr


# --- predict ------------------------------------------------------------------------------------------------------------


def test_predict_reads_files_folders_patterns_and_standard_input(world, runs, tmp_path):
    rng = np.random.default_rng(2)
    for name in ("a.png", "deep/b.png", "deep/er/c.png"):
        paint(tmp_path / name, COLOURS["red"], rng)
    (tmp_path / "notes.txt").write_text("x")
    done = mulki("predict", runs["task"], tmp_path, "--json")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [Path(line["path"]).name for line in lines] == ["a.png", "b.png", "c.png"]
    assert "1 .txt" in done.stderr
    for line in lines:
        assert len(line["predictions"]) == 5
        values = [each["probability"] for each in line["predictions"]]
        assert values == sorted(values, reverse=True)
        assert sum(values) < 1 + 1e-6
    single = json.loads(mulki("predict", runs["task"], tmp_path / "a.png", "--json").stdout)
    assert single == lines[0], "alone as in a folder"
    pattern = mulki("predict", runs["task"], f"{tmp_path}/**/*.png", "--json").stdout
    assert len(pattern.splitlines()) == 3
    paths = f"{tmp_path}/a.png\n{tmp_path}/deep/b.png\n"
    piped = mulki("predict", runs["task"], "-", "--json", input=paths).stdout.splitlines()
    assert [json.loads(line)["path"] for line in piped] == paths.split()
    image = (tmp_path / "a.png").read_bytes()
    direct = json.loads(mulki("predict", runs["task"], "-", "--json", input=image).stdout)
    assert direct == {"path": "-", "predictions": single["predictions"]}


def test_an_image_that_pillow_cannot_read_is_no_list_of_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named = find_images(["-"], lambda: b"a\xe9.png\0\tb.png\0", print)
    assert [each.name for each in named] == ["a\udce9.png", "\tb.png"]
    for beginning, hint in ((b"\0\0\0\x18ftypheic", "pip install pillow-heif"), (b"\x01odd", "save the image as .jpg")):
        with pytest.raises(MulkiError, match="neither an image that Pillow reads nor a list of paths") as found:
            find_images(["-"], lambda data=beginning: data + b"\0.\0", print)
        assert hint in found.value.hint


def test_the_export_predicts_as_the_run_does(world, runs):
    for kind in KINDS:
        run, export = (
            [json.loads(line) for line in mulki("predict", path, world / "data/1/test", "--json").stdout.splitlines()]
            for path in (runs[kind], exported(world, kind))
        )
        assert len(run) == 12
        for one, two in zip(run, export, strict=True):
            assert [each["class"] for each in one["predictions"]] == [each["class"] for each in two["predictions"]]
            for left, right in zip(one["predictions"], two["predictions"], strict=True):
                assert left["probability"] == pytest.approx(right["probability"], abs=1e-5)


def test_the_classes_to_choose_from(world, runs, tmp_path):
    image = world / "data/0/test/1/0.png"

    def classes(*words):
        line = json.loads(mulki("predict", runs["task"], image, "--json", "--top", 99, *words).stdout)
        assert sum(each["probability"] for each in line["predictions"]) == pytest.approx(1, abs=1e-5)
        return {(each["class"], each["task"]) for each in line["predictions"]}

    birds = {(name, "birds") for name in TASKS["birds"]}
    assert classes("--classes", "birds") == birds
    assert classes() == classes("--classes", "all"), "everything was learned"
    assert len(classes()) == 9, "both cranes are one class"
    assert classes("--classes", "sites,birds") == {("crane", "sites"), ("blue", "sites"), *birds} - {("crane", "birds")}
    assert classes("--classes", "a cat, a dog,A Cat") == {("a cat", None), ("a dog", None)}
    (tmp_path / "names.txt").write_text("a cat, sleeping\na dog\n\n")
    assert classes("--classes", f"@{tmp_path}/names.txt") == {("a cat, sleeping", None), ("a dog", None)}
    (tmp_path / "tasks.txt").write_text("\ufeffbirds\nsites\n", encoding="utf-8")
    assert classes("--classes", f"@{tmp_path}/tasks.txt") == {("birds", None), ("sites", None)}, (
        "names, whatever they are"
    )
    for text, said in (("\n", "no name in this file"), ("one\n", "one name in this file")):
        (tmp_path / "few.txt").write_text(text)
        assert said in mulki("predict", runs["task"], image, "--classes", f"@{tmp_path}/few.txt", status=2).stderr
    done = mulki("predict", runs["task"], image, "--classes", "birdz", status=2)
    assert "no task is named 'birdz'; did you mean 'birds'?" in done.stderr
    done = mulki("predict", runs["task"], image, "--classes", "birds,sitse", status=2)
    assert "'birds' is a task, and no task is named 'sitse'; did you mean 'sites'?" in done.stderr
    assert "@names.txt" in done.stderr


def test_names_and_templates_that_the_model_cuts_off(world, runs):
    image, start = world / "data/0/test/1/0.png", "a very long name, word after word " * 20
    words = ("predict", runs["task"], image, "--classes")
    done = mulki(*words, f"@{_written(world / 'names.txt', f'{start} cat', f'{start} dog', 'crow')}", status=2)
    assert "error: --classes: 2 classes read the same, since the model reads" in done.stderr
    assert not done.stdout
    done = mulki(*words, f"@{_written(world / 'names.txt', f'cat {start}', 'crow')}")
    assert "warning: --classes: 1 of 2 sentences is longer than" in done.stderr
    done = mulki(*words, "birds", "--template", f"{start} {{}}", status=2)
    assert f"error: task birds: {len(TASKS['birds'])} classes read the same" in done.stderr


def _written(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_the_template_changes_the_answer_and_is_checked(world, runs):
    image = world / "data/0/test/1/0.png"
    words = ("predict", runs["task"], image, "--json", "--classes", "red,green,blue")
    plain = mulki(*words).stdout
    assert plain == mulki(*words, "--template", "a photo of a {}.").stdout
    assert plain != mulki(*words, "--template", "{}").stdout
    assert "has no {}" in mulki(*words, "--template", "a photo", status=2).stderr


def test_sentences_are_cut_and_encoded_in_batches(monkeypatch):
    clip = small_clip().eval()
    deployed = DeployedClip(clip=clip, tokenizer=small_tokenizer, transform=None, device=torch.device("cpu"))
    names, templates = ["a", "bb", "ccc", "dddd", "e"], ["{}.", "a {}"]
    seen, embed = [], clip.token_embedding.forward
    with monkeypatch.context() as patch:
        patch.setattr("mulki_plugins.deploy.model._SENTENCES", 4)
        patch.setattr(
            clip.token_embedding, "forward", lambda tokens: (seen.append(tuple(tokens.shape)), embed(tokens))[1]
        )
        cut = deployed.encode_classes(names, templates)
    assert seen == [(4, 8), (4, 8), (2, 8)], "the longest sentence has 6 letters, a beginning and an end"
    with torch.no_grad():
        whole = clip.encode_text(deployed.tokenise(names, templates), normalize=True).reshape(2, 5, -1).mean(0)
    assert torch.allclose(cut, torch.nn.functional.normalize(whole, dim=-1), rtol=0, atol=1e-6)


def test_a_deployed_model_multiplies_matrices_as_its_run_did():
    clip, seen = small_clip().eval(), []
    for tower in (clip.visual, clip.transformer):
        tower.register_forward_hook(lambda *_: seen.append(torch.get_float32_matmul_precision()))
    deployed = DeployedClip(
        clip=clip, tokenizer=small_tokenizer, transform=None, device=torch.device("cpu"), precision="tf32"
    )
    text, images = deployed.encode_classes(["a", "b"], ["{}."]), torch.zeros(2, 3, 16, 16)
    deployed.encode_images(images)
    deployed.answer_images(images, Candidates(("a", "b"), (None, None), text, {}))
    assert seen == ["high"] * 3
    assert torch.get_float32_matmul_precision() == "highest", "afterwards it is as it was"


def test_kept_text_features_are_of_the_weights_that_lie_there_now(tmp_path):
    (tmp_path / "run").mkdir()
    for place, file in ((tmp_path / "w.safetensors",) * 2, (tmp_path / "run", tmp_path / "run" / "model.safetensors")):
        file.write_bytes(b"1")
        model = SimpleNamespace(name="m", options={"pretrained": str(place)})
        source = SimpleNamespace(recipe=SimpleNamespace(model=model), weights=None, tasks=(), precision="fp32")
        deployed = SimpleNamespace(device=SimpleNamespace(type="cpu"))
        before = features._fingerprint(source, [], deployed)
        assert features._fingerprint(source, [], deployed) == before
        file.write_bytes(b"22")
        assert features._fingerprint(source, [], deployed) != before


def test_unreadable_images_are_named_and_passed_over(world, runs, tmp_path):
    paint(tmp_path / "good.png", COLOURS["red"], np.random.default_rng(0))
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8 cut off")
    done = mulki("predict", runs["task"], tmp_path, tmp_path / "gone.png", status=3)
    assert "good.png" in done.stdout
    assert "bad.jpg: this image cannot be read" in done.stderr
    assert "gone.png: no such file" in done.stderr
    assert "2 of 3 images were passed over" in done.stderr
    done = mulki("predict", runs["task"], tmp_path / "bad.jpg", status=2)
    assert "none of the images can be read" in done.stderr
    assert "standard input is empty" in mulki("predict", runs["task"], "-", input="", status=2).stderr


def test_an_image_that_cannot_be_prepared_does_not_end_the_others(tmp_path):
    line, good = tmp_path / "line.png", tmp_path / "good.png"
    Image.new("RGB", (6000, 1)).save(line)
    Image.new("RGB", (20, 20)).save(good)
    deployed = DeployedClip(
        clip=small_clip().eval(), tokenizer=small_tokenizer, device=torch.device("cpu"),
        transform=image_transform(16, is_train=False, resize_mode="longest"),
    )  # fmt: skip
    candidates = Candidates(("a", "b"), (None, None), deployed.encode_classes(["a", "b"], ["{}."]), {})
    first, second = classify(deployed, candidates, [Input(str(line)), Input(str(good))])
    assert first.problem.startswith("this image, 6000×1 pixels, cannot be prepared for the model: ")
    assert len(second.predictions) == 2


def test_hostile_class_names_stay_names(world, runs):
    image = world / "data/2/test/0/0.png"
    text = mulki("predict", runs["task"], image, "--classes", "odd |names|").stdout
    assert "\u202e" not in text
    assert "<script>" in text, "a terminal shows it as it is"
    line = mulki("predict", runs["task"], image, "--classes", "odd |names|", "--json").stdout
    assert line.isascii()
    assert {each["class"] for each in json.loads(line)["predictions"]} == {name.strip() for name in HOSTILE}
    card = (exported(world, "task") / "README.md").read_text()
    assert "<script>" not in card
    assert "\u202e" not in card
    assert "](http" not in card.replace("](https://arxiv.org", "")
    assert "odd \\|names\\|" in card
    assert "| data of sites | CC &lt;BY&gt; 1.0 |" in card
    assert "long " * 20 not in card, "long names are cut"


# --- export: the folder -------------------------------------------------------------------------------------------------


def test_export_says_where_it_needs_to_be_told(world, runs):
    assert "--to is missing; type: mulki export runs --to my-model" in mulki("export", "runs", status=2).stderr


def test_an_export_below_the_home_folder_names_weights(world, runs, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    mulki("export", runs["text"], "--to=~/model")
    assert (tmp_path / "model" / "head.json").is_file() == (tmp_path / "model" / "head.safetensors").is_file()
    file = weight_file(str(tmp_path / "model"))
    assert file.path == tmp_path / "model" / "open_clip_model.safetensors"


def test_export_never_overwrites(world, runs, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for words in ([], ["--force"]):
        done = mulki("export", runs["task"], "--to", tmp_path / "mine", *words, status=2)
        assert "holds other files" in done.stderr
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    mulki("export", runs["text"], "--to", tmp_path / "model")
    before = (tmp_path / "model" / "README.md").read_text()
    assert "replace it with --force" in mulki("export", runs["task"], "--to", tmp_path / "model", status=2).stderr
    assert (tmp_path / "model" / "README.md").read_text() == before
    (tmp_path / "model" / "notes.txt").write_text("mine")
    done = mulki("export", runs["task"], "--to", tmp_path / "model", "--force", status=2)
    assert "'notes.txt', and --force would take it away" in done.stderr
    (tmp_path / "model" / "notes.txt").unlink()
    mulki("export", runs["task"], "--to", tmp_path / "model", "--force")
    assert "mulki-tiny" in (tmp_path / "model" / "README.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "model"}, "nothing temporary stays"
    assert "the run itself lies there" in mulki("export", runs["task"], "--to", runs["task"].parent, status=2).stderr


def test_an_export_that_fails_leaves_nothing(world, runs, tmp_path, monkeypatch):
    from mulki_plugins.deploy import export

    monkeypatch.setattr(export, "QuickGELU", torch.nn.Dropout3d)  # the activation is taken for GELU
    done = mulki("export", runs["tower"], "--to", tmp_path / "model", status=2)
    assert "differs from the trained one in its features" in done.stderr
    assert not any(tmp_path.iterdir())


def test_a_checkpoint_gives_the_model_of_its_moment(world, runs, tmp_path):
    done = mulki("export", runs["task"] / "checkpoints" / "task-02-sites", "--to", tmp_path / "two")
    assert "after 2 of 3 tasks" in done.stderr
    found = json.loads(mulki("evaluate", tmp_path / "two", "--json").stdout)
    matrix = json.loads((runs["task"] / "result.json").read_text())["matrix"]
    assert [task["accuracy"] for task in found["tasks"]] == matrix[1]
    card = (tmp_path / "two" / "README.md").read_text()
    assert "**An intermediate checkpoint**" in card
    assert f"mulki export {runs['task']}/checkpoints/task-02-sites --to " in card, (
        "not the run, whose end is another model"
    )
    assert "(not learned)" in card
    image = world / "data/0/test/1/0.png"
    seen = json.loads(mulki("predict", tmp_path / "two", image, "--json", "--top", 99).stdout)
    assert {each["class"] for each in seen["predictions"]} == {"crane", "red", "green", "blue"}


def test_the_card_of_joint_training_has_the_row_of_all_tasks():
    source, result = SimpleNamespace(complete=True), SimpleNamespace(matrix=[[50.0, 60.0]], zero_shot=[1.0, 2.0])
    assert card._measured(source, result) == [50.0, 60.0]
    assert card._measured(source, SimpleNamespace(matrix=[], zero_shot=[1.0, 2.0])) == [1.0, 2.0], "nothing was trained"


def test_the_card_leaves_blank_what_the_run_never_measured(world, runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs["task"], run)
    moment = run / "checkpoints" / "task-02-sites"

    def read():
        """What is said, the card, and the cells of birds: just learned, at the end."""
        source = find_source(moment)
        text = "\n".join(card._lines(source, "to", False, None))
        [row] = [line.split("|") for line in text.splitlines() if line.startswith("| birds | 3 |")]
        return source.notices[0], text, [cell.strip() for cell in row[-3:-1]]

    matrix = json.loads((run / "result.json").read_text())["matrix"]
    just = f"{matrix[0][0]:.1f}"
    assert read()[2] == [just, f"{matrix[1][0]:.1f}"]
    manifest = json.loads((moment / "manifest.json").read_text())
    manifest |= {"tasks": 1, "steps": 2, "run": manifest["run"] | {"learned": [0]}}
    whole = (moment / "manifest.json").read_text()
    (moment / "manifest.json").write_text(json.dumps(manifest))
    said, text, cells = read()
    assert said.endswith("is the model after 1 of 3 tasks, the last one birds, and 2 steps into sites")
    assert "this is the model after 1 of 3 tasks, and 2 steps into sites." in text
    assert cells == [just, ""], "no row is of these weights"
    (moment / "manifest.json").write_text(whole)
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(result | {"status": "stopped", "matrix": matrix[:1], "metrics": {}}))
    assert read()[2] == [just, ""], "it was stopped before it measured them"


def test_the_head_of_a_checkpoint_has_grown_for_the_tasks_begun_alone(world, runs, tmp_path, monkeypatch):
    moment = runs["head"] / "checkpoints" / "task-02-sites"
    mulki("export", moment, "--to", tmp_path / "two")
    assert json.loads((tmp_path / "two" / "head.json").read_text())["begun"] == [0, 1]
    grown, before_task = [], Rail.before_task
    monkeypatch.setattr(Rail, "before_task", lambda self, task, n: (grown.append(task), before_task(self, task, n)))
    image = world / "data/0/test/1/0.png"
    answers = [json.loads(mulki("predict", each, image, "--json").stdout) for each in (moment, tmp_path / "two")]
    assert grown == [0, 1, 0, 1]
    scores = [[each["probability"] for each in answer["predictions"]] for answer in answers]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


def test_a_run_that_was_stopped_gives_its_last_task(world, runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs["task"], run)
    shutil.rmtree(run / "checkpoints" / "task-03-odd--names-")
    data = json.loads((run / "result.json").read_text())
    data |= {"status": "stopped", "matrix": data["matrix"][:2], "metrics": {}}
    (run / "result.json").write_text(json.dumps(data))
    done = mulki("evaluate", run, "--json")
    assert "the run is stopped; this is the model after 2 of 3 tasks, the last one sites" in done.stderr
    assert [task["accuracy"] for task in json.loads(done.stdout)["tasks"]] == data["matrix"][1]
    shutil.rmtree(run / "checkpoints")
    assert "mulki resume" in mulki("predict", run, "x.png", status=2).stderr


def test_a_run_without_weights_or_texts(world, runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs["task"], run)
    (run / "classes.json").unlink()
    found = json.loads(mulki("evaluate", run, "--json").stdout)
    assert [task["accuracy"] for task in found["tasks"]] == last_row(run), "its stream still has the class names"
    kept = json.loads((runs["task"] / "classes.json").read_text())
    kept["tasks"][1]["class_names"][1] = "teal"
    (run / "classes.json").write_text(json.dumps(kept))
    done = mulki("evaluate", run, "--json")
    assert "warning: sites: its class names or templates are no longer those of the run" in done.stderr
    (run / "classes.json").unlink()
    [weights] = run.glob("checkpoints/task-03*/weights.safetensors")
    shutil.move(weights, run / "model.safetensors")
    shutil.rmtree(run / "checkpoints")
    assert json.loads(mulki("evaluate", run, "--json").stdout)["tasks"] == found["tasks"], "kept outside of checkpoints"
    (run / "model.safetensors").unlink()
    assert "kept no weights after its last task" in mulki("predict", run, "x.png", status=2).stderr


def test_a_run_without_training_exports_the_pretrained_model(world, tmp_path):
    (tmp_path / "zero.yaml").write_text(json.dumps(recipe_for(world, TINY) | {"strategy": "zero-shot"}))
    mulki("run", tmp_path / "zero.yaml", "--out", tmp_path / "runs")
    run = tmp_path / "runs/mine/zero-shot/seed-0"
    mulki("export", tmp_path / "runs", "--to", tmp_path / "model")
    found = json.loads(mulki("evaluate", tmp_path / "model", "--json").stdout)
    assert [task["accuracy"] for task in found["tasks"]] == last_row(run)
    assert "It was not trained further" in (tmp_path / "model" / "README.md").read_text()


def test_what_is_no_model(world, runs, tmp_path):
    for path, part in (
        (tmp_path / "nowhere", "no such folder"),
        (tmp_path, "neither a run nor an exported model"),
        (world / "runs", "8 runs are below it"),
    ):
        assert part in mulki("predict", path, "x.png", status=2).stderr
    broken = tmp_path / "broken"
    shutil.copytree(exported(world, "task"), broken)
    (broken / "classes.json").write_text('{"tasks": [{"name": 3}]}')
    assert "does not hold the class names" in mulki("predict", broken, "x.png", status=2).stderr
    shutil.copy(exported(world, "task") / "classes.json", broken)
    config = json.loads((broken / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": True}
    (broken / "open_clip_config.json").write_text(json.dumps(config))
    done = mulki("predict", broken, world / "data/0/test/1/0.png", status=2)
    assert "trust_remote_code" in done.stderr
    shutil.copy(exported(world, "task") / "open_clip_config.json", broken)
    (broken / "open_clip_model.safetensors").write_bytes(b"0" * 64)
    assert "open_clip cannot load it" in mulki("predict", broken, world / "data/0/test/1/0.png", status=2).stderr


def test_a_model_that_open_clip_cannot_build_is_refused(world, tmp_path):
    with small_world():
        recipe = recipe_for(world, {"name": "small-clip"})
        recipe["stream"] = {"name": "small"}
        (tmp_path / "small.yaml").write_text(json.dumps(recipe))
        mulki("run", tmp_path / "small.yaml", "--out", tmp_path / "runs")
        done = mulki("export", tmp_path / "runs", "--to", tmp_path / "model", status=2)
        assert "its package does not say how open_clip builds it" in done.stderr
        found = json.loads(mulki("evaluate", tmp_path / "runs", "--json").stdout)
        assert [task["accuracy"] for task in found["tasks"]] == last_row(tmp_path / "runs/mine/finetune/seed-0")


def test_onnx_needs_packages_and_says_which(world, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_files, "find_spec", lambda name: None if name == "onnxscript" else name)
    done = mulki("export", runs["tower"], "--to", tmp_path / "model", "--onnx", status=2)
    assert "--onnx needs onnxscript; pip install 'mulki[onnx]'" in done.stderr
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["task", "tower"])
def test_onnx_gives_the_features_of_the_model(world, runs, tmp_path, kind):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    runtime = pytest.importorskip("onnxruntime")
    mulki("export", runs[kind], "--to", tmp_path / "model", "--onnx")
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'model'}")
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'model'}")(
        ["a photo of a crane.", "red", "a b c d e", "f"]
    )
    images = torch.stack([transform(Image.open(path)) for path in sorted(world.glob("data/0/test/*/*.png"))[:7]])
    for name, batch, encode in (
        ("image", images, model.eval().encode_image), ("text", tokens, model.encode_text),
    ):  # fmt: skip
        [found] = runtime.InferenceSession(str(tmp_path / "model" / f"{name}.onnx")).run(None, {"input": batch.numpy()})
        with torch.no_grad():
            wanted = torch.nn.functional.normalize(encode(batch), dim=-1)
        assert found.shape == wanted.shape
        assert np.abs(found - wanted.numpy()).max() < 1e-4
    assert "`image.onnx`" in (tmp_path / "model" / "README.md").read_text()


QUICK = """
import sys
from mulki_plugins.cli import main
main(sys.argv[1:], standalone_mode=False)
slow = [name for name in ("avalanche", "torch._dynamo", "matplotlib", "tensorboard") if name in sys.modules]
assert not slow, slow
import torch._dynamo
assert torch._dynamo.config is not None, "the compiler itself can be imported afterwards"
"""


def test_predict_imports_only_what_it_needs(world, runs):
    done = subprocess.run(
        [sys.executable, "-c", QUICK, "predict", str(runs["task"]), str(world / "data/0/test/1/0.png"), "--top", "1"],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "0.png  " in done.stdout


def test_the_text_features_of_many_classes_are_computed_once(world, runs, tmp_path, monkeypatch):
    monkeypatch.setenv("MULKI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(features, "_WORTH_CACHING", 1)
    words = ("predict", runs["task"], world / "data/0/test/1/0.png", "--json")
    first = mulki(*words).stdout
    [kept] = tmp_path.glob("cache/text-features/*.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(DeployedClip, "encode_classes", None)
        assert mulki(*words).stdout == first
    kept.write_bytes(b"damaged")
    assert mulki(*words).stdout == first
    mulki("predict", runs["seen"], world / "data/0/test/1/0.png")
    assert len(list(tmp_path.glob("cache/text-features/*.safetensors"))) == 2, "other weights, other features"
