"""A step: what it waits for, what the loggers get and when, parts of a batch, precision, and compiled towers."""

import copy
import math

import pytest
import torch
from avalanche.training.plugins import EvaluationPlugin, EWCPlugin, ReplayPlugin, SupervisedPlugin
from torch.profiler import ProfilerActivity, profile, record_function

from mulki_plugins.baselines import LearningWithoutForgetting, ReferenceDistillation, WeightConstraint
from mulki_plugins.baselines.reference import ReferenceBatches
from mulki_plugins.errors import MulkiError
from mulki_plugins.models import ClipClassifier
from mulki_plugins.ranks import collectives
from mulki_plugins.recipe.resolve import Changes, resolve
from mulki_plugins.recipe.schema import Evaluate, Optimizer, Train
from mulki_plugins.stages import Adding, Connecting, Distinguishing, Eliciting, Recalling, Teachers
from mulki_plugins.stages.stage import Stage, features_of
from mulki_plugins.streams.benchmark import as_benchmark, as_reference
from mulki_plugins.training import compilation
from mulki_plugins.training.accuracy import AccuracyRecorder
from mulki_plugins.training.finite import Diverged
from mulki_plugins.training.logbook import StepLog
from mulki_plugins.training.rng import seed_everything
from mulki_plugins.training.strategy import ContinualTemplate, halvings
from tests.conftest import small_clip, small_reference, small_tokenizer, weights


class Lines:
    """Keeps what a logger gets: (tag, step, value), and how many steps had begun by then."""

    def __init__(self):
        self.lines, self.begun, self.strategy = [], [], None

    def log_metrics(self, values):
        self.lines += [(v.name, v.x_plot, float(v.value)) for v in values]
        self.begun += [self.strategy.step] * len(values)


def template(model, plugins=(), ahead=1, **train):
    train = {"iterations": 8, "batch_size": 6, "optimizer": Optimizer(lr=0.01), **train}
    seed_everything(0)
    lines = Lines()
    strategy = ContinualTemplate(
        model=model,
        train=Train(**train),
        evaluate=Evaluate(),
        device=torch.device("cpu"),
        plugins=list(plugins),
        evaluator=EvaluationPlugin(AccuracyRecorder(), loggers=[lines], collect_all=False),
    )
    strategy.journal.ahead = ahead
    strategy.lines = lines
    lines.strategy = strategy
    return strategy


def fresh(stream, train="all"):
    return ClipClassifier(small_clip(), small_tokenizer, stream.tasks, train=train)


def train(strategy, benchmark, tasks=1):
    for experience in list(benchmark.train_stream)[:tasks]:
        strategy.train(experience, eval_streams=[])
    return strategy


def doing(event, action, name="Doing"):
    """A plugin that does one thing at one event."""
    return type(name, (SupervisedPlugin,), {event: lambda self, strategy, **kwargs: action(strategy)})()


WAITING = {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::_unique2", "aten::is_nonzero"}
"""Operations for which a program waits for a GPU."""


class Profiler(SupervisedPlugin):
    """Profiles whole steps of the second task, from the third one on, from the batch on the device to the end of the step."""

    def __init__(self):
        super().__init__()
        self.waits, self.now = [], None

    def before_training_iteration(self, strategy, **kwargs):
        strategy.after_step = self.stop
        if strategy.clock.train_exp_counter == 1 and 2 <= strategy.clock.train_exp_iterations < 6:
            self.now = profile(activities=[ProfilerActivity.CPU])
            self.now.__enter__()

    def stop(self):
        if self.now is not None:
            self.now.__exit__(None, None, None)
            events = [e for e in self.now.events() if e.name in WAITING and not _on_the_host(e)]
            self.waits.append(sorted(e.name for e in events))
            self.now = None


def _on_the_host(event):
    """Within the loading of reference images; or within the fused optimizer, which on a CPU itself reads its count of steps.

    On a GPU its kernel reads the count, so nobody waits.
    """
    while event is not None and not event.name.startswith(("Optimizer.step", "loading")):
        event = event.cpu_parent
    return event is not None


def reference_of(loaded):
    return as_reference(small_reference(), loaded.transform(train=False))


STACKS = {
    "finetune": lambda loaded: [],
    "mulki": lambda loaded: [Teachers(), Eliciting(), Adding(), Recalling(), Distinguishing(), Connecting(every=2)],
    "zscl": lambda loaded: [Teachers(use="initial"), ReferenceDistillation(reference=reference_of(loaded))],
    "lwf": lambda loaded: [Teachers(use="previous"), LearningWithoutForgetting()],
    "ewc": lambda loaded: [EWCPlugin(10.0)],
    "l2": lambda loaded: [WeightConstraint()],
}


@pytest.mark.parametrize(
    ("name", "precision"), [*((name, "fp32") for name in STACKS), ("mulki", "bf16"), ("mulki", "fp16")]
)
def test_no_step_waits_for_the_device(stream, benchmark, loaded, monkeypatch, name, precision):
    fetch = ReferenceBatches.__next__

    def labelled(batches):
        with record_function("loading"):
            return fetch(batches)

    monkeypatch.setattr(ReferenceBatches, "__next__", labelled)
    profiler = Profiler()
    strategy = template(
        fresh(stream), [profiler, *STACKS[name](loaded)], ahead=10, precision=precision, gradient_clip=1.0
    )
    train(strategy, benchmark, tasks=2)
    assert profiler.waits == [[]] * 4


def test_the_profiler_sees_what_waits(stream, benchmark):
    profiler = Profiler()
    waiting = doing("after_forward", lambda s: s.loss.item())
    train(template(fresh(stream), [profiler, waiting], ahead=10), benchmark, tasks=2)
    assert profiler.waits == [["aten::_local_scalar_dense", "aten::item"]] * 4


@pytest.mark.parametrize("ahead", [3, 10])
def test_the_loggers_get_the_same_values_some_steps_later(stream, benchmark, ahead):
    got = {}
    for steps in (1, ahead):
        strategy = template(fresh(stream), STACKS["mulki"](None), ahead=steps, optimizer=Optimizer(name="sgd", lr=0.01))
        strategy.make_optimizer = _fused(strategy)
        got[steps] = train(strategy, benchmark, tasks=2).lines
    assert got[ahead].lines == got[1].lines
    assert len({(tag, step) for tag, step, _ in got[1].lines}) == len(got[1].lines)
    late = [begun - step % 8 for (tag, step, _), begun in zip(got[ahead].lines, got[ahead].begun, strict=True)]
    assert max(late) == {3: 3, 10: 9}[ahead], "the values wait, at most until the task ends"


def _fused(strategy):
    """The same arithmetic, whether values wait or not."""
    make = type(strategy).make_optimizer

    def made(**kwargs):
        ahead, strategy.journal.ahead = strategy.journal.ahead, 2
        make(strategy, **kwargs)
        strategy.journal.ahead = ahead

    return made


def test_values_that_are_no_numbers_and_values_that_change_later():
    log, running = StepLog(), torch.zeros(())
    for step in range(3):
        running += 1
        log.add("running", step, running, "last")
        log.add("wide", step, torch.arange(3.0), "last")
        log.add("long", step, torch.tensor(2**40 + step), "last")
        log.add("mean", step, 2.0, "mean", 1.0)
        log.add("mean", step, 5.0, "mean", 2.0)
        log.end_step(keep=True)
    assert len(log) == 3
    values = log.read()
    assert [(tag, at, float(v)) for tag, at, v in values if tag == "running"] == [
        ("running", 0, 1), ("running", 1, 2), ("running", 2, 3),
    ]  # fmt: skip
    assert [v.tolist() for tag, _, v in values if tag == "wide"] == [[0, 1, 2]] * 3
    assert [tag for tag, _, _ in values[:4]] == ["running", "wide", "long", "mean"]
    assert [v for tag, _, v in values if tag == "mean"] == [4.0] * 3
    assert len(log) == 0
    assert log.read() == []


def spoil(at, value):
    def change(strategy):
        if strategy.step == at:
            strategy.loss = strategy.loss + value

    return change


@pytest.mark.parametrize(("step", "value"), [(2, math.nan), (4, math.inf), (8, math.nan)])
def test_a_loss_that_is_not_finite_is_found_later_and_named_as_if_at_once(stream, benchmark, step, value):
    """The step is left out on the device, the error names it and its plugin, and the loggers have the terms up to it."""
    before = {}
    keep = doing("before_update", lambda s: before.update(weights(s.model)) if s.step == step else None)
    spoiler = doing("after_forward", spoil(step, value), "Spoiler")
    strategy = template(fresh(stream), [spoiler, keep, stopper(step)], ahead=10)
    with pytest.raises(Diverged, match=f"{value:g}, made so by the plugin 'Spoiler' in its after_forward"):
        train(strategy, benchmark)
    assert strategy.step == step
    assert {at for _, at, _ in strategy.lines.lines} == set(range(step))
    [total] = [v for tag, at, v in strategy.lines.lines if (tag, at) == ("train/loss/total", step - 1)]
    assert not math.isfinite(total)
    assert all(torch.equal(p, before[n]) for n, p in strategy.model.state_dict().items()), (
        "no later step, none with NaN"
    )


def stopper(step):
    """Lets no step after this one change the weights, so that the weights before it can be compared."""

    def freeze(strategy):
        if strategy.step > step:
            for group in strategy.optimizer.param_groups:
                group["lr"] = group["weight_decay"] = 0.0

    return doing("before_update", freeze)


def test_a_gradient_that_is_not_finite_is_found_later(stream, benchmark):
    class Root(Stage):
        def after_forward(self, strategy, **kwargs):
            image = features_of(strategy, self).image
            zero = (image - image).square().sum() if strategy.step == 3 else image.square().sum()
            self.add_loss(strategy, "root", zero.sqrt())

    model = fresh(stream)
    strategy = template(model, [Root()], ahead=10)
    with pytest.raises(MulkiError) as caught:
        train(strategy, benchmark)
    assert caught.value.message.startswith(
        "task first, step 3: the gradient of a weight is not finite, though the loss is"
    )
    assert all(p.isfinite().all() for p in model.parameters())


def test_settling_raises_before_anything_is_written(stream, benchmark):
    """What a checkpoint does before it reads the weights."""
    settled = []

    def after_step(strategy):
        if strategy.step == 5:
            settled.append(strategy.step)
            strategy.settle()
            settled.append("written")

    strategy = template(fresh(stream), [doing("after_forward", spoil(3, math.nan))], ahead=10)
    strategy.after_step = lambda: after_step(strategy)
    with pytest.raises(Diverged):
        train(strategy, benchmark)
    assert settled == [5]
    assert strategy.step == 3


def test_an_error_after_a_step_that_was_not_finite_gives_way_to_it(stream, benchmark):
    def fail(strategy):
        if strategy.step == 6:
            raise KeyError("later")

    plugins = [doing("after_forward", spoil(4, math.nan)), doing("after_update", fail)]
    strategy = template(fresh(stream), plugins, ahead=10)
    with pytest.raises(Diverged) as caught:
        train(strategy, benchmark)
    assert isinstance(caught.value.__cause__, KeyError)
    assert strategy.step == 4
    other = template(fresh(stream), [doing("after_update", fail)], ahead=10)
    with pytest.raises(KeyError):
        train(other, benchmark)
    assert {at for _, at, _ in other.lines.lines} == set(range(5)), "the loggers have all whole steps"


def test_an_overflow_in_half_precision_is_no_error(stream, benchmark):
    def overflow(strategy):
        if strategy.step == 4:
            strategy.scaler._scale.fill_(2.0**60)

    model = fresh(stream)
    strategy = template(model, [doing("before_forward", overflow)], ahead=10, precision="fp16")
    train(strategy, benchmark)
    assert strategy.scaler.get_scale() < 2.0**60, "steps were left out"
    assert len([tag for tag, *_ in strategy.lines.lines if tag == "train/loss/total"]) == 8
    assert all(p.isfinite().all() for p in model.parameters())


def test_the_next_task_starts_from_the_scale_that_fitted(stream, benchmark):
    said, scales = [], []

    def note(strategy):
        if strategy.step == 1 and not scales:
            strategy.scaler._scale.fill_(2.0**60)
        scales.append(strategy.scaler.get_scale())

    strategy = template(fresh(stream), [doing("before_forward", note)], precision="fp16")
    strategy.say = said.append
    strategy.scaler.scale(torch.zeros(1))  # allocates the scale
    strategy.scaler._scale.fill_(2.0**60)
    train(strategy, benchmark, tasks=2)
    assert scales[8] <= scales[7] < 2.0**60, "eight steps a task"
    assert "of 8 steps were left out" in said[0]
    assert said[0].startswith("task first: fp16 overflowed, and at least ")
    assert halvings(2.0**16, 2.0**14) == 2
    assert halvings(2.0**16, 0.0) == 165, "so many lead to 0"


def test_another_optimizer_is_checked_in_each_step(stream, benchmark):
    """One that cannot leave out a step on the device."""

    def own(strategy):
        strategy.optimizer = torch.optim.SGD([p for p in strategy.model.parameters() if p.requires_grad], lr=0.1)

    plugins = [doing("before_training_exp", own), doing("after_forward", spoil(3, math.nan))]
    strategy = template(fresh(stream), plugins, ahead=10)
    with pytest.raises(Diverged):
        train(strategy, benchmark)
    assert max(strategy.lines.begun) == 3


class Gradients(SupervisedPlugin):
    """Keeps the gradients of the first step, and how often each event came."""

    def __init__(self):
        super().__init__()
        self.gradients, self.events, self.outputs = {}, [], []

    def after_forward(self, strategy, **kwargs):
        self.events.append("after_forward")

    def before_update(self, strategy, **kwargs):
        self.events.append("before_update")
        self.outputs.append((strategy.mb_output.detach().clone(), strategy.mb_y.clone(), float(strategy.loss)))
        if not self.gradients:
            self.gradients = {n: p.grad.clone() for n, p in strategy.model.named_parameters() if p.grad is not None}


SPLITTABLE = {
    "finetune": lambda: [],
    "distillation": lambda: [Teachers(), Adding(), Distinguishing()],
    "l2": lambda: [WeightConstraint(weight=3.0)],
    "ewc": lambda: [EWCPlugin(10.0)],
    "replay": lambda: [ReplayPlugin(6)],
}


@pytest.mark.parametrize("parts", [2, 3, 4])
@pytest.mark.parametrize("name", SPLITTABLE)
def test_gradients_of_the_parts_add_up_to_the_batchs(stream, loaded, name, parts):
    seen, curves = {}, {}
    transforms = [loaded.transform(train=mode) for mode in (True, False)]
    benchmark = as_benchmark(stream, *(lambda image, t=t: t(image).double() for t in transforms))
    for count in (1, parts):
        watch = Gradients()
        strategy = template(
            fresh(stream).double(), [*SPLITTABLE[name](), watch], accumulate=count, iterations=2, label_smoothing=0.1,
            optimizer=Optimizer(name="sgd", lr=1e-9),
        )  # fmt: skip
        train(strategy, benchmark, tasks=2)
        seen[count], curves[count] = watch, strategy.lines.lines
        assert strategy.clock.train_iterations == 4, "a step is a step of the optimizer"
    one, more = seen[1], seen[parts]
    assert more.gradients.keys() == one.gradients.keys()
    for key, gradient in one.gradients.items():
        assert torch.allclose(more.gradients[key], gradient, rtol=1e-6, atol=1e-7), key
    assert more.events[: parts + 1] == ["after_forward"] * parts + ["before_update"]
    for (logits, y, loss), (joined, same_y, total) in zip(one.outputs, more.outputs, strict=True):
        assert torch.equal(y, same_y)
        assert torch.allclose(joined, logits)
        assert total == pytest.approx(loss, rel=1e-6)
    assert [line[:2] for line in curves[parts]] == [line[:2] for line in curves[1]]
    assert [v for *_, v in curves[parts]] == pytest.approx([v for *_, v in curves[1]], rel=1e-4, abs=1e-5)


def test_a_batch_smaller_than_the_number_of_parts(stream, benchmark):
    watch = Gradients()
    train(template(fresh(stream), [watch], iterations=None, epochs=1, batch_size=5, accumulate=4), benchmark)
    assert watch.events.count("before_update") == 4, "16 images: 5 + 5 + 5 + 1"
    assert watch.events.count("after_forward") == 4 * 3 + 1


def test_a_part_of_a_batch_keeps_its_size(stream, benchmark):
    def join(strategy):
        strategy.mbatch = [torch.cat([each, each[:1]]) for each in strategy.mbatch]

    train(template(fresh(stream), [doing("before_forward", join)], batch_size=4), benchmark)
    with pytest.raises(MulkiError, match="a batch of 3 images in the place of 2"):
        train(template(fresh(stream), [doing("before_forward", join)], batch_size=4, accumulate=2), benchmark)


def test_a_failure_of_one_rank_waits_for_no_other(stream, benchmark, monkeypatch):
    """With steps whose numbers are still to be read: reading them would wait for ranks that do not read theirs."""

    def fail(strategy):
        if strategy.step == 4:
            monkeypatch.setattr(collectives, "several", lambda: True)
            monkeypatch.setattr(type(strategy), "settle", lambda self: pytest.fail("it waits"))
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        train(template(fresh(stream), [doing("before_update", fail)], ahead=10), benchmark)


def resolved(strategy, *settings):
    small = ("stream={name: small}", "model={name: small-clip}", "reference=small-other", "device=cpu")
    return resolve("recipes/mtil.yaml", Changes(strategy=strategy, settings=(*small, *settings)))


@pytest.mark.parametrize(
    ("strategy", "plugin"), [("mulki", "eliciting"), ("zscl", "zscl"), ("snd", "snd"), ("lwf", "lwf")]
)
def test_parts_are_refused_where_a_loss_is_over_the_whole_batch(small_parts, strategy, plugin):
    resolved(strategy)
    with pytest.raises(MulkiError) as caught:
        resolved(strategy, "train.accumulate=2")
    [line] = [line for line in caught.value.lines() if f".{plugin}:" in line]
    assert "its loss is over the whole batch, and train.accumulate passes it in 2 parts" in line
    assert "set train.accumulate to 1" in line


def test_parts_of_other_strategies_and_of_small_batches(small_parts):
    for strategy in ("finetune", "l2", "ewc", "replay", "wise-ft"):
        assert resolved(strategy, "train.accumulate=2").recipe.train.accumulate == 2
    with pytest.raises(MulkiError, match=r"8 parts of a batch, expected at most train\.batch_size, which is 4"):
        resolved("finetune", "train.accumulate=8", "train.batch_size=4")


def test_a_fingerprint_counts_what_changes_numbers_alone(small_parts):
    from mulki_plugins.recipe.settings import fingerprint, select_decisive

    plain = resolved("finetune").recipe
    assert not {"compile", "accumulate"} & set(select_decisive(plain)["train"])
    changed = ["train.accumulate=2", "train.compile=true", "train.precision=tf32"]
    assert len({fingerprint(plain), *(fingerprint(resolved("finetune", each).recipe) for each in changed)}) == 4


def test_tf32_is_set_for_the_training_and_the_evaluation_and_put_back(stream, benchmark):
    seen = []
    look = [
        doing(event, lambda s: seen.append(torch.get_float32_matmul_precision()))
        for event in ("after_forward", "before_eval")
    ]
    strategy = template(fresh(stream), look, precision="tf32", iterations=1)
    train(strategy, benchmark)
    strategy.eval(benchmark.test_stream[:1])
    assert seen == ["high", "high"]
    assert torch.get_float32_matmul_precision() == "highest"
    with pytest.raises(KeyError):
        train(template(fresh(stream), [doing("after_forward", lambda s: {}["x"])], precision="tf32"), benchmark)
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.fixture
def eager_backend(monkeypatch):
    monkeypatch.setattr(compilation.CompiledTowers, "backend", "aot_eager")


def test_compiled_towers_compute_the_same_and_leave_no_trace(stream, benchmark, eager_backend, monkeypatch):
    calls, compiled = [], torch.compile

    def counting(function, **options):
        call = compiled(function, **options)

        def counted(*args, **kwargs):
            calls.append(function.__self__)
            return call(*args, **kwargs)

        return counted

    monkeypatch.setattr(torch, "compile", counting)
    said, results = [], {}
    copies = []
    look = doing("after_training_iteration", lambda s: copies.append(copy.deepcopy(s.model)))
    for on in (False, True):
        plugins = [Teachers(), Eliciting(), Adding(), Distinguishing(), look]
        strategy = template(fresh(stream), plugins, compile=on, iterations=3, optimizer=Optimizer(name="sgd", lr=0.01))
        strategy.say = said.append
        results[on] = weights(train(strategy, benchmark, tasks=2).model)
    assert said == []
    assert results[True].keys() == results[False].keys()
    for name, value in results[False].items():
        assert torch.allclose(results[True][name], value, atol=1e-5), name
    kinds = {type(module).__name__ for module in calls}
    assert kinds == {"VisionTransformer", "Transformer"}
    towers = {id(module) for module in calls if type(module).__name__ == "VisionTransformer"}
    assert len(towers) >= 3, "the student, the pre-trained model and the model before the task"
    for module in [*strategy.model.modules(), *copies[-1].modules()]:
        assert module._compiled_call_impl is None
    before = len(calls)
    strategy.eval(benchmark.test_stream[:1])
    assert len(calls) == before, "an evaluation is not compiled"


def test_a_compiler_that_fails_costs_a_notice(stream, benchmark, monkeypatch):
    def broken(function, **options):
        def fails(*args, **kwargs):
            raise RuntimeError("no C++ compiler\nwas found")

        return fails

    expected = weights(train(template(fresh(stream), iterations=3), benchmark).model)
    monkeypatch.setattr(torch, "compile", broken)
    said = []
    strategy = template(fresh(stream), compile=True, iterations=3)
    strategy.say = said.append
    got = weights(train(strategy, benchmark).model)
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    assert said == [
        "train.compile: the compiler failed, the run goes on without it: RuntimeError: no C++ compiler was found"
    ]


def test_an_error_of_the_model_itself_is_no_failure_of_the_compiler(stream, benchmark, eager_backend):
    def spoil_images(strategy):
        strategy.mbatch = [strategy.mb_x[:, :2], *strategy.mbatch[1:]]

    said = []
    strategy = template(fresh(stream), [doing("before_forward", spoil_images)], compile=True)
    strategy.say = said.append
    with pytest.raises(RuntimeError, match="channels"):
        train(strategy, benchmark)
    assert said == []
