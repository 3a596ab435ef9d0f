"""Several ranks train what one process trains, and end together. All runs of two ranks share a few launches over gloo."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from avalanche.training.plugins import SupervisedPlugin
from matplotlib.backends.backend_agg import FigureCanvasAgg
from safetensors.torch import load_file

from mulki_plugins.cli import main
from mulki_plugins.errors import MulkiError
from mulki_plugins.ranks import collectives
from mulki_plugins.ranks.batches import OwnBatches, OwnSamples, in_order, note_share, own_part
from mulki_plugins.ranks.check import problems
from mulki_plugins.ranks.launch import Launch, launched
from mulki_plugins.recipe.resolve import Changes, resolve
from mulki_plugins.registry.catalog import Provenance
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.registry.register import Register
from mulki_plugins.testing.ranks import forked_ranks, run_on_ranks
from tests.conftest import _draw_blank as draw_blank
from tests.conftest import blank_figure, small_world
from tests.environments import ROOT

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the ranks of these tests are forks")

STRATEGIES = [
    "finetune", "lwf", "ewc", "replay", "icarl", "zscl", "snd", "mulki", "lora", "null-space", "mas", "si", "l2", "wise-ft",
    "weight-ensemble", "joint",
]  # fmt: skip
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


def command(recipe, out, *words):
    return lambda: main.main(["run", str(recipe), "--out", str(out), *words])


@pytest.fixture(scope="module")
def runs(recipe, tmp_path_factory):
    """The folders of all strategies' runs: of one process, and of two ranks; and what the ranks printed."""
    chosen = [word for strategy in STRATEGIES for word in ("--strategy", strategy)]
    out = {}
    for ranks in (1, 2):
        out[ranks] = tmp_path_factory.mktemp(f"on-{ranks}")
        said = tmp_path_factory.mktemp(f"said-by-{ranks}")
        assert run_on_ranks(command(recipe, out[ranks], *chosen), ranks, said) == [0] * ranks, (
            said / "stderr-0"
        ).read_text()
    return out[1] / "ranks", out[2] / "ranks", said


def weights_of(run):
    [last] = sorted(each for each in (run / "checkpoints").iterdir() if "-step-" not in each.name)[-1:]
    return load_file(last / "weights.safetensors")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_train_what_one_process_trains(strategy, runs):
    one, two = (weights_of(folder / strategy / "seed-0") for folder in runs[:2])
    start = weights_of(runs[0] / "finetune" / "seed-0")
    assert one.keys() == two.keys()
    far = sum(float((one[n].double() - two[n].double()).square().sum()) for n in one) ** 0.5
    size = sum(float(one[n].double().square().sum()) for n in one) ** 0.5
    assert far < 1e-5 * size
    if strategy != "finetune" and one.keys() == start.keys():  # else the strategy would do nothing here
        assert sum(float((one[n] - start[n]).square().sum()) for n in one) ** 0.5 > 10 * far
    results = [json.loads((folder / strategy / "seed-0" / "result.json").read_text()) for folder in runs[:2]]
    assert np.abs(np.array(results[0]["matrix"]) - np.array(results[1]["matrix"])).max() < 1e-9
    assert results[1]["device"]["ranks"] == 2
    assert "ranks" not in results[0]["device"]


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


def test_only_the_first_rank_prints_and_writes(runs):
    _, two, said = runs
    assert (said / "stdout-1").read_text() == (said / "stderr-1").read_text() == ""
    assert "Transfer" in (said / "stdout-0").read_text()
    answers = json.loads((two / "finetune" / "seed-0" / "result.json").read_text())
    assert answers["status"] == "complete"
    assert (two / "finetune" / "seed-0" / "predictions").is_dir()
    assert (two / "finetune" / "seed-0" / "log.txt").read_text().count("zero-shot: mean accuracy") == 1


SPOILERS = '''
import os, signal
import torch
from avalanche.training.plugins import SupervisedPlugin
from mulki_plugins.ranks import collectives


class Spoiler(SupervisedPlugin):
    """Does something on one rank, at the second step of the second task."""

    def after_forward(self, strategy, **kwargs):
        clock = strategy.clock
        if (clock.train_exp_counter, clock.train_exp_iterations, collectives.rank()) != (1, 1, int(os.environ["ON_RANK"])):
            return
        what = os.environ["SPOILER"]
        if what == "raises":
            raise KeyError("spoiled")
        if what == "nan":
            strategy.loss = strategy.loss * float("nan")
        if what.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, what))
'''


@pytest.fixture
def spoiled(recipe, tmp_path, monkeypatch):
    """Run two ranks, one of which spoils the run: the statuses, what each printed, the run's folder."""
    (tmp_path / "spoilers_of_ranks.py").write_text(SPOILERS)
    monkeypatch.syspath_prepend(tmp_path)
    Register(catalog(), Provenance(distribution="spoilers", version="1")).plugin(
        "spoiler", "spoilers_of_ranks:Spoiler", summary="spoils"
    )

    def run(what, rank):
        monkeypatch.setenv("SPOILER", what)
        monkeypatch.setenv("ON_RANK", str(rank))
        said, out = tmp_path / "said", tmp_path / "out"
        said.mkdir()
        settings = ("--set", "strategy.plugins=[spoiler]", "--name", "spoiled", "--set", "train.checkpoint.every=1")
        with forked_ranks(command(recipe, out, *settings), 2, said) as forks:
            statuses = forks.wait()
        printed = [(said / f"stdout-{r}").read_text() + (said / f"stderr-{r}").read_text() for r in (0, 1)]
        return statuses, printed, out / "ranks" / "spoiled" / "seed-0"

    yield run
    del catalog().parts["plugin", "spoiler"]


ENDS = {
    "raises": (2, "KeyError: 'spoiled'"),
    "nan": (2, "the loss is nan, made so by the plugin 'spoiler'"),
    "SIGTERM": (143, "stopped by SIGTERM; resume it with"),
    "SIGKILL": (2, "was killed: the process ended without a word"),
}


@pytest.mark.parametrize(("what", "rank"), [("raises", 1), ("nan", 1), ("SIGTERM", 1), ("SIGKILL", 1), ("SIGKILL", 0)])
def test_what_ends_one_rank_ends_all_with_one_message(what, rank, spoiled):
    statuses, printed, run = spoiled(what, rank)
    status, message = ENDS[what]
    other = 1 - rank
    assert statuses[other] == status
    assert statuses[rank] == (-9 if what == "SIGKILL" else status)
    errors = [line for text in printed for line in text.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, printed
    assert message in errors[0]
    assert "Traceback" not in printed[0] + printed[1]
    result = json.loads((run / "result.json").read_text())
    assert result["status"] == ("running" if rank == 0 else "stopped" if what == "SIGTERM" else "failed")
    if what == "raises":
        assert "spoilers_of_ranks.py" in (run / "log.txt").read_text()  # the traceback of the other rank


def test_a_run_of_two_ranks_is_resumed_on_two_with_the_same_bits_and_on_one(spoiled, recipe, tmp_path):
    statuses, printed, run = spoiled("SIGTERM", 0)
    assert statuses == [143, 143], printed
    assert any("-step-" in each.name for each in (run / "checkpoints").iterdir())
    shutil.copytree(run, tmp_path / "alone")
    os.environ["SPOILER"] = "nothing"  # the fixture puts it back
    whole = tmp_path / "whole"
    words = ("--set", "strategy.plugins=[spoiler]", "--set", "train.checkpoint.every=1", "--name", "spoiled")
    assert run_on_ranks(command(recipe, whole, *words), 2, tmp_path / "said") == [0, 0]
    assert run_on_ranks(lambda: main.main(["resume", str(run)]), 2, tmp_path / "said") == [0, 0]
    assert run_on_ranks(lambda: main.main(["resume", str(tmp_path / "alone")]), 1, tmp_path / "said") == [0]
    assert "began with 2 ranks and resumes with 1" in (tmp_path / "said" / "stderr-0").read_text()
    expected, same, alone = map(weights_of, (whole / "ranks" / "spoiled" / "seed-0", run, tmp_path / "alone"))
    for name in expected:
        assert torch.equal(expected[name], same[name]), name
        assert torch.allclose(expected[name], alone[name], rtol=1e-5, atol=1e-6), name


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


# what is refused


def test_a_batch_that_the_ranks_cannot_share_says_what_divides(recipe):
    resolved = resolve(str(recipe), Changes())
    assert list(problems(resolved.recipe, 3)) == []
    [line] = problems(resolved.recipe, 4)
    assert "6 images are no equal shares for 4 ranks; set it to 4 or 8, or use one of 2, 3, 6 ranks" in line


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
