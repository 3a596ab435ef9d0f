"""The peers' plugins in Avalanche's own Naive: what they compute, keep, and leave alone."""

import math

import pytest
import torch
import torch.nn.functional as F
from avalanche.training.plugins import EWCPlugin, MASPlugin, SupervisedPlugin
from safetensors.torch import load_file

from mulki_plugins.baselines import (
    ICarl,
    LearningWithoutForgetting,
    MagMax,
    ReferenceDistillation,
    SelectiveDistillation,
    SynapticIntelligence,
    WeightConstraint,
)
from mulki_plugins.baselines.avalanche import EWC, MAS
from mulki_plugins.baselines.exemplars import HerdedExemplars
from mulki_plugins.baselines.lwf import random_tokens
from mulki_plugins.baselines.magmax import larger
from mulki_plugins.errors import MulkiError
from mulki_plugins.losses import distillation
from mulki_plugins.models import ClipClassifier
from mulki_plugins.models.tiny import mulki_tiny
from mulki_plugins.recipe.resolve import Changes, resolve
from mulki_plugins.stages import Teachers
from mulki_plugins.streams import Reference, as_reference
from mulki_plugins.training.resume import resume_experiment
from mulki_plugins.training.run import run_experiment
from tests.conftest import (
    Killed,
    Quiet,
    SmallTokenizer,
    naive,
    same,
    small_clip,
    small_reference,
    small_tokenizer,
    weights,
)


@pytest.fixture
def reference(loaded):
    return as_reference(small_reference(), loaded.transform(train=False))


def logged(strategy_run):
    return [value for name, value in strategy_run.values if name.startswith("train/loss")]


def all_peers(reference):
    return {
        "lwf": [Teachers(use="previous"), LearningWithoutForgetting()],
        "lwf-vr": [Teachers(use="previous"), LearningWithoutForgetting(texts="random", count=20, length=4)],
        "l2": [WeightConstraint()],
        "zscl": [Teachers(use="initial"), ReferenceDistillation(reference=reference)],
        "snd": [Teachers(), SelectiveDistillation(reference=reference)],
        "icarl": [Teachers(use="previous"), ICarl(memory=10)],
    }


@pytest.mark.parametrize("name", ["lwf", "lwf-vr", "l2", "zscl", "snd", "icarl"])
def test_every_peer_learns_and_its_teachers_stay(name, classifier, benchmark, reference):
    classifier.tokenizer = SmallTokenizer()
    plugins = all_peers(reference)[name]
    logger = Quiet()
    strategy = naive(classifier, plugins, logger, lr=0.1)
    before = weights(classifier)
    for i, experience in enumerate(benchmark.train_stream):
        strategy.train(experience)
        if isinstance(plugins[0], Teachers):
            assert same(plugins[0].initial.model.state_dict(), before)
            assert not any(p.requires_grad for p in plugins[0].previous.model.parameters())
        if i == 0 and isinstance(plugins[0], Teachers):
            assert plugins[0].initial.model is plugins[0].previous.model
    assert not same(before, weights(classifier))
    values = logged(logger)
    assert values
    assert all(value >= -1e-6 for value in values)
    assert any(value > 1e-7 for value in values)


@pytest.mark.parametrize("name", ["lwf", "zscl", "snd", "l2"])
def test_nothing_is_lost_where_student_and_teacher_are_one(name, classifier, benchmark, reference):
    logger = Quiet()
    naive(classifier, all_peers(reference)[name], logger).train(benchmark.train_stream[0])
    assert logged(logger)[0] == pytest.approx(0, abs=1e-5)


def test_lwf_computes_its_equation(classifier, benchmark):
    seen = {}

    class Spy(LearningWithoutForgetting):
        def after_forward(self, strategy, **kwargs):
            teachers = Teachers.of(strategy, self)
            z, t = strategy.model.features.image.detach(), teachers.active[0].text(1)
            known, s = teachers.images(strategy)[0], strategy.model.scale
            student, teacher = s * z @ t.T, s * known @ t.T
            seen["expected"] = (
                0.7 * distillation(student, teacher, 3.0).mean() + 0.2 * distillation(student.T, teacher.T, 3.0).mean()
            )
            super().after_forward(strategy, **kwargs)

    logger = Quiet()
    strategy = naive(classifier, [Teachers(use="previous"), Spy(image=0.7, text=0.2, temperature=3.0)], logger, lr=0.1)
    strategy.train(benchmark.train_stream[0])
    strategy.train(benchmark.train_stream[1])
    assert logged(logger)[-1] == pytest.approx(float(seen["expected"]), rel=1e-5)
    assert logged(logger)[-1] > 0


def test_random_texts_hold_no_special_token():
    tokenizer = mulki_tiny().tokenizer
    torch.manual_seed(0)
    tokens = random_tokens(tokenizer, 50, 10)
    assert tokens.shape == (50, tokenizer.context_length)
    assert (tokens[:, 0] == tokenizer.sot_token_id).all()
    assert (tokens[:, 11] == tokenizer.eot_token_id).all()
    assert (tokens[:, 12:] == 0).all()
    assert not set(tokens[:, 1:11].flatten().tolist()) & {0, *tokenizer.all_special_ids}
    assert len(torch.unique(tokens, dim=0)) == 50
    longest = random_tokens(tokenizer, 2, 99)
    assert (longest[:, -1] == tokenizer.eot_token_id).all()


def test_random_texts_need_a_tokenizer_that_says_its_tokens(classifier, benchmark):
    plugins = [Teachers(), LearningWithoutForgetting(texts="random")]
    classifier.tokenizer = lambda texts: small_tokenizer(texts)  # which does not name its special tokens
    with pytest.raises(MulkiError, match="random texts need open_clip's SimpleTokenizer"):
        naive(classifier, plugins).train(benchmark.train_stream[0])


def test_l2_is_the_squared_distance_to_the_start(classifier, benchmark):
    seen = []

    class Spy(WeightConstraint):
        def after_forward(self, strategy, **kwargs):
            now = dict(strategy.model.named_parameters())
            seen.append(sum(((now[n] - w) ** 2).sum().item() for n, w in start.items()))
            super().after_forward(strategy, **kwargs)

    start = {n: p.detach().clone() for n, p in classifier.named_parameters() if p.requires_grad}
    logger = Quiet()
    naive(classifier, [Spy(weight=0.5)], logger, lr=0.1).train(benchmark.train_stream[0])
    assert logged(logger) == pytest.approx([0.5 * value for value in seen], rel=1e-4)
    assert seen[0] == 0
    assert seen[-1] > 0


def test_reference_distillation_teaches_the_image_tower_alone(classifier, benchmark, reference):
    gradients = {}

    class Spy(ReferenceDistillation):
        def after_forward(self, strategy, **kwargs):
            strategy.loss = strategy.loss * 0
            super().after_forward(strategy, **kwargs)
            strategy.model.zero_grad()
            strategy.loss.sum().backward(retain_graph=True)
            gradients.update({n: p.grad for n, p in strategy.model.named_parameters() if p.grad is not None})

    strategy = naive(classifier, [Teachers(use="initial"), Spy(reference=reference)], lr=0.1)
    strategy.train(benchmark.train_stream[0])
    strategy.train(benchmark.train_stream[1])
    towers = {name.split(".")[1] for name, grad in gradients.items() if grad.abs().sum() > 0}
    assert towers == {"visual"}


def test_reference_batches_go_around_without_end(classifier, benchmark, reference):
    asked = []

    class Counted(torch.utils.data.Dataset):
        def __len__(self):
            return len(reference.images)

        def __getitem__(self, index):
            asked.append(index)
            return reference.images[index]

    teachers = Teachers(use="initial")
    plugin = ReferenceDistillation(reference=Reference(Counted(), ("a", "b", "c")), batch_size=4)
    naive(classifier, [teachers, plugin]).train(benchmark.train_stream[1])
    assert len(asked) == 4 + 4 + 2 + 4  # four steps: ten images, then from the start
    assert sorted(asked[:10]) == list(range(10))
    assert teachers.initial.forwards == 4


def test_snd_weighs_each_sample_on_its_own(classifier, benchmark, reference):
    """The mean of products is not the product of means, which the authors' released code computes."""
    logger, teachers = Quiet(), Teachers()
    plugin = SelectiveDistillation(
        reference=reference, previous=3.0, initial=2.0, slope=6.0, threshold=0.4, batch_size=10
    )
    strategy = naive(classifier, [teachers, plugin], logger, lr=0.3)
    strategy.train(benchmark.train_stream[0])
    steps = len(logged(logger))
    strategy.train(benchmark.train_stream[1])
    x = torch.stack([reference.images[i] for i in range(10)])  # every batch holds all ten, in some order
    z0, zp = teachers.initial.images(x), teachers.previous.images(x)  # at its first step the student is z^p
    w = [1 / (1 + torch.exp(-6 * ((a - b).norm() - 0.4))).item() for a, b in zip(z0, zp, strict=True)]
    assert max(w) - min(w) > 0.01, "or the test tells nothing"
    shares = [value for name, value in logger.values if name == "train/share/previous"]
    assert shares[-1] == pytest.approx(sum(w) / 10, rel=1e-4)
    expected = sum(2 * (1 - wi) * ((p - o) ** 2).sum().item() for wi, p, o in zip(w, zp, z0, strict=True)) / 10
    assert logged(logger)[steps] == pytest.approx(expected, rel=1e-3)


def test_exemplars_are_few_even_and_herded(classifier, benchmark):
    plugin = ICarl(memory=15)
    strategy = naive(classifier, [Teachers(use="previous"), plugin], lr=0.05)
    for i, experience in enumerate(benchmark.train_stream):
        strategy.train(experience)
        classes = sum([2, 3, 2][: i + 1])
        sizes = [len(group) for group in plugin.exemplars.groups.values()]
        assert len(plugin.exemplars.buffer) == sum(sizes) == min(8 * classes, 15), "no place is left empty"
        assert max(sizes) - min(sizes) <= 1
        if i == 0:
            dataset = experience.dataset.eval()
            rows = [r for r in range(len(dataset)) if dataset[r][1] == 0]
            z = classifier.eval().encode_image(torch.stack([dataset[r][0] for r in rows])).detach()
            chosen = classifier.encode_image(
                torch.stack([x for x, *_ in plugin.exemplars.groups[0, 0].eval()])
            ).detach()
            nearest = (z - z.mean(0)).norm(dim=1).argmin()
            assert torch.allclose(chosen[0], z[nearest], atol=1e-5), "the first is the one nearest to the mean"


def test_more_classes_than_exemplars_keep_what_fits(classifier, benchmark):
    plugin = ICarl(memory=3)
    strategy = naive(classifier, [Teachers(use="previous"), plugin])
    for experience in benchmark.train_stream:
        strategy.train(experience)
    assert [len(group) for group in plugin.exemplars.groups.values()] == [1, 1, 1, 0, 0, 0, 0]
    assert len(plugin.exemplars.buffer) == 3


def test_herding_looks_through_the_evaluation_mode(classifier, benchmark):
    modes = []
    original = type(classifier).encode_image

    def spy(self, x):
        modes.append((self.training, torch.is_grad_enabled()))
        return original(self, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(classifier), "encode_image", spy)
        classifier.train()
        HerdedExemplars(4).add(classifier, benchmark.train_stream[0].dataset)
    assert set(modes) == {(False, False)}
    assert classifier.training


def test_icarl_distils_on_exemplars_alone(classifier, benchmark):
    rows = []

    class Spy(ICarl):
        def after_forward(self, strategy, **kwargs):
            super().after_forward(strategy, **kwargs)
            rows.append((strategy.mb_task_id.tolist(), strategy.clock.train_exp_counter))

    logger = Quiet()
    plugin = Spy(memory=10, weight=2.0)
    strategy = naive(classifier, [Teachers(use="previous"), plugin], logger, lr=0.1)
    strategy.train(benchmark.train_stream[0])
    assert all(value == 0 for value in logged(logger)), "the first task has no exemplars"
    strategy.train(benchmark.train_stream[1])
    later = [tasks for tasks, task in rows if task == 1]
    assert all(set(tasks) == {0, 1} for tasks in later)
    assert logged(logger)[-1] > 0


def test_exemplars_are_told_from_their_own_classes(classifier, benchmark):
    """Three classes in the second task, two in the first: an exemplar's loss must not see the third."""
    seen = {}

    class Spy(ICarl):
        def after_forward(self, strategy, **kwargs):
            loss = strategy.loss.clone()
            super().after_forward(strategy, **kwargs)
            if strategy.clock.train_exp_counter == 1:
                features, old = strategy.model.features, strategy.mb_task_id == 0
                previous = Teachers.of(strategy, self).previous
                s, t = features.scale, features.text[0]
                taught = s * previous.model.encode_image(strategy.mb_x[old]) @ previous.text(0).T
                own = s * features.image[old] @ t.T
                slow = F.kl_div(
                    F.log_softmax(own / 2, 1), F.log_softmax(taught / 2, 1), log_target=True, reduction="sum"
                )
                seen["difference"] = (strategy.loss - loss - 4 * slow / old.sum()).abs().max().item()

    strategy = naive(classifier, [Teachers(use="previous"), Spy(memory=8)], lr=0.1)
    strategy.train(benchmark.train_stream[0])
    strategy.train(benchmark.train_stream[1])
    assert seen["difference"] < 1e-5


def test_reference_is_an_object_and_no_option(reference):
    with pytest.raises(ValueError, match="expected a Reference"):
        ReferenceDistillation(reference="mtil-mini-reference")
    with pytest.raises(ValueError, match="memory: expected a whole number, at least 1"):
        ICarl(memory=0)


def test_synaptic_intelligence_notes_copies(classifier, benchmark):
    """Also on a CPU: Ω = −Σ g·Δθ / ((θ − θ_start)² + eps) over the steps, clamped at 0.001, against a plain sum."""
    plugin, path, start = SynapticIntelligence(si_lambda=1.0), {}, weights(classifier)

    class Path(SupervisedPlugin):
        def before_update(self, strategy, **kwargs):
            self.before = {n: p.detach().clone() for n, p in strategy.model.named_parameters()}
            self.grads = {n: p.grad.clone() for n, p in strategy.model.named_parameters() if p.grad is not None}

        def after_update(self, strategy, **kwargs):
            for name, p in strategy.model.named_parameters():
                if name in self.grads:
                    moved = self.grads[name] * (p.detach() - self.before[name])
                    path[name] = path.get(name, 0) + moved

    strategy = naive(classifier, [plugin, Path()])
    strategy.train(benchmark.train_stream[0], eval_streams=[])
    end = weights(classifier)
    for name, moved in path.items():
        expected = (-moved / ((end[name] - start[name]).square() + plugin.eps)).clamp(max=0.001)
        torch.testing.assert_close(plugin.ewc_data[1][name].data, expected.flatten())
    assert max(entry.data.abs().max() for entry in plugin.ewc_data[1].values()) > 0
    penalties = []

    class Penalty(SupervisedPlugin):
        def before_backward(self, strategy, **kwargs):
            penalties.append(plugin.compute_ewc_loss(classifier, plugin.ewc_data, set(), "cpu", 1.0).item())

    strategy.plugins.insert(1, Penalty())
    strategy.train(benchmark.train_stream[1], eval_streams=[])
    assert penalties[0] == 0
    assert penalties[-1] != 0


def test_a_step_that_half_precision_leaves_out_is_no_part_of_the_path(classifier, benchmark):
    plugin = SynapticIntelligence(si_lambda=1.0)

    class Overflow(SupervisedPlugin):
        def before_update(self, strategy, **kwargs):
            if strategy.clock.train_exp_iterations == 1:
                self.start = weights(strategy.model)
                for p in strategy.model.parameters():
                    if p.grad is not None:
                        p.grad.fill_(math.inf)

        def after_update(self, strategy, **kwargs):
            if strategy.clock.train_exp_iterations == 1:
                strategy.model.load_state_dict(self.start, strict=False)

    strategy = naive(classifier, [Overflow(), plugin])
    strategy.train(benchmark.train_stream[0], eval_streams=[])
    assert all(entry.data.isfinite().all() for entry in plugin.syn_data["trajectory"].values())
    assert max(entry.data.abs().max() for entry in plugin.ewc_data[1].values()) > 0


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (lambda: EWCPlugin(50.0), lambda: EWC(50.0)),
        (lambda: EWCPlugin(50.0, "online", 0.5), lambda: EWC(50.0, "online", 0.5)),
        (lambda: MASPlugin(2.0), lambda: MAS(2.0)),
    ],
)
def test_penalties_in_few_kernels_train_as_avalanches_do(stream, benchmark, theirs, ours):
    trained = []
    for plugin in (theirs(), ours()):
        model = ClipClassifier(small_clip(), small_tokenizer, stream.tasks)
        strategy = naive(model, [plugin], lr=0.05)
        for experience in benchmark.train_stream:
            strategy.train(experience)
        trained.append((weights(model), strategy.loss.item()))
    assert same(trained[0][0], trained[1][0]), "to the last digit"
    assert trained[0][1] == pytest.approx(trained[1][1], rel=1e-6)
    free = ClipClassifier(small_clip(), small_tokenizer, stream.tasks)
    strategy = naive(free, [], lr=0.05)
    for experience in benchmark.train_stream:
        strategy.train(experience)
    assert not same(weights(free), trained[0][0])


@torch.no_grad()
def merged_at_once(initial, trained, factor):
    """The slow way: for each number the change of largest magnitude among all tasks; the later of two equal ones."""
    result = {}
    for name, start in initial.items():
        changes = torch.stack([each[name] - start for each in trained]).flip(0)  # argmax takes the first of equals
        at = changes.abs().argmax(0, keepdim=True)
        result[name] = start + factor * changes.gather(0, at)[0]
    return result


class Trained(SupervisedPlugin):
    """Keeps the weights that each task was trained to, and those that it starts from; stands before MagMax."""

    def __init__(self):
        super().__init__()
        self.ends, self.starts = [], []

    def before_training_iteration(self, strategy, **kwargs):
        if strategy.clock.train_exp_iterations == 0:
            self.starts.append(weights(strategy.model))

    def after_training_exp(self, strategy, **kwargs):
        self.ends.append(weights(strategy.model))


@pytest.mark.parametrize("factor", [0.5, 1.0])
def test_magmax_is_the_largest_change_of_all_tasks(classifier, benchmark, factor):
    initial, watch = weights(classifier), Trained()
    strategy = naive(classifier, [watch, MagMax(factor=factor)], lr=0.5)
    learning = {name for name, p in classifier.named_parameters() if p.requires_grad}
    for task, experience in enumerate(benchmark.train_stream):
        strategy.train(experience)
        now = weights(classifier)
        expected = merged_at_once(initial, watch.ends, factor)
        for name, value in now.items():
            if name in learning:
                assert torch.allclose(value, expected[name], atol=1e-6), name
                assert task == 0 or torch.equal(watch.starts[task][name], watch.ends[task - 1][name]), "starts unmerged"
            else:
                assert torch.equal(value, initial[name]), f"{name} is untouched"
        if not task and factor == 1:
            assert all(torch.allclose(now[name], watch.ends[0][name], atol=1e-6) for name in learning)
    assert {"clip.logit_scale"} <= weights(classifier).keys() - learning


def test_of_two_equal_changes_magmax_takes_the_later():
    assert larger(torch.tensor([2.0, -3.0, 1.0]), torch.tensor([-2.0, 1.0, -4.0])).tolist() == [-2.0, -3.0, -4.0]


def test_magmax_ends_a_killed_run_as_if_it_had_never_been(tmp_path, kill_at, small_parts):
    settings = (
        "stream={name: small}", "model={name: small-clip}", "train.iterations=4", "train.batch_size=4",
        "train.checkpoint.every=2", "device=cpu", "loggers=[csv]", "train.schedule.warmup=1",
    )  # fmt: skip
    recipe = resolve("recipes/mtil.yaml", Changes(strategy="magmax", settings=settings))
    whole = run_experiment(recipe, 0, tmp_path / "whole")
    for at in ((2, 1), (2, 3), (3, 2)):
        kill_at(*at)
        with pytest.raises(Killed):
            run_experiment(recipe, 0, tmp_path / f"killed-{at}")
        [folder] = (tmp_path / f"killed-{at}").glob("*/*/seed-0")
        assert resume_experiment(recipe, 0, folder).matrix == whole.matrix
        [other] = (tmp_path / "whole").glob("*/*/seed-0")
        assert same(load_file(other / "model.safetensors"), load_file(folder / "model.safetensors"))
