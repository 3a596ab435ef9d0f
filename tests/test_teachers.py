"""The teachers and their prototypes: what they are, how often they are asked, and that nothing reaches them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from avalanche.benchmarks.utils import concat_datasets

from mulki_plugins.models import ClipClassifier
from mulki_plugins.stages import Adding, Distinguishing, Eliciting, Recalling, Teachers
from mulki_plugins.stages import teachers as teachers_module
from mulki_plugins.stages.prototypes import visual_prototypes
from mulki_plugins.stages.statistics import sampled
from mulki_plugins.stages.teachers import Teacher
from tests.conftest import Quiet, naive, same, small_clip, small_tokenizer, weights


def test_each_teacher_is_forwarded_once_per_step_however_many_ask(classifier, benchmark):
    teachers = Teachers()
    seen = []

    class Count(Adding):
        def after_training_iteration(self, strategy, **kwargs):
            seen.append([teacher.forwards for teacher in teachers.active])

    strategy = naive(classifier, [teachers, Adding(), Adding(), Count(), Eliciting(), Distinguishing()])
    first, second, _ = benchmark.train_stream
    strategy.train(first)
    steps = len(seen)
    assert seen == [[step + 1] for step in range(steps)], "on the first task the two teachers are one"
    initial = teachers.initial.forwards
    seen.clear()
    strategy.train(second)
    assert seen == [[initial + step + 1, step + 1] for step in range(len(seen))]


def test_nobody_asks_nobody_is_forwarded(classifier, benchmark):
    teachers = Teachers()
    naive(classifier, [teachers]).train(benchmark.train_stream[0])
    assert teachers.initial.forwards == 0


def test_teachers_are_out_of_reach(classifier, benchmark):
    teachers = Teachers()
    strategy = naive(classifier, [teachers, Adding(), Eliciting()])
    start = weights(classifier)
    first, second, _ = benchmark.train_stream
    strategy.train(first)
    after_first = weights(classifier)
    strategy.train(second)
    assert same(weights(teachers.initial.model), start)
    assert same(weights(teachers.previous.model), after_first)
    held = [p for group in strategy.optimizer.param_groups for p in group["params"]]
    for teacher in teachers.active:
        assert not teacher.model.training
        assert not any(p.requires_grad for p in teacher.model.parameters())
        assert not {id(p) for p in teacher.model.parameters()} & {id(p) for p in held}
    assert {id(p) for p in held} == {id(p) for p in classifier.parameters()}
    assert list(classifier.state_dict()) == list(start), "teachers are no submodules of the model"


def test_teachers_in_half_precision_teach_nearly_the_same(stream, benchmark):
    seen = {}
    for half in ("never", "always"):
        teachers, logger = Teachers(half=half), Quiet()
        model = ClipClassifier(small_clip(), small_tokenizer, stream.tasks)
        naive(model, [teachers, Adding(), Eliciting()], logger).train(benchmark.train_stream[0])
        seen[half] = [value for name, value in logger.values if name == "train/loss/eliciting"]
        dtype = torch.bfloat16 if half == "always" else torch.float32
        assert {p.dtype for p in teachers.initial.model.parameters()} == {dtype}
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert seen["always"] == pytest.approx(seen["never"], rel=0.05)


def test_only_prototypes_grow_with_the_number_of_tasks(classifier, benchmark):
    teachers = Teachers()
    strategy = naive(classifier, [teachers, Adding(classes="seen"), Eliciting(), Distinguishing()])
    for n, experience in enumerate(benchmark.train_stream, 1):
        strategy.train(experience)
        for teacher in teachers.active:
            assert set(teacher.prototypes) == set(range(n))
            assert {p.shape for p in teacher.prototypes.values()} <= {(2, 16), (3, 16)}
            assert set(teacher.texts) <= set(range(n))
    assert teachers._images == []
    assert teachers._batch is None


def test_use_one_teacher_only(classifier, benchmark):
    for use in ("initial", "previous"):
        teachers = Teachers(use=use)
        strategy = naive(classifier, [teachers, Adding()])
        for experience in list(benchmark.train_stream)[:2]:
            strategy.train(experience)
        assert teachers.active == [getattr(teachers, use)]


def test_prototypes_are_class_means_seen_through_the_evaluation_transform(classifier, stream, benchmark, loaded):
    dataset = benchmark.train_stream[1].dataset
    got = visual_prototypes([classifier.eval()], dataset, {1}, batch_size=5)[0][1]
    transform = loaded.transform(train=False)
    images = [(transform(image), label) for image, label in (stream.tasks[1].train[i] for i in range(len(dataset)))]
    with torch.no_grad():
        for c in range(3):
            z = torch.stack([classifier.encode_image(x[None])[0] for x, label in images if label == c])
            assert torch.allclose(got[c], F.normalize(z.mean(0), dim=0), atol=1e-5)


def test_several_models_share_one_reading_of_the_images(classifier, benchmark):
    other = ClipClassifier(small_clip(3), small_tokenizer, classifier.prompts).eval()
    dataset, read = benchmark.train_stream[1].dataset, []
    both = visual_prototypes([classifier.eval(), other], dataset, {1})
    for model, found in zip((classifier, other), both, strict=True):
        assert torch.equal(found[1], visual_prototypes([model], dataset, {1})[0][1])

    class Counted(type(dataset)):
        def __getitem__(self, i):
            read.append(i)
            return super().__getitem__(i)

        def eval(self):
            return self

    counted = copy.copy(dataset.eval())
    counted.__class__ = Counted
    visual_prototypes([classifier, other], counted, {1})
    assert len(read) == len(dataset)


def test_a_task_that_comes_again_gets_new_prototypes(classifier, benchmark):
    whole = benchmark.train_stream[1]
    without_grey, teachers = copy.copy(whole), Teachers()
    some = [i for i, y in enumerate(whole.dataset.targets) if y != 2]
    without_grey._dataset = whole.dataset.subset(some)
    strategy = naive(classifier, [teachers, Adding()])
    strategy.train(without_grey)
    start = copy.deepcopy(classifier).eval()
    strategy.train(whole)
    expected = visual_prototypes([start, teachers.initial.model], whole.dataset, {1})
    assert torch.equal(teachers.previous.prototypes[1], expected[0][1])
    assert torch.equal(teachers.initial.prototypes[1], expected[1][1])


def test_the_previous_teacher_takes_over_the_prototypes_that_followed_the_student(classifier, benchmark):
    teachers, eliciting = Teachers(), Eliciting()
    strategy = naive(classifier, [teachers, eliciting, Adding()], lr=0.1)
    strategy.train(benchmark.train_stream[0])
    start = visual_prototypes([teachers.initial.model], benchmark.train_stream[0].dataset, {0})[0][0]
    followed = eliciting.prototypes[0].clone()
    assert not torch.allclose(followed, start, atol=1e-3)
    strategy.train(benchmark.train_stream[1])
    assert torch.equal(teachers.previous.prototypes[0], followed)
    assert torch.equal(teachers.previous.prototypes[1], eliciting.prototypes[1])


def test_on_the_first_task_each_teacher_has_prototypes_of_its_own(classifier, benchmark):
    teachers, eliciting = Teachers(), Eliciting()
    strategy = naive(classifier, [teachers, eliciting], lr=0.1)
    start = copy.deepcopy(classifier).eval()
    strategy.train(benchmark.train_stream[0])
    expected = visual_prototypes([start], benchmark.train_stream[0].dataset, {0})[0][0]
    assert torch.equal(teachers.initial.prototypes[0], expected)
    assert torch.equal(teachers.previous.prototypes[0], eliciting.prototypes[0])
    assert not torch.allclose(teachers.previous.prototypes[0], expected, atol=1e-3)
    strategy.train(benchmark.train_stream[1])
    assert torch.equal(teachers.initial.prototypes[0], expected)


def test_both_teachers_prototypes_are_kept_in_the_state(classifier, benchmark):
    teachers = Teachers()
    strategy = naive(classifier, [teachers, Eliciting()], lr=0.1)
    pretrained = copy.deepcopy(classifier)
    strategy.train(benchmark.train_stream[0])
    other = Teachers()
    again = naive(pretrained, [other, Eliciting()])
    other.before_training(again)
    other.load_state_dict(teachers.state_dict())
    for name in ("initial", "previous"):
        assert torch.equal(getattr(other, name).prototypes[0], getattr(teachers, name).prototypes[0])
    assert not torch.equal(other.initial.prototypes[0], other.previous.prototypes[0])


def test_teachers_answer_in_the_training_prompt(classifier, benchmark):
    teachers = Teachers()
    naive(classifier, [teachers]).train(benchmark.train_stream[0])
    x = torch.stack([benchmark.train_stream[0].dataset[i][0] for i in range(2)])
    with torch.no_grad():
        model = teachers.initial.model
        assert torch.equal(model(x, 1), model.logits(model.encode_image(x), model.encode_text(1, all_templates=False)))


def test_a_class_without_images_has_its_text_as_prototype(classifier, benchmark):
    dataset = benchmark.train_stream[1].dataset
    some = dataset.subset([i for i, y in enumerate(dataset.targets) if y != 2])
    got = visual_prototypes([classifier.eval()], some, {1})[0][1]
    assert torch.allclose(got[2], classifier.text_features(1, "all")[2])


def counted_readings(monkeypatch):
    """Lets `visual_prototypes` note how many models each reading of the images was for."""
    readings, read = [], teachers_module.visual_prototypes

    def noted(models, dataset, tasks, **options):
        readings.append((len(models), len(dataset)))
        return read(models, dataset, tasks, **options)

    monkeypatch.setattr(teachers_module, "visual_prototypes", noted)
    return readings


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        (lambda: [Eliciting(), Adding()], [1, 2]),
        (lambda: [Eliciting(), Adding(relations={"image_to_text": 1.0}), Recalling()], [1, 1]),
        (lambda: [Adding(relations={"text_to_image": 1.0})], [1, 2]),
        (lambda: [Adding(relations={"image_to_text": 1.0})], []),
        (lambda: [Recalling(weight=0)], []),
    ],
)
def test_all_prototypes_of_a_task_come_from_one_reading(classifier, benchmark, monkeypatch, stages, expected):
    """Of both teachers if some stage reads both, else only of the one that is read."""
    readings = counted_readings(monkeypatch)
    teachers = Teachers()
    strategy = naive(classifier, [teachers, *stages()])
    first, second, _ = benchmark.train_stream
    strategy.train(first)
    start = copy.deepcopy(classifier).eval()
    strategy.train(second)
    assert [models for models, _ in readings] == expected
    if expected == [1, 2]:
        own = visual_prototypes([teachers.initial.model, start], second.dataset, {1})
        assert torch.equal(teachers.initial.prototypes[1], own[0][1])
        if len(strategy.plugins) == 3:  # eliciting would have moved the other's
            assert torch.equal(teachers.previous.prototypes[1], own[1][1])


@pytest.mark.parametrize("count", [1, 3, 100])
def test_prototypes_of_a_sample_are_the_means_of_that_many_images_of_each_class(classifier, benchmark, count):
    dataset = benchmark.train_stream[1].dataset
    some = sampled(dataset, count)
    there = [list(dataset.targets).count(c) for c in range(3)]
    assert [list(some.targets).count(c) for c in range(3)] == [min(count, n) for n in there]
    state = torch.get_rng_state()
    assert list(sampled(dataset, count).place) == list(some.place) == sorted(some.place)
    assert torch.equal(state, torch.get_rng_state())
    teachers = Teachers(images_per_class=count)
    start = copy.deepcopy(classifier).eval()
    naive(classifier, [teachers, Adding()]).train(benchmark.train_stream[1])
    expected = visual_prototypes([start], some, {1})[0][1]
    assert torch.equal(teachers.initial.prototypes[1], expected)
    whole = visual_prototypes([start], dataset, {1})[0][1]
    assert torch.equal(expected, whole) == (count == 100)
    assert ((expected * whole).sum(1) > 0.8).all()


def test_a_sample_has_each_class_of_each_task(benchmark):
    both = concat_datasets([benchmark.train_stream[0].dataset, benchmark.train_stream[2].dataset])
    some = sampled(both, 2)
    pairs = list(zip(some.targets_task_labels, some.targets, strict=True))
    assert sorted(set(pairs)) == [(0, 0), (0, 1), (2, 0), (2, 1)]
    assert len(pairs) == 8


def test_joined_features_are_kept_until_a_part_changes(classifier):
    teacher, parts = Teacher(classifier), [torch.rand(2, 4), torch.rand(3, 4)]
    first = teacher.joined("texts", parts, torch.float32)
    assert torch.equal(first, torch.cat(parts))
    assert teacher.joined("texts", list(parts), torch.float32) is first
    assert teacher.joined("texts", parts, torch.bfloat16).dtype == torch.bfloat16
    parts[0].mul_(2)
    assert torch.equal(teacher.joined("texts", parts, torch.float32), torch.cat(parts))
    parts[1] = parts[1] + 1
    assert torch.equal(teacher.joined("texts", parts, torch.float32), torch.cat(parts))
