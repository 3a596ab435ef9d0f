"""Adapters that choose a route for each image: experts, prompts, the Gaussians by which they choose, and whole runs."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from attrs import evolve
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from mulki_plugins.adapters import ContextPrompts, Experts, LoRA
from mulki_plugins.adapters.experts import Mixture, choose_experts
from mulki_plugins.adapters.gaussians import HELD_OUT, Gaussian, Gaussians, Moments, gaussians_of
from mulki_plugins.adapters.prompts import Prompts, strength
from mulki_plugins.cli import main
from mulki_plugins.errors import MulkiError
from mulki_plugins.models import ClipClassifier, load_clip
from mulki_plugins.models.adapter import NO_ROUTE, RoutedAdapter
from mulki_plugins.recipe.resolve import Changes, resolve
from mulki_plugins.report.result import FILE, read_result
from mulki_plugins.stages.words import Phrases
from mulki_plugins.training.extend import extend_experiment
from mulki_plugins.training.resume import resume_experiment
from mulki_plugins.training.run import run_experiment
from tests.conftest import Killed, small_clip, small_model, small_tokenizer

ADAPTERS = {
    "experts": lambda: Experts(experts=5, hidden=4, scale=1.0, dropout=0.2),
    "prompts": lambda: ContextPrompts(length=3, scale=2.0, levels=3, claimed=0.95),
}
OPTIONS = {
    "experts": "[{experts: {experts: 5, hidden: 4, scale: 1.0}}]",
    "prompts": "[{prompts: {length: 3, scale: 20.0, claimed: 0.9}}]",
}


class ByBrightness(RoutedAdapter):
    """A route for each task, by the sign of a feature; the route's own vector joins the features of images and texts."""

    def apply(self, clip):
        clip.visual.shifts = nn.ParameterDict()
        clip.visual.register_forward_hook(
            lambda visual, inputs, z: z + visual.shift if visual.shift is not None else None
        )
        clip.visual.shift = None

    def before_task(self, clip, task):
        clip.visual.shifts[str(task)] = nn.Parameter(torch.zeros(clip.visual.output_dim))

    def use(self, clip, route):
        clip.visual.shift = None if route is None else clip.visual.shifts[str(route)]

    def route(self, clip, features):
        begun = len(clip.visual.shifts)
        return torch.where(features[:, 0] > 0, torch.where(features[:, 1] > 0, begun - 1, 0), NO_ROUTE)

    def learn_route(self, clip, task, features):
        self.seen = torch.cat(list(features))


def images(n=12, seed=1):
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def adapted(stream, adapter, train="adapters"):
    return ClipClassifier(small_clip(), small_tokenizer, stream.tasks, train=train, adapters=[adapter])


def plain(stream):
    return ClipClassifier(small_clip(), small_tokenizer, stream.tasks).eval()


def learn(model, task=0, steps=5, lr=0.05):
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr, weight_decay=0.1)
    for _ in range(steps):
        x = images(6)
        loss = F.cross_entropy(model(x, task), torch.tensor([0, 1, 0, 1, 1, 0]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def teach(model, task, x):
    """Let the adapter learn a task's route from these images, as a run does."""
    model.before_task(task)
    model.eval()
    with torch.no_grad(), model.routes.taking(None):
        model.routes.adapter.learn_route(model.clip, task, [model.encode_directly(part) for part in x.split(7)])


def learned(stream, name, tasks=2):
    """A model that has learned some tasks; the images of task t are those of seed 10 + t, around a mean of their own."""
    torch.manual_seed(0)
    model = adapted(stream, ADAPTERS[name]())
    for task in range(tasks):
        teach(model, task, of_task(task))
        learn(model, task)
        model.after_task(task)
    return model.eval()


def of_task(task, n=40):
    centre = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(50 + task))
    return 0.5 * centre + 0.3 * images(n, seed=10 + task)


# The seam


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_fresh_adapter_is_the_model_without_it(stream, name):
    model, base = adapted(stream, ADAPTERS[name]()), plain(stream)
    model.before_task(0)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(images(), 0), base(images(), 0))
        with model.routes.taking(model.routes.own(0)):
            assert torch.equal(model.encode_directly(images()), base.encode_image(images()))
            assert torch.equal(model.encode_text(1, all_templates=True), base.encode_text(1, all_templates=True))


@pytest.mark.parametrize("name", ADAPTERS)
def test_what_no_task_claims_gets_the_logits_of_the_frozen_model_to_the_bit(stream, name):
    model, base = learned(stream, name), plain(stream)
    far = of_task(7)
    mixed = torch.cat([far, of_task(0), of_task(1)])
    with torch.no_grad():
        _, routes = model.routes.encode(model.encode_directly, mixed)
        assert set(routes[: len(far)]) == {None}
        assert {None} < set(routes)
        own, frozen = model(mixed, 2), base(mixed, 2)
        assert torch.equal(own[: len(far)], frozen[: len(far)])
        claimed = [row for row, route in enumerate(routes) if route is not None]
        assert len(claimed) > 60
        assert not torch.allclose(own[claimed], frozen[claimed], atol=1e-3)
        assert torch.equal(model.union_logits(mixed, [0, 2])[: len(far)], base.union_logits(mixed, [0, 2])[: len(far)])


@pytest.mark.parametrize("name", ADAPTERS)
def test_answers_depend_neither_on_the_batch_nor_on_the_tasks_label(stream, name):
    model = learned(stream, name)
    x = torch.cat([of_task(0, 20), of_task(7, 20), of_task(1, 20)])
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        whole = model(x, 2)
        single = torch.cat([model(each[None], 2) for each in x])
        shuffled = model(x[order], 2)
        labels = torch.arange(len(x)) % 2 + 1  # tasks 1 and 2, with three and two classes
        mixed = model(x, labels)
        unlabelled = model(x)
    assert torch.allclose(whole, single, atol=1e-4)
    assert torch.equal(whole.argmax(1), single.argmax(1))
    assert torch.equal(whole[order].argmax(1), shuffled.argmax(1))
    assert torch.allclose(mixed[labels == 2][:, :2], whole[labels == 2], atol=1e-5)
    assert (mixed[labels == 2][:, 2] < -9e3).all()
    assert torch.allclose(mixed[labels == 1], unlabelled[1][labels == 1], atol=1e-5)


def test_each_image_meets_the_sentences_of_its_route(stream):
    model = learned(stream, "prompts")
    x = torch.cat([of_task(0, 5), of_task(1, 5), of_task(7, 5)])
    with torch.no_grad():
        answers = model(x, 2)
        for row, route in enumerate(model.routes.encode(model.encode_directly, x)[1]):
            with model.routes.taking(route):
                z, t = model.encode_directly(x[row : row + 1]), model.encode_text(2, all_templates=True)
            assert torch.allclose(answers[row], model.logits(z, t)[0], atol=1e-4)


def test_a_batch_of_several_tasks_trains_each_on_its_own_route(stream):
    model = adapted(stream, ADAPTERS["prompts"]())
    for task in range(2):
        model.before_task(task)
    for prompts in (m for m in model.modules() if isinstance(m, Prompts)):
        prompts.tasks.requires_grad_(True)
        for each in prompts.tasks.values():
            nn.init.normal_(each.V, generator=torch.Generator().manual_seed(len(each.V)))
    model.train()
    labels = torch.tensor([1, 0, 1, 0, 0])
    x = images(5)
    together = model(x, labels)
    assert model.features.image.shape[0] == 5
    for task in range(2):
        alone = model(x[labels == task], task)
        assert torch.allclose(together[labels == task][:, : alone.shape[1]], alone, atol=1e-5)
    together[labels == 0].sum().backward()
    for prompts in (m for m in model.modules() if isinstance(m, Prompts)):
        assert prompts.tasks["0"].V.grad.abs().sum() > 0
        assert not prompts.tasks["1"].V.grad.any()


@pytest.mark.parametrize("name", ADAPTERS)
def test_sentences_in_another_template_take_their_tasks_route(stream, name):
    model = learned(stream, name)
    phrases, classes = Phrases(model), torch.tensor([0, 1, 2, 4])
    with torch.no_grad():
        every = torch.cat([model.encode_text(task, all_templates=False) for task in (0, 1)])
        assert torch.allclose(phrases.features([(0, 0), (1, 0)]), every, atol=1e-6)
        assert torch.allclose(phrases.features([(0, 0), (1, 0)], classes), every[classes], atol=1e-6)
        with model.routes.taking(None):
            assert not torch.allclose(phrases.features([(1, 0)]), every[2:], atol=1e-3), "or the test tells nothing"
    assert phrases.features([(1, 0)]).requires_grad


def test_a_copy_takes_routes_of_its_own(stream):
    model = learned(stream, "experts")
    copied = copy.deepcopy(model)
    with torch.no_grad():
        before = model(of_task(0), 0)
        assert torch.equal(copied(of_task(0), 0), before)
        for mixture in (m for m in copied.modules() if isinstance(m, Mixture)):
            for expert in mixture.experts:
                expert.up.normal_()
        assert not torch.allclose(copied(of_task(0), 0), before, atol=1e-2)
        assert torch.equal(model(of_task(0), 0), before)


def test_half_precision_leaves_the_gaussians_as_they_are(stream):
    model = learned(stream, "prompts")
    before = {name: b.clone() for name, b in gaussians_of(model.clip).state_dict().items()}
    model.to(torch.bfloat16)
    after = gaussians_of(model.clip).state_dict()
    assert model.clip.visual.conv1.weight.dtype == torch.bfloat16
    assert all(torch.equal(after[name], b) and after[name].dtype == torch.float32 for name, b in before.items())


def test_what_may_not_stand_beside_routes(stream):
    with pytest.raises(MulkiError, match=r"own weights must not learn"):
        adapted(stream, Experts(), train="image")
    for others in ([Experts(), LoRA()], [Experts(), ContextPrompts()]):
        with pytest.raises(MulkiError, match="another adapter would change them"):
            ClipClassifier(small_clip(), small_tokenizer, stream.tasks, train="adapters", adapters=others)


@pytest.mark.parametrize("adapter", [Experts, ContextPrompts])
def test_a_tower_without_known_blocks_is_refused(stream, adapter):
    clip = small_clip()
    clip.transformer = nn.Identity()
    with pytest.raises(MulkiError, match="the text tower has no blocks that it can use"):
        ClipClassifier(clip, small_tokenizer, stream.tasks, train="adapters", adapters=[adapter()])


def test_somebody_elses_adapter_chooses_too(stream):
    model, base = adapted(stream, ByBrightness()), plain(stream)
    for task in range(2):
        teach(model, task, images(20))
        with torch.no_grad():
            model.clip.visual.shifts[str(task)].normal_(generator=torch.Generator().manual_seed(task))
    z = base.encode_image(images(20))
    assert torch.allclose(model.routes.adapter.seen, z, atol=1e-6)
    with torch.no_grad():
        raw, answers = base.clip.encode_image(images(20)), model(images(20), 0)
    for row in range(20):
        shift = torch.zeros(()) if z[row, 0] <= 0 else model.clip.visual.shifts["1" if z[row, 1] > 0 else "0"]
        expected = base.scale * F.normalize(raw[row] + shift, dim=0) @ base.text_features(0, "all").T
        assert torch.allclose(answers[row], expected, atol=1e-4)


@pytest.mark.parametrize("adapter", [Experts(experts=3, hidden=4), ContextPrompts(length=2)])
def test_the_bundled_model_has_a_place_in_both_towers(stream, adapter):
    loaded = load_clip("mulki-tiny")
    x = torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    base = ClipClassifier(copy.deepcopy(loaded.clip), loaded.tokenizer, stream.tasks).eval()
    model = ClipClassifier(loaded.clip, loaded.tokenizer, stream.tasks, train="adapters", adapters=[adapter])
    model.before_task(0)
    model.eval()
    with torch.no_grad(), model.routes.taking(model.routes.own(0)):
        assert torch.equal(model.encode_directly(x), base.encode_image(x))
        for name, p in model.added_weights().items():
            if name.endswith((".up", ".V")):
                p.normal_(generator=torch.Generator().manual_seed(1))
        assert not torch.allclose(model.encode_directly(x), base.encode_image(x), atol=1e-3)
        texts = model.encode_text(0, all_templates=True), base.encode_text(0, all_templates=True)
        assert not torch.allclose(*texts, atol=1e-3)
    with torch.no_grad():
        assert torch.equal(model(x, 0), base(x, 0)), "nothing has learned a route"


# Gaussians


def features(n, d=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=g)
    return F.normalize(torch.randn(n, d, generator=g) @ mixing + 8 * torch.randn(d, generator=g), dim=1)


def test_streamed_moments_are_those_of_all_features_at_once():
    x = features(50).double()
    streamed = Moments(6)
    for part in x.split(7):
        streamed.add(part)
    assert torch.allclose(streamed.mean(), x.mean(0), atol=1e-12)
    s = np.cov(x.numpy().T)
    n, d, trace = 50, 6, np.trace(s)
    rho = ((1 - 2 / d) * np.trace(s @ s) + trace**2) / ((n + 1 - 2 / d) * (np.trace(s @ s) - trace**2 / d))
    expected = (1 - min(rho, 1)) * s + min(rho, 1) * trace / d * np.eye(d)
    assert 0 < rho < 1
    assert np.allclose(streamed.covariance().numpy(), expected, atol=2e-7)


@pytest.mark.parametrize("n", [1, 3, 5, 60])
def test_the_density_is_that_of_the_normal_distribution(n):
    x = features(n)
    gaussian = Gaussian(6)
    assert gaussian.log_density(x).eq(-math.inf).all()
    gaussian.fit(iter(x.split(4)), 0.9)
    moments = Moments(6)
    moments.add(x.double())
    reference = torch.distributions.MultivariateNormal(moments.mean(), moments.covariance())
    probe = features(20, seed=5)
    expected = reference.log_prob(probe.double())
    assert torch.allclose(gaussian.log_density(probe).double(), expected, rtol=1e-4, atol=1e-3)


def test_a_task_claims_about_the_share_of_new_images_that_it_should():
    everything = features(4000)
    gaussian = Gaussian(6)
    gaussian.fit(everything[:2000].split(64), 0.9)
    share = (gaussian.log_density(everything[2000:]) >= gaussian.threshold).float().mean()
    assert abs(float(share) - 0.9) < 0.04
    rows = torch.arange(2000) % HELD_OUT == HELD_OUT - 1
    fitted = Gaussian(6)
    fitted.fit([everything[:2000][~rows]], 1.0)
    scores = fitted.log_density(everything[:2000][rows])
    assert float(gaussian.threshold) == pytest.approx(float(torch.quantile(scores, 0.1)), rel=1e-4)


def test_the_likeliest_task_that_claims_an_image():
    tasks = Gaussians()
    for task in (3, 5):
        tasks.begin(task, 6)
        tasks.of(task).fit([features(200, seed=task)], 0.99)
    tasks.begin(8, 6)  # has learned nothing yet
    density, task = tasks.most_likely(torch.cat([features(200, seed=3), features(200, seed=5)]), claiming=True)
    assert (task[:200] == 3).float().mean() > 0.9
    assert (task[200:] == 5).float().mean() > 0.9
    assert set(task.tolist()) <= {3, 5, -1}
    assert torch.equal(density == -math.inf, task == -1)
    far = -features(50, seed=3)
    assert (tasks.most_likely(far, claiming=True)[1] == -1).all()
    assert (tasks.most_likely(far, claiming=False)[1] != -1).all()


# Experts


def test_two_experts_answer_and_ties_go_to_the_first():
    chosen, gates = choose_experts(torch.zeros(3, 5))
    assert chosen.tolist() == [[0, 1]] * 3
    assert torch.equal(gates, torch.full((3, 2), 0.5))
    scores = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    chosen, gates = choose_experts(scores)
    assert torch.equal(chosen, scores.topk(2).indices)
    assert torch.allclose(gates.sum(1), torch.ones(40))
    assert (gates > 0).all()


@pytest.mark.parametrize("tokens", [2, 60])  # few: all experts compute; many: the chosen ones
def test_a_mixture_is_the_sum_over_the_two_chosen_experts(tokens):
    torch.manual_seed(0)
    mixture = Mixture(8, torch.zeros(1), 5, 3, 0.5, dropout=0.4, noise=1.0)
    mixture.begin(4)
    mixture.task = "4"
    for p in mixture.parameters():
        nn.init.normal_(p)
    x, u = torch.randn(6, tokens, 8), torch.randn(6, 8)
    mixture.eval()
    answers = mixture(x, u)
    assert torch.equal(answers, mixture(x, u)), "evaluation has no noise"
    scores = u @ mixture.routers["4"].R
    for i in range(6):
        best = scores[i].topk(2)
        expected = torch.zeros(tokens, 8)
        for gate, e in zip(best.values.softmax(0), best.indices, strict=True):
            expert = mixture.experts[e]
            hidden = (x[i] @ expert.down.T + expert.down_bias).relu()
            expected += 0.5 * gate * (hidden @ expert.up + expert.up_bias)
        assert torch.allclose(answers[i], expected, atol=1e-4)
    assert int(mixture.used.sum()) == 0
    mixture.train()
    assert not torch.equal(mixture(x, u), mixture(x, u)), "training has"
    assert torch.equal(mixture.used, 2 * F.one_hot(scores.topk(2).indices, 5).sum((0, 1)))


def test_experts_stand_beside_the_mlp_after_attention(stream):
    model = learned(stream, "experts", tasks=1)
    block = model.clip.visual.transformer.resblocks[0]
    x = torch.randn(3, 5, 32)
    with torch.no_grad(), model.routes.taking(0):
        after = x + block.attention(block.ln_1(x))
        expected = after + block.mlp(block.ln_2(after)) + block.experts(after, after[:, 0])
        assert torch.allclose(block(x), expected, atol=1e-5)
        assert not torch.allclose(block.experts(after, after[:, 0]), torch.zeros(()), atol=1e-3)


def test_the_experts_used_most_are_frozen_bit_by_bit_and_the_next_task_has_a_router_of_its_own(stream):
    model = learned(stream, "experts", tasks=1)
    mixtures = [m for m in model.modules() if isinstance(m, Mixture)]
    assert len(mixtures) == 2
    for mixture in mixtures:
        most = mixture.used.sort(descending=True, stable=True).indices[:2]
        assert set(mixture.frozen.nonzero()[:, 0].tolist()) == set(most.tolist())
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.before_task(1)
    learn(model, 1)
    changed = {name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])}
    for path, mixture in ((n, m) for n, m in model.named_modules() if isinstance(m, Mixture)):
        for e, frozen in enumerate(mixture.frozen.tolist()):
            mine = [name for name in changed if name.startswith(f"{path}.experts.{e}.")]
            assert not (frozen and mine)
        assert not [name for name in changed if name.startswith(f"{path}.routers.0.")]
        assert any(name.startswith(f"{path}.experts.") for name in changed)
    assert all(".experts" in name for name in changed), "the model's own weights stay"


# Prompts


def test_prompts_are_a_second_softmax_before_the_output_projection(stream):
    torch.manual_seed(0)
    model = learned(stream, "prompts", tasks=1)
    attention = model.clip.visual.transformer.resblocks[0].attn
    x, width, heads = torch.randn(2, 5, 32), 32, attention.num_heads
    with torch.no_grad():
        frozen = attention(x, x, x, need_weights=False)[0]
        prompts = attention.prompts.tasks["0"]
        q = x @ attention.in_proj_weight[:width].T + attention.in_proj_bias[:width]
        size = width // heads
        for level, route in ((1, 0), (2, 1), (3, 2)):
            added = torch.zeros(2, 5, width)
            for h in range(heads):
                rows = slice(h * size, (h + 1) * size)
                shares = (q[..., rows] @ prompts.K[:, rows].T / math.sqrt(size)).softmax(-1)
                added[..., rows] = level / 3 * 2.0 * shares @ prompts.V[:, rows]
            with model.routes.taking(route):
                answer = attention(x, x, x, need_weights=False)[0]
            assert torch.allclose(answer, frozen + added @ attention.out_proj.weight.T, atol=1e-5)
            assert (answer - frozen).abs().max() > 1e-3


def test_far_features_have_no_strength(stream):
    assert float(strength(torch.tensor(-math.inf), 512)) == 0
    assert float(strength(torch.tensor(512.0 * 3), 512)) == pytest.approx(1 / (1 + math.exp(-2)))
    tasks = Gaussians()
    tasks.begin(0, 6)
    tasks.of(0).fit([features(300)], 1.0)
    near, far = (tasks.most_likely(x, claiming=False)[0] for x in (features(300), -features(300)))
    assert strength(far, 6).max() < 1e-3
    assert strength(near, 6).mean() > 100 * strength(far, 6).max()


def test_only_the_first_blocks_get_prompts_and_a_task_trains_its_own(stream):
    model = adapted(stream, ContextPrompts(length=3, towers="image"))
    assert sum(isinstance(m, Prompts) for m in model.modules()) == 1
    model.before_task(0)
    model.after_task(0)
    model.before_task(1)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(trained) == {f"clip.visual.transformer.resblocks.0.attn.prompts.tasks.1.{x}" for x in "KV"}
    assert sum(p.numel() for p in trained.values()) == 2 * 3 * 32


# Runs


@pytest.fixture(autouse=True)
def one_thread(small_parts):
    torch.set_num_threads(1)


SMALL = (
    "model={name: small-clip}", "train.iterations=6", "train.schedule.warmup=1", "train.batch_size=4",
    "train.checkpoint.every=2", "train.optimizer.lr=0.02", "device=cpu", "loggers=[csv]",
)  # fmt: skip


def resolved(name, *settings, stream="{name: small}"):
    own = ("model.train=adapters", f"model.adapters={OPTIONS[name]}", f"stream={stream}")
    return resolve("recipes/mtil.yaml", Changes(strategy="finetune", settings=(*SMALL, *own, *settings)))


def mulki(*arguments, status=0):
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    assert done.exit_code == status, done.output + done.stderr
    return done


def accuracies(*arguments):
    return [task["accuracy"] for task in json.loads(mulki("evaluate", *arguments, "--json").stdout)["tasks"]]


@pytest.mark.parametrize(
    ("name", "at"), [("experts", (2, 3)), ("experts", (3, 2)), ("prompts", (2, 6)), ("prompts", (2, 3))]
)
def test_a_killed_run_ends_as_if_it_had_never_been(tmp_path, kill_at, left_alone, name, at):
    recipe = resolved(name)
    whole, other = left_alone(recipe)
    kill_at(*at)
    with pytest.raises(Killed):
        run_experiment(recipe, 0, tmp_path / "killed")
    [folder] = (tmp_path / "killed").glob("*/*/seed-0")
    resumed = resume_experiment(recipe, 0, folder)
    assert resumed.matrix == whole.matrix
    last, again = (load_file(each / "checkpoints/task-03-third/weights.safetensors") for each in (other, folder))
    assert last.keys() == again.keys()
    assert all(torch.equal(last[key], again[key]) for key in last)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_run_is_used_with_its_routes_and_open_clip_cannot_have_it(tmp_path, name):
    folder = tmp_path / "run"
    result = run_experiment(resolved(name), 0, tmp_path, folder=folder)
    assert result.matrix[-1] != result.zero_shot
    own = small_clip().state_dict()
    final = load_file(folder / "model.safetensors")
    assert all(torch.equal(final[key], own[key]) for key in own), "open_clip's names and weights stay"
    assert accuracies(folder) == result.matrix[-1]
    assert accuracies(folder, "--batch-size", 1) == result.matrix[-1]
    assert accuracies(folder / "weights" / "task-02-second") == result.matrix[1]
    done = mulki("export", folder, "--to", tmp_path / "exported", status=2)
    assert "cannot be merged into plain weights, so open_clip cannot load the model" in done.stderr
    assert not (tmp_path / "exported").exists()
    mulki("clean", "--all", folder)
    assert accuracies(folder) == result.matrix[-1]
    assert 0 < result.parameters["trained"] < result.parameters["all"]


def test_predictions_of_a_run_with_routes_are_those_of_its_classifier(tmp_path, stream):
    folder = tmp_path / "run"
    run_experiment(resolved("prompts"), 0, tmp_path, folder=folder)
    model = adapted(stream, ContextPrompts(length=3, scale=20.0, claimed=0.9))
    for task in range(3):
        model.before_task(task)
        model.after_task(task)
    model.clip.load_state_dict(load_file(folder / "model.safetensors"))
    model.eval()
    files = []
    for i, (image, _) in enumerate(stream.tasks[1].test[j] for j in range(6)):
        image.save(tmp_path / f"{i}.png")
        files.append(tmp_path / f"{i}.png")
    transform = small_model().transform(train=False)
    names = [name for task in stream.tasks for name in task.class_names]
    x = torch.stack([transform(stream.tasks[1].test[j][0]) for j in range(6)])
    with torch.no_grad(), model.using("all"):
        probabilities = model.union_logits(x, [0, 1, 2]).softmax(1)
    answers = [json.loads(line) for line in mulki("predict", folder, *files, "--json", "--top", 1).stdout.splitlines()]
    for row, answer in enumerate(answers):
        best = answer["predictions"][0]
        place = int(probabilities[row].argmax())
        assert best["class"] == names[model.union([0, 1, 2]).first[place]]
        assert best["probability"] == pytest.approx(float(probabilities[row, place]), abs=1e-3)


@pytest.mark.parametrize("name", OPTIONS)
def test_an_extended_run_ends_as_if_its_task_had_always_been_there(tmp_path, name):
    from mulki_plugins.registry.catalog import Catalog, Provenance
    from mulki_plugins.registry.discovery import catalog
    from mulki_plugins.registry.register import Register
    from tests.test_extend import chosen

    mine = Catalog()
    Register(mine, Provenance(distribution="mulki", version="")).stream("chosen", chosen, summary="colours")
    catalog().parts.update(mine.parts)
    try:
        two, three = (
            resolved(name, stream=f"{{name: chosen, tasks: [{t}]}}") for t in ("first, second", "first, second, third")
        )
        whole = run_experiment(three, 0, tmp_path, folder=tmp_path / "whole")
        run_experiment(two, 0, tmp_path, folder=tmp_path / "parent")
        extended = extend_experiment(read_result(tmp_path / "parent" / FILE), three, tmp_path / "extended")
    finally:
        for key in mine.parts:
            del catalog().parts[key]
    assert extended.matrix == whole.matrix
    assert extended.zero_shot == whole.zero_shot
    assert extended.metrics == whole.metrics


@pytest.mark.parametrize(("adapter", "learned"), [("experts", "routers.{}."), ("prompts", "tasks.{}.V")])
def test_joint_training_gives_each_task_a_route_that_has_learned(tmp_path, adapter, learned):
    recipe = resolved(adapter)
    joint = evolve(recipe, recipe=evolve(recipe.recipe, strategy=evolve(recipe.recipe.strategy, base="joint")))
    result = run_experiment(joint, 0, tmp_path, folder=tmp_path / "run")
    final = load_file(tmp_path / "run" / "model.safetensors")
    for task in range(3):
        assert math.isfinite(float(final[f"visual.gaussians.{task}.threshold"]))
        own = [value for name, value in final.items() if learned.format(task) in name]
        assert any(value.abs().max() > 0 for value in own), "weights of each task that start at 0"
    assert accuracies(tmp_path / "run") == result.matrix[-1]
