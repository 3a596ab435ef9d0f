"""`mulki bench`: how time is split, how passes are cut short, what is predicted, and the command as a whole."""

import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from attrs import evolve
from click.testing import CliRunner
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, TensorDataset

from mulki_plugins.bench import measure as measuring
from mulki_plugins.bench import passes as passes_module
from mulki_plugins.bench import thin
from mulki_plugins.bench.hardware import Counter, peak_product
from mulki_plugins.bench.measure import Evaluation, Learned, Measured, _rates, measure
from mulki_plugins.bench.passes import Pass, Passes
from mulki_plugins.bench.predict import predict, whole_evaluation
from mulki_plugins.bench.steps import StepObserver, Steps
from mulki_plugins.bench.stopwatch import PARTS, Stopwatch
from mulki_plugins.bench.synthetic import synthetic, without_weights
from mulki_plugins.bench.table import as_text, duration
from mulki_plugins.bench.thin import Thinned, affordable_batch, sample_sizes, shortened, some
from mulki_plugins.cli import main
from mulki_plugins.errors import MulkiError
from mulki_plugins.ranks.batches import OwnBatches
from mulki_plugins.recipe.budget import evaluations, trainings
from mulki_plugins.recipe.resolve import Changes, resolve
from mulki_plugins.recipe.schema import Choice
from mulki_plugins.stages.statistics import evaluation_batches
from mulki_plugins.streams.task import ArrayImages
from tests.conftest import SIZE, small_world

pytestmark = pytest.mark.flops
SMALL = [
    "--set", "stream={name: small}", "--set", "model={name: small-clip}", "--set", "device=cpu",
    "--set", "train.iterations=6", "--set", "train.schedule.warmup=1", "--set", "train.batch_size=4",
    "--set", "reference=null",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def small_streams():
    with small_world():
        yield


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch):
    """A twentieth of a second for the largest product."""
    monkeypatch.setattr(measuring, "peak_product", partial(peak_product, seconds=0.05))


class Clock:
    """Stands still until it is told to advance."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def advance(self, seconds):
        self.now += seconds


def recipe(*settings, strategy="mulki-plus"):
    return resolve("mtil", Changes(strategy=strategy, settings=settings)).recipe


# the time of each part


def test_a_part_within_another_counts_only_once():
    clock = Clock()
    watch = Stopwatch(clock=clock)
    clock.advance(1)
    with watch.part("losses and plugins"):
        clock.advance(2)
        with watch.part("teachers"):
            clock.advance(4)
        clock.advance(8)
    seconds = watch.take()
    assert seconds == dict.fromkeys(PARTS, 0.0) | {"other": 1, "losses and plugins": 10, "teachers": 4}
    assert sum(watch.take().values()) == 0


def test_a_part_waits_for_the_device_only_if_asked():
    waited = []
    watch = Stopwatch(lambda: waited.append(1))
    with watch.part("backward"):
        pass
    assert not waited
    watch.waits = True
    with watch.part("backward"):
        pass
    assert len(waited) == 2


def test_a_watched_method_is_itself_again_afterwards():
    class Base:
        def forward(self):
            clock.advance(3)
            return 5

    class Model(Base):
        pass

    clock, forward = Clock(), Base.forward
    watch = Stopwatch(clock=clock)
    with watch.watch(Model, "forward", "student"), watch.watch(Model, "no_such_method", "student"):
        assert Model().forward() == 5
    assert watch.take()["student"] == 3
    assert Base.forward is forward
    assert "forward" not in vars(Model)
    assert not hasattr(Model, "no_such_method")


# passes over images


def read_all(loader, clock, seconds):
    read = 0
    for [x] in loader:
        clock.advance(seconds)
        read += len(x)
    return read


@pytest.mark.parametrize("sampled", [lambda batches: None, lambda batches: batches, OwnBatches])
def test_a_long_pass_is_cut_short_and_reckoned(sampled):
    clock = Clock()
    passes = Passes(Stopwatch(clock=clock), clock)
    data = TensorDataset(torch.zeros(95, 1))
    batches = sampled(BatchSampler(SequentialSampler(data), 10, drop_last=False))
    loader = DataLoader(data, batch_size=10) if batches is None else DataLoader(data, batch_sampler=batches)
    with passes.watching():
        assert read_all(loader, clock, 2.0) == 20
    [found] = passes.take()
    assert (found.images, found.read, found.seconds, found.rate) == (95, 20, 4.0, 0.2)
    assert found.whole == pytest.approx(4.0 + 75 * 0.2)
    assert read_all(DataLoader(data, batch_size=10), clock, 2.0) == 95, "outside of the block nothing is cut"


@pytest.mark.parametrize("case", ["short", "random order", "evaluation", "training"])
def test_no_other_pass_is_cut_short(case):
    clock = Clock()
    watch = Stopwatch(clock=clock)
    passes = Passes(watch, clock, evaluating=case == "evaluation")
    data = TensorDataset(torch.zeros(40, 1))
    seconds = passes_module.ENOUGH / 4 if case == "short" else 10.0
    loader = DataLoader(data, batch_size=10, shuffle=case == "random order")
    with passes.watching():
        if case == "training":
            with watch.part("loading"):
                batches = iter(loader)
            assert sum(len(x) for (x,) in batches) == 40
        else:
            assert read_all(loader, clock, seconds) == 40
    assert [p.read for p in passes.take()] == ([40] if case == "short" else [])


def test_a_pass_in_random_order_that_says_how_many_images_it_reads_is_cut_short():
    clock = Clock()
    passes = Passes(Stopwatch(clock=clock), clock)
    data = TensorDataset(torch.zeros(95, 1))
    with passes.watching():
        assert read_all(DataLoader(data, 10, sampler=RandomSampler(data, num_samples=60)), clock, 2.0) == 20
    assert [(each.images, each.read) for each in passes.take()] == [(60, 20)]


class Images(TensorDataset):
    """Has the view of Avalanche's data sets for an evaluation."""

    def eval(self):
        return self


def test_the_pass_of_a_stage_or_a_head_is_cut_short():
    clock = Clock()
    passes = Passes(Stopwatch(clock=clock), clock)
    images = Images(torch.zeros(95, 1), torch.zeros(95, dtype=torch.long))
    with passes.watching():
        for _ in evaluation_batches(images, 10, shared=True):
            clock.advance(2.0)
    assert [(each.images, each.read) for each in passes.take()] == [(95, 20)]


def test_a_slow_machine_reads_a_few_images_of_each_batch():
    clock = Clock()
    passes = Passes(Stopwatch(clock=clock), clock, rows=4)
    data = TensorDataset(torch.zeros(95, 1))
    with passes.watching():
        assert read_all(DataLoader(data, batch_size=10), clock, 2.0) == 8
    [found] = passes.take()
    assert (found.images, found.read, found.rate) == (95, 8, 0.5)


# steps


def observe(asynchronous, durations, steps=4, limit=1000.0):
    clock, waits = Clock(), []
    watch = Stopwatch(clock=clock)
    strategy = SimpleNamespace(
        dataloader=SimpleNamespace(count=99), clock=SimpleNamespace(train_exp_iterations=0), device=torch.device("cpu")
    )
    observer = StepObserver(
        strategy=strategy, watch=watch, wait=lambda: waits.append(clock.now), warmup=2, steps=steps, limit=limit,
        asynchronous=asynchronous, count=False, clock=clock,
    )  # fmt: skip
    for seconds in durations:
        with watch.part("backward"):
            clock.advance(seconds * 0.75)
        clock.advance(seconds * 0.25)
        strategy.clock.train_exp_iterations += 1
        observer()
        if strategy.dataloader.count != 99:
            break
    return observer.result(), strategy, waits


def test_steps_after_the_warm_up_count_and_the_task_ends():
    steps, strategy, _ = observe(False, [50, 9, 1, 2, 3, 2, 7, 7])
    assert steps.seconds == [1, 2, 3, 2]
    assert steps.median == 2
    assert steps.parts["backward"] == 1.5
    assert steps.parts["other"] == 0.5
    assert strategy.dataloader.count == 6
    assert steps.span == 9 + 1 + 2 + 3 + 2


def test_a_slow_machine_makes_fewer_steps():
    steps, strategy, _ = observe(False, [50, 9, 40, 40, 40, 40, 40], steps=30, limit=60)
    assert steps.seconds == [40, 40]
    assert strategy.dataloader.count == 4


def test_a_device_that_runs_behind_gets_steps_of_its_own_for_the_parts():
    steps, strategy, waits = observe(True, [50, 9, 1, 2, 3, 2, 8, 8, 8], steps=4)
    assert steps.seconds == [2, 2, 2, 2], "the mean: single steps end before the device does"
    assert steps.parts["backward"] == 6
    assert strategy.dataloader.count == 9
    assert all(end not in waits for end in (100 + 60, 100 + 62, 100 + 65)), "no wait between timed steps"


def test_the_mean_takes_periodic_work_in_and_leaves_an_interruption_out():
    steps = Steps(warmup=0, seconds=[1.0] * 8 + [2.0, 100.0], parts={}, span=0.0, flops=0, calls={})
    assert steps.mean == pytest.approx((8 + 2 + 3) / 10)


# the budget and the prediction


IMAGES = {"a": 100, "b": 200, "c": 64}


def test_the_trainings_and_evaluations_of_each_base():
    naive = recipe("train.iterations=7")
    assert [(t.steps, t.images) for t in trainings(naive, IMAGES)] == [(7, 100), (7, 200), (7, 64)]
    epochs = evolve(naive, train=evolve(naive.train, iterations=None, epochs=2))
    assert [t.steps for t in trainings(epochs, IMAGES)] == [2 * 4, 2 * 7, 2 * 2]  # batches of 32
    cumulative = evolve(epochs, strategy=evolve(epochs.strategy, base="cumulative"))
    assert [(t.steps, t.images) for t in trainings(cumulative, IMAGES)] == [(8, 100), (2 * 10, 300), (2 * 12, 364)]
    joint = recipe("train.iterations=7", strategy="joint")
    assert [(t.name, t.steps, t.images) for t in trainings(joint, IMAGES)] == [("all tasks", 21, 364)]
    assert [t.steps for t in trainings(evolve(joint, train=epochs.train), IMAGES)] == [2 * 12]
    nothing = recipe(strategy="zero-shot")
    assert trainings(nothing, IMAGES) == []
    assert [evaluations(r, 3) for r in (naive, joint, nothing)] == [4, 2, 1]
    assert evaluations(evolve(nothing, evaluate=evolve(nothing.evaluate, classes="seen")), 3) == 4


def test_a_tasks_own_budget_counts():
    own = recipe("train.iterations=7", "train.per_task={digits: {iterations: 3}, flags: {epochs: 1}}")
    assert [t.steps for t in trainings(own, {"digits": 100, "flags": 65, "food": 10})] == [3, 3, 7]


def measured(settings=("train.iterations=10", "train.checkpoint.every=4"), strategy="mulki-plus"):
    def learned(name, images, seconds, passes):
        steps = Steps(
            warmup=1, seconds=[seconds] * 3, parts=dict.fromkeys(PARTS, seconds / 9), span=1.0, flops=0, calls={}
        )
        return Learned(
            name=name, images=images, steps=steps, overhead=2.0, passes=passes, checkpoint=0.5, peak_memory_mib=1.0
        )

    def evaluation(seconds):
        return Evaluation(read={"a": 10, "b": 10, "c": 10}, sentences=dict.fromkeys(IMAGES, 7), seconds=seconds,
                          loading=1.0, encoding=1.0,
                          rates={"a": 0.1, "b": 0.1, "c": 0.2})  # fmt: skip

    return Measured(
        recipe=recipe(*settings, strategy=strategy), device="machine", threads=2, peak_flops=1e9, build=5.0,
        tasks=[
            learned("a", 100, 1.0, [Pass(images=100, read=50, seconds=1.0, rate=0.01)]),
            learned("b", 200, 3.0, [Pass(images=200, read=200, seconds=4.0, rate=0.02),
                                    Pass(images=384, read=384, seconds=7.0, rate=0.02)]),
        ],
        evaluations=[evaluation(9.0), evaluation(3.0), evaluation(5.0)],
        sentences=dict.fromkeys(IMAGES, 7), sentence_seconds=0.5,
        batch_size=64, eval_batch_size=8, checkpoint_mib=20.0, train_images=IMAGES, test_images={"a": 30, "b": 10, "c": 20},
    )  # fmt: skip


def test_the_prediction_is_the_sum_of_its_parts():
    result = predict(measured(), imports=1.5)
    assert result.startup == 6.5
    assert result.training == 10 * 1.0 + 10 * 3.0 + 10 * 3.0
    assert result.evaluation == pytest.approx((9 + 4) + 3 * ((3 + 4) + (5 + 4)) / 2)  # 20·0.1 + 10·0.2 are missing
    first, second, third = 2 + 1.5, 2 + 4 + 7, 2 + (4 - 136 * 0.02) + 7  # the pass over the task's own images shrinks
    assert result.preparation == pytest.approx(first + second + third)
    assert result.checkpoints == 3 * 0.5 * (1 + 2)
    assert result.total == pytest.approx(6.5 + 70 + 13 + 24 + result.preparation + 4.5)


def test_the_prediction_of_a_run_that_trains_nothing():
    nothing = evolve(measured((), "zero-shot"), tasks=[])
    result = predict(nothing)
    assert (result.training, result.preparation, result.checkpoints) == (0, 0, 0)
    assert result.evaluation == 13
    assert "this strategy trains nothing" in as_text(nothing, result)


def test_tasks_that_were_not_evaluated_are_reckoned():
    part = Evaluation(
        read={"a": 10, "b": 10}, sentences={"a": 7, "b": 3}, seconds=9.0, loading=1.0, encoding=1.0,
        rates={"a": 0.1, "b": 0.3},
    )  # fmt: skip
    seconds = whole_evaluation(part, measured())
    assert seconds == pytest.approx(9 + 20 * 0.1 + 20 * 0.2 + 4 * 0.5 + 7 * 0.5)


def test_a_machine_that_is_slow_at_sentences_evaluates_two_tasks(monkeypatch, stream, classifier):
    thinned = Thinned(recipe())
    assert [task.name for task in thinned(stream, classifier, SIZE).tasks] == ["first", "second", "third"]
    monkeypatch.setattr(thin, "seconds_per_sentence", lambda model: thin.SECONDS)
    slow = thinned(stream, classifier, SIZE)
    assert [task.name for task in slow.tasks] == ["first", "second"]
    assert [len(task.templates) for task in slow.tasks] == [1, 1]
    assert [prompts.templates for prompts in classifier.prompts[:2]] == [task.templates for task in slow.tasks]
    assert thinned.whole is stream
    anything = Thinned(recipe("evaluate.classes=all"))
    assert len(anything(stream, classifier, SIZE).tasks) == 3


def test_rates_are_those_of_the_loaders_own_pace():
    ends = [(0, 1.0), (0, 2.0), (0, 2.5), (1, 9.0)]
    assert _rates(ends, {"a": 30, "b": 10}, 10, 1) == pytest.approx({"a": 1.5 / 20, "b": 1.5 / 20})
    assert _rates([(0, 1.0), (1, 3.0)], {"a": 10, "b": 10}, 10, 1) == pytest.approx({"a": 0.2, "b": 0.2})


# a sample of the test images


def test_an_evaluation_is_as_large_as_the_machine_is_fast():
    tests = {"a": 300, "b": 50000}
    assert sample_sizes(0.001, tests, 128, 0) == (128, {"a": 5000, "b": 5000})
    assert sample_sizes(0.1, tests, 128, 0) == (25, {"a": 50, "b": 50})
    assert sample_sizes(5.0, tests, 128, 0) == (4, {"a": 8, "b": 8})
    batch, counts = sample_sizes(0.0001, tests, 128, 12)
    assert batch == 128
    assert counts == {"a": 256, "b": 50 * 128}, (
        "each of the workers fetches three batches before the pace shows, and one more"
    )


def test_a_step_is_as_large_as_the_machine_is_fast(monkeypatch, stream, classifier):
    assert affordable_batch(0.001, 64) == 64
    assert affordable_batch(thin.STEP / thin.PASSES / 20, 64) == 20
    assert affordable_batch(100.0, 64) == thin.LEAST
    assert affordable_batch(100.0, 2) == 2
    monkeypatch.setattr(thin, "seconds_per_image", lambda model, size: 100.0)
    whole = recipe("train.compile=true", "train.batch_size=16")
    thinned = Thinned(whole)
    thinned(stream, classifier, SIZE)
    small = shortened(whole, 5, thinned)
    assert (small.train.batch_size, small.train.compile) == (thin.LEAST, False)


def test_steps_of_small_batches_tell_of_whole_ones():
    parts = {**dict.fromkeys(PARTS, 0.0), "optimizer": 1.0, "backward": 2.0}
    small = Steps(warmup=1, seconds=[4.0, 3.0, 5.0], parts=parts, span=1.0, flops=0, calls={})
    whole = small.of_batches(8.0, fixed=1.0)
    assert whole.median == pytest.approx(1.0 + 8 * 3.0)
    assert whole.parts["optimizer"] == 1.0
    assert whole.parts["backward"] == pytest.approx(2.0 * 25 / 4)
    assert small.of_batches(1.0, fixed=1.0).seconds == small.seconds


def test_bench_of_a_slow_machine_says_what_was_measured(monkeypatch):
    monkeypatch.setattr(thin, "seconds_per_image", lambda model, size: 100.0)
    small = recipe(
        "stream={name: small}", "model={name: small-clip}", "device=cpu", "reference=null", "train.batch_size=16"
    )
    measured = measure(small, 0, steps=2, evaluate=False)
    assert measured.batch_size == thin.LEAST
    text = as_text(measured, predict(measured))
    assert "A step of 4 images was measured and the time of 16 reckoned from it." in text
    assert "batches of 16" in text


def test_a_sample_is_spread_over_all_images():
    images = ArrayImages(np.zeros((10, 2, 2, 3), dtype=np.uint8), np.arange(10))
    few = some(images, 4)
    assert few.targets == [0, 3, 6, 9]
    assert [few[i][1] for i in range(len(few))] == few.targets
    assert some(images, 10) is images


# data and weights that are not there


def test_synthetic_data_have_the_published_numbers(tmp_path):
    options = {"split": "zscl", "tasks": ["EuroSAT", "MNIST"]}
    stream = synthetic(Choice("mtil", options), tmp_path)
    eurosat, mnist = stream.tasks
    assert (len(eurosat.class_names), len(eurosat.train), len(eurosat.test)) == (10, 21600, 5400)
    assert (len(mnist.class_names), len(mnist.train), len(mnist.test)) == (10, 60000, 10000)
    image, label = eurosat.train[1234]
    assert image.size == (64, 64)
    assert label == 4
    assert mnist.test[7][0].mode == "RGB"
    assert len(set(eurosat.test.targets)) == 10
    assert not {eurosat.train.path(i) for i in range(30)} & {eurosat.test.path(i) for i in range(30)}
    few = synthetic(Choice("mtil", {**options, "shots": 5}), tmp_path).tasks[0]
    assert len(few.train) == 50
    with pytest.raises(MulkiError, match="--synthetic"):
        synthetic(Choice("folders", {}), tmp_path)


def test_weights_of_a_tag_are_replaced_and_those_of_a_file_are_not():
    paper = resolve("mtil-vitb16").recipe
    random, replaced = without_weights(paper)
    assert replaced
    assert random.model.options["pretrained"] == "random"
    assert random.model.name == paper.model.name
    assert without_weights(random) == (random, False)
    assert without_weights(recipe())[1] is False


# the machine


def test_operations_and_reads_are_counted():
    a, b = torch.ones(8, 16), torch.ones(16, 32)
    counter = Counter(torch.device("cpu"), kernels=True)
    counter.start()
    float((a @ b).sum())
    counts = counter.stop()
    assert counts["flops"] == 2 * 8 * 16 * 32
    assert counts["scalar_reads"] == 1
    assert counts["launches"] >= 3


def test_attention_on_a_cpu_is_counted():
    q, k, v = (torch.ones(2, 4, 16, 8) for _ in range(3))
    counter = Counter(torch.device("cpu"), kernels=True)
    counter.start()
    torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert counter.stop()["flops"] == 2 * (2 * 2 * 4 * 16 * 16 * 8)


def test_the_largest_product_is_measured_and_the_precision_is_put_back():
    before = torch.get_float32_matmul_precision()
    assert peak_product(torch.device("cpu"), "tf32", seconds=0.05) > 1e8
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0123, "12 ms"), (12.34, "12.3 s"), (245.2, "4 min 05 s"), (6300, "1 h 45 min")]
)
def test_durations_in_words(seconds, text):
    assert duration(seconds) == text


# the command


def mulki(*arguments, code=0):
    done = CliRunner().invoke(main, list(map(str, arguments)))
    assert done.exit_code == code, done.output + done.stderr
    return done


def test_bench_measures_and_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = mulki("bench", "mtil", "--strategy", "mulki", *SMALL, "--steps", "3", "--json")
    data = json.loads(done.stdout)
    first, second = data["tasks"]
    assert (first["name"], second["name"]) == ("first", "second")
    for task in (first, second):
        parts = task["parts_seconds"]
        assert min(parts[name] for name in PARTS if name not in ("checkpoint", "logging")) > 0, parts
        assert 0 < sum(parts.values()) < 3 * task["step_seconds"]
        assert task["images_per_second"] == pytest.approx(4 / task["step_seconds"])
    assert first["flops"] is None
    assert second["flops"] > 0
    assert 0 < second["utilisation"] < 1
    assert second["calls"]["launches"] > 100
    assert len(data["evaluations"]) == 3
    assert data["checkpoint"]["mib"] > 0
    prediction = data["prediction"]
    parts = ("training", "evaluation", "preparation", "checkpoints", "startup")
    assert prediction["seconds"] == pytest.approx(sum(prediction[part] for part in parts))
    steps = 6 * first["step_seconds_mean"] + 12 * second["step_seconds_mean"]
    assert prediction["training"] == pytest.approx(steps)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("strategy", ["finetune", "joint", "zero-shot", "ewc", "replay"])
def test_bench_of_every_kind_of_strategy(strategy):
    done = mulki("bench", "mtil", "--strategy", strategy, *SMALL, "--steps", "2")
    assert "one run of the whole recipe on this machine: about" in done.stdout
    assert ("this strategy trains nothing" in done.stdout) == (strategy == "zero-shot")


def test_bench_without_data_draws_images_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(thin, "SECONDS", 1.0)
    stream = f"stream={{name: mtil, root: {tmp_path / 'nowhere'}, tasks: [MNIST, EuroSAT]}}"
    settings = (stream, "model=mulki-tiny", "device=cpu", "train.batch_size=4", "train.workers=0", "train.per_task={}",
                "train.compile=false", "train.precision=fp32")  # fmt: skip
    words = [word for setting in settings for word in ("--set", setting)]
    done = mulki("bench", "mtil-vitb16", "--strategy", "finetune", *words, "--steps", "2", "--json")
    assert "note: measured with drawn images" in done.stderr
    data = json.loads(done.stdout)
    assert [task["name"] for task in data["tasks"]] == ["MNIST", "EuroSAT"]
    assert data["prediction"]["training"] > 400 * data["tasks"][1]["step_seconds"]


def test_an_estimate_of_a_dry_run(tmp_path):
    done = mulki("run", "mtil", *SMALL, "--dry-run", "--estimate", "--out", tmp_path, "--seed", "0", "--seed", "1")
    assert "one run of the whole recipe on this machine: about" in done.stdout
    assert "all 2 seeds" in done.stdout
    data = json.loads(mulki("run", "mtil", *SMALL, "--dry-run", "--estimate", "--json", "--out", tmp_path).stdout)
    assert data["estimate"]["seconds"] > 0
    assert list(tmp_path.iterdir()) == []
    assert "--estimate needs --dry-run" in mulki("run", "mtil", "--estimate", code=2).stderr
