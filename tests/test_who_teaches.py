"""Which teacher speaks: of which classes in divided targets, and for which images in weights by novelty."""

import math

import pytest
import torch
import torch.nn.functional as F

from mulki_plugins import losses
from mulki_plugins.models import ClipClassifier
from mulki_plugins.stages import Adding, Distinguishing, Eliciting, Recalling, Teachers
from tests.conftest import Quiet, naive, same, small_clip, small_tokenizer, weights


def test_novelty_by_loops():
    z = F.normalize(torch.tensor([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.2]]), dim=1)
    prototypes = F.normalize(torch.tensor([[1.0, 0.1], [0.0, 1.0]]), dim=1)
    w = losses.novelty_weights(z, prototypes, 5.0, 0.3)
    for b in range(3):
        nearest = max(sum(float(x * y) for x, y in zip(z[b], p, strict=True)) for p in prototypes)
        assert w[b].item() == pytest.approx(1 / (1 + math.exp(-5.0 * (1 - nearest - 0.3))), abs=1e-6)
    assert torch.equal(losses.novelty_weights(z, prototypes[:0], 5.0, 0.3), torch.ones(3))


def test_the_initial_teacher_speaks_of_what_is_new(classifier, benchmark, monkeypatch):
    """Images by their distance from the first task's prototypes; sentences of its classes are the previous teacher's."""
    seen, teachers = {}, Teachers()
    stage = Distinguishing(weights="novelty", slope=8.0, threshold=0.1)
    weigh = stage.weigh

    def watched(logits, targets, rows, features=()):
        result = weigh(logits, targets, rows, features)
        seen[rows] = features[-1].clone(), result.clone()
        return result

    monkeypatch.setattr(stage, "weigh", watched)
    strategy = naive(classifier, [teachers, Eliciting(), Adding(), Recalling(), stage], lr=0.1)
    strategy.train(benchmark.train_stream[0])
    assert seen == {}, "one teacher on the first task"
    prototypes = teachers.previous.prototypes[0].clone()
    strategy.train(benchmark.train_stream[1])
    z, w = seen["samples"]
    nearest = (z @ prototypes.T).max(1).values
    assert torch.allclose(w[0], torch.sigmoid(8.0 * (1 - nearest - 0.1)), atol=1e-6)
    assert torch.allclose(w.sum(0), torch.ones(len(z)))
    assert torch.equal(seen["classes"][1][0], torch.zeros(len(seen["classes"][0])))
    with pytest.raises(ValueError, match="novelty needs each teacher's features"):
        stage.weigh([torch.zeros(1, 2)] * 2, torch.zeros(1, dtype=torch.long), "samples")


def test_novelty_has_its_prototypes_without_another_stage_that_reads_them(classifier, benchmark):
    teachers, logger = Teachers(), Quiet()
    stage = Distinguishing(weights="novelty", slope=8.0, threshold=0.1)
    strategy = naive(classifier, [teachers, Adding(relations={"image_to_text": 1.0}), stage], logger, lr=0.1)
    for experience in list(benchmark.train_stream)[:2]:
        strategy.train(experience)
    assert 0 in teachers.previous.prototypes
    shares = [value for name, value in logger.values if name == "train/share/initial"]
    assert min(shares) > 0
    assert max(shares) < 1


def test_divided_targets_by_loops(classifier, benchmark):
    """On the second task: its three classes are the initial teacher's, the two of the first task the previous one's."""
    teachers, logger, seen = Teachers(half="never"), Quiet(), {}
    relations = {"image_to_text": 1.0, "text_to_text": 0.5}

    class Spy(Adding):
        def after_forward(self, strategy, **kwargs):
            last = strategy.model.features
            seen.update(x=strategy.mb_x, z=last.image.detach(), t=last.text[max(last.text)].detach())
            super().after_forward(strategy, **kwargs)

    plugins = [teachers, Spy(targets="divided", classes="seen", relations=relations, temperature=1.5)]
    strategy = naive(classifier, plugins, logger, lr=0.1)
    for experience in list(benchmark.train_stream)[:2]:
        strategy.train(experience)
    got = [value for name, value in logger.values if name == "train/loss/adding"][-1]
    with torch.no_grad():
        initial, previous = (teacher.model for teacher in teachers.active)
        z0, zk = (model.encode_image(seen["x"]) for model in (initial, previous))
        own, earlier = initial.encode_text(1, all_templates=False), previous.encode_text(0, all_templates=False)
        of_previous = previous.encode_text(1, all_templates=False)
    s, expected = float(classifier.scale), 0.0
    for factor, student, of_initial, of_other in (
        (1.0, seen["z"], z0, zk),
        (0.5, seen["t"], own, of_previous),
    ):
        for x, a, b in zip(student, of_initial, of_other, strict=True):
            p, q = [s * float(x @ c) for c in own], [s * float(a @ c) for c in own]
            p, q = p + [s * float(x @ c) for c in earlier], q + [s * float(b @ c) for c in earlier]
            p, q = ([math.exp(v / 1.5) for v in row] for row in (p, q))
            kl = sum(v / sum(q) * math.log(v / sum(q) / (u / sum(p))) for u, v in zip(p, q, strict=True))
            expected += factor * 2.25 * kl / len(student)
    assert expected > 1e-4, "or the test tells nothing"
    assert got == pytest.approx(expected, rel=1e-3)


def test_divided_targets_need_classes_of_earlier_tasks():
    with pytest.raises(ValueError, match="set classes to seen"):
        Adding(targets="divided")


def test_divided_is_weighed_where_one_teacher_teaches(stream, benchmark):
    def trained(use, targets):
        model = ClipClassifier(small_clip(), small_tokenizer, stream.tasks)
        strategy = naive(model, [Teachers(use=use), Adding(targets=targets, classes="seen")], lr=0.1)
        for experience in list(benchmark.train_stream)[:2]:
            strategy.train(experience)
        return weights(model)

    assert same(trained("previous", "weighed"), trained("previous", "divided"))
    assert not same(trained("both", "weighed"), trained("both", "divided"))
