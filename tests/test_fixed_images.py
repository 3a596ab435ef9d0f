"""An image tower that does not learn: the teachers take its features of a step's images, evaluations those of test images."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from avalanche.training.plugins import SupervisedPlugin

from mulki_plugins.adapters import LoRA
from mulki_plugins.models import ClipClassifier
from mulki_plugins.models.classifier import Headed
from mulki_plugins.models.fixed_images import learns_nothing_of_images
from mulki_plugins.recipe.resolve import Changes, resolve
from mulki_plugins.registry.catalog import Catalog, Provenance
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.registry.register import Register
from mulki_plugins.stages import Adding, Distinguishing, Preserving, Teachers
from mulki_plugins.training.kept_features import KeptFeatures
from mulki_plugins.training.run import Run, run_experiment
from tests.conftest import naive, same, small_clip, small_tokenizer, weights

SMALL = (
    "stream={name: small}", "model={name: small-clip}", "train.iterations=4", "train.schedule.warmup=1",
    "train.batch_size=4", "train.optimizer.lr=0.05", "device=cpu", "loggers=[]", "evaluate.batch_size=5",
)  # fmt: skip
TEXT_ALONE = "model={name: small-clip, train: text}"
RAIL = "model={name: small-clip, train: text, head: {rail: {width: 40, features: pooled}}}"


def student(stream, **options):
    torch.manual_seed(1)
    return ClipClassifier(small_clip(), small_tokenizer, stream.tasks, **options).train()


pytestmark = pytest.mark.usefixtures("small_parts")


# which towers are fixed


def test_a_tower_is_fixed_if_its_weights_alone_decide(stream):
    assert learns_nothing_of_images(student(stream, train="text"))
    assert learns_nothing_of_images(student(stream, train="none"))
    assert not learns_nothing_of_images(student(stream))
    assert not learns_nothing_of_images(student(stream, train="image"))
    assert not learns_nothing_of_images(student(stream, train="text", adapters=[LoRA(rank=2, towers="text")]))


@pytest.mark.parametrize("change", ["hook", "hook before", "forward", "encode_image", "training"])
def test_what_others_put_into_it_may_depend_on_anything(stream, change):
    model = student(stream, train="text")
    part = model.clip.visual.transformer
    if change == "hook":
        part.register_forward_hook(lambda module, given, output: output)
    elif change == "hook before":
        part.register_forward_pre_hook(lambda module, given: None)
    elif change == "forward":
        part.forward = part.forward
    elif change == "encode_image":
        model.clip.encode_image = model.clip.encode_image
    else:
        part.train()
    assert not learns_nothing_of_images(model)


def test_hooks_that_came_with_the_model_are_its_own(stream):
    clip = small_clip()
    clip.visual.register_forward_pre_hook(lambda module, given: None)
    assert learns_nothing_of_images(ClipClassifier(clip, small_tokenizer, stream.tasks, train="text").eval())


# teachers


def trained(stream, benchmark, train, shares, monkeypatch):
    with monkeypatch.context() as patched:
        if not shares:
            patched.setattr("mulki_plugins.stages.teachers.learns_nothing_of_images", lambda model: False)
        model, teachers = student(stream, train=train), Teachers()
        strategy = naive(model, [teachers, Adding(), Distinguishing(), Preserving(count=4, pool=16)])
        for experience in list(benchmark.train_stream)[:2]:
            strategy.train(experience)
    return weights(model), [teacher.forwards for teacher in teachers.active]


def test_teachers_take_the_features_of_a_student_whose_image_tower_stays_theirs(stream, benchmark, monkeypatch):
    shared, none = trained(stream, benchmark, "text", True, monkeypatch)
    alone, some = trained(stream, benchmark, "text", False, monkeypatch)
    assert same(shared, alone)
    assert none == [0, 0]
    assert min(some) > 0
    shared, both = trained(stream, benchmark, "all", True, monkeypatch)
    alone, also = trained(stream, benchmark, "all", False, monkeypatch)
    assert same(shared, alone)
    assert both == also == some


def test_a_teacher_whose_image_tower_is_another_sees_for_itself(stream, benchmark):
    first, second, *_ = benchmark.train_stream
    model, teachers = student(stream, train="text"), Teachers()
    strategy = naive(model, [teachers, Adding()])
    strategy.train(first)
    next(model.clip.visual.parameters()).data.add_(0.1)
    strategy.train(second)
    assert not teachers.initial.sees_as_student
    assert teachers.previous.sees_as_student
    assert teachers.initial.forwards > teachers.previous.forwards == 0


def test_features_asked_for_before_the_forward_are_of_this_batch(stream, benchmark):
    class Early(Adding):
        def before_forward(self, strategy, **kwargs):
            teachers = Teachers.of(strategy, self)
            expected = teachers.initial.model.encode_image(strategy.mb_x)
            assert torch.equal(teachers.images(strategy)[0], expected)

    teachers = Teachers()
    naive(student(stream, train="text"), [teachers, Early()]).train(benchmark.train_stream[0])
    assert teachers.initial.forwards > 0


# evaluations


def matrix(out, *settings, strategy="finetune"):
    recipe = resolve("recipes/mtil.yaml", Changes(strategy=strategy, settings=(*SMALL, *settings)))
    run_experiment(recipe, 0, out)
    [result] = out.glob("*/*/seed-0/result.json")
    found = json.loads(result.read_text())
    return [found["zero_shot"], *found["matrix"]]


@pytest.fixture
def encoded(monkeypatch):
    """The number of batches that were encoded for evaluations."""
    counted = [0]
    plain = Headed.encode_for_head

    def encode(self, x):
        counted[0] += self.known_features is None and not self.training
        return plain(self, x)

    monkeypatch.setattr(Headed, "encode_for_head", encode)
    return counted


@pytest.mark.parametrize("settings", [(TEXT_ALONE,), (TEXT_ALONE, "evaluate.classes=seen"), (RAIL,)])
def test_test_images_are_encoded_once(tmp_path, encoded, settings):
    once = matrix(tmp_path / "once", *settings)
    few = encoded[0]
    encoded[0] = 0
    assert matrix(tmp_path / "anew", *settings, "evaluate.cache=off") == once
    head = few if "head" in settings[0] else 0  # it reads the training images too
    assert encoded[0] > few + head // 2
    assert len({tuple(row) for row in once}) > 1, "the text tower has learned"
    if not head:
        assert encoded[0] == (len(once)) * few


@pytest.mark.parametrize("settings", [("model.train=all",), (TEXT_ALONE, "evaluate.cache=off")])
def test_a_tower_that_learns_and_no_cache_keep_nothing(tmp_path, monkeypatch, settings):
    kept = []
    monkeypatch.setattr(KeptFeatures, "note", lambda self, features: kept.append(self._of))
    matrix(tmp_path, *settings)
    assert kept
    assert not any(each is not None for each in kept)


def test_a_weight_that_somebody_has_changed_is_noticed(tmp_path, monkeypatch):
    plain = Teachers.before_training_exp

    def change(self, strategy, **kwargs):
        plain(self, strategy, **kwargs)
        next(strategy.model.clip.visual.parameters()).data.mul_(-3)

    monkeypatch.setattr(Teachers, "before_training_exp", change)
    once = matrix(tmp_path / "once", TEXT_ALONE, strategy="lwf")
    assert matrix(tmp_path / "anew", TEXT_ALONE, "evaluate.cache=off", strategy="lwf") == once


def test_a_plugin_that_may_change_test_images_sees_them_encoded(tmp_path, monkeypatch, encoded):
    monkeypatch.setattr(Teachers, "before_eval_forward", lambda self, strategy, **kwargs: None, raising=False)
    rows = matrix(tmp_path / "watched", TEXT_ALONE, strategy="lwf")
    watched, encoded[0] = encoded[0], 0
    monkeypatch.undo()
    assert matrix(tmp_path / "alone", TEXT_ALONE, strategy="lwf") == rows
    assert watched > 0


class Parts(SupervisedPlugin):
    """Evaluates all but the first of the first task's test images after each task."""

    tested, found = [], []

    def after_training_exp(self, strategy, **kwargs):
        experience = copy.copy(self.tested[0])
        whole = experience._dataset
        experience._dataset = whole.subset(list(range(1, len(whole))))
        experience.images = copy.copy(experience.images)
        experience.images.images = SimpleNamespace(targets=experience.images.targets[1:])
        strategy.eval([experience])
        self.found.append(strategy.mb_output)


def test_a_part_of_a_test_set_is_no_test_set(tmp_path, monkeypatch):
    plain = Run.evaluate

    def evaluate(self, *experiences):
        Parts.tested[:] = self.built.tested
        return plain(self, *experiences)

    monkeypatch.setattr(Run, "evaluate", evaluate)
    mine = Catalog()
    Register(mine, Provenance(distribution="somebodys", version="0")).plugin("parts", Parts, summary="evaluates parts")
    catalog().parts.update(mine.parts)
    outputs = {}
    try:
        for cache in ("auto", "off"):
            Parts.found.clear()
            settings = (*SMALL, TEXT_ALONE, f"evaluate.cache={cache}", "evaluate.batch_size=2")
            changes = Changes(strategy="finetune", settings=settings, with_plugins=("parts",))
            run_experiment(resolve("recipes/mtil.yaml", changes), 0, tmp_path / cache)
            outputs[cache] = list(Parts.found)
    finally:
        catalog().parts.pop(("plugin", "parts"))
    assert len(outputs["auto"]) == 3
    assert all(map(torch.equal, outputs["auto"], outputs["off"]))


def test_no_more_is_kept_than_the_limit(stream):
    model, images = student(stream, train="text").eval(), object()
    kept = KeptFeatures(limit=2 * 5 * 4 * 4)
    batches = [torch.full((5, 4), float(i)) for i in range(3)]
    for _ in range(2):
        kept.begin(model, images)
        for i, batch in enumerate(batches):
            known = kept.known(torch.device("cpu"))
            assert (known is None) == (kept.encoded <= i or i == 2)
            kept.note(batch if known is None else known)
            assert known is None or torch.equal(known, batch)
    assert kept.encoded == 4
    kept.begin(model, object())
    assert kept.known(torch.device("cpu")) is None
