"""mtil-mini: what it promises of its tasks, its pictures, its splits and its cache."""

import numpy as np
import pytest
import torch

from mulki_plugins.errors import MissingData, MulkiError
from mulki_plugins.models import load_clip
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.streams import as_benchmark, mtil_mini
from mulki_plugins.streams.mini import pictures, sprites
from mulki_plugins.streams.mini.renditions import BANDS, SIZE, STYLES, angles
from mulki_plugins.streams.mini.stream import ORDERS, declared_tasks, mtil_mini_reference


def test_eleven_tasks_of_ten_to_sixty_classes():
    tasks = declared_tasks()
    assert list(tasks) == sorted(tasks) == list(ORDERS["I"])
    assert sorted(ORDERS["II"]) == list(ORDERS["I"])
    assert catalog().find("stream", "mtil-mini").tasks == ORDERS["I"]
    for name, task in tasks.items():
        names = list(task["classes"])
        assert 10 <= len(names) <= 60, name
        assert len(set(map(str.lower, names))) == len(names), name
        assert all("{}" in template for template in task["templates"]), name
        if isinstance(task["classes"], dict):
            assert len(set(task["classes"].values())) == len(names), f"{name}: a drawing stands for two classes"


def test_every_sentence_fits_into_the_models_context():
    tokenizer = load_clip("mulki-tiny").tokenizer
    for name, task in declared_tasks().items():
        for template in task["templates"]:
            for row, class_name in zip(
                tokenizer([template.format(c) for c in task["classes"]]), task["classes"], strict=True
            ):
                assert row[-1] in (0, tokenizer.eot_token_id), f"{name}: {template.format(class_name)}"
                assert len(tokenizer.encode(template.format(class_name))) <= 14, (
                    f"{name}: {template.format(class_name)}"
                )


@pytest.fixture(scope="module")
def stream():
    return mtil_mini()


def test_sizes_and_balance(stream):
    for task in stream.tasks:
        for split, n in ((task.train, pictures.TRAIN), (task.test, pictures.TEST)):
            assert split.images.shape == (n, SIZE, SIZE, 3)
            assert split.images.dtype == np.uint8
            counts = np.bincount(split.labels, minlength=len(task.class_names))
            assert counts.max() - counts.min() <= 1, task.name
            assert split.images.std() > 20, f"{task.name}: there is nothing to see"


def test_train_and_test_share_no_image(stream):
    for task in stream.tasks:
        train = {image.tobytes() for image in task.train.images}
        test = {image.tobytes() for image in task.test.images}
        assert len(train) == pictures.TRAIN, f"{task.name}: an image stands twice"
        assert len(test) == pictures.TEST, f"{task.name}: an image stands twice"
        assert not train & test, task.name


def test_train_and_test_share_no_pose_and_no_font():
    generator = torch.Generator().manual_seed(0)
    train, test = (angles(20_000, 30.0, split, generator) for split in ("train", "test"))
    bands = [set(((a / 30 + 1) / 2 * BANDS).long().tolist()) for a in (train, test)]
    assert bands == [set(range(0, BANDS, 2)), set(range(1, BANDS, 2))]
    assert torch.cdist(train[:2000, None], test[:2000, None]).min() > 0.1
    assert not set(sprites.TRAIN_FONTS) & set(sprites.TEST_FONTS)

    def family(name):
        return name.split("-")[0]

    assert not set(map(family, sprites.TRAIN_FONTS)) & set(map(family, sprites.TEST_FONTS))
    assert all(style.rotation > 0 for style in STYLES.values())


def test_drawing_is_deterministic(stream):
    for task in stream.tasks:
        if task.name in ("letters", "shapes", "textures", "scans", "flags"):
            again = pictures.draw(task.name, declared_tasks()[task.name], "test")
            assert np.array_equal(again.images, task.test.images), task.name
            assert np.array_equal(again.labels, task.test.labels), task.name


def test_the_cache_is_used_and_a_damaged_one_drawn_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("MULKI_CACHE", str(tmp_path / "cache"))
    drawn = []
    draw = pictures.draw
    monkeypatch.setattr(pictures, "draw", lambda *args: drawn.append(args[2]) or draw(*args))
    first = mtil_mini(tasks=["scans"])
    assert drawn == ["train", "test"]
    assert np.array_equal(mtil_mini(tasks=["scans"]).tasks[0].train.images, first.tasks[0].train.images)
    assert drawn == ["train", "test"]
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(path.read_bytes()[:1000])
    assert np.array_equal(mtil_mini(tasks=["scans"]).tasks[0].train.images, first.tasks[0].train.images)
    assert drawn == ["train", "test"] * 2
    assert first.notices == ()
    monkeypatch.setenv("MULKI_CACHE", "/dev/null/nowhere")
    [notice] = mtil_mini(tasks=["scans"]).notices
    assert "/dev/null/nowhere" in notice
    assert "MULKI_CACHE" in notice


@pytest.mark.parametrize("damage", [b"", b"junk", b"PK\x03\x04"])
def test_a_damaged_cache_is_drawn_anew(damage, stream, tmp_path, monkeypatch):
    scans = declared_tasks()["scans"]
    [shared] = pictures.cache_folder().glob("mtil-mini-scans-test-*.npz")
    whole = shared.read_bytes()
    monkeypatch.setenv("MULKI_CACHE", str(tmp_path))
    path = pictures.cache_folder() / shared.name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(damage)
    drawn = pictures.cached("scans", scans, "test", [])
    assert path.read_bytes() == whole
    assert len(drawn.images) == 320
    assert not list(pictures.cache_folder().glob("*.part"))


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(sprites, "find_spec", lambda name: None)
    with pytest.raises(MissingData) as caught:
        sprites.openmoji_sprites(["x"])
    assert caught.value.lines() == ["mtil-mini needs the package 'fontTools'; pip install 'mulki[mini]'"]


def test_orders_and_subsets():
    assert [t.name for t in mtil_mini(order="II", tasks=["digits", "scans"]).tasks] == ["digits", "scans"]
    assert [t.name for t in mtil_mini(order=["scans", "digits"]).tasks] == ["scans", "digits"]
    for wrong in ({"order": ["scns"]}, {"tasks": ["scns"]}):
        with pytest.raises(MulkiError, match=r"no task 'scns' \(did you mean 'scans'\?\)"):
            mtil_mini(**wrong)
    with pytest.raises(MulkiError, match="twice"):
        mtil_mini(order=["scans", "scans"])
    with pytest.raises(MulkiError, match="no task is left"):
        mtil_mini(order=["scans"], tasks=["food"])


def test_the_benchmark_keeps_names_labels_and_transforms(stream, loaded):
    benchmark = as_benchmark(stream, lambda image: ("train", image.size), lambda image: ("eval", image.size))
    assert len(benchmark.train_stream) == 11
    for i, (train, test) in enumerate(zip(benchmark.train_stream, benchmark.test_stream, strict=True)):
        assert train.task_name == test.task_name == stream.tasks[i].name
        assert train.task_labels == [i]
        assert train.class_names == stream.tasks[i].class_names
        assert train.dataset[5][0] == ("train", (SIZE, SIZE))
        assert train.dataset.eval()[5][0] == ("eval", (SIZE, SIZE))
        assert test.dataset[5][0] == ("eval", (SIZE, SIZE))
        assert train.dataset[5][1] == stream.tasks[i].train.labels[5]
        assert train.dataset[5][2] == i


def test_validation_images_are_held_out_of_training_evenly():
    whole = {task.name: task for task in mtil_mini().tasks}
    for task in mtil_mini(evaluate_on="validation").tasks:
        train, held = task.train, task.test
        assert len(train) + len(held) == len(whole[task.name].train)
        together = np.concatenate([train.images, held.images])
        assert {i.tobytes() for i in together} == {i.tobytes() for i in whole[task.name].train.images}
        counts = np.bincount(held.labels, minlength=len(task.class_names))
        full = np.bincount(whole[task.name].train.labels, minlength=len(task.class_names))
        assert (counts == full // 5).all()
        if task.name != "flags":  # two renditions may agree to the last pixel only where drawings do
            assert not {i.tobytes() for i in train.images} & {i.tobytes() for i in held.images}


def test_reference_shares_no_image_and_no_class_name_with_the_eleven():
    [reference] = mtil_mini_reference().tasks
    names, drawings, pictures = set(), set(), set()
    for task in mtil_mini().tasks:
        names |= {name.lower() for name in task.class_names}
        pictures |= {i.tobytes() for part in (task.train, task.test) for i in part.images}
    for entry in declared_tasks().values():
        drawings |= set(entry["classes"].values()) if entry["source"] == "openmoji" else set()
    own = declared_tasks("reference.yaml")["reference"]["classes"]
    assert not {name.lower() for name in reference.class_names} & names
    assert not {text.rstrip("\ufe0f") for text in own.values()} & {text.rstrip("\ufe0f") for text in drawings}
    assert not {i.tobytes() for i in reference.train.images} & pictures
    assert len(reference.train) == 1600
    assert len(set(own.values())) == len(own) == len(reference.class_names)
    assert np.bincount(reference.train.labels).min() >= 1600 // len(own)
