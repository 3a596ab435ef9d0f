"""The template: exact budgets, a fresh optimizer, schedules, precision, scopes of classes; and seeding."""

import math
import random

import numpy as np
import pytest
import torch
from avalanche.training.plugins import EvaluationPlugin, ReplayPlugin, SupervisedPlugin

from mulki_plugins.models import ClipClassifier
from mulki_plugins.recipe.schema import Evaluate, Optimizer, Schedule, TaskBudget, Train
from mulki_plugins.report.progress import ProgressLogger
from mulki_plugins.streams import as_benchmark
from mulki_plugins.training.accuracy import AccuracyRecorder
from mulki_plugins.training.batches import TaskBatches
from mulki_plugins.training.rng import seed_everything
from mulki_plugins.training.schedule import factor
from mulki_plugins.training.strategy import ContinualTemplate
from tests.conftest import small_clip, small_tokenizer


class Watch(SupervisedPlugin):
    """Writes down what happens in each step."""

    def __init__(self):
        super().__init__()
        self.steps, self.rates, self.optimizers, self.sizes, self.gradients = [], [], [], [], []

    def before_training_exp(self, strategy, **kwargs):
        self.steps.append(0)
        self.optimizers.append(strategy.optimizer)

    def after_training_iteration(self, strategy, **kwargs):
        self.steps[-1] += 1
        self.rates.append(strategy.optimizer.param_groups[0]["lr"])
        self.sizes.append(len(strategy.mb_y))

    def after_backward(self, strategy, **kwargs):
        grads = [p.grad.norm() for p in strategy.model.parameters() if p.grad is not None]
        self.gradients.append(torch.stack(grads).norm().item())


@pytest.fixture
def benchmark(stream, loaded):
    return as_benchmark(stream, loaded.transform(train=True), loaded.transform(train=False))


def template(model, plugins=(), evaluate=None, **train):
    train = {"iterations": 5, "batch_size": 6, "optimizer": Optimizer(lr=0.01), **train}
    seed_everything(0)
    recorder = AccuracyRecorder()
    strategy = ContinualTemplate(
        model=model,
        train=Train(**train),
        evaluate=evaluate or Evaluate(),
        device=torch.device("cpu"),
        plugins=plugins,
        evaluator=EvaluationPlugin(recorder, loggers=[ProgressLogger(3)], collect_all=False),
    )
    strategy.recorder = recorder
    return strategy


def test_the_number_of_steps_is_exact(classifier, benchmark):
    watch = Watch()
    strategy = template(
        classifier, [watch], iterations=7, per_task={"second": TaskBudget(iterations=3), "third": TaskBudget(epochs=2)}
    )
    for experience in benchmark.train_stream:
        strategy.train(experience, eval_streams=[])
    assert watch.steps == [7, 3, 2 * math.ceil(16 / 6)]


def test_epochs(classifier, benchmark):
    watch = Watch()
    strategy = template(classifier, [watch], iterations=None, epochs=3)
    strategy.train(benchmark.train_stream[0], eval_streams=[])
    assert watch.steps == [3 * math.ceil(16 / 6)]
    assert watch.sizes == [6, 6, 4] * 3


def test_the_number_of_steps_is_exact_with_replay(classifier, benchmark):
    watch = Watch()
    strategy = template(classifier, [ReplayPlugin(mem_size=6), watch], iterations=7)
    for experience in benchmark.train_stream:
        strategy.train(experience, eval_streams=[])
    assert watch.steps == [7, 7, 7]
    assert max(watch.sizes) > 6, "kept images are mixed in"


def test_a_new_optimizer_for_each_task_of_the_weights_that_learn(stream, benchmark):
    model = ClipClassifier(small_clip(), small_tokenizer, stream.tasks, train="image")
    watch = Watch()
    strategy = template(model, [watch], optimizer=Optimizer(lr=0.01, weight_decay=0.1))
    states = []
    for experience in list(benchmark.train_stream)[:2]:
        strategy.train(experience, eval_streams=[])
        states.append(len(watch.optimizers[-1].state))
    assert watch.optimizers[0] is not watch.optimizers[1]
    held = {id(p) for group in watch.optimizers[1].param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    assert id(model.clip.logit_scale) not in held
    for group in watch.optimizers[1].param_groups:
        assert group["weight_decay"] == (0.1 if group["params"][0].ndim >= 2 else 0.0)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_schedules(name):
    schedule = Schedule(name=name, warmup=4)
    got = [factor(schedule, step, 20) for step in range(20)]
    assert got[:4] == [0.25, 0.5, 0.75, 1.0]
    e = [(step - 4) / 16 for step in range(4, 20)]
    expected = {
        "cosine": [(1 + math.cos(math.pi * x)) / 2 for x in e],
        "linear": [1 - x for x in e],
        "constant": [1] * 16,
    }
    assert got[4:] == pytest.approx(expected[name])


def test_the_learning_rate_follows_the_schedule_in_every_task(classifier, benchmark):
    watch = Watch()
    schedule = Schedule(name="cosine", warmup=2)
    strategy = template(classifier, [watch], schedule=schedule, per_task={"second": TaskBudget(lr=0.5)})
    for experience in list(benchmark.train_stream)[:2]:
        strategy.train(experience, eval_streams=[])
    once = [factor(schedule, step, 5) for step in range(5)]
    assert watch.rates == pytest.approx([0.01 * f for f in once] + [0.5 * f for f in once])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_precisions_train(classifier, benchmark, precision):
    before = {n: p.clone() for n, p in classifier.named_parameters()}
    strategy = template(classifier, precision=precision)
    strategy.train(benchmark.train_stream[0], eval_streams=[])
    strategy.eval(benchmark.test_stream)
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in classifier.parameters())
    assert any(not torch.equal(before[n], p) for n, p in classifier.named_parameters())


def test_plugins_see_true_gradients_in_fp16(classifier, benchmark):
    seen = {}
    for precision in ("fp32", "fp16"):
        watch = Watch()
        model = ClipClassifier(small_clip(), small_tokenizer, classifier.prompts)
        template(model, [watch], precision=precision, iterations=1).train(benchmark.train_stream[0], eval_streams=[])
        seen[precision] = watch.gradients[0]
    assert seen["fp16"] == pytest.approx(seen["fp32"], rel=0.05)


def test_gradients_are_clipped(classifier, benchmark):
    watch = Watch()
    template(classifier, [watch], gradient_clip=0.01).train(benchmark.train_stream[0], eval_streams=[])
    assert max(watch.gradients) <= 0.01 + 1e-6


def test_label_smoothing_reaches_training_alone(classifier, benchmark):
    losses = []

    class Loss(SupervisedPlugin):
        def before_backward(self, strategy, **kwargs):
            losses.append((strategy.loss.item(), strategy.mb_output.detach(), strategy.mb_y))

    template(classifier, [Loss()], label_smoothing=0.3, iterations=1).train(benchmark.train_stream[0], eval_streams=[])
    value, logits, y = losses[0]
    assert value == pytest.approx(torch.nn.functional.cross_entropy(logits, y, label_smoothing=0.3).item(), rel=1e-5)


def accuracies_by_hand(model, benchmark, loaded, tasks_of):
    """The accuracy on each test set among the classes of tasks_of(task), with plain loops."""
    result = []
    model.eval()
    with torch.no_grad():
        for task, experience in enumerate(benchmark.test_stream):
            scope = tasks_of(task)
            places = [(t, c) for t in scope for c in range(len(model.prompts[t].class_names))]
            texts = torch.cat([model.text_features(t) for t in scope])
            right = 0
            for x, y, *_ in experience.dataset:
                best = int((model.encode_image(x[None]) @ texts.T).argmax())
                right += places[best] == (task, int(y))
            result.append(100 * right / len(experience.dataset))
    return result


@pytest.mark.parametrize(
    ("classes", "tasks_of"),
    [
        ("task", lambda task: [task]),
        ("seen", lambda task: [0, 1] if task < 2 else [task]),
        ("all", lambda task: [0, 1, 2]),
    ],
)
def test_scopes_of_classes(classifier, benchmark, loaded, stream, classes, tasks_of):
    strategy = template(classifier, evaluate=Evaluate(classes=classes, batch_size=5))
    for experience in list(benchmark.train_stream)[:2]:
        strategy.train(experience, eval_streams=[])
    strategy.eval(benchmark.test_stream)
    got = [strategy.recorder.accuracies[task.name] for task in stream.tasks]
    assert got == accuracies_by_hand(classifier, benchmark, loaded, tasks_of)


def test_a_loader_without_batches_is_an_error():
    assert list(TaskBatches([1, 2, 3], 7)) == [1, 2, 3, 1, 2, 3, 1]
    with pytest.raises(ValueError, match="no training images"):
        list(TaskBatches([], 3))


def test_seeding_depends_on_seed_and_task_alone():
    def drawn(seed, task):
        seed_everything(seed, task)
        return random.random(), np.random.rand(), torch.rand(1).item()

    first = drawn(1, 2)
    torch.rand(100)
    assert drawn(1, 2) == first
    assert len({drawn(s, t) for s in range(3) for t in range(3)}) == 9
