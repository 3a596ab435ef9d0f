"""An image tower that does not learn: the teachers take its features of a step's images, evaluations those of test images."""

import contextlib
import copy
import json
from types import SimpleNamespace

import pytest
import torch
from avalanche.training.plugins import SupervisedPlugin
from torch import nn
from torch.nn.utils import parametrize

from mulki_plugins.adapters import LoRA
from mulki_plugins.heads import Rail
from mulki_plugins.models import ClipClassifier
from mulki_plugins.models.fixed_images import image_tower_is_fixed
from mulki_plugins.models.head import TextHead
from mulki_plugins.recipe.resolve import Changes, resolve
from mulki_plugins.registry.catalog import Catalog, Provenance
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.registry.register import Register
from mulki_plugins.stages import Adding, Distinguishing, Preserving, Teachers
from mulki_plugins.training.batches import EvaluationBatches
from mulki_plugins.training.kept_features import KeptFeatures, checksum_of_pixels
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
    assert image_tower_is_fixed(student(stream, train="text"))
    assert image_tower_is_fixed(student(stream, train="none"))
    assert not image_tower_is_fixed(student(stream))
    assert not image_tower_is_fixed(student(stream, train="image"))
    assert not image_tower_is_fixed(student(stream, train="text", adapters=[LoRA(rank=2, towers="text")]))


CHANGES = {
    "a hook": lambda model: model.clip.visual.transformer.register_forward_hook(lambda module, given, output: output),
    "a hook before": lambda model: model.clip.visual.transformer.register_forward_pre_hook(lambda module, given: None),
    "a hook on the classifier": lambda model: model.register_forward_pre_hook(lambda module, given: None),
    "a forward": lambda model: setattr(model.clip.visual, "forward", model.clip.visual.forward),
    "a method": lambda model: setattr(model.clip.visual, "_pool", model.clip.visual._pool),
    "encode_image": lambda model: setattr(model.clip, "encode_image", model.clip.encode_image),
    "encode_directly": lambda model: setattr(model, "encode_directly", model.encode_directly),
    "a module": lambda model: setattr(model.clip.visual, "ln_post", nn.Sequential(model.clip.visual.ln_post).eval()),
    "a parametrization": lambda model: parametrize.register_parametrization(
        model.clip.visual.conv1, "weight", nn.Identity()
    ),
    "training": lambda model: model.clip.visual.transformer.train(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_others_put_into_it_may_depend_on_anything(stream, change):
    model = student(stream, train="text")
    assert image_tower_is_fixed(model)
    CHANGES[change](model)
    for part in model.clip.visual.parameters():
        part.requires_grad_(False)
    assert not image_tower_is_fixed(model)


def test_hooks_that_came_with_the_model_are_its_own(stream):
    clip = small_clip()
    clip.visual.register_forward_pre_hook(lambda module, given: None)
    assert image_tower_is_fixed(ClipClassifier(clip, small_tokenizer, stream.tasks, train="text").eval())


# teachers


def trained(stream, benchmark, train, shares, monkeypatch):
    with monkeypatch.context() as patched:
        if not shares:
            patched.setattr("mulki_plugins.stages.teachers.image_tower_is_fixed", lambda model: False)
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


@pytest.mark.parametrize("when", ["between tasks", "before the epoch", "in a buffer"])
def test_a_teacher_whose_image_tower_is_another_sees_for_itself(stream, benchmark, when):
    first, second, *_ = benchmark.train_stream
    clip = small_clip()
    clip.visual.register_buffer("shift", torch.zeros(()), persistent=False)
    model, teachers = ClipClassifier(clip, small_tokenizer, stream.tasks, train="text").train(), Teachers()

    class Change(SupervisedPlugin):
        def before_training_epoch(self, strategy, **kwargs):
            if when == "before the epoch" and strategy.experience is second:
                with torch.no_grad():
                    next(model.clip.visual.parameters()).add_(0.1)

    strategy = naive(model, [teachers, Change(), Adding()])
    strategy.train(first)
    if when == "between tasks":
        next(model.clip.visual.parameters()).data.add_(0.1)
    elif when == "in a buffer":
        model.clip.visual.shift.fill_(1)
    strategy.train(second)
    assert teachers.initial.forwards > 0
    assert (teachers.previous.forwards > 0) == (when == "before the epoch")


@pytest.mark.parametrize("when", ["after_backward", "after_update"])
def test_features_asked_for_late_are_of_the_whole_batch(tmp_path, when):
    rows = []

    def ask(self, strategy, **kwargs):
        rows.append((len(Teachers.of(strategy, self).images(strategy)[0]), len(strategy.mb_x)))

    late = type("Late", (SupervisedPlugin,), {when: ask, "per_sample": True})
    with registered("late", late):
        changes = Changes(
            strategy="finetune", settings=(*SMALL, TEXT_ALONE, "train.accumulate=2"), with_plugins=("teachers", "late")
        )
        run_experiment(resolve("recipes/mtil.yaml", changes), 0, tmp_path)
    assert rows
    assert set(rows) == {(4, 4)}


def test_another_batch_put_in_place_is_seen_as_it_is(stream, benchmark):
    class Other(Adding):
        def after_forward(self, strategy, **kwargs):
            teachers, before = Teachers.of(strategy, self), strategy.mbatch
            strategy.mbatch = [-before[0], *before[1:]]
            assert torch.equal(teachers.images(strategy)[0], teachers.initial.model.encode_image(strategy.mb_x))
            strategy.mbatch = before

    naive(student(stream, train="text"), [Teachers(), Other()]).train(benchmark.train_stream[0])


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


@contextlib.contextmanager
def registered(name, part, kind="plugin"):
    mine = Catalog()
    getattr(Register(mine, Provenance(distribution="somebodys", version="0")), kind)(name, part, summary="a part")
    catalog().parts.update(mine.parts)
    try:
        yield
    finally:
        catalog().parts.pop((kind, name))


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
    plain = KeptFeatures.of

    def of(self, batch, encode):
        def counting():
            counted[0] += 1
            return encode()

        return plain(self, batch, counting)

    monkeypatch.setattr(KeptFeatures, "of", of)
    return counted


@pytest.mark.parametrize("settings", [(TEXT_ALONE,), (TEXT_ALONE, "evaluate.classes=seen"), (RAIL,)])
def test_test_images_are_encoded_once(tmp_path, encoded, settings):
    once = matrix(tmp_path / "once", *settings)
    assert encoded[0] == 7
    assert matrix(tmp_path / "anew", *settings, "evaluate.cache=off") == once
    assert encoded[0] == 7 + len(once) * 7
    assert len({tuple(row) for row in once}) > 1, "the text tower has learned"


@pytest.mark.parametrize("settings", [("model.train=all",), (TEXT_ALONE, "evaluate.cache=off")])
def test_a_tower_that_learns_and_no_cache_keep_nothing(tmp_path, encoded, settings):
    rows = matrix(tmp_path, *settings)
    assert encoded[0] == len(rows) * 7, "two batches or three of each test set, in each evaluation"


def test_a_weight_that_somebody_has_changed_is_noticed(tmp_path, monkeypatch):
    plain = Teachers.before_training_exp

    def change(self, strategy, **kwargs):
        plain(self, strategy, **kwargs)
        next(strategy.model.clip.visual.parameters()).data.mul_(-3)

    monkeypatch.setattr(Teachers, "before_training_exp", change)
    once = matrix(tmp_path / "once", TEXT_ALONE, strategy="lwf")
    assert matrix(tmp_path / "anew", TEXT_ALONE, "evaluate.cache=off", strategy="lwf") == once


@pytest.mark.parametrize("event", ["before_eval_exp", "before_eval_iteration", "before_eval_forward"])
def test_a_plugin_that_may_change_what_is_encoded_sees_it_encoded(tmp_path, monkeypatch, encoded, event):
    monkeypatch.setattr(Teachers, event, lambda self, strategy, **kwargs: None, raising=False)
    rows = matrix(tmp_path, TEXT_ALONE, strategy="lwf")
    assert encoded[0] == len(rows) * 7


def test_a_test_image_that_changes_is_encoded_again(tmp_path, monkeypatch, encoded):
    """As if the file of the first image of each batch were another one from the second evaluation on."""
    plain, evaluation = EvaluationBatches._unpack_minibatch, [0]

    def change(self):
        evaluation[0] += self._evaluated == 0 and not self.is_training
        if not self.is_training and evaluation[0] > 3:
            self.mbatch[0][0] = 255 - self.mbatch[0][0]
        plain(self)

    monkeypatch.setattr(EvaluationBatches, "_unpack_minibatch", change)
    once = matrix(tmp_path / "once", TEXT_ALONE)
    assert encoded[0] == 14, "and then it is known, too"
    evaluation[0] = 0
    monkeypatch.setattr("mulki_plugins.training.batches.checksum_of_pixels", lambda x: None)
    assert matrix(tmp_path / "anew", TEXT_ALONE) == once


class Writing(TextHead):
    """Takes z for its own."""

    def forward(self, z, scope):
        z.sub_(0.1)
        return scope.text_logits(z)


def test_a_head_that_writes_into_its_features_changes_no_later_ones(tmp_path):
    with registered("writing", Writing, "head"):
        head = "model={name: small-clip, train: text, head: writing}"
        once = matrix(tmp_path / "once", head)
        assert matrix(tmp_path / "anew", head, "evaluate.cache=off") == once


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
    outputs = {}
    with registered("parts", Parts):
        for cache in ("auto", "off"):
            Parts.found.clear()
            settings = (*SMALL, TEXT_ALONE, f"evaluate.cache={cache}", "evaluate.batch_size=2")
            changes = Changes(strategy="finetune", settings=settings, with_plugins=("parts",))
            run_experiment(resolve("recipes/mtil.yaml", changes), 0, tmp_path / cache)
            outputs[cache] = list(Parts.found)
    assert len(outputs["auto"]) == 3
    assert all(map(torch.equal, outputs["auto"], outputs["off"]))


# what is kept


def test_no_more_is_kept_than_the_limit(stream):
    model = student(stream, train="text").eval()
    kept = KeptFeatures(limit=2 * 5 * 4 * 4)
    batches, encoded = [torch.full((5, 4), float(i)) for i in range(3)], []

    def encode(batch):
        encoded.append(batch)
        return batch.clone()

    for _ in range(2):
        kept.begin(model, keep=True)
        for i, batch in enumerate(batches):
            features = kept.of((0, i, 7), lambda batch=batch: encode(batch))
            assert torch.equal(features, batch)
            features.zero_()
    assert len(encoded) == 4
    kept.begin(model, keep=False)
    kept.begin(model, keep=True)
    kept.of((0, 0, 7), lambda: encode(batches[0]))
    kept.of((0, 0, None), lambda: encode(batches[0]))
    kept.of((0, 0, None), lambda: encode(batches[0]))
    assert len(encoded) == 7, "dropped, and what cannot be identified is not kept"


def test_batches_are_known_by_their_pixels():
    x = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    other = x.clone()
    other[1, 2, 3, 3] ^= 1
    same_pixels = x.clone(memory_format=torch.channels_last)
    assert checksum_of_pixels(x) == checksum_of_pixels(same_pixels)
    assert len({checksum_of_pixels(each) for each in (x, other, x[:1], x.reshape(1, 6, 4, 4))}) == 4
    assert checksum_of_pixels(x.float()) is None


def test_another_head_reads_other_features(stream):
    model, kept, encoded = student(stream, train="text").eval(), KeptFeatures(), []

    def encode():
        encoded.append(model.encode_for_head(torch.ones(2, 3, 16, 16)))
        return encoded[-1]

    for head in (TextHead(), Rail(width=8, features="projected"), Rail(width=8, features="pooled")):
        model.put_on(head)
        kept.begin(model, keep=True)
        features = kept.of((0, 0, 1), encode)
        assert torch.equal(features, model.encode_for_head(torch.ones(2, 3, 16, 16)))
    assert len(encoded) == 2, "the first two read the same"


def test_batches_of_another_size_are_other_batches(tmp_path, encoded):
    class Sizes(SupervisedPlugin):
        def after_training_exp(self, strategy, **kwargs):
            strategy.eval_mb_size += 1

    with registered("sizes", Sizes):
        rows = {}
        for cache in ("auto", "off"):
            changes = Changes(
                strategy="finetune", settings=(*SMALL, TEXT_ALONE, f"evaluate.cache={cache}"), with_plugins=("sizes",)
            )
            rows[cache] = run_experiment(resolve("recipes/mtil.yaml", changes), 0, tmp_path / cache).matrix
    assert rows["auto"] == rows["off"]
