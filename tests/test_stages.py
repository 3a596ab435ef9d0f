"""The stages in Avalanche's own Naive, without a recipe: what they compute, keep, and leave alone."""

import copy
import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from avalanche.benchmarks.scenarios.dataset_scenario import benchmark_from_datasets
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.training.plugins import EvaluationPlugin, ReplayPlugin
from avalanche.training.supervised import AGEM, EWC, Cumulative, JointTraining, LwF, Replay
from torch import nn
from torch.utils.data import TensorDataset

from mulki_plugins.errors import Mistakes
from mulki_plugins.losses import prototype_alignment, relation_distillation, relation_logits, teacher_scores
from mulki_plugins.models import ClipClassifier
from mulki_plugins.recipe.resolve import Changes, resolve
from mulki_plugins.stages import Adding, Connecting, Distinguishing, Eliciting, Recalling, Teachers
from mulki_plugins.stages.importance import RunningMean, interpolation_shares, rescaled, sensitivity
from mulki_plugins.stages.prototypes import visual_prototypes
from mulki_plugins.stages.stage import Stage
from tests.conftest import Quiet, every_stage, naive, same, small_clip, small_tokenizer, weights


def test_all_stages_in_naive(classifier, benchmark):
    logger = Quiet()
    strategy = naive(classifier, every_stage(), logger)
    before = weights(classifier)
    for experience in benchmark.train_stream:
        strategy.train(experience)
    strategy.eval(benchmark.test_stream)
    terms = {name for name, _ in logger.values}
    assert {"train/loss/eliciting", "train/loss/adding", "train/share/initial"} <= terms
    assert all(value >= -1e-6 for name, value in logger.values if name.startswith("train/loss"))
    assert not same(before, weights(classifier))


@pytest.mark.parametrize("left_out", [Eliciting, Adding, Distinguishing, Connecting])
def test_every_stage_changes_the_result(stream, benchmark, left_out):
    def trained(plugins):
        model = ClipClassifier(small_clip(), small_tokenizer, stream.tasks)
        strategy = naive(model, plugins, lr=0.1)
        for experience in list(benchmark.train_stream)[:2]:
            strategy.train(experience)
        return weights(model)

    whole = trained(every_stage())
    assert same(whole, trained(every_stage())), "the same seed gives the same weights"
    assert not same(whole, trained([p for p in every_stage() if not isinstance(p, left_out)]))


def test_a_benchmark_without_task_labels(loaded, stream):
    images = [
        (loaded.transform(train=False)(image), label) for image, label in (stream.tasks[0].train[i] for i in range(16))
    ]
    x, y = torch.stack([image for image, _ in images]), torch.tensor([label for _, label in images])
    tensors = TensorDataset(x, y)
    tensors.targets = y.tolist()
    data = as_classification_dataset(tensors)
    experience = benchmark_from_datasets(train=[data], test=[data]).train_stream[0]
    model = ClipClassifier(small_clip(), small_tokenizer, stream.tasks[:1])
    before = weights(model)
    naive(model, every_stage()).train(experience)
    assert not same(before, weights(model))


def one_step(classifier, benchmark, plugins, task=0):
    """The strategy after a task, with the losses it logged."""
    logger = Quiet()
    strategy = naive(classifier, plugins, logger)
    strategy.train(benchmark.train_stream[task])
    return strategy, [value for name, value in logger.values if name.startswith("train/loss")]


def test_eliciting_computes_its_equation(classifier, benchmark):
    start = copy.deepcopy(classifier).eval()
    seen = {}

    class Spy(Teachers):
        def after_forward(self, strategy, **kwargs):
            if "z" not in seen:
                features = strategy.model.features
                seen.update(z=features.image.detach(), t=features.text[0].detach(), y=strategy.mb_y, s=features.scale)

    _, terms = one_step(classifier, benchmark, [Spy(), Eliciting(weight=0.5, momentum=0.8)])
    old = visual_prototypes([start], benchmark.train_stream[0].dataset, {0})[0][0]
    p = old.clone()
    for c in range(2):
        if (seen["y"] == c).any():
            p[c] = F.normalize(0.8 * old[c] + 0.2 * seen["z"][seen["y"] == c].mean(0), dim=0)
    assert terms[0] == pytest.approx(0.5 * prototype_alignment(p, seen["t"], seen["s"]).item(), rel=1e-4)


def test_eliciting_starts_from_the_teacher_that_it_is_told(classifier, benchmark):
    ready = {}

    class Spy(Eliciting):
        def before_training_exp(self, strategy, **kwargs):
            super().before_training_exp(strategy, **kwargs)
            ready[self.start, strategy.clock.train_exp_counter] = {k: p.clone() for k, p in self.prototypes.items()}

    initial = copy.deepcopy(classifier).eval()
    strategy = naive(classifier, [Teachers(), Spy(start="initial"), Spy(start="previous", weight=0.0)], lr=0.1)
    strategy.train(benchmark.train_stream[0])
    previous = copy.deepcopy(classifier).eval()
    strategy.train(benchmark.train_stream[1])
    for start, model in (("initial", initial), ("previous", previous)):
        [expected] = visual_prototypes([model], benchmark.train_stream[1].dataset, {1})
        assert torch.allclose(ready[start, 1][1], expected[1], atol=1e-6)
    assert not torch.allclose(ready["initial", 1][1], ready["previous", 1][1], atol=1e-4)


@pytest.mark.parametrize("features", [0.0, 0.3])
@pytest.mark.parametrize("distinguish", [False, True])
def test_adding_computes_its_equation_with_two_teachers(classifier, benchmark, distinguish, features):
    teachers = Teachers()
    relations = {"image_to_text": 1.0, "text_to_image": 0.5}
    plugins = [teachers, Adding(weight=0.7, temperature=2.0, relations=relations, features=features)]
    plugins += [Distinguishing(score="likelihood", temperature=0.5)] if distinguish else []
    logger, seen = Quiet(), {}

    class Spy(Adding):
        def after_forward(self, strategy, **kwargs):
            if strategy.clock.train_exp_counter == 1 and "z" not in seen:
                last = strategy.model.features
                seen.update(x=strategy.mb_x, y=strategy.mb_y, z=last.image.detach(), t=last.text[1].detach())

    strategy = naive(classifier, [*plugins, Spy(weight=0)], logger)
    strategy.train(benchmark.train_stream[0])
    logger.values.clear()
    strategy.train(benchmark.train_stream[1])
    got = next(value for name, value in logger.values if name == "train/loss/adding")
    s, y, factors = classifier.scale, seen["y"], {"image_to_text": 1.0, "text_to_image": 0.5}
    views = []
    for teacher in teachers.active:
        model = teacher.model
        with torch.no_grad():
            z, t = model.encode_image(seen["x"]), model.encode_text(1, all_templates=False)
        views.append((z, t, visual_prototypes([model], benchmark.train_stream[1].dataset, {1})[0][1]))
    scores = torch.stack([teacher_scores(s * z @ t.T, y, "likelihood") for z, t, _ in views])
    w = torch.softmax(-scores / 0.5, 0) if distinguish else torch.full((2, len(y)), 0.5)
    expected = 0.0
    for (z, t, p), share in zip(views, w, strict=True):
        student = {r: relation_logits(r, seen["z"], seen["t"], p, t, s) for r in factors}
        teacher = {r: relation_logits(r, z, t, p, t, s) for r in factors}
        expected += relation_distillation(student, teacher, factors, share, 2.0).item()
        moved = share * (1 - F.cosine_similarity(seen["z"], z)), share.mean() * (1 - F.cosine_similarity(seen["t"], t))
        expected += features * sum(each.mean().item() for each in moved)
    assert got == pytest.approx(0.7 * expected, rel=1e-3)
    logged = [value for name, value in logger.values if name == "train/share/initial"]
    assert logged[:1] == ([pytest.approx(w[0].mean().item(), rel=1e-3)] if distinguish else [])


def test_the_logged_share_is_the_mean_over_a_batch_of_several_tasks(monkeypatch):
    stage, logged = Distinguishing(temperature=0.5), {}
    monkeypatch.setattr(stage, "log", lambda strategy, tag, value: logged.setdefault(tag, []).append(float(value)))
    generator = torch.Generator().manual_seed(0)
    shares = []
    for samples, classes in ((5, 3), (2, 4)):
        logits = [torch.randn(samples, classes, generator=generator) for _ in range(2)]
        shares.append(stage.weigh(logits, torch.arange(samples) % classes, "samples")[0])
    stage.after_backward(None)
    stage.after_backward(None)  # the next step starts empty
    assert logged == {"train/share/initial": [pytest.approx(torch.cat(shares).mean().item())]}


def test_the_defaults_that_published_numbers_rest_on():
    defaults = {
        Eliciting: {"weight": 1.0, "momentum": 0.9},
        Distinguishing: {"score": "likelihood", "temperature": 1.0},
        Connecting: {"every": 10, "inter": 0.2, "start": False, "importance": False},
    }
    for stage, expected in defaults.items():
        parameters = inspect.signature(stage).parameters
        assert {name: parameters[name].default for name in expected} == expected


@pytest.mark.parametrize("distinguish", [False, True])
def test_recalling_computes_its_equation(classifier, benchmark, distinguish):
    """At the second step of the third task: five earlier classes among eight, each weighed by who finds its prototype."""
    seen, teachers, factors = {}, Teachers(), {"text_to_image": 1.5, "text_to_text": 0.5}

    class Spy(Recalling):
        def after_forward(self, strategy, **kwargs):
            self.watched = strategy.clock.train_exp_counter == 2 and strategy.clock.train_exp_iterations == 1
            if self.watched:
                with torch.no_grad():
                    seen["t"] = torch.cat([strategy.model.encode_text(task, all_templates=False) for task in (0, 1)])
                seen["p"] = torch.cat([teachers.previous.prototypes[task] for task in (0, 1, 2)])
            super().after_forward(strategy, **kwargs)

        def add_loss(self, strategy, term, loss, weight=1.0):
            if self.watched:
                seen["loss"] = (weight * loss).item()
            super().add_loss(strategy, term, loss, weight)

    recalling = Spy(weight=0.7, relations=factors, count=9)
    plugins = [teachers, Eliciting(), recalling, *([Distinguishing(temperature=0.5)] if distinguish else [])]
    strategy = naive(classifier, plugins, lr=0.1)
    for experience in benchmark.train_stream:
        strategy.train(experience)
    s, t, p, expected = classifier.scale, seen["t"], seen["p"], 0.0
    with torch.no_grad():
        anchors = [torch.cat([m.model.encode_text(i, all_templates=False) for i in (0, 1, 2)]) for m in teachers.active]
    own = [torch.stack([-F.log_softmax(s * a[c] @ p.T, 0)[c] for c in range(5)]) for a in anchors]
    w = torch.softmax(-torch.stack(own) / 0.5, 0) if distinguish else torch.full((2, 5), 0.5)
    for m, a in enumerate(anchors):
        for c in range(5):
            for factor, targets in ((1.5, p), (0.5, a)):
                known, answer = (F.log_softmax(s * x @ targets.T / 2.0, 0) for x in (a[c], t[c]))
                expected += factor * w[m, c] * 4.0 * (known.exp() * (known - answer)).sum() / 5
    assert expected > 1e-3, "or the test tells nothing"
    assert seen["loss"] == pytest.approx(0.7 * float(expected), rel=1e-3)


@pytest.mark.parametrize("count", [1, 3, 100])
def test_as_many_earlier_classes_as_asked_for(classifier, benchmark, count):
    drawn = []

    class Spy(Teachers):
        def class_views(self, strategy, tasks, places):
            drawn.append((tasks, places.tolist()))
            return super().class_views(strategy, tasks, places)

    stages = [Eliciting(), Recalling(count=count)]
    strategy = naive(classifier, [Spy(), *stages], lr=0.1)
    strategy.train(benchmark.train_stream[0])
    assert not drawn, "nothing is earlier than the first task"
    for experience in list(benchmark.train_stream)[1:]:
        strategy.train(experience)
    for tasks, places in drawn:
        there = {1: 2, 2: 5}[tasks[-1]]
        assert len(set(places)) == len(places) == min(count, there)
        assert set(places) <= set(range(there))


def test_a_sentence_of_an_earlier_class_teaches_the_text_tower_alone(classifier, benchmark):
    teachers = Teachers()
    recalling = Recalling()
    strategy = naive(classifier, [teachers, Eliciting(weight=0), recalling], lr=0.1)
    for experience in list(benchmark.train_stream)[:2]:
        strategy.train(experience)
    strategy.model.zero_grad()
    recalling.before_forward(strategy)
    classifier.train()(torch.rand(2, 3, 16, 16), 1)
    loss = recalling.sentences_loss(strategy)
    loss.backward()
    moved = {n for n, p in classifier.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert loss > 0
    assert moved
    assert not any("visual" in name for name in moved)


def test_adding_is_zero_at_the_first_step_of_the_first_task(classifier, benchmark):
    _, terms = one_step(classifier, benchmark, [Teachers(), Adding()])
    assert terms[0] == pytest.approx(0, abs=1e-5)
    assert terms[-1] > 0


def test_running_mean_is_the_mean_of_the_snapshots():
    snapshots = [{"w": torch.randn(3, 4)} for _ in range(7)]
    running = RunningMean()
    for snapshot in snapshots:
        running.add(snapshot)
    assert torch.allclose(running.mean["w"], torch.stack([s["w"] for s in snapshots]).mean(0), atol=1e-6)


class Steps(Connecting):
    """Connecting, with the weights after each step written down."""

    def __init__(self, **options):
        super().__init__(**options)
        self.seen = []

    def after_training_iteration(self, strategy, **kwargs):
        super().after_training_iteration(strategy, **kwargs)
        self.seen.append(weights(strategy.model))


@pytest.mark.parametrize("inter", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("every", [1, 2, 100, None])
def test_connecting_on_known_weights(classifier, benchmark, inter, every):
    connecting = Steps(every=every, inter=inter)
    start = weights(classifier)
    naive(classifier, [connecting]).train(benchmark.train_stream[0])
    chosen = connecting.seen[every - 1 :: every] if every else []
    for name, value in weights(classifier).items():
        learned = (
            torch.stack([s[name].double() for s in chosen]).mean(0) if chosen else connecting.seen[-1][name].double()
        )
        expected = (1 - inter) * learned + inter * start[name].double()
        assert torch.allclose(value.double(), expected, atol=1e-5), name


def test_connecting_with_the_weights_before_the_first_task(classifier, benchmark):
    connecting = Steps(every=None, inter=0.5, initial=0.2)
    strategy, pretrained = naive(classifier, [connecting], lr=0.1), weights(classifier)
    strategy.train(benchmark.train_stream[0])
    before = weights(classifier)
    strategy.train(benchmark.train_stream[1])
    for name, value in weights(classifier).items():
        expected = 0.8 * (0.5 * connecting.seen[-1][name] + 0.5 * before[name]) + 0.2 * pretrained[name]
        assert torch.allclose(value, expected, atol=1e-6), name


@pytest.mark.parametrize("importance", [False, True])
def test_connecting_with_a_share_for_each_tower(classifier, benchmark, importance):
    """As with `inter` at the tower's share; the text tower, which is not named, has `inter` itself."""

    def trained(name, **options):
        model = copy.deepcopy(classifier)
        naive(model, [Connecting(every=2, importance=importance, **options)], lr=0.1).train(benchmark.train_stream[0])
        return {n: value for n, value in weights(model).items() if ("visual" in n) == (name == "image")}

    assert same(trained("image", inter=0.2, towers={"image": 0.7}), trained("image", inter=0.7))
    assert same(trained("text", inter=0.2, towers={"image": 0.7}), trained("text", inter=0.2))
    assert same(trained("text", inter=0.2, towers={"text": 0.6}), trained("text", inter=0.6))
    assert not same(trained("image", inter=0.2), trained("image", inter=0.7))


@pytest.mark.parametrize("options", [{"every": 100}, {"every": None}, {"every": 100, "start": False}])
def test_a_task_shorter_than_a_snapshot_is_not_thrown_away(classifier, benchmark, options):
    seen = {}

    class Spy(Connecting):
        def after_training_exp(self, strategy, **kwargs):
            seen["last"] = weights(strategy.model)
            super().after_training_exp(strategy, **kwargs)

    start = weights(classifier)
    options = {"start": True, **options}
    naive(classifier, [Spy(inter=0.0, **options)], lr=0.1).train(benchmark.train_stream[0])
    for name, p in classifier.named_parameters():
        expected = (start[name] + seen["last"][name]) / 2 if options["start"] else seen["last"][name]
        assert torch.allclose(p, expected, atol=1e-6)


def test_adding_needs_a_relation_or_features():
    with pytest.raises(ValueError, match="expected at least one above 0"):
        Adding(relations={"image_to_text": 0.0})
    Adding(relations={"image_to_text": 0.0}, features=1.0)


def test_a_mixture_of_teachers_needs_scores_that_are_not_negative():
    with pytest.raises(ValueError, match="margin may be negative"):
        Distinguishing(score="margin", weights="mixture")


def test_a_mixture_follows_the_teacher_that_is_surer(classifier):
    logits = [torch.tensor([[3.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [3.0, 0.0]])]
    w = Distinguishing(weights="mixture", temperature=0.2).weigh(logits, torch.tensor([0, 0]), "samples")
    assert w[0, 0] > 0.95
    assert w[1, 1] > 0.95
    assert torch.allclose(w.sum(0), torch.ones(2))


def test_disagreement_weighs_the_teachers_by_their_features():
    """σ(slope·(‖z⁰ − z¹‖ − threshold)), sample by sample with Python's own arithmetic."""
    a = [[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]
    b = [[1.0, 0.0], [0.8, 0.6], [0.0, -1.0]]
    stage = Distinguishing(weights="disagreement", slope=3.0, threshold=0.5)
    logits = [torch.zeros(3, 4), torch.ones(3, 4)]
    w = stage.weigh(logits, torch.tensor([0, 1, 2]), "samples", [torch.tensor(a), torch.tensor(b)])
    for i in range(3):
        distance = math.dist(a[i], b[i])
        expected = 1 / (1 + math.exp(-3.0 * (distance - 0.5)))
        assert w[1, i].item() == pytest.approx(expected, abs=1e-6)
        assert w[0, i].item() == pytest.approx(1 - expected, abs=1e-6)
    with pytest.raises(ValueError, match="disagreement needs each teacher's features"):
        stage.weigh(logits, torch.tensor([0, 1, 2]), "samples")


def test_disagreement_is_that_of_images_and_of_earlier_sentences(classifier, benchmark, monkeypatch):
    """In training, the features are the teachers' own: of the batch's images, and of the drawn classes' sentences."""
    seen, stage, teachers = {}, Distinguishing(weights="disagreement"), Teachers(half="never")
    weigh = stage.weigh

    def watched(logits, targets, rows, features=()):
        batch = [each.clone() for each in teachers.images(strategy)]
        seen.setdefault(rows, []).append((batch, [each.clone() for each in features]))
        return weigh(logits, targets, rows, features)

    monkeypatch.setattr(stage, "weigh", watched)
    strategy = naive(classifier, [teachers, Adding(), Recalling(), stage])
    first, second, *_ = benchmark.train_stream
    strategy.train(first)
    assert seen == {}, "one teacher on the first task"
    strategy.train(second)
    for batch, features in seen["samples"]:
        assert all(torch.equal(*pair) for pair in zip(batch, features, strict=True))
        assert not torch.equal(*features)
    for _, features in seen["classes"]:
        for each, teacher in zip(features, (teachers.initial, teachers.previous), strict=True):
            known = teacher.text(0)
            assert all(torch.isclose(known, row).all(1).any() for row in each), "sentences of the first task"


def test_shares_of_interpolation_by_loops():
    before, now = torch.tensor([0.0, 1.0, 4.0, 0.0], dtype=torch.float64), torch.tensor([0.0, 1.0, 1.0, 3.0]).double()
    shares = interpolation_shares(before, now, 0.3, damping=0.01)
    floor = 0.01 * (sum(before.tolist()) / 4 + sum(now.tolist()) / 4)
    for a, b, n in zip(shares.tolist(), before.tolist(), now.tolist(), strict=True):
        kept, new = 0.3 * (b + floor), 0.7 * (n + floor)
        assert a == pytest.approx(kept / (kept + new))
    assert shares[0].item() == pytest.approx(0.3), "no gradient anywhere: as without importances"
    assert shares[1].item() == pytest.approx(0.3)
    assert shares[2] > 0.3 > shares[3]
    assert torch.equal(interpolation_shares(before, now, 0.0), torch.zeros(4).double())
    assert torch.equal(interpolation_shares(before, now, 1.0), torch.ones(4).double())
    assert interpolation_shares(torch.zeros(2), torch.zeros(2), 0.4).tolist() == pytest.approx([0.4, 0.4])


def test_connecting_by_importance_on_known_gradients(classifier, benchmark):
    """Each weight moves from the task's last value towards its first by its own share."""
    squares, starts, seen = [], [], {}

    class Spy(Connecting):
        def before_training_exp(self, strategy, **kwargs):
            super().before_training_exp(strategy, **kwargs)
            starts.append(weights(strategy.model))
            squares.append([])

        def before_update(self, strategy, **kwargs):
            super().before_update(strategy, **kwargs)
            squares[-1].append({n: p.grad.square() for n, p in strategy.model.named_parameters() if p.grad is not None})

        def after_training_exp(self, strategy, **kwargs):
            seen["last"] = weights(strategy.model)
            super().after_training_exp(strategy, **kwargs)

    learning = {n: p for n, p in classifier.named_parameters() if p.requires_grad}
    zero = sensitivity(classifier, learning, benchmark.train_stream[0].dataset)
    strategy = naive(classifier, [Spy(every=None, inter=0.4, importance=True)], lr=0.1)
    importances = []
    for task in (0, 1, 2):
        strategy.train(benchmark.train_stream[task])
        steps = squares[task]
        now = {n: torch.stack([step[n] for step in steps]).mean(0) for n in steps[0]}
        importances.append(now)
        if task == 0:
            importances.insert(0, rescaled(zero, now))
        for name in now:
            before = torch.stack([each[name] for each in importances[:-1]]).mean(0)
            a = interpolation_shares(before, now[name], 0.4)
            expected = (1 - a) * seen["last"][name] + a * starts[task][name]
            assert torch.allclose(dict(classifier.named_parameters())[name], expected, atol=1e-6)
            assert a.max() - a.min() > 1e-3, "or the test tells nothing"


def test_the_initial_weights_join_in_by_importance(classifier, benchmark):
    """By how much each weight matters to the pre-trained model, and on average to the tasks so far, this one too."""
    gradients = []

    class Spy(Connecting):
        def before_training_exp(self, strategy, **kwargs):
            super().before_training_exp(strategy, **kwargs)
            gradients.append([])

        def before_update(self, strategy, **kwargs):
            super().before_update(strategy, **kwargs)
            gradients[-1].append(
                {n: p.grad.square() for n, p in strategy.model.named_parameters() if p.grad is not None}
            )

    learning = {n: p for n, p in classifier.named_parameters() if p.requires_grad}
    zero, pretrained = sensitivity(classifier, learning, benchmark.train_stream[0].dataset), weights(classifier)
    with pytest.raises(ValueError, match="initial_importance: expected importance true and initial above 0"):
        Connecting(initial_importance=True)
    models, tasks = (copy.deepcopy(classifier), classifier), []
    options = {"every": None, "inter": 0.4, "importance": True, "initial": 0.3}
    for model, more in zip(models, ({"initial_importance": True}, {}), strict=True):
        naive(model, [Spy(**options, **more)], lr=0.1).train(benchmark.train_stream[0])
    steps = gradients[0]
    tasks = {n: torch.stack([step[n] for step in steps]).mean(0) for n in steps[0]}
    f0, got, evenly = rescaled(zero, tasks), weights(models[0]), weights(models[1])
    for name, f in tasks.items():
        without = (evenly[name] - 0.3 * pretrained[name]) / 0.7
        b = interpolation_shares(f0[name], f, 0.3)
        assert torch.allclose(got[name], (1 - b) * without + b * pretrained[name], atol=1e-6), name
        assert b.max() - b.min() > 1e-3, "or the test tells nothing"
    plugin = Spy(**options, initial_importance=True)
    strategy = naive(classifier, [plugin], lr=0.1)
    for task in (0, 1):
        strategy.train(benchmark.train_stream[task])
    kept = plugin.state_dict()
    other = Spy(**options, initial_importance=True)
    other.load_state_dict(kept)
    plugin.importance.now, other.importance.now = (RunningMean(2, {n: f.clone() for n, f in tasks.items()}),) * 2
    name = next(iter(tasks))
    learned = (plugin.importance.before.mean[name] * 3 - kept["initial"][name] + tasks[name]) / 3
    share = plugin.importance.initial_share(name, 0.3)
    assert torch.allclose(share, interpolation_shares(kept["initial"][name], learned, 0.3), atol=1e-6)
    assert torch.equal(share, other.importance.initial_share(name, 0.3))


def test_sensitivity_by_loops_and_what_it_leaves_alone(classifier, benchmark):
    learning = {n: p for n, p in classifier.named_parameters() if p.requires_grad}
    dataset = benchmark.train_stream[1].dataset
    before, state = weights(classifier), torch.get_rng_state()
    classifier.train()
    found = sensitivity(classifier, learning, dataset, batches=2, batch_size=5)
    assert torch.equal(state, torch.get_rng_state())
    assert classifier.training
    assert same(before, weights(classifier))
    assert all(p.grad is None for p in learning.values())
    again = sensitivity(classifier, learning, dataset, batches=2, batch_size=5)
    assert all(torch.equal(found[n], again[n]) for n in found)
    assert all((f >= 0).all() and f.shape == learning[n].shape for n, f in found.items())
    assert {n.split(".")[1] == "visual" for n, f in found.items() if f.sum() > 0} == {True, False}, "both towers"

    generator = torch.Generator().manual_seed(0)
    total = dict.fromkeys(learning, 0.0)
    loader = torch.utils.data.DataLoader(dataset.eval(), batch_size=5, shuffle=True, generator=generator)
    classifier.eval()
    for _, batch in zip(range(2), loader, strict=False):
        z, t = classifier.encode_image(batch[0]), classifier.encode_text(1, all_templates=False)
        v, u = (F.normalize(torch.randn(f.shape, generator=generator), dim=1) for f in (z, t))
        moved = sum((a * b).sum() for a, b in zip(z, v, strict=True)) / 5
        moved = moved + sum((a * b).sum() for a, b in zip(t, u, strict=True)) / 3
        classifier.zero_grad()
        moved.backward()
        for n, p in learning.items():
            total[n] = total[n] + p.grad**2 / 2
    assert all(torch.allclose(found[n], total[n], rtol=1e-3, atol=1e-9) for n in found)


def test_rescaled_has_the_sum_of_another():
    a, b = (
        {"x": torch.tensor([1.0, 3.0]), "y": torch.tensor([4.0])},
        {"x": torch.tensor([1.0, 1.0]), "y": torch.ones(2)},
    )
    result = rescaled(a, b)
    assert sum(v.sum() for v in result.values()) == pytest.approx(4.0)
    assert result["x"][1] / result["x"][0] == pytest.approx(3.0)
    assert torch.equal(rescaled({"x": torch.zeros(2)}, b)["x"], torch.zeros(2))


def test_adding_sees_the_classes_of_earlier_tasks(classifier, benchmark):
    shapes = []

    class Spy(Teachers):
        def views(self, *args, **kwargs):
            views = super().views(*args, **kwargs)
            shapes.append([(len(view.text), len(view.anchors), len(view.prototypes)) for view in views])
            return views

    for classes, expected in (("task", [[(2, 2, 2)], [(3, 3, 3)] * 2]), ("seen", [[(2, 2, 2)], [(3, 5, 5)] * 2])):
        shapes.clear()
        strategy = naive(classifier, [Spy(), Adding(classes=classes)], lr=0.1)
        strategy.train(benchmark.train_stream[0])
        strategy.train(benchmark.train_stream[1])
        assert [shapes[0], shapes[-1]] == expected


def test_connecting_leaves_buffers_alone(benchmark, stream):
    model = ClipClassifier(small_clip(), small_tokenizer, stream.tasks)
    model.norm = nn.BatchNorm1d(3)
    model.register_buffer("count", torch.tensor(41))
    connecting = Connecting(every=1, inter=0.5)
    strategy = naive(model, [connecting])

    class Touch(Connecting):
        def before_training_exp(self, strategy, **kwargs):
            super().before_training_exp(strategy, **kwargs)
            strategy.model.norm(torch.randn(8, 3) + 5)
            strategy.model.count += 1

    strategy.plugins.insert(0, Touch(every=1, inter=0.5))
    strategy.train(benchmark.train_stream[0])
    assert model.count.item() == 42
    assert model.count.dtype == torch.int64
    assert (model.norm.running_mean > 0.1).all()


def test_replayed_samples_are_taught_by_their_own_task(classifier, benchmark):
    logger = Quiet()
    strategy = naive(classifier, [*every_stage(), ReplayPlugin(mem_size=8)], logger)
    for experience in benchmark.train_stream:
        strategy.train(experience)
    assert all(torch.isfinite(torch.tensor(value)) for _, value in logger.values)
    assert {name for name, _ in logger.values} >= {"train/loss/eliciting", "train/loss/adding"}


@pytest.mark.parametrize(
    ("base", "options"),
    [
        (Cumulative, {}),
        (JointTraining, {}),
        (Replay, {"mem_size": 10}),
        (EWC, {"ewc_lambda": 1.0}),
        (LwF, {"alpha": 1.0, "temperature": 2.0}),
        (AGEM, {"patterns_per_exp": 4}),
    ],
)
def test_the_stages_work_in_avalanches_strategies(classifier, benchmark, base, options):
    logger = Quiet()
    strategy = base(
        model=classifier,
        optimizer=torch.optim.SGD(classifier.parameters(), lr=0.01),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=6,
        plugins=every_stage(),
        evaluator=EvaluationPlugin(loggers=[logger]),
        **options,
    )
    for experiences in [benchmark.train_stream] if base is JointTraining else benchmark.train_stream:
        strategy.train(experiences)
    strategy.eval(benchmark.test_stream)
    values = [value for name, value in logger.values if name == "train/loss/adding"]
    assert values
    assert all(torch.isfinite(torch.tensor(values)))


def test_a_nested_evaluation_does_no_harm(stream, benchmark):
    def trained(eval_every):
        model = ClipClassifier(small_clip(), small_tokenizer, stream.tasks)
        strategy = naive(model, every_stage(), eval_every=eval_every)
        evaluate = strategy.eval

        def undisturbed(*args, **kwargs):
            with torch.random.fork_rng():  # its loaders draw seeds, which would change the shuffling after it
                return evaluate(*args, **kwargs)

        strategy.eval = undisturbed
        strategy.train(benchmark.train_stream[0], eval_streams=[benchmark.test_stream])
        return weights(model)

    with_evaluation, without = trained(1), trained(-1)
    assert all(torch.allclose(with_evaluation[name], without[name], atol=1e-6) for name in without)


def test_mistakes_are_told(classifier, benchmark):
    with pytest.raises(RuntimeError, match="Adding needs the plugin Teachers"):
        naive(classifier, [Adding()]).train(benchmark.train_stream[0])
    with pytest.raises(TypeError, match=r"Teachers works on the features of a .*ClipClassifier, .* is a Linear"):
        naive(nn.Linear(2, 2), [Teachers()]).train(benchmark.train_stream[0])


@pytest.mark.parametrize(
    ("stage", "options", "why"),
    [
        (Eliciting, {"weight": -1}, "weight: expected a number, at least 0, got -1"),
        (Eliciting, {"momentum": 1.5}, "momentum: expected a number, at least 0 and at most 1"),
        (Adding, {"temperature": 0}, "temperature: expected a number, above 0"),
        (
            Adding,
            {"relations": {"image_to_txt": 1}},
            "relations.image_to_txt: unknown option .did you mean 'image_to_text'",
        ),
        (Distinguishing, {"score": "luck"}, "score: expected 'likelihood' or 'entropy' or 'margin'"),
        (Connecting, {"every": 0, "inter": 2}, "every: expected a whole number, at least 1.*; inter: "),
        (Teachers, {"use": "none"}, "use: expected 'both' or 'initial' or 'previous'"),
    ],
)
def test_options_are_checked(stage, options, why):
    with pytest.raises(ValueError, match=why):
        stage(**options)


def test_a_stages_loss_is_weighed_by_its_share_of_the_batch_and_logged_once(classifier, benchmark):
    parts = []

    class Constant(Stage):
        def __init__(self):
            super().__init__()
            self.weight = 2.0

        def loss(self, part):
            assert part.z.shape == (len(part.y), 16)
            assert len(part.rows) == len(part.y)
            parts.append((part.task, part.share))
            return part.z.new_tensor(10.0**part.task)

    logger = Quiet()
    strategy = naive(classifier, [Constant(), ReplayPlugin(mem_size=8)], logger)
    for experience in list(benchmark.train_stream)[:2]:
        strategy.train(experience)
    logged = [value for name, value in logger.values if name == "train/loss/constant"]
    first, second = parts[-2:]
    assert {first[0], second[0]} == {0, 1}
    assert first[1] + second[1] == pytest.approx(1)
    assert logged[-1] == pytest.approx(2.0 * (first[1] * 10.0 ** first[0] + second[1] * 10.0 ** second[0]))
    assert logged[0] == pytest.approx(2.0), "one task: its share is 1"


@pytest.mark.parametrize(
    ("strategy", "settings", "message"),
    [
        (
            "mulki-plus",
            ["strategy.adding.relations={image_to_text: 0}"],
            "adding.relations: expected at least one above 0, or",
        ),
        (
            "mulki",
            ["strategy.distinguishing.weights=mixture", "strategy.distinguishing.score=margin"],
            "distinguishing.weights: a mixture needs scores of at least 0",
        ),
        ("mulki", ["strategy.connecting.initial_importance=true"], "initial_importance: expected importance true and"),
        (
            "mulki-plus",
            ["strategy.preserving.logits=0"],
            "preserving: expected at least one of logits, texts, orthogonal",
        ),
        (
            "mulki-lora",
            ["strategy.recalling.relations={text_to_image: 0}"],
            "recalling.relations: expected at least one",
        ),
    ],
)
def test_options_that_do_not_fit_one_another_show_before_a_run(strategy, settings, message):
    with pytest.raises(Mistakes, match=message):
        resolve("mtil", Changes(strategy=strategy, settings=tuple(settings)))
