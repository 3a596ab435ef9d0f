"""Rephrasing: the batch's classes in another template of the task."""

import math

import pytest
import torch
import torch.nn.functional as F

from mulki_plugins.models import ClipClassifier, Prompts
from mulki_plugins.stages import Rephrasing
from mulki_plugins.stages.words import Phrases
from mulki_plugins.testing.kit import check_one
from tests.conftest import Quiet, naive, same, small_clip, small_tokenizer, weights

TEMPLATES = ("a {} one.", "it is {}.", "{}", "see {}")


def classifier_of(stream, templates):
    return ClipClassifier(
        small_clip(), small_tokenizer, [Prompts(task.class_names, templates) for task in stream.tasks]
    )


def test_it_computes_its_equation_in_every_other_template(stream, benchmark):
    """Without steps of the optimizer, each logged value is that of one of the three other templates, and each occurs."""
    model, batches = classifier_of(stream, TEMPLATES), []

    class Spy(Rephrasing):
        def loss(self, part):
            value = super().loss(part)
            batches.append((part.z.detach(), part.y, value.item()))
            return value

    logger = Quiet()
    strategy = naive(model, [Spy(weight=0.5, smoothing=0.1)], logger, lr=0.0)
    for _ in range(4):
        strategy.train(benchmark.train_stream[1])
    used, s = set(), float(model.scale)
    for z, y, got in batches:
        values = []
        for template in TEMPLATES:
            tokens = small_tokenizer([template.replace("{}", name) for name in stream.tasks[1].class_names])
            with torch.no_grad():
                t = F.normalize(model.clip.encode_text(tokens), dim=1)
            total = 0.0
            for image, label in zip(z, y.tolist(), strict=True):
                logits = [s * float(image @ each) for each in t]
                logp = [v - math.log(sum(map(math.exp, logits))) for v in logits]
                total -= 0.9 * logp[label] + 0.1 * sum(logp) / len(logp)
            values.append(total / len(z))
        near = [abs(got - value) < 1e-4 * abs(value) for value in values]
        assert sum(near) == 1
        used.add(near.index(True))
    assert used == {1, 2, 3}
    logged = [value for name, value in logger.values if name == "train/loss/rephrasing"]
    assert logged == pytest.approx([0.5 * got for _, _, got in batches])


def test_it_is_nothing_for_one_template_or_without_weight(stream, benchmark):
    logger = Quiet()

    def trained(templates, *plugins):
        model = classifier_of(stream, templates)
        naive(model, list(plugins), logger, lr=0.1).train(benchmark.train_stream[0])
        return weights(model)

    assert same(trained(TEMPLATES), trained(TEMPLATES, Rephrasing(weight=0)))
    trained(TEMPLATES[:1], Rephrasing())
    assert {value for name, value in logger.values if name == "train/loss/rephrasing"} == {0.0}
    assert not same(trained(TEMPLATES), trained(TEMPLATES, Rephrasing()))


def test_phrases_of_several_tasks(stream):
    model = classifier_of(stream, TEMPLATES).eval()
    phrases = Phrases(model)
    names = [*stream.tasks[0].class_names, *stream.tasks[2].class_names]
    texts = [t.replace("{}", name) for t, name in zip(["{}", "{}", "it is {}.", "it is {}."], names, strict=True)]
    expected = F.normalize(model.clip.encode_text(small_tokenizer(texts)), dim=1)
    assert phrases.templates(0) == 4
    assert torch.allclose(phrases.features([(0, 2), (2, 1)]), expected, atol=1e-6)
    assert torch.allclose(phrases.features([(0, 2), (2, 1)], torch.tensor([3, 0])), expected[[3, 0]], atol=1e-6)


def test_it_passes_the_kit_with_other_options():
    for check in ("trains", "repeatable", "resume", "growth", "extremes"):
        check_one("plugin", check, "rephrasing", {"weight": 2.0, "smoothing": 0.2})
