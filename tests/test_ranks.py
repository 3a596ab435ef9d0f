"""Several ranks train what one process trains, and end together. All runs of two ranks share a few launches over gloo."""

import copy
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from avalanche.training.plugins import SupervisedPlugin
from matplotlib.backends.backend_agg import FigureCanvasAgg
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Dataset

from mulki_plugins.baselines.reference import ReferenceBatches
from mulki_plugins.cli import main
from mulki_plugins.errors import MulkiError
from mulki_plugins.ranks import collectives
from mulki_plugins.ranks.batches import OwnBatches, OwnSamples, in_order, note_share, own_part, part_sizes
from mulki_plugins.ranks.check import problems
from mulki_plugins.ranks.draws import (
    computing,
    draw_dropout_for_samples,
    draw_for_samples,
    dropout_of_samples,
    rows,
    set_rows,
)
from mulki_plugins.ranks.launch import Launch, launched
from mulki_plugins.recipe.resolve import Changes, resolve
from mulki_plugins.registry.catalog import Provenance
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.registry.register import Register
from mulki_plugins.streams.benchmark import Reference
from mulki_plugins.streams.task import TaskStream
from mulki_plugins.testing.ranks import run_on_ranks
from mulki_plugins.testing.small import small_stream
from tests.conftest import _draw_blank as draw_blank
from tests.conftest import blank_figure, small_world, without_flops
from tests.environments import ROOT

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the ranks of these tests are forks")

STRATEGIES = [
    "finetune", "lwf", "ewc", "replay", "icarl", "zscl", "snd", "mulki", "lora", "null-space", "mas", "si", "l2", "wise-ft",
    "weight-ensemble", "joint", "moe-adapters", "diki", "mulki-plus",
]  # fmt: skip
COUNTED = ("finetune", "mulki")
"""The strategies whose operations are counted."""
RECIPE = """
name: ranks
stream: {name: small}
reference: small-other
model: {name: small-clip}
strategy: finetune
train:
  iterations: 3
  batch_size: 6
  workers: 0
  optimizer: {name: sgd, lr: 0.01}
  gradient_clip: 1.0
  schedule: {name: constant}
  checkpoint: {every: 2, minutes: null, keep: 2}
evaluate: {batch_size: 4}
loggers: [csv]
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    path = folder / "ranks.yaml"
    path.write_text(RECIPE)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with small_world(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(FigureCanvasAgg, "draw", draw_blank)  # before the fixture of each test does so
        patch.setattr("mulki_plugins.training.records.matrix_figure", blank_figure)
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield path
    torch.set_num_threads(threads)


def two_tasks():
    return TaskStream(name="two", tasks=small_stream().tasks[:2])


def command(recipe, out, *words):
    return lambda: main.main(["run", str(recipe), "--out", str(out), *words])


@pytest.fixture(scope="module")
def runs(recipe, tmp_path_factory):
    """The folders of all strategies' runs: of one process, and of two ranks; and what the ranks printed."""
    Register(catalog(), Provenance(distribution="ranks", version="1")).stream("two", two_tasks, summary="two tasks")
    out = {ranks: tmp_path_factory.mktemp(f"on-{ranks}") for ranks in (1, 2)}
    (shorter := recipe.with_name("two.yaml")).write_text(RECIPE.replace("{name: small}", "{name: two}"))
    for counted in (False, True):
        chosen = [word for s in STRATEGIES if (s in COUNTED) == counted for word in ("--strategy", s)]
        with pytest.MonkeyPatch.context() as patch:
            if not counted:
                without_flops(patch)
            for ranks in (1, 2):
                said = tmp_path_factory.mktemp(f"said-by-{ranks}")
                begin = command(shorter, out[ranks], *chosen)
                assert run_on_ranks(begin, ranks, said) == [0] * ranks, (said / "stderr-0").read_text()
    del catalog().parts["stream", "two"]
    return out[1] / "ranks", out[2] / "ranks", said


def weights_of(run):
    [last] = sorted(each for each in (run / "checkpoints").iterdir() if "-step-" not in each.name)[-1:]
    state = torch.load(last / "state.pt", weights_only=True)
    tensors = load_file(last / "weights.safetensors") | state["model"]
    return {name: tensor for name, tensor in tensors.items() if ".gaussians." not in name}  # larger than what learns


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_train_what_one_process_trains(strategy, runs):
    one, two = (weights_of(folder / strategy / "seed-0") for folder in runs[:2])
    start = weights_of(runs[0] / "finetune" / "seed-0")
    assert one.keys() == two.keys()
    for name in [name for name in one if not one[name].is_floating_point()]:  # such as how often an expert has answered
        assert torch.equal(one.pop(name), two.pop(name)), name
    far = sum(float((one[n].double() - two[n].double()).square().sum()) for n in one) ** 0.5
    size = sum(float(one[n].double().square().sum()) for n in one) ** 0.5
    assert far < 1e-5 * size
    if strategy != "finetune" and one.keys() == start.keys():  # else the strategy would do nothing here
        assert sum(float((one[n] - start[n]).square().sum()) for n in one) ** 0.5 > 10 * far
    results = [json.loads((folder / strategy / "seed-0" / "result.json").read_text()) for folder in runs[:2]]
    assert np.abs(np.array(results[0]["matrix"]) - np.array(results[1]["matrix"])).max() < 1e-9
    assert results[1]["device"]["ranks"] == 2
    assert "ranks" not in results[0]["device"]
    once, twice = (result["flops"]["total"] for result in results)
    assert strategy not in COUNTED or once < twice < 2 * once  # each rank encodes all sentences, and half of the images


def test_the_loggers_get_what_one_process_logs(runs):
    one, two = ((folder / "mulki" / "seed-0" / "metrics.csv").read_text().splitlines() for folder in runs[:2])
    rows = [
        {tuple(line.split(",")[:-1]): line.split(",")[-1] for line in lines[1:] if "train/" in line}
        for lines in (one, two)
    ]
    assert len(rows[0]) > 30
    assert rows[0].keys() == rows[1].keys()
    for key, value in rows[0].items():
        assert float(value) == pytest.approx(float(rows[1][key]), rel=1e-4, abs=1e-6), key


def test_the_command_of_another_rank_prints_nothing(tmp_path):
    """With the real stdout, whose descriptor the command exchanges."""
    place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    begun = [sys.executable, "-m", "mulki_plugins", "run", "mtil", "--dry-run"]
    alone = subprocess.run(begun, capture_output=True, text=True, cwd=tmp_path)
    assert "mulki-plus" in alone.stdout
    done = subprocess.run(begun, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, **place})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_only_the_first_rank_prints_and_writes(runs):
    _, two, said = runs
    assert (said / "stdout-1").read_text() == (said / "stderr-1").read_text() == ""
    assert "Transfer" in (said / "stdout-0").read_text()
    answers = json.loads((two / "finetune" / "seed-0" / "result.json").read_text())
    assert answers["status"] == "complete"
    assert (two / "finetune" / "seed-0" / "predictions").is_dir()
    assert (two / "finetune" / "seed-0" / "log.txt").read_text().count("zero-shot: mean accuracy") == 1


SPOILERS = '''
import os, resource, signal, time
from pathlib import Path
from avalanche.training.plugins import SupervisedPlugin
from mulki_plugins.ranks import collectives


class Spoiler(SupervisedPlugin):
    """Does something on one rank, at the second step of the second task."""

    def after_forward(self, strategy, **kwargs):
        clock = strategy.clock
        if (clock.train_exp_counter, clock.train_exp_iterations, collectives.rank()) != (1, 1, int(os.environ["ON_RANK"])):
            return
        what = os.environ["SPOILER"]
        Path(os.environ["MOMENT"]).write_text(str(time.time()))
        if what == "raises":
            raise KeyError("spoiled")
        if what == "nan":
            strategy.loss = strategy.loss * float("nan")
        if what == "full":  # no file may become larger: not the weights, but what tells how the run ended
            resource.setrlimit(resource.RLIMIT_FSIZE, (16384, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        if what.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, what))
'''
EACH_STEP = ("--set", "train.checkpoint.every=1", "--set", "train.checkpoint.keep=9")


@pytest.fixture(scope="module")
def undisturbed(recipe, tmp_path_factory):
    """The weights of a run of two ranks that nothing has spoiled."""
    out, said = tmp_path_factory.mktemp("undisturbed"), tmp_path_factory.mktemp("said")
    assert run_on_ranks(command(recipe, out, *EACH_STEP), 2, said) == [0, 0], (said / "stderr-0").read_text()
    return weights_of(out / "ranks" / "finetune" / "seed-0")


@pytest.fixture
def spoiled(recipe, tmp_path, monkeypatch):
    """Run two ranks, one of which spoils the run: the statuses, what each printed, the run's folder, the seconds to the end."""
    (tmp_path / "spoilers_of_ranks.py").write_text(SPOILERS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("MOMENT", str(tmp_path / "moment"))
    Register(catalog(), Provenance(distribution="spoilers", version="1")).plugin(
        "spoiler", "spoilers_of_ranks:Spoiler", summary="spoils"
    )

    def run(what, rank):
        monkeypatch.setenv("SPOILER", what)
        monkeypatch.setenv("ON_RANK", str(rank))
        said, out = tmp_path / "said", tmp_path / "out"
        said.mkdir()
        settings = ("--set", "strategy.plugins=[spoiler]", "--name", "spoiled", *EACH_STEP)
        statuses = run_on_ranks(command(recipe, out, *settings), 2, said)
        seconds = time.time() - float((tmp_path / "moment").read_text())
        monkeypatch.setenv("SPOILER", "nothing")  # from here on
        return statuses, printed_by(said), out / "ranks" / "spoiled" / "seed-0", seconds

    yield run
    del catalog().parts["plugin", "spoiler"]


def printed_by(said):
    return [(said / f"stdout-{r}").read_text() + (said / f"stderr-{r}").read_text() for r in (0, 1)]


def errors_in(printed):
    assert "Traceback" not in "".join(printed)
    return [line for text in printed for line in text.splitlines() if line.startswith("error:")]


ENDS = {
    "raises": (2, "KeyError: 'spoiled'"),
    "nan": (2, "the loss is nan, made so by the plugin 'spoiler'"),
    "full": (2, "File too large; what was written before is still there"),
    "SIGTERM": (143, "stopped by SIGTERM; resume it with"),
    "SIGKILL": (2, "was killed: the process ended without a word"),
}


@pytest.mark.parametrize(
    ("what", "rank"), [("raises", 1), ("nan", 1), ("full", 0), ("SIGTERM", 1), ("SIGKILL", 1), ("SIGKILL", 0)]
)
def test_what_ends_one_rank_ends_all_with_one_message_and_the_run_is_resumed(
    what, rank, spoiled, undisturbed, tmp_path
):
    statuses, printed, run, seconds = spoiled(what, rank)
    assert seconds < 10, "the others would wait an hour for it"
    status, message = ENDS[what]
    assert statuses[1 - rank] == status
    assert statuses[rank] == (-9 if what == "SIGKILL" else status)
    [error] = errors_in(printed)
    assert message in error
    result = json.loads((run / "result.json").read_text())
    ended = "stopped" if what == "SIGTERM" else "failed"
    assert result["status"] == ("running" if (what, rank) == ("SIGKILL", 0) else ended)
    if what == "raises":
        assert "spoilers_of_ranks.py" in (run / "log.txt").read_text()  # the traceback of the other rank
    assert any("task-01-step-000001" in each.name for each in (run / "checkpoints").iterdir()), printed
    assert run_on_ranks(lambda: main.main(["resume", str(run)]), 2, tmp_path / "said") == [0, 0]
    resumed = weights_of(run)
    assert all(torch.equal(undisturbed[name], resumed[name]) for name in undisturbed)


def test_a_run_of_two_ranks_is_resumed_on_one(spoiled, undisturbed, tmp_path):
    statuses, printed, run, _ = spoiled("SIGTERM", 0)
    assert statuses == [143, 143], printed
    assert any("-step-000002" in each.name for each in (run / "checkpoints").iterdir())
    assert run_on_ranks(lambda: main.main(["resume", str(run)]), 1, tmp_path / "said") == [0]
    assert "began with 2 ranks and resumes with 1" in (tmp_path / "said" / "stderr-0").read_text()
    alone = weights_of(run)
    for name in undisturbed:
        assert torch.allclose(undisturbed[name], alone[name], rtol=1e-5, atol=1e-6), name


def test_an_image_that_one_rank_cannot_read_ends_both_as_one_process(recipe, tmp_path):
    photos = save_photos(tmp_path / "photos")
    broken = max((photos / "second" / "train").rglob("*.png"))
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    tasks = ", ".join(f"{{name: {n}, train: {photos}/{n}/train, test: {photos}/{n}/test}}" for n in ("first", "second"))
    settings = (
        f"stream={{name: folders, tasks: [{tasks}]}}",
        "train.workers=1",
        "train.epochs=1",
        "train.iterations=null",
    )
    words = ["--name", "photos", *(word for setting in settings for word in ("--set", setting))]
    errors = {}
    for ranks in (1, 2):
        (said := tmp_path / f"said-{ranks}").mkdir()
        assert run_on_ranks(command(recipe, tmp_path / str(ranks), *words), ranks, said) == [2] * ranks
        assert "Traceback" not in "".join(each.read_text() for each in said.iterdir())
        errors[ranks] = [line for each in said.iterdir() for line in each.read_text().splitlines() if "error:" in line]
    [error] = errors[2]
    assert errors[1] == [error]
    assert f"{broken}: this image cannot be read" in error
    run = tmp_path / "2" / "ranks" / "photos" / "seed-0"
    assert json.loads((run / "result.json").read_text())["status"] == "failed"
    broken.write_bytes(whole)
    resume = ["resume", str(run), "--force"]  # as the error says: the data are not the same as before
    assert run_on_ranks(lambda: main.main(resume), 2, tmp_path / "said-2") == [0, 0]
    assert json.loads((run / "result.json").read_text())["status"] == "complete"


def save_photos(folder):
    """Two tasks of the small stream as files."""
    for task in small_stream().tasks[:2]:
        for part, images in (("train", task.train), ("test", task.test)):
            for i in range(len(images)):
                image, label = images[i]
                place = folder / task.name / part / task.class_names[label]
                place.mkdir(parents=True, exist_ok=True)
                image.save(place / f"{i}.png")
    return folder


def test_the_stage_of_an_example_runs_on_two_ranks_unchanged(recipe, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "mulki-jigsaw")
    register = Register(catalog(), Provenance(distribution="mulki-jigsaw", version="1"))
    register.plugin("jigsaw", "mulki_jigsaw.stage:Jigsaw")
    try:
        for ranks in (1, 2):  # one tile stays in its place, so nothing is drawn that depends on the share of the batch
            (tmp_path / "said").mkdir(exist_ok=True)
            stack = "strategy.plugins=[teachers,{jigsaw: {tiles: 1, weight: 50.0}}]"
            begin = command(recipe, tmp_path / str(ranks), "--name", "jigsaw", "--set", stack)
            assert run_on_ranks(begin, ranks, tmp_path / "said") == [0] * ranks, (
                tmp_path / "said" / "stderr-0"
            ).read_text()
        stack = stack.replace("tiles: 1", "tiles: 2")
        assert run_on_ranks(
            command(recipe, tmp_path / "2", "--name", "tiles", "--set", stack), 2, tmp_path / "said"
        ) == [0, 0]
    finally:
        del catalog().parts["plugin", "jigsaw"]
    one, two, tiles = (
        weights_of(tmp_path / folder / "seed-0") for folder in ("1/ranks/jigsaw", "2/ranks/jigsaw", "2/ranks/tiles")
    )
    assert all(torch.allclose(one[name], two[name], rtol=1e-5, atol=1e-6) for name in one)
    assert not all(torch.allclose(one[name], tiles[name], rtol=1e-5, atol=1e-6) for name in one)


# which part is whose


@pytest.fixture
def as_rank():
    def use(rank, world):
        collectives.use(collectives.Ranks(rank, world, None, broken=lambda error: error))

    yield use
    collectives.use(None)
    set_rows(0)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 32])
def test_the_parts_of_a_batch_are_its_partition(size, as_rank):
    rows, shares = [], []
    for rank in range(3):
        as_rank(rank, 3)
        [part] = own_part([torch.arange(size)])
        note_share(size)
        rows += part.tolist()
        shares.append(collectives.factor())
        assert collectives.world() == (1 if size < 3 else 3)
        assert shares[-1] == pytest.approx(1 / 3 if size < 3 else len(part) / size)
    assert sorted(rows) == (sorted(3 * list(range(size))) if size < 3 else list(range(size)))
    assert sum(shares) == pytest.approx(1)


def test_each_sample_keeps_its_seed_whatever_the_number_of_ranks(as_rank):
    batches = [[5, 3, 8, 1], [2, 7, 0, 4], [6]]
    drawn = {}
    for world in (1, 2, 4):
        drawn[world] = []
        for rank in range(world):
            as_rank(rank, world)
            torch.manual_seed(3)
            sampler = OwnSamples(batches)
            drawn[world] += [sample for batch in sampler for sample in batch]
            assert list(sampler.sizes) == [4, 4, 1]
    assert set(drawn[1]) == set(drawn[2]) == set(drawn[4])
    assert len({seeds for _, seeds in drawn[1]}) == 9


def test_each_batch_of_an_evaluation_is_on_one_rank(as_rank):
    read = []
    for rank in range(3):
        as_rank(rank, 3)
        sampler = OwnBatches([[0, 1], [2, 3], [4, 5], [6]])
        read.append(list(sampler))
        assert len(sampler) == len(read[-1])
    assert sorted(index for each in read for batch in each for index in batch) == list(range(7))
    assert [len(each) for each in read] == [2, 1, 1]
    collectives.use(None)
    assert in_order(["a", "b"]) == ["a", "b"]


@pytest.mark.parametrize(("size", "count"), [(12, 1), (12, 2), (7, 2), (7, 5), (4, 2), (2, 2)])
def test_the_ranks_compute_a_batch_in_the_parts_of_one_process(size, count, as_rank):
    parts = []
    for rank in range(3):
        as_rank(rank, 3)
        [own] = own_part([torch.arange(size)])
        note_share(size)
        parts.append(part_sizes(len(own), count))
        assert sum(own for own, _ in parts[-1]) == len(own)
    assert len({len(each) for each in parts}) == 1, "or one rank would wait for the others forever"
    for each in zip(*parts, strict=True):
        [total] = {total for _, total in each}
        if size < 3:  # each rank computes the whole batch
            assert [own for own, _ in each] == [total] * 3
        else:
            assert [own for own, _ in each] == [len(range(rank, total, 3)) for rank in range(3)]
    collectives.use(None)
    assert part_sizes(7, 3) == [(3, 3), (2, 2), (2, 2)]


class Branch(nn.Module):
    """A dropout inside a tower."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(5, 5), nn.Dropout(0.4))

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_the_ranks_draw_what_one_process_draws(layout, as_rank):
    x = torch.randn(7, 30, 5, generator=torch.Generator().manual_seed(0))
    if layout == "columns":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    branch = Branch()

    def draw(samples):
        torch.manual_seed(3)
        noise = draw_for_samples(samples, torch.randn_like)
        return [noise, dropout_of_samples(samples, 0.3, training=True), copied(samples), torch.rand(4)]

    copied = branch
    expected = draw(x)
    assert torch.equal(dropout_of_samples(x, 0.3, training=False), x)
    for rank in range(3):
        as_rank(rank, 3)
        note_share(7)
        draw_dropout_for_samples(branch)
        copied = copy.deepcopy(branch)
        drawn = draw(x[rank::3])
        assert all(torch.allclose(a, b[rank::3]) for a, b in zip(drawn[:3], expected[:3], strict=True))
        assert torch.equal(drawn[3], expected[3]), "the generators are the same afterwards"
        assert not torch.equal(copied(x[rank::3]), copied(x[rank::3]))
        copied.eval()
        assert torch.equal(copied(x[rank::3]), branch.inner[0](x[rank::3]))


def test_for_other_samples_each_rank_draws_its_own(as_rank):
    drawn = []
    for rank in range(2):
        as_rank(rank, 2)
        note_share(8)
        torch.manual_seed(3)
        drawn += [draw_for_samples(torch.empty(3, 2), torch.randn_like) for _ in range(2)]
        assert torch.equal(torch.rand(4), torch.rand(4, generator=torch.Generator().manual_seed(3)))
        with computing(6):
            torch.manual_seed(3)
            whole = torch.randn(6, 2, generator=torch.Generator().manual_seed(3))
            assert torch.equal(draw_for_samples(torch.empty(3, 2), torch.randn_like), whole[rank::2])
        assert rows() == 8
    assert len({tuple(each.flatten().tolist()) for each in drawn}) == 4
    note_share(8)
    torch.manual_seed(3)
    assert torch.equal(draw_for_samples(torch.empty(3, 2), torch.randn_like), drawn[2]), "and the same again"


class Read(Dataset):
    """Numbers, and which of them have been read."""

    def __init__(self):
        self.read = []

    def __len__(self):
        return 7

    def __getitem__(self, index):
        self.read.append(index)
        return torch.tensor([float(index)])


def test_each_rank_reads_its_own_reference_images(as_rank):
    def first_batches(rank, world):
        images = Read()
        if world > 1:
            as_rank(rank, world)
        torch.manual_seed(3)
        batches = ReferenceBatches(Reference(images, ("a text",)), 3)
        return [next(batches).flatten().tolist() for _ in range(6)], batches, images

    whole, batches, _ = first_batches(0, 1)
    assert [len(each) for each in whole] == [3, 3, 1] * 2
    for rank in range(2):
        own, batches, images = first_batches(rank, 2)
        assert own == [each[rank::2] for each in whole]
        assert batches.rows == 1
        assert len(images.read) == (10 if rank == 0 else 6)  # a batch of one image is read by both
        note_share(1)
        again = next(batches)
        note_share(2)
        assert len(again) == 3, "every rank computes the whole step"


# what is refused


def test_a_batch_that_the_ranks_cannot_share_says_what_divides(recipe):
    resolved = resolve(str(recipe), Changes())
    assert list(problems(resolved.recipe, 3)) == []
    [line] = problems(resolved.recipe, 4)
    assert "4 ranks cannot share 6 images equally; set it to 4 or 8, or use one of 2, 3, 6 ranks" in line


def test_a_part_that_works_in_one_process_only_is_refused_with_its_reason(recipe):
    register = Register(catalog(), Provenance(distribution="others", version="2"))
    register.plugin("alone", "tests.test_ranks:Alone", summary="alone")
    try:
        resolved = resolve(str(recipe), Changes(settings=("strategy.plugins=[alone]",)))
        [line] = problems(resolved.recipe, 2)
        assert "the plugin 'alone' of others 2 works in one process only: it keeps a table of all batches" in line
    finally:
        del catalog().parts["plugin", "alone"]


class Alone(SupervisedPlugin):
    """A plugin that says that it needs one process."""

    one_process = "it keeps a table of all batches"


@pytest.mark.parametrize(
    ("environment", "launch"),
    [
        ({}, None),
        ({"RANK": "0", "WORLD_SIZE": "1"}, None),
        (
            {
                "RANK": "3",
                "WORLD_SIZE": "4",
                "LOCAL_RANK": "1",
                "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "a",
                "MASTER_PORT": "1",
            },
            Launch(3, 4, 1, 2),
        ),
    ],
)
def test_torchruns_environment_is_read(environment, launch):
    assert launched(environment) == launch


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"RANK": "4"}, "no place among the ranks"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', expected a number"),
        ({"MASTER_ADDR": ""}, "lacks MASTER_ADDR"),
    ],
)
def test_an_environment_that_makes_no_sense_is_an_error(changes, problem):
    whole = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    with pytest.raises(MulkiError, match=problem):
        launched(whole | changes)
