"""Preserving: the initial teacher speaks of generic words, on the images of the task or on others made from them."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from mulki_plugins.errors import MulkiError
from mulki_plugins.models import ClipClassifier
from mulki_plugins.stages import Preserving, Teachers, mixtures
from mulki_plugins.stages.teachers import Teacher
from mulki_plugins.stages.words import generic_sentences, sentence_features, vocabulary_words, words_of
from mulki_plugins.testing.kit import check_one
from tests.conftest import Quiet, naive, same, small_clip, small_tokenizer, weights


@pytest.mark.parametrize(
    ("entries", "inner"),
    [
        (["riv", "er</w>", "river</w>", "cat</w>", "Ladder</w>", "l33t</w>", "Ġ", "bridge</w>", "tower"], False),
        (["▁river", "▁cat", "ladder", "▁bridge", "▁Tower"], True),
        (["Ġriver", "Ġcat", "ladder", "Ġbridge"], True),
        (["river", "##adder", "[CLS]", "cat", "bridge", "brücke"], True),
    ],
)
def test_the_words_of_a_vocabulary(entries, inner):
    vocabulary = {entry: i for i, entry in enumerate(entries)}
    tokenizer = SimpleNamespace(encoder=vocabulary)
    if inner:
        tokenizer = SimpleNamespace(tokenizer=SimpleNamespace(get_vocab=lambda: vocabulary))
    assert vocabulary_words(tokenizer) == ["bridge", "river"]


def test_a_tokenizer_without_a_vocabulary_needs_words(classifier, benchmark):
    assert vocabulary_words(len) == []
    classifier.tokenizer = lambda texts: small_tokenizer(texts)
    naive(classifier, [Teachers(), Preserving(logits=0, features=1.0)]).train(benchmark.train_stream[0])
    with pytest.raises(MulkiError, match="shows no vocabulary"):
        naive(classifier, [Teachers(), Preserving()]).train(benchmark.train_stream[0])


def test_sentences_are_made_of_the_words_alone():
    torch.manual_seed(0)
    drawn = generic_sentences(["river", "tower"], ["{}", "a {}."], 60, 3)
    names = {s.removeprefix("a ").removesuffix(".") for s in drawn}
    assert len(drawn) == 60
    assert {s.startswith("a ") for s in drawn} == {True, False}
    assert {len(name.split()) for name in names} == {1, 2, 3}
    assert {word for name in names for word in name.split()} == {"river", "tower"}
    assert words_of(["Ice-cream cone", "cat"]) == {"ice", "cream", "cone", "cat"}
    assert words_of(["snow_leopard", "river/lake", "AnnualCrop", "devil's claw"]) == {
        "snow", "leopard", "river", "lake", "annual", "crop", "devils", "claw",
    }  # fmt: skip


def test_words_of_the_classes_so_far_are_left_out(classifier, benchmark):
    """`blue` belongs to the second task, so the first may use it, and no later one."""
    made = []

    class Spy(Preserving):
        def before_training_exp(self, strategy, **kwargs):
            super().before_training_exp(strategy, **kwargs)
            made.append({tuple(row) for row in self._tokens.tolist()})

    stage = Spy(words=["Red", "blue", "key"], longest=1, pool=200)
    strategy = naive(classifier, [Teachers(), stage])
    for experience in list(benchmark.train_stream)[:2]:
        strategy.train(experience)

    def rows(*words):
        texts = [template.replace("{}", word) for word in words for template in ("{}", "a {} one.", "it is {}.")]
        return {tuple(row) for row in small_tokenizer(texts).tolist()}

    assert made == [rows("blue", "key"), rows("key")]


class Watched(Preserving):
    """Notes what the loss of the last step was computed from."""

    def preserved(self, strategy):
        loss = super().preserved(strategy)
        with torch.no_grad():
            self.seen = {
                "loss": loss.item(),
                "x": strategy.mb_x.clone(),
                "tokens": self._tokens[self._drawn],
                "student": {n: w.clone() for n, w in strategy.model.state_dict().items()},
            }
        return loss


def features(model, stream, weights_, x, tokens, task):
    """z, the features of the sentences and of the task's classes, by a model with these weights."""
    copied = ClipClassifier(small_clip(), small_tokenizer, stream.tasks)
    copied.load_state_dict(weights_)
    copied.eval()
    with torch.no_grad():
        texts = F.normalize(copied.clip.encode_text(tokens), dim=1)
        return copied.encode_image(x), texts, copied.encode_text(task, all_templates=False)


@pytest.mark.parametrize("classes", [False, True])
@pytest.mark.parametrize("use", ["both", "previous"])
def test_it_computes_its_equation(classifier, stream, benchmark, classes, use):
    initial = weights(classifier)
    teachers = Teachers(use=use)
    stage = Watched(logits=0.7, texts=2.0, orthogonal=3.0, features=0.4, temperature=3.0, count=5, classes=classes)
    strategy = naive(classifier, [teachers, stage], lr=0.1)
    strategy.train(benchmark.train_stream[0])
    before = weights(classifier)
    strategy.train(benchmark.train_stream[1])
    seen, s = stage.seen, float(classifier.scale)
    given = seen["x"], seen["tokens"], 1
    assert len(seen["tokens"]) == 5
    z, v, t = features(classifier, stream, seen["student"], *given)
    z0, v0, t0 = features(classifier, stream, before if use == "previous" else initial, *given)
    if classes:
        asked, known = torch.cat([v, t]), torch.cat([v0, t0])
    else:
        asked, known = v, v0
    expected = 0.0
    for b in range(len(z)):
        p, q = ([math.exp(s * float(a[b] @ w) / 3.0) for w in each] for a, each in ((z, asked), (z0, known)))
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        expected += 0.7 * 9.0 * sum(y * math.log(y / x) for x, y in zip(p, q, strict=True)) / len(z)
        expected += 0.4 * (1 - float(z[b] @ z0[b])) / len(z)
    expected += 2.0 * sum(float(((a - b) ** 2).sum()) for a, b in zip(v, v0, strict=True)) / 5
    along = sum(float((a - b) @ x) ** 2 for a, b in zip(v, v0, strict=True) for x in z0) / (5 * len(z0))
    assert use == "previous" or 3.0 * along > 1e-5, "or the test does not see it"
    expected += 3.0 * along
    assert expected > 5e-4, "or the test tells nothing"
    assert seen["loss"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("images", ["mixed", "distorted"])
def test_other_images_are_seen_by_student_and_teacher_alike(classifier, benchmark, monkeypatch, images):
    stage, seen = Watched(logits=0, features=1.0, images=images), {}
    strategy = naive(classifier, [Teachers(), stage], lr=1.0)
    strategy.train(benchmark.train_stream[0])

    def watch(name, owner, method):
        original = getattr(owner, method)

        def watched(self, x):
            result = original(self, x)
            seen.setdefault(name, (x, result))
            return result

        monkeypatch.setattr(owner, method, watched)

    watch("teacher", Teacher, "images")
    watch("student", ClipClassifier, "encode_image")
    strategy.mbatch = [stage.seen["x"], torch.zeros(len(stage.seen["x"]), dtype=torch.long), torch.zeros(1)]
    loss = stage.preserved(strategy)
    (x, z), (x0, z0) = seen["student"], seen["teacher"]
    assert torch.equal(x, x0)
    assert not torch.isclose(x, stage.seen["x"]).flatten(1).all(1).any(), "no image stays what it was"
    assert loss.item() == pytest.approx(float((1 - (z * z0).sum(1)).mean()), rel=1e-3)
    assert loss > 1e-6
    assert z.requires_grad


def test_it_begins_at_zero_and_takes_part_in_the_first_task(classifier, benchmark):
    logger = Quiet()
    naive(classifier, [Teachers(), Preserving(texts=1.0)], logger, lr=0.1).train(benchmark.train_stream[0])
    terms = [value for name, value in logger.values if name == "train/loss/preserving"]
    assert terms[0] == pytest.approx(0, abs=1e-6)
    assert terms[-1] > 1e-6


def test_without_weight_nothing_changes(stream, benchmark):
    def trained(*more):
        model = ClipClassifier(small_clip(), small_tokenizer, stream.tasks)
        strategy = naive(model, [Teachers(), *more], lr=0.1)
        for experience in list(benchmark.train_stream)[:2]:
            strategy.train(experience)
        return weights(model)

    assert same(trained(), trained(Preserving(weight=0)))
    assert not same(trained(), trained(Preserving()))


def test_something_must_be_preserved():
    with pytest.raises(ValueError, match="at least one of logits, texts, orthogonal and features"):
        Preserving(logits=0)


def test_a_mixture_lies_between_two_images():
    x = torch.rand(5, 3, 4, 4)
    torch.manual_seed(3)
    result = mixtures.mixed(x, 0.5)
    torch.manual_seed(3)
    share = torch.distributions.Beta(0.5, 0.5).sample((5, 1, 1, 1)).flatten().tolist()
    order = torch.randperm(5).tolist()
    partner = {b: order[i - 1] for i, b in enumerate(order)}
    for b in range(5):
        assert torch.allclose(result[b], share[b] * x[b] + (1 - share[b]) * x[partner[b]], atol=1e-6)
    assert min(share) < 0.5 < max(share)


def test_a_distorted_image_has_its_colours_in_another_order():
    """An image of one colour shows what happens to colours, one with a bright side that it is turned or cropped."""
    torch.manual_seed(0)
    colour = torch.tensor([0.1, 0.5, 0.9])
    results = mixtures.distorted(colour[None, :, None, None].expand(200, 3, 6, 6))
    seen = set()
    for image in results:
        assert torch.allclose(image, image[:, :1, :1].expand_as(image), atol=1e-5)
        assert torch.allclose(image[:, 0, 0].abs().sort().values, colour, atol=1e-5)
        seen.add(tuple(round(v, 3) for v in image[:, 0, 0].tolist()))
    assert len(seen) == 12, "six orders, each as it is or inverted"
    half = torch.zeros(1, 3, 8, 8)
    half[..., 4:] = 1
    moved = mixtures.distorted(half.expand(20, 3, 8, 8)).abs()
    assert moved.max() <= 1 + 1e-5
    assert len({tuple(image.flatten().round(decimals=3).tolist()) for image in moved}) > 15


@pytest.mark.parametrize("change", [lambda x: mixtures.mixed(x, 1.0), mixtures.distorted])
def test_each_rank_makes_its_part_of_the_whole_batch(monkeypatch, change):
    x = torch.rand(5, 3, 4, 4)
    torch.manual_seed(1)
    whole = change(x)
    for mine in range(2):
        monkeypatch.setattr(mixtures, "world", lambda: 2)
        monkeypatch.setattr(mixtures, "rank", lambda mine=mine: mine)
        monkeypatch.setattr(mixtures, "gathered", lambda _: torch.cat([x[0::2], x[1::2]]))
        torch.manual_seed(1)
        assert torch.equal(change(x[mine::2]), whole[mine::2])


def test_features_of_sentences_are_the_towers(classifier):
    tokens = small_tokenizer(["a bridge", "x"])
    classifier.eval()
    cut = sentence_features(classifier, tokens, 11)
    assert torch.allclose(cut, F.normalize(classifier.clip.encode_text(tokens), dim=1), atol=1e-6)
    assert cut.requires_grad


@pytest.mark.parametrize(
    "options",
    [
        {"images": "distorted", "texts": 1.0, "orthogonal": 10.0, "features": 1.0},
        {"images": "mixed", "classes": True, "words": ["bridge", "tower"], "longest": 1},
    ],
)
def test_it_passes_the_kit_with_other_options(options):
    """A run that is killed and resumed has the same weights, bit for bit."""
    for check in ("trains", "repeatable", "resume", "growth", "extremes"):
        check_one("plugin", check, "preserving", options)
