"""The streams `split` and `mixed`: which classes and images each step has, and what is wrong with their options."""

import json

import numpy as np
import pytest
import torch
from attrs import evolve
from click.testing import CliRunner
from PIL import Image

from mulki_plugins.cli import main
from mulki_plugins.errors import MulkiError
from mulki_plugins.metrics import incremental, incremental_by_step, incremental_last
from mulki_plugins.recipe.resolve import resolve
from mulki_plugins.registry.catalog import Catalog, Provenance
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.registry.register import Register
from mulki_plugins.report.predictions import read_predictions
from mulki_plugins.report.result import FILE
from mulki_plugins.streams import ArrayImages, TaskStream
from mulki_plugins.streams.class_steps import of_classes, order_classes, split, step_sizes
from mulki_plugins.streams.images import FileImages
from mulki_plugins.streams.mini.stream import mtil_mini
from mulki_plugins.streams.mixed import mixed
from mulki_plugins.streams.mtil.contents import PixelImages
from mulki_plugins.streams.nested import check_mixed, check_split, innermost
from mulki_plugins.streams.selection import with_validation
from mulki_plugins.testing.small import small_task

COLOURS = ("red", "green", "blue", "yellow", "grey")
FIRST_TEN = {
    100: [68, 56, 78, 8, 23, 84, 90, 65, 74, 76], 200: [168, 136, 51, 9, 183, 101, 171, 99, 42, 159],
    300: [169, 221, 146, 296, 92, 229, 49, 70, 126, 77],
}  # fmt: skip
"""The first classes of the published order, seed 1993."""


def colours() -> TaskStream:
    """One task of five colours."""
    return TaskStream(name="colours", tasks=(small_task("colours", COLOURS, 3),))


@pytest.fixture(autouse=True)
def parts(small_parts):
    torch.set_num_threads(1)
    mine = Catalog()
    Register(mine, Provenance(distribution="mulki", version="")).stream("colours", colours, summary="five colours")
    catalog().parts.update(mine.parts)
    yield
    for key in mine.parts:
        del catalog().parts[key]


@pytest.mark.parametrize(
    ("classes", "base", "increment", "sizes"),
    [
        (100, 0, 10, [10] * 10), (100, 50, 10, [50] + [10] * 5), (100, 40, 7, [40] + [7] * 8 + [4]), (10, 0, 4, [4, 4, 2]),
        (5, 5, 2, [5]), (5, 0, 9, [5]), (3, 1, 1, [1, 1, 1]),
    ],
)  # fmt: skip
def test_the_sizes_of_the_steps(classes, base, increment, sizes):
    assert step_sizes(classes, base, increment) == sizes


@pytest.mark.parametrize("classes", FIRST_TEN)
def test_the_published_order(classes):
    order = order_classes([str(i) for i in range(classes)], 1993)
    assert order[:10].tolist() == FIRST_TEN[classes]
    assert sorted(order.tolist()) == list(range(classes))


def pixels_by_class(task, split_name):
    """The images of each class name, as bytes."""
    images = getattr(task, split_name)
    found = {name: [] for name in task.class_names}
    for i in range(len(images)):
        image, label = images[i]
        assert label == images.targets[i]
        found[task.class_names[label]].append(np.asarray(image).tobytes())
    return found


@pytest.mark.parametrize("order", [1993, 7, None, ["grey", "blue", "red", "yellow", "green"]])
def test_steps_are_the_data_set_cut_by_class(order):
    [whole] = colours().tasks
    steps = split(of="colours", base=3, increment=1, class_order=order).tasks
    assert [task.name for task in steps] == ["colours-1", "colours-2", "colours-3"]
    expected = {
        1993: np.random.RandomState(1993).permutation(5),
        7: np.random.RandomState(7).permutation(5),
        None: range(5),
    }
    names = order if isinstance(order, list) else [whole.class_names[i] for i in expected[order]]
    assert [task.class_names for task in steps] == [tuple(names[:3]), (names[3],), (names[4],)]
    assert {task.templates for task in steps} == {whole.templates}
    for part in ("train", "test"):
        together = {name: images for task in steps for name, images in pixels_by_class(task, part).items()}
        assert together == pixels_by_class(whole, part), "every image once, under its own class, in its order"


def test_all_kinds_of_images_are_cut_alike(tmp_path):
    labels = np.array([2, 0, 1, 2, 0, 1])
    pixels = np.arange(6 * 2 * 2 * 3, dtype=np.uint8).reshape(6, 2, 2, 3)
    names = []
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
        names.append(f"{i}.png")

    class Foreign:
        """A data set of another package, in files."""

        targets = labels.tolist()

        def __len__(self):
            return 6

        def __getitem__(self, i):
            return Image.fromarray(pixels[i]), int(labels[i])

        def path(self, i):
            return tmp_path / names[i]

        def fingerprint(self):
            return "foreign"

    files = FileImages.of(tmp_path, names, labels.tolist())
    kinds = [ArrayImages(pixels, labels), PixelImages(pixels, labels), files, Foreign()]
    for images in kinds:
        cut = of_classes(images, np.array([2, 1]), 3)
        assert list(cut.targets) == [0, 1, 0, 1]
        assert len(cut) == 4
        for i, source in enumerate([0, 2, 3, 5]):
            image, label = cut[i]
            assert np.array_equal(np.asarray(image), pixels[source])
            assert label == cut.targets[i]
        other = of_classes(images, np.array([0]), 3)
        assert cut.fingerprint() != other.fingerprint(), "cached images of the two are told apart"
    assert [str(cut.path(i)) for i in range(4)] == [str(tmp_path / f"{i}.png") for i in (0, 2, 3, 5)]


def test_a_data_set_of_mini_and_its_shots():
    steps = split(of={"name": "mtil-mini", "tasks": ["letters"], "shots": 3}, increment=6).tasks
    assert [len(task.class_names) for task in steps] == [6, 6, 6, 6, 2]
    [whole] = mtil_mini(tasks=["letters"]).tasks
    assert sum(len(task.test) for task in steps) == len(whole.test)
    for task in steps:
        assert np.bincount(task.train.targets).tolist() == [3] * len(task.class_names)


def test_few_images_of_mini_are_nested_and_never_test_images():
    kinds = {n: mtil_mini(tasks=["scans"], shots=n).tasks[0] for n in (2, 5)}
    sets = {n: {image.tobytes() for image in task.train.images} for n, task in kinds.items()}
    assert [len(sets[n]) for n in (2, 5)] == [20, 50]
    assert sets[2] < sets[5]
    assert not sets[5] & {image.tobytes() for image in kinds[5].test.images}
    held = mtil_mini(tasks=["scans"], shots=5, evaluate_on="validation").tasks[0]
    assert not {i.tobytes() for i in held.train.images} & {i.tobytes() for i in held.test.images}
    [notice] = mtil_mini(tasks=["flags"], shots=200).notices
    assert "60 of 60 classes have fewer than 200 training images" in notice


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"of": "colours", "increment": 2, "base": 6}, "has 5 classes, and the first step takes 6"),
        ({"of": "small", "increment": 2}, "expected a stream of one task, and small has 3"),
        ({"of": "colours", "increment": 1, "class_order": ["red"]}, "expected all 5 classes, without 'green' and 3 more"),
        ({"of": "colours", "increment": 1, "class_order": ["rad"]}, "no class 'rad' .did you mean 'red'"),
        ({"of": {"name": "mtil-mini", "task": ["food"]}, "increment": 1}, "stream.of.task: unknown option"),
    ],
)  # fmt: skip
def test_what_split_refuses(options, message):
    with pytest.raises(MulkiError, match=message):
        split(**options)


@pytest.mark.parametrize(
    ("check", "options", "path", "message"),
    [
        (check_split, {"of": 3}, ("of",), "expected a stream"),
        (check_split, {"of": {"name": "mixed", "of": []}}, ("of", "name"), "cannot stand inside"),
        (check_split, {"of": {"name": "mtil-mini", "tasks": ["fod"]}}, ("of", "tasks", 0), "did you mean 'food'"),
        (check_split, {"of": "mtil-mini"}, ("of",), "one task, got 11"),
        (check_split, {"of": "colours", "class_order": 2**32}, ("class_order",), "at most 4294967295"),
        (check_split, {"of": "colours", "class_order": ["a", "a"]}, ("class_order", 1), "named twice"),
        (check_mixed, {"of": "colours"}, ("of",), "expected a list"),
        (check_mixed, {"of": ["colours", "colors"]}, ("of", 1, "name"), "no stream is named"),
        (check_mixed, {"of": [{"name": "mixed", "of": []}]}, ("of", 0, "name"), "cannot stand inside"),
        (check_mixed, {"of": ["mtil-mini"], "order": ["food", "fod"]}, ("order", 1), "did you mean 'food'"),
        (check_mixed, {"of": ["mtil-mini"], "order": ["food", "food"]}, ("order", 1), "named twice"),
        (check_mixed, {"of": ["mtil-mini"], "order": []}, ("order",), "at least one task"),
    ],
)
def test_what_validation_finds(check, options, path, message):
    [mistake] = check(options)
    assert mistake.path == path
    assert message in mistake.message


def test_streams_in_turn_one_after_the_other_or_as_listed():
    parts = ["small", "colours", {"name": "split", "of": {"name": "mtil-mini", "tasks": ["scans"]}, "increment": 5}]

    def names(**more):
        return [task.name for task in mixed(of=parts, **more).tasks]

    assert names() == ["first", "second", "third", "colours", "scans-1", "scans-2"]
    assert names(order="alternate") == ["first", "colours", "scans-1", "second", "scans-2", "third"]
    assert names(order=["scans-2", "first"]) == ["scans-2", "first"]
    with pytest.raises(MulkiError, match=r"no stream has the task 'frist' .did you mean 'first'"):
        names(order=["frist"])
    with pytest.raises(MulkiError, match="the task 'colours' is in colours"):
        mixed(of=["colours", "colours"])


def test_the_data_of_streams_inside_others():
    inner = {"name": "mtil-mini", "tasks": ["scans"]}
    of = [{"name": "split", "of": inner, "increment": 5}, "colours"]
    found = innermost({"name": "mixed", "of": of, "order": "sequence"})
    assert [each["name"] for each in found] == ["mtil-mini", "colours"]
    assert found[0]["evaluate_on"] == "test", "with all options"


def test_accuracy_among_all_seen_classes_by_hand():
    matrix, images = [[90.0, 1.0, 2.0], [80.0, 60.0, 3.0], [70.0, 50.0, 40.0]], [10, 20, 30]
    assert incremental_by_step(matrix, images).tolist() == pytest.approx([90, 2000 / 30, (700 + 1000 + 1200) / 60])
    assert incremental(matrix, images) == pytest.approx((90 + 2000 / 30 + 2900 / 60) / 3)
    assert incremental_last(matrix, images) == pytest.approx(2900 / 60)
    for wrong in ([10, 20], [10, 0, 30], [10, float("nan"), 30]):
        with pytest.raises(ValueError, match="numbers of test images of 3 tasks"):
            incremental(matrix, wrong)


RECIPE = """
name: steps
stream: {name: split, of: colours, base: 3, increment: 1}
model: small-clip
strategy: finetune
train: {iterations: 3, batch_size: 4, optimizer: {lr: 1e-2}}
evaluate: {classes: seen, metrics: [incremental, incremental-last, last]}
loggers: [csv]
device: cpu
"""


def mulki(*arguments, code=0):
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    assert done.exit_code == code, done.output + done.stderr
    assert "Traceback" not in done.output + done.stderr
    return done


def test_a_run_of_steps_counts_right_answers_among_seen_classes(tmp_path):
    (tmp_path / "steps.yaml").write_text(RECIPE)
    done = mulki("run", tmp_path / "steps.yaml", "--out", tmp_path / "runs")
    folder = tmp_path / "runs" / "steps" / "finetune" / "seed-0"
    result = json.loads((folder / FILE).read_text())
    assert result["protocol"] == {
        "stream": "split", "model": "small-clip", "classes": "seen", "of": "colours", "base": 3, "increment": 1,
        "class_order": 1993,
    }  # fmt: skip
    kept = read_predictions(folder)
    steps = [
        100 * sum(kept.right(b, j).sum() for j in range(b)) / sum(len(kept.labels(j)) for j in range(b))
        for b in (1, 2, 3)
    ]
    assert result["metrics"]["incremental"] == pytest.approx(sum(steps) / 3)
    assert result["metrics"]["incremental-last"] == pytest.approx(steps[-1])
    seen = set(range(4))  # after the second step
    assert {int(kept.predicted(2, j)[i]) for j in (0, 1) for i in range(len(kept.labels(j)))} <= seen
    lines = done.output.splitlines()
    [head] = [line for line in lines if line.startswith("after")]
    assert head.split() == ["after", "colours-1", "colours-2", "colours-3", "mean", "seen"]
    shown = [line.split()[-1] for line in lines if line.startswith("colours-")]
    assert shown == [f"{step:.1f}" for step in steps]


def test_what_learns_nothing_ends_alike_however_the_classes_are_cut(tmp_path):
    (tmp_path / "steps.yaml").write_text(RECIPE.replace("finetune", "zero-shot"))
    ends = {}
    for base, increment in ((0, 1), (0, 2), (3, 1), (1, 4)):
        changes = (
            f"--set=stream.base={base}",
            f"--set=stream.increment={increment}",
            f"--out={tmp_path / str(len(ends))}",
        )
        mulki("run", tmp_path / "steps.yaml", *changes)
        [file] = (tmp_path / str(len(ends))).rglob(FILE)
        result = json.loads(file.read_text())
        ends[base, increment] = result["metrics"]["incremental-last"]
        assert len(result["tasks"]) == len(step_sizes(5, base, increment))
    assert len(set(ends.values())) == 1, ends
    assert ends[0, 1] > 0


def test_metrics_of_seen_classes_need_that_scope(tmp_path):
    (tmp_path / "steps.yaml").write_text(RECIPE.replace("classes: seen", "classes: task"))
    done = mulki("validate", tmp_path / "steps.yaml", code=2)
    assert "$.evaluate.metrics[0]: the metric 'incremental' needs evaluate.classes: seen, got 'task'" in done.stderr


def test_one_template_for_all_tasks(tmp_path):
    (tmp_path / "steps.yaml").write_text(RECIPE.replace("classes: seen,", 'classes: seen, template: "the {} thing",'))
    mulki("run", tmp_path / "steps.yaml", "--out", tmp_path / "runs")
    folder = tmp_path / "runs" / "steps" / "finetune" / "seed-0"
    texts = json.loads((folder / "classes.json").read_text())["tasks"]
    assert [task["templates"] for task in texts] == [["the {} thing"]] * 3
    assert json.loads((folder / FILE).read_text())["protocol"]["template"] == "the {} thing"
    for wrong in ("the thing", "the {} {name}"):
        done = mulki("validate", tmp_path / "steps.yaml", "--set", f"evaluate.template={json.dumps(wrong)}", code=2)
        assert "expected '{}' in the class name's place" in done.stderr


def test_a_class_of_two_tasks_with_one_template_is_one_class(tmp_path):
    """Under one template `zero` of `digits` and of `scans` read the same, so either answer counts."""
    settings = "stream.tasks=[digits,scans]", "train.iterations=1", "loggers=[]", "stream.shots=2"
    changes = [f"--set={s}" for s in settings]
    mulki("run", "recipes/xtail-mini.yaml", "--strategy", "zero-shot", *changes, "--out", tmp_path)
    [file] = tmp_path.rglob(FILE)
    together = json.loads(file.read_text())["zero_shot"]
    mulki("run", "recipes/xtail-mini.yaml", "--strategy", "zero-shot", *changes, "--set=evaluate.classes=task",
          "--out", tmp_path / "task")  # fmt: skip
    [file] = (tmp_path / "task").rglob(FILE)
    assert together == json.loads(file.read_text())["zero_shot"], "ten classes in all"


def test_shipped_recipes_have_the_published_protocols():
    steps = resolve("split-cifar100").recipe
    assert steps.stream.options["class_order"] == 1993
    assert (steps.stream.options["base"], steps.stream.options["increment"]) == (0, 10)
    assert (steps.model.name, steps.model.options["pretrained"]) == ("ViT-B-16", "laion400m_e32")
    xtail = resolve("xtail-vitb16").recipe
    assert (xtail.stream.options["split"], xtail.stream.options["shots"]) == ("coop", 16)
    assert "CIFAR100" not in xtail.stream.options["tasks"]
    assert len(xtail.stream.options["tasks"]) == 10
    assert (xtail.evaluate.classes, xtail.evaluate.template) == ("all", "a photo of a {}.")


def test_mixed_holds_out_every_fifth_image_of_each_class_for_validation():
    own = {task.name: task for task in mtil_mini(tasks=["digits", "scans"], evaluate_on="validation").tasks}
    held_out = mixed(of=[{"name": "mtil-mini", "tasks": ["digits", "scans"]}], evaluate_on="validation")
    for task in held_out.tasks:
        for part in ("train", "test"):
            mine, expected = getattr(task, part), getattr(own[task.name], part)
            assert mine.targets == expected.targets
            assert mine.fingerprint() == expected.fingerprint()


def test_validation_keeps_the_files_and_their_classes(tmp_path):
    for name, count in {"cat": 11, "dog": 4}.items():
        for i in range(count):
            file = tmp_path / name / f"{i:02}.png"
            file.parent.mkdir(exist_ok=True)
            Image.new("RGB", (4, 4), (i, 0, 0)).save(file)
    [task] = mixed(
        of=[{"name": "folders", "tasks": [{"name": "pets", "images": str(tmp_path), "test_share": 0.01}]}],
        evaluate_on="validation",
    ).tasks
    files = {
        part: [str(images.path(i)) for i in range(len(images))]
        for part, images in (("train", task.train), ("test", task.test))
    }
    assert [len(files["train"]), len(files["test"])] == [11, 2]  # of ten cats and three dogs, every fifth of each
    assert all("cat" in file for file in files["test"])
    assert not set(files["train"]) & set(files["test"])
    assert list(task.test.targets) == [task.class_names.index("cat")] * 2


def test_a_task_too_small_for_a_validation_is_named():
    [task] = colours().tasks
    few = ArrayImages(np.zeros((8, 4, 4, 3), np.uint8), np.repeat(np.arange(2), 4))
    with pytest.raises(MulkiError, match="colours: no class has five training images"):
        with_validation(evolve(task, train=few))
