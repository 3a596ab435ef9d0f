"""What TensorBoard shows, read back from the event files."""

import io

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from mulki_plugins.recipe.resolve import Changes, resolve
from mulki_plugins.report.predictions import UNREAD, Answers, read_predictions
from mulki_plugins.report.result import Result
from mulki_plugins.report.tensorboard import TensorBoardLogger
from mulki_plugins.report.wrong_images import captions, choose_wrong, draw_sheet
from mulki_plugins.training.resume import resume_experiment
from mulki_plugins.training.run import run_experiment
from tests.conftest import Killed, small_world

FEW = ("stream=small", "model=small-clip", "train.iterations=4", "train.batch_size=4", "train.schedule.warmup=0",
       "loggers=[tensorboard]", "evaluate.classes=all", "train.checkpoint.every=1")  # fmt: skip


def toy():
    return resolve("mtil", Changes(strategy="finetune", settings=FEW))


def events(folder):
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    found.Reload()
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run's folder, and its result."""
    folder = tmp_path_factory.mktemp("runs") / "mtil" / "finetune" / "seed-0"
    with small_world():
        return folder, run_experiment(toy(), 0, folder, folder=folder)


def scalars(found, tag):
    return [(event.step, event.value) for event in found.Scalars(tag)]


def test_the_means_after_each_task(run):
    folder, result = run
    found = events(folder)
    rows = [result.zero_shot, *result.matrix]
    assert scalars(found, "eval/mean") == [(i, pytest.approx(np.mean(row), abs=1e-4)) for i, row in enumerate(rows)]
    assert scalars(found, "eval/mean_learned") == [
        (i, pytest.approx(np.mean(rows[i][:i]), abs=1e-4)) for i in range(1, 4)
    ]
    assert scalars(found, "eval/mean_future") == [(i, pytest.approx(np.mean(rows[i][i:]), abs=1e-4)) for i in range(3)]
    assert scalars(found, "metrics/last") == [(3, pytest.approx(result.metrics["last"], abs=1e-4))]


def test_time_and_memory(run):
    folder, result = run
    found = events(folder)
    for name in ("train", "evaluate"):
        assert scalars(found, f"cost/{name}_seconds") == [
            (i + 1, pytest.approx(seconds, abs=1e-4)) for i, seconds in enumerate(result.seconds[name])
        ]
    memory = scalars(found, "cost/peak_memory_mib")
    assert [step for step, _ in memory] == [0, 1, 2, 3]
    assert memory[-1][1] == pytest.approx(result.device["peak_memory_mib"], rel=0.2)


def test_the_matrix_is_drawn_after_each_task(run):
    assert [event.step for event in events(run[0]).Images("matrix")] == [1, 2, 3]


def test_a_few_wrong_images_of_each_task(run):
    """The sheet of a task is as wide as the number of its wrong images says, and shows none that are right."""
    folder, _ = run
    found, kept = events(folder), read_predictions(folder)
    for task, name in enumerate(kept.tasks):
        sheets = {event.step: event for event in found.Images(f"wrong/{name}")} if _has(found, name) else {}
        expected = {row for row in (task + 1, 3) if not kept.right(row, task).all()}
        assert set(sheets) == expected, name
        for row, event in sheets.items():
            wrong = min(8, int((~kept.right(row, task)).sum()))
            assert Image.open(io.BytesIO(event.encoded_image_string)).width == min(wrong, 4) * 152 + 8


def _has(found, name):
    return f"wrong/{name}" in found.Tags()["images"]


def hparams(found, tag):
    content = found.SummaryMetadata(f"_hparams_/{tag}").plugin_data.content
    return HParamsPluginData.FromString(content)


def test_hyper_parameters_beside_the_metrics_without_another_run(run):
    folder, _ = run
    found = events(folder)
    started = hparams(found, "session_start_info").session_start_info
    assert started.hparams["train.optimizer.lr"].number_value == 0.0005
    assert started.hparams["evaluate.classes"].string_value == "all"
    assert started.hparams["strategy"].string_value == "finetune"
    assert started.hparams["seed"].string_value == "0"
    assert started.group_name == "mtil/finetune"
    assert hparams(found, "session_end_info").session_end_info.status == api_pb2.STATUS_SUCCESS
    assert [path.parent for path in folder.rglob("*tfevents*")] == [folder], "no stray run below it, and no second file"


def test_the_recipe_as_text(run):
    folder, _ = run
    text = events(folder).Tensors("recipe/text_summary")[0].tensor_proto.string_val[0].decode()
    for line in (folder / "recipe.yaml").read_text().splitlines():
        assert f"\n    {line}" in text


def test_a_killed_and_resumed_run_has_no_point_twice(run, small_parts, kill_at, tmp_path):
    kill_at(2, 2)
    folder = tmp_path / "mtil" / "finetune" / "seed-0"
    with pytest.raises(Killed):
        run_experiment(toy(), 0, folder, folder=folder)
    resume_experiment(toy(), 0, folder)
    once, again = events(run[0]), events(folder)
    assert again.Tags()["scalars"] == once.Tags()["scalars"]
    for tag in once.Tags()["scalars"]:
        assert [step for step, _ in scalars(again, tag)] == [step for step, _ in scalars(once, tag)], tag
    assert len(again.Tensors("recipe/text_summary")) == 1
    assert [event.step for event in again.Images("matrix")] == [1, 2, 3]


def test_a_failed_run_is_marked(tmp_path):
    Result(recipe="r", strategy="s", seed=0, tasks=["a"], status="failed").write(tmp_path)
    logger = TensorBoardLogger(tmp_path)
    logger.close()
    assert hparams(events(tmp_path), "session_end_info").session_end_info.status == api_pb2.STATUS_FAILURE


@pytest.mark.parametrize("recipe", ["```\n<script>alert(1)</script>\n# x", "\x1b[31m\udcff", "a: [", ""])
def test_a_recipe_is_code_to_markdown_whatever_it_says(recipe, tmp_path):
    (tmp_path / "recipe.yaml").write_text(recipe, errors="surrogateescape")
    TensorBoardLogger(tmp_path).close()
    found = events(tmp_path)
    if "recipe/text_summary" in found.Tags()["tensors"]:
        text = found.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0].decode()
        assert "\x1b" not in text
        assert all(line.startswith("    ") for line in text.splitlines()[2:])


def test_the_most_confident_wrong_answers_are_chosen():
    labels = np.array([0, 0, 0, 1, 1, 1])
    answers = Answers(
        predicted=np.array([0, 1, 2, UNREAD, 0, 2]), confidence=np.array([255, 100, 200, 0, 255, 200], dtype=np.uint8)
    )
    assert choose_wrong(answers, labels) == [4, 2, 5, 1]
    assert captions(answers, [4], labels, ["cat", "dog", "owl"]) == [["dog", "not cat", "sure to 100 %"]]


@pytest.mark.parametrize("name", ["$\\frac{", "花 🦉", "a\nb\x1b", "\ud800", "x" * 5000, "", "مرحبا"])
def test_any_caption_fits_below_its_image(name):
    images = [Image.new("RGB", size, "red") for size in ((1, 1), (500, 3), (3, 500), (64, 64), (20, 20))]
    sheet = draw_sheet(images, [[name, "b", "c"]] * 5)
    assert sheet.shape[1:] == (4 * 152 + 8, 3)
    assert (sheet[:, :8] == 255).all(), "nothing is drawn in the margin"
    assert (sheet[:, -8:] == 255).all()
