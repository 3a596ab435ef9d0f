"""An ordinary step of the stages and peers reads nothing back from the device, and asks the text tower once."""

import copy

import pytest
import torch
from avalanche.training.plugins import SupervisedPlugin
from torch.utils._python_dispatch import TorchDispatchMode

from mulki_plugins.baselines import (
    ICarl,
    LearningWithoutForgetting,
    ReferenceDistillation,
    SelectiveDistillation,
    WeightConstraint,
)
from mulki_plugins.baselines.avalanche import EWC, MAS, Replay
from mulki_plugins.baselines.reference import ReferenceBatches
from mulki_plugins.models import ClipClassifier
from mulki_plugins.stages import Adding, Connecting, Distinguishing, Eliciting, Recalling, Teachers
from mulki_plugins.streams import as_reference
from tests.conftest import naive, same, small_clip, small_reference, small_tokenizer, weights

WAITS = ("_local_scalar_dense", "item", "nonzero", "_unique2", "unique_dim", "bincount", "masked_select", "equal")


class Recorded(TorchDispatchMode):
    """Records the names of the operations that make the host wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.waits, self.count = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.count += 1
        boolean = name in ("index", "index_put", "index_put_") and any(
            each is not None and each.dtype == torch.bool for each in args[1]
        )
        if name in WAITS or boolean:
            self.waits.append(name)
        return function(*args, **(kwargs or {}))


class Watching(SupervisedPlugin):
    """The first and the last of the plugins: records between its `begins` and its `ends`, as `mulki run` calls a step."""

    def __init__(self, recorded, begins, ends):
        super().__init__()
        self.recorded = recorded
        setattr(self, begins, self.begin) if begins else None
        setattr(self, ends, self.end) if ends else None

    def begin(self, strategy, **kwargs):
        strategy.model.batch_labels = strategy.mb_task_id.tolist()
        if strategy.clock.train_exp_iterations > 0:  # a task's first step makes its tokens
            self.recorded.__enter__()

    def end(self, strategy, **kwargs):
        strategy.model.batch_labels = None
        if strategy.clock.train_exp_iterations > 0:
            self.recorded.__exit__(None, None, None)


class Unread:
    """A logger that leaves the values on the device."""

    def log_metrics(self, values):
        pass


def stacks(loaded):
    reference = as_reference(small_reference(), loaded.transform(train=False))
    method = [
        Teachers(), Eliciting(), Adding(classes="seen"), Recalling(), Distinguishing(),
        Connecting(every=1, importance=True),
    ]  # fmt: skip
    return {
        "finetune": [],
        "mulki": method,
        "zscl": [Teachers(use="initial"), ReferenceDistillation(reference=reference), WeightConstraint()],
        "snd": [Teachers(), SelectiveDistillation(reference=reference)],
        "lwf": [Teachers(use="previous"), LearningWithoutForgetting()],
        "ewc": [EWC(1.0)],
        "ewc online": [EWC(1.0, mode="online", decay_factor=0.5)],
        "mas": [MAS()],
        "replay": [Replay(mem_size=8), *method],
        "icarl": [Teachers(use="previous"), ICarl(memory=8)],
    }


@pytest.mark.parametrize(
    "name", ["finetune", "mulki", "zscl", "snd", "lwf", "ewc", "ewc online", "mas", "replay", "icarl"]
)
def test_a_step_never_waits_for_the_device(name, classifier, benchmark, loaded, monkeypatch):
    images = torch.rand(6, 3, 16, 16)
    monkeypatch.setattr(ReferenceBatches, "__next__", lambda batches: images)  # a loader draws its images on the host
    step, update = Recorded(), Recorded()
    first = [Watching(step, "before_forward", None), Watching(update, "before_backward", None)]
    last = [Watching(step, None, "after_forward"), Watching(update, None, "before_update")]
    plugins = [*first, *stacks(loaded)[name], *last]
    strategy = naive(classifier, plugins, Unread())
    for experience in list(benchmark.train_stream)[:2]:
        strategy.train(experience)
    assert step.waits == []
    assert update.waits == []
    assert step.count > 50, "or nothing was recorded"
    assert update.count > 50


def test_the_record_finds_what_waits(classifier, benchmark):
    class Reads(SupervisedPlugin):
        def after_forward(self, strategy, **kwargs):
            strategy.loss = strategy.loss + float(strategy.mb_output[strategy.mb_y == 0].sum())

    step = Recorded()
    plugins = [Watching(step, "before_forward", None), Reads(), Watching(step, None, "after_forward")]
    naive(classifier, plugins).train(benchmark.train_stream[0])
    assert {"index", "_local_scalar_dense"} <= set(step.waits)


@pytest.mark.parametrize("replay", [False, True])
def test_all_sentences_of_a_step_pass_the_text_tower_at_once(classifier, benchmark, replay):
    passes, encode = [], classifier.clip.transformer.forward

    def count(x, **options):
        if torch.is_grad_enabled():
            passes[-1].append(tuple(x.shape[:2]))
        return encode(x, **options)

    class Begins(SupervisedPlugin):
        def before_forward(self, strategy, **kwargs):
            passes.append([])

        def after_forward(self, strategy, **kwargs):
            passes[-1].append(sorted(strategy.model.features.text))

    teachers = Teachers()
    plugins = [Begins(), *([Replay(mem_size=8)] if replay else []), teachers, Eliciting(), Recalling(count=2)]
    strategy = naive(classifier, plugins)
    strategy.train(benchmark.train_stream[0])
    classifier.clip.transformer.forward = count
    passes.clear()
    strategy.train(benchmark.train_stream[1])
    assert passes
    classes = [2, 3, 2]
    for (sentences, length), tasks in passes:
        assert tasks == ([0, 1] if replay else [1])
        assert sentences == sum(classes[task] for task in tasks) + 2, "the batch's classes, and two earlier ones"
        assert length == 12, "small-clip's sentences fill its context"


def test_requested_classes_are_those_of_a_pass_of_their_own(stream):
    model = ClipClassifier(small_clip(), small_tokenizer, stream.tasks).train()
    indices = torch.tensor([4, 0, 2])
    asker = object()
    model.request(asker, [2, 1], indices)
    model(torch.rand(4, 3, 16, 16), torch.tensor([1, 0, 1, 1]))
    texts = {task: model.encode_text(task, all_templates=False) for task in range(3)}
    features = model.features
    assert torch.allclose(features.classes[asker], torch.cat([texts[2], texts[1]])[indices], atol=1e-5)
    assert features.text.keys() == {0, 1}
    for task, t in features.text.items():
        assert torch.allclose(t, texts[task], atol=1e-5)
    assert features.classes[asker].requires_grad
    model.request(asker, (), indices[:0])
    model(torch.rand(4, 3, 16, 16), 1)
    assert not model.features.classes


def test_requested_classes_of_a_frozen_text_tower_come_from_its_cache(stream):
    model = ClipClassifier(small_clip(), small_tokenizer, stream.tasks, train="image").train()
    asker, passes = object(), []
    model.clip.transformer.register_forward_pre_hook(lambda module, inputs: passes.append(len(inputs[0])))
    model.request(asker, [0, 1], torch.tensor([1, 2]))
    for _ in range(3):
        model(torch.rand(4, 3, 16, 16), 2)
    assert sorted(passes) == [2, 2, 3]
    expected = [model.encode_text(task, all_templates=False)[0 if task else 1] for task in (0, 1)]
    assert torch.allclose(model.features.classes[asker], torch.stack(expected), atol=1e-6)


def test_a_request_and_its_plugin_are_not_copied_with_the_model(stream):
    class Uncopyable:
        def __deepcopy__(self, memo):
            raise AssertionError("a teacher must not copy the plugins")

    model = ClipClassifier(small_clip(), small_tokenizer, stream.tasks).train()
    model.request(Uncopyable(), [0], torch.tensor([1]))
    twin = copy.deepcopy(model)
    twin(torch.rand(4, 3, 16, 16), 2)
    assert twin.features.classes == {}
    assert same(weights(twin), weights(model))


def test_the_caller_may_know_the_tasks_of_the_batch(stream):
    model = ClipClassifier(small_clip(), small_tokenizer, stream.tasks).train()
    x, labels = torch.rand(4, 3, 16, 16), torch.tensor([2, 0, 2, 2])
    expected = model(x, labels)
    for known in ([2, 0, 2, 2], [2, 2, 2, 2]):
        model.batch_labels = known
        with Recorded() as recorded:
            found = model(x, labels)
        assert recorded.waits == []
        assert torch.equal(found, expected) == (known == labels.tolist()), "the caller's word counts"
