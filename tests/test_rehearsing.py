"""Rehearsing: features drawn around the prototypes of earlier classes, and how what is kept drifts."""

import copy
import json
import math
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from safetensors.torch import load_file

from mulki_plugins.cli import main
from mulki_plugins.models import ClipClassifier
from mulki_plugins.stages import Connecting, Eliciting, Rehearsing, Teachers
from mulki_plugins.stages.spreads import Spreads, measure
from mulki_plugins.testing.kit import check_one
from mulki_plugins.testing.ranks import run_on_ranks
from tests.conftest import Quiet, naive, same, small_clip, small_tokenizer, weights


def images_of(dataset):
    """Images, classes and task labels as tensors, through the evaluation transform."""
    rows = [dataset.eval()[i] for i in range(len(dataset))]
    return torch.stack([r[0] for r in rows]), torch.tensor([r[1] for r in rows]), torch.tensor([r[2] for r in rows])


def test_a_spread_by_loops(classifier, benchmark):
    """Means, variances and the covariance of two tasks, against numpy."""
    spreads, deviations = Spreads(), []
    for task, classes in ((0, 2), (1, 3)):
        dataset = benchmark.train_stream[task].dataset
        assert measure(spreads, classifier, dataset, {task: classes}) == {}
        x, y, _ = images_of(dataset)
        with torch.no_grad():
            z = classifier.eval().encode_image(x).double().numpy()
        for c in range(classes):
            own = z[(y == c).numpy()]
            mean = own.mean(0)
            assert np.allclose(spreads.means[task][c], mean, atol=1e-6)
            assert float(spreads.variances[task][c]) == pytest.approx(np.cov(own.T).trace(), rel=1e-4)
            deviations.append(own - mean)
    every = np.concatenate(deviations)
    sigma = every.T @ every / (len(every) - 5)
    assert spreads.degrees == len(every) - 5
    assert np.allclose(spreads.scatter / spreads.degrees, sigma, atol=1e-8)


def test_draws_have_the_mean_and_the_covariance_that_were_measured():
    """Far from the origin, a feature of unit norm varies like the part of the noise across its mean."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(400, 3, generator=generator, dtype=torch.float64) * torch.tensor([0.02, 0.05, 0.01])
    z = noise - noise.mean(0) + torch.tensor([0.0, 0.0, 1.0])
    ones = torch.ones(400, 1, dtype=torch.float64)
    spreads = Spreads()
    spreads.add(7, torch.tensor([400, 1]), torch.stack([z.sum(0), z[0]]), torch.stack([z.square().sum(), z[0].square().sum()]),
                z.T @ z + torch.outer(z[0], z[0]))  # fmt: skip
    torch.manual_seed(0)
    drawn = spreads.draw(7, torch.zeros(50_000, dtype=torch.long)).double()
    assert torch.allclose(drawn.norm(dim=1), ones.new_ones(()), atol=1e-5)
    assert torch.allclose(drawn.mean(0), torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64), atol=3e-3)
    expected = torch.cov(z.T)[:2, :2]
    assert torch.allclose(torch.cov(drawn.T)[:2, :2], expected, rtol=0.05, atol=1e-5)
    assert torch.cov(spreads.draw(7, torch.zeros(20_000, dtype=torch.long), 0.5).T)[1, 1] == pytest.approx(
        float(expected[1, 1]) / 4, rel=0.05
    )
    alone = spreads.draw(7, torch.ones(20_000, dtype=torch.long))
    assert torch.cov(alone.T)[1, 1] == pytest.approx(float(expected[1, 1]), rel=0.1), (
        "one image: the spread of all classes"
    )
    still = spreads.draw(7, torch.tensor([0, 1]), 0.0)
    assert torch.allclose(still, F.normalize(spreads.means[7], dim=1))


def test_a_class_twice_as_wide_is_drawn_twice_as_wide():
    generator = torch.Generator().manual_seed(1)
    narrow, wide = (scale * torch.randn(300, 4, generator=generator, dtype=torch.float64) for scale in (0.01, 0.02))
    each = [group - group.mean(0) + torch.eye(4)[i] for i, group in enumerate((narrow, wide))]
    spreads = Spreads()
    spreads.add(0, torch.tensor([300, 300]), torch.stack([g.sum(0) for g in each]),
                torch.stack([g.square().sum() for g in each]), sum(g.T @ g for g in each))  # fmt: skip
    torch.manual_seed(0)
    sizes = [float(spreads.draw(0, torch.full((5000,), c)).std(0)[2:].mean()) for c in (0, 1)]
    ratio = (each[1].var(0).sum() / each[0].var(0).sum()).sqrt()
    assert sizes[1] / sizes[0] == pytest.approx(float(ratio), rel=0.03)
    assert ratio > 1.7
    assert sizes[0] == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize("width", [0.05, 1.0])
def test_drift_by_loops(classifier, stream, benchmark, width):
    before = ClipClassifier(small_clip(), small_tokenizer, stream.tasks).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in classifier.clip.visual.parameters():
            p.add_(0.05 * torch.randn_like(p))
    points = {0: F.normalize(torch.randn(3, 16), dim=1), 2: F.normalize(torch.randn(1, 16), dim=1)}
    dataset = benchmark.train_stream[1].dataset
    drift = measure(Spreads(), classifier, dataset, {1: 3}, before=before, points=points, width=width)
    x, _, _ = images_of(dataset)
    with torch.no_grad():
        new, old = classifier.eval().encode_image(x).double(), before.encode_image(x).double()
    for task, each in points.items():
        for i, p in enumerate(each.double()):
            w = [math.exp(-float((z - p).square().sum()) / (2 * width**2)) for z in old]
            expected = sum(wi * (b - a) for wi, a, b in zip(w, old, new, strict=True)) / sum(w)
            assert torch.allclose(drift[task][i].double(), expected, atol=1e-6)
            assert expected.norm() > 1e-3


class Watched(Rehearsing):
    def rehearsed(self, strategy):
        loss = super().rehearsed(strategy)
        with torch.no_grad():
            t = [strategy.model.encode_text(task, all_templates=False) for task in range(3)]
            self.drawn = self._sentences(strategy)
        self.seen = {
            "loss": loss, "z": self._z.clone(), "labels": self._labels.tolist(), "tasks": list(self._tasks),
            "classes": self._classes.tolist(), "t": t,
        }  # fmt: skip
        return loss


@pytest.mark.parametrize("among", ["task", "seen"])
@pytest.mark.parametrize("targets", ["labels", "teacher"])
def test_it_computes_its_equation(classifier, benchmark, among, targets):
    teachers = Teachers()
    stage = Watched(among=among, targets=targets, classes=3, count=7, smoothing=0.1, temperature=1.5)
    strategy = naive(classifier, [teachers, Eliciting(), Connecting(every=2), stage], lr=0.1)
    for experience in benchmark.train_stream:
        strategy.train(experience)
    seen, s = stage.seen, float(classifier.scale)
    with torch.no_grad():
        known = [teachers.previous.model.encode_text(task, all_templates=False) for task in range(3)]
    assert seen["tasks"] == [0, 1] if among == "seen" else seen["tasks"] in ([0], [1])
    chosen, before = (
        torch.cat([torch.cat([texts[task] for task in seen["tasks"]])[seen["classes"]], *([texts[2]] if among == "seen" else [])])
        for texts in (seen["t"], known)
    )  # fmt: skip
    expected = 0.0
    for z, label in zip(seen["z"], seen["labels"], strict=True):
        logits, teacher = ([s * float(z @ t) for t in texts] for texts in (chosen, before))
        if targets == "labels":
            logp = [v - math.log(sum(map(math.exp, logits))) for v in logits]
            expected -= 0.9 * logp[label] + 0.1 * sum(logp) / len(logp)
        else:
            p, q = ([math.exp(v / 1.5) for v in row] for row in (logits, teacher))
            expected += 2.25 * sum(y / sum(q) * math.log(y / sum(q) / (x / sum(p))) for x, y in zip(p, q, strict=True))
    assert len(seen["labels"]) == 7
    assert expected > 1e-4, "or the test tells nothing"
    assert float(seen["loss"]) == pytest.approx(expected / 7, rel=1e-3)


def test_a_feature_is_drawn_for_its_label(classifier, benchmark):
    """Without spread, each feature is the direction of the mean of the class that it stands for."""
    stage = Watched(among="seen", spread=0, classes=4, count=30)
    strategy = naive(classifier, [Teachers(), stage], lr=0.1)
    for experience in benchmark.train_stream:
        strategy.train(experience)
    means = F.normalize(torch.cat([stage.kept.means[task] for task in (0, 1)]), dim=1)
    for z, label in zip(stage.seen["z"], stage.seen["labels"], strict=True):
        assert torch.allclose(z, means[stage.seen["classes"][label]], atol=1e-6)
    assert len(set(stage.seen["labels"])) == 4


def test_a_class_without_training_images_is_not_drawn(classifier, benchmark):
    """Its mean is unknown, and it stays so while the means of the others drift."""
    stage = Watched(among="seen", classes=9, drift=0.5)
    strategy = naive(classifier, [Teachers(), stage], lr=0.1)
    strategy.train(benchmark.train_stream[0])
    stage.kept.add(
        0, torch.tensor([0, 4]), torch.ones(2, 16).double(), torch.tensor([0.0, 9.0]), torch.eye(16).double()
    )
    assert stage.kept.scatter.isfinite().all()
    for experience in list(benchmark.train_stream)[1:]:
        strategy.train(experience)
        assert 0 not in stage.seen["classes"]
        assert stage.seen["z"].isfinite().all()
    assert stage.seen["classes"] == [1, 2, 3, 4]
    assert stage.kept.means[0][0].isnan().all()


def test_sentences_in_a_template_that_is_drawn(classifier, benchmark):
    """The small tasks have two templates: `a {} one.` and `it is {}.`"""
    seen = set()
    for seed in range(6):
        model = copy.deepcopy(classifier)
        stage = Watched(among="seen", templates="drawn", classes=4)
        strategy = naive(model, [Teachers(), stage], lr=0.0)
        torch.manual_seed(seed)
        for experience in benchmark.train_stream:
            strategy.train(experience)
        names = [name for task in (0, 1) for name in model.prompts[task].class_names]
        every = []
        for template in model.prompts[0].templates:
            tokens = small_tokenizer([template.replace("{}", names[c]) for c in stage.seen["classes"]])
            every.append(F.normalize(model.eval().clip.encode_text(tokens), dim=1))
        matches = [torch.allclose(stage.drawn, each, atol=1e-5) for each in every]
        assert sum(matches) == 1
        seen.add(matches.index(True))
    assert seen == {0, 1}


def test_only_the_text_tower_is_taught(classifier, benchmark):
    stage = Watched()
    strategy = naive(classifier, [Teachers(), stage], lr=0.1)
    for experience in list(benchmark.train_stream)[:2]:
        strategy.train(experience)
    strategy.model.zero_grad()
    strategy.experience = benchmark.train_stream[2]
    stage._current = {2}
    stage.before_forward(strategy)
    classifier.train()(torch.rand(2, 3, 16, 16), 2)
    stage.rehearsed(strategy).backward()
    moved = {n for n, p in classifier.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert moved
    assert not any("visual" in name for name in moved)


def test_drift_moves_what_is_kept_of_earlier_tasks(classifier, benchmark):
    """After the second task: the first one's means and prototypes by the shift of the images near them, the second's not."""
    teachers, stage = Teachers(), Rehearsing(weight=0, drift=0.5)
    strategy = naive(classifier, [teachers, Eliciting(), stage], lr=0.3)
    strategy.train(benchmark.train_stream[0])
    means, prototypes = stage.kept.means[0].clone(), teachers.previous.prototypes[0].clone()
    strategy.train(benchmark.train_stream[1])
    shift = measure(
        Spreads(), classifier, benchmark.train_stream[1].dataset, {1: 3}, before=teachers.previous.model,
        points={0: torch.cat([means, prototypes])}, width=0.5,
    )[0]  # fmt: skip
    assert torch.allclose(stage.kept.means[0], means + shift[:2], atol=1e-6)
    assert torch.allclose(teachers.previous.prototypes[0], F.normalize(prototypes + shift[2:], dim=1), atol=1e-6)
    assert shift.norm() > 1e-3
    x, y, _ = images_of(benchmark.train_stream[1].dataset)
    with torch.no_grad():
        z = classifier.eval().encode_image(x)
    assert torch.allclose(stage.kept.means[1], torch.stack([z[y == c].mean(0) for c in range(3)]), atol=1e-6)


def test_it_is_zero_on_the_first_task_and_nothing_without_weight(stream, benchmark):
    def trained(*more, logger=None):
        model = ClipClassifier(small_clip(), small_tokenizer, stream.tasks)
        strategy = naive(model, [Teachers(), *more], logger, lr=0.1)
        for experience in list(benchmark.train_stream)[:2]:
            strategy.train(experience)
        return weights(model)

    logger = Quiet()
    trained(Rehearsing(), logger=logger)
    terms = [value for name, value in logger.values if name == "train/loss/rehearsing"]
    first = terms[: len(terms) // 2 - 1]
    assert max(map(abs, first)) == 0
    assert terms[-1] > 0
    assert same(trained(), trained(Rehearsing(weight=0)))
    assert not same(trained(), trained(Rehearsing()))


def test_what_is_kept_goes_through_a_state(classifier, benchmark):
    stage = Rehearsing()
    naive(classifier, [Teachers(), stage]).train(benchmark.train_stream[0])
    other = Rehearsing()
    other.load_state_dict(stage.state_dict())
    draws = []
    for each in (stage, other):
        torch.manual_seed(5)
        draws.append(each.kept.draw(0, torch.tensor([0, 1, 1])))
    assert torch.equal(*draws)


def test_its_place_is_after_connecting(tmp_path):
    recipe = tmp_path / "wrong.yaml"
    recipe.write_text(
        "name: wrong\nstream: mtil-mini\nmodel: mulki-tiny\ntrain: {iterations: 1}\n"
        "strategy: {name: wrong, plugins: [teachers, rehearsing, connecting]}\n"
    )
    done = CliRunner().invoke(main, ["validate", str(recipe)])
    assert done.exit_code == 2
    assert "rehearsing: must come after 'connecting'" in done.stderr


RECIPE = """
name: kept
stream: {name: small}
model: {name: small-clip, train: all, head: text}
strategy: mulki-plus
train:
  iterations: 3
  batch_size: 6
  workers: 0
  optimizer: {name: sgd, lr: 0.01}
  schedule: {name: constant}
evaluate: {batch_size: 4}
loggers: []
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the ranks of this test are forks")
@pytest.mark.xdist_group("ranks")
def test_two_ranks_preserve_and_rehearse_as_one_process_does(tmp_path, small_parts):
    recipe = tmp_path / "kept.yaml"
    recipe.write_text(RECIPE)
    options = ["preserving.images=distorted", "preserving.texts=1", "preserving.features=1", "rehearsing.drift=0.5"]
    settings = [word for option in options for word in ("--set", f"strategy.{option}")]
    found, matrices = [], []
    for ranks in (1, 2):
        out, said = tmp_path / f"on-{ranks}", tmp_path / f"said-by-{ranks}"
        said.mkdir()
        words = ["run", str(recipe), "--with", "rehearsing", *settings, "--out", str(out)]
        assert run_on_ranks(lambda words=words: main.main(words), ranks, said) == [0] * ranks, (
            said / "stderr-0"
        ).read_text()
        [result] = out.rglob("result.json")
        matrices.append(np.array(json.loads(result.read_text())["matrix"]))
        [last] = sorted(each for each in (result.parent / "checkpoints").iterdir() if "-step-" not in each.name)[-1:]
        found.append(load_file(last / "weights.safetensors"))
    one, two = found
    far = sum(float((one[n].double() - two[n].double()).square().sum()) for n in one) ** 0.5
    assert far < 1e-5 * sum(float(one[n].double().square().sum()) for n in one) ** 0.5
    assert np.abs(matrices[0] - matrices[1]).max() < 1e-9


@pytest.mark.parametrize("options", [{"drift": 0.3}, {"among": "seen", "targets": "teacher", "templates": "drawn"}])
def test_it_passes_the_kit_with_other_options(options):
    """A run that is killed and resumed has the same weights, bit for bit."""
    for check in ("trains", "repeatable", "resume", "growth", "extremes"):
        check_one("plugin", check, "rehearsing", options)
