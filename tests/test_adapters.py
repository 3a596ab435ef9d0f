"""Adapters: LoRA by hand, weights that grow for each task, and how runs apply, resume and merge them."""

import copy

import pytest
import torch
from avalanche.training.plugins import SupervisedPlugin
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrize

from mulki_plugins.adapters import Adapter, LoRA, NullSpace
from mulki_plugins.adapters.null_space import near_the_axes
from mulki_plugins.adapters.projections import projections
from mulki_plugins.baselines import WeightConstraint
from mulki_plugins.cli import main
from mulki_plugins.errors import Mistakes, MulkiError
from mulki_plugins.models import ClipClassifier
from mulki_plugins.recipe.resolve import Changes, resolve
from mulki_plugins.registry.catalog import Catalog, Provenance
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.registry.register import Register
from mulki_plugins.stages import Connecting
from mulki_plugins.training.resume import resume_experiment
from mulki_plugins.training.run import run_experiment
from tests.conftest import Killed, naive, same, small_clip, small_tokenizer, weights

SMALL = (
    "stream={name: small}", "model={name: small-clip}", "train.iterations=6", "train.schedule.warmup=1",
    "train.batch_size=4", "train.checkpoint.every=2", "train.optimizer.lr=0.01", "device=cpu", "loggers=[csv]",
)  # fmt: skip


class Growing(Adapter):
    """A vector for each task, added to the image features; frozen when its task ends."""

    def apply(self, clip):
        clip.visual.shifts = nn.ParameterDict()
        plain = clip.visual.forward
        clip.visual.forward = lambda x: plain(x) + sum(clip.visual.shifts.values())

    def before_task(self, clip, task):
        clip.visual.shifts[str(task)] = nn.Parameter(torch.zeros(clip.visual.output_dim))

    def after_task(self, clip, task):
        clip.visual.shifts[str(task)].requires_grad_(False)


class Renaming(Adapter):
    """Replaces a layer by a wrapper, so that its weight has another name."""

    def apply(self, clip):
        block = clip.visual.transformer.resblocks[0]
        block.mlp.c_fc = nn.Sequential(block.mlp.c_fc)


@pytest.fixture(autouse=True)
def registered(small_parts):
    torch.set_num_threads(1)
    mine = Catalog()
    register = Register(mine, Provenance(distribution="somebodys-adapters", version="0.3"))
    register.adapter("growing", Growing)
    register.adapter("renaming", Renaming)
    catalog().parts.update(mine.parts)
    yield
    for key in mine.parts:
        del catalog().parts[key]


def resolved(*settings, strategy="finetune", train="adapters", adapters="[{lora: {rank: 3}}]"):
    own = (f"model.train={train}", f"model.adapters={adapters}")
    return resolve("recipes/mtil.yaml", Changes(strategy=strategy, settings=(*SMALL, *own, *settings)))


def adapted(stream, *adapters, train="adapters", seed=0):
    return ClipClassifier(small_clip(seed), small_tokenizer, stream.tasks, train=train, adapters=adapters)


def images(n=5):
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def learn(model, steps=4):
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.05)
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(images(), 0), torch.tensor([0, 1, 0, 1, 1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("targets", [None, ["q"], ["k", "v"], ["o"], ["mlp"]])
def test_a_fresh_lora_changes_nothing_and_a_trained_one_is_merged_exactly(stream, targets):
    plain = ClipClassifier(small_clip(), small_tokenizer, stream.tasks).eval()
    model = adapted(stream, LoRA(rank=3, alpha=6.0, targets=targets)).eval()
    with torch.no_grad():
        assert torch.equal(plain(images(), 0), model(images(), 0))
    learn(model)
    assert not torch.allclose(plain(images(), 0), model(images(), 0), atol=1e-3)
    answers = model(images(), 0)
    plain.clip.load_state_dict(model.merged_weights())
    assert torch.allclose(plain(images(), 0), answers, atol=1e-5)
    assert torch.equal(model(images(), 0), answers), "the model itself stays as it was"


def test_the_change_is_the_product_of_its_factors_and_of_low_rank(stream):
    plain, model = small_clip(), learn(adapted(stream, LoRA(rank=2, alpha=1.0, targets=["q", "v"], towers="image")))
    attention = model.clip.visual.transformer.resblocks[0].attn
    low_rank = attention.parametrizations.in_proj_weight[0]
    before, after = plain.visual.transformer.resblocks[0].attn.in_proj_weight, attention.in_proj_weight
    width = attention.embed_dim
    for i, block in enumerate((0, None, 1)):
        rows = slice(i * width, (i + 1) * width)
        expected = 0.5 * low_rank.B[block] @ low_rank.A[block] if block is not None else torch.zeros(width, width)
        assert torch.allclose(after[rows] - before[rows], expected, atol=1e-6)
        assert torch.linalg.matrix_rank((after - before)[rows], tol=1e-5) <= 2
    for name, p in plain.named_parameters():
        kept = dict(model.clip.named_parameters())
        parametrized = name.replace("in_proj_weight", "parametrizations.in_proj_weight.original")
        assert torch.equal(p, kept[name] if name in kept else kept[parametrized]), f"{name} is frozen"
    assert not parametrize.is_parametrized(model.clip.transformer.resblocks[0].attn), "the text tower is left alone"
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 4 * 2 * width


def test_merging_at_a_tasks_end_keeps_the_answers_and_starts_anew(stream):
    model = adapted(stream, LoRA(rank=3, merge_each_task=True))
    learn(model)
    before = model(images(), 0)
    first = dict(model.added_weights())
    model.after_task(0)
    assert torch.allclose(model(images(), 0), before, atol=1e-5)
    assert all(p.abs().max().item() == 0 for name, p in model.added_weights().items() if name.endswith(".B"))
    assert first.keys() == model.added_weights().keys()
    merged = {n: p.clone() for n, p in model.named_parameters() if n.endswith("original")}
    model.after_task(1)
    for name, p in model.named_parameters():
        assert name not in merged or torch.equal(p, merged[name]), "merging a second time changes nothing"


@pytest.mark.parametrize(
    ("train", "learning"), [("adapters", "added"), ("none", "nothing"), ("image", "both"), ("all", "both")]
)
def test_what_learns(stream, train, learning):
    model = adapted(stream, LoRA(rank=2), train=train)
    learns = {name for name, p in model.clip.named_parameters() if p.requires_grad}
    added = set(model.added_weights())
    assert added
    assert {"added": learns == added, "nothing": not learns, "both": added < learns}[learning]
    assert not model.clip.logit_scale.requires_grad


def test_a_copy_has_adapters_of_its_own(stream):
    model = adapted(stream, Growing())
    copied = copy.deepcopy(model)
    copied.before_task(0)
    assert "shifts.0" in str(list(dict(copied.clip.visual.named_parameters())))
    assert not model.added_weights()


LAYERS = {
    "visual.transformer.resblocks.0.attn.out_proj": "o", "transformer.resblocks.0.mlp.c_fc": "mlp",
    "transformer.resblocks.0.mlp.c_proj": "mlp", "visual.attnpool.q_proj": "q", "visual.attnpool.c_proj": "o",
    "visual.trunk.patch_embed.proj": None, "visual.trunk.blocks.0.attn.qkv": "qkv", "visual.trunk.blocks.0.attn.proj": "o",
    "visual.trunk.blocks.0.mlp.fc2": "mlp", "visual.head.proj": None, "text.proj": None, "text.text_projection": None,
}  # fmt: skip
"""Linear layers in the towers of open_clip, timm and transformers, and what they are."""


def test_the_last_projection_of_a_tower_is_not_one_of_attention():
    clip = nn.Module()
    for path in LAYERS:
        module, (*above, last) = clip, path.split(".")
        for name in above:
            if not hasattr(module, name):
                module.add_module(name, nn.Module())
            module = getattr(module, name)
        module.add_module(last, nn.Linear(3, 3))
    names = {module: path for path, module in clip.named_modules()}
    for target in ("q", "k", "o", "mlp"):
        found = {names[each.module] for each in projections(clip, "all", {target})}
        assert found == {path for path, kind in LAYERS.items() if target in (kind or "")}, target


def test_a_model_without_a_place_for_it(stream):
    with pytest.raises(MulkiError, match="no layers"):
        ClipClassifier(
            nn.ParameterDict({"logit_scale": torch.zeros(())}), small_tokenizer, stream.tasks, adapters=[LoRA()]
        )


def test_an_adapter_that_renames_the_models_weights_is_refused(tmp_path):
    with pytest.raises(MulkiError, match=r"Renaming renames the model.s own weights.*c_fc"):
        run_experiment(resolved(adapters="[renaming]"), 0, tmp_path)


@pytest.mark.parametrize(
    ("adapters", "train", "error"),
    [
        ("[]", "adapters", r"\$\.model\.train: the model has no adapters; add some"),
        ("[{lora: {rank: 0}}]", "adapters", r"\$\.model\.adapters\[0\]\.lora\.rank: expected .*at least 1"),
        ("[{lora: {rnk: 4}}]", "adapters", r"\.rnk: unknown option \(did you mean 'rank'\?\)"),
        ("[lora, 3]", "adapters", r"\$\.model\.adapters\[1\]: expected an adapter"),
        ("[lorra]", "all", r"no adapter is named 'lorra' \(did you mean 'lora'\?\)"),
        ("lora", "all", r"\$\.model\.adapters: expected a list of adapters"),
        ("[lora]", "adapter", r"\$\.model\.train: expected .*'adapters' or 'none', got 'adapter'"),
    ],
)
def test_mistakes_in_a_recipe(adapters, train, error):
    with pytest.raises(Mistakes, match=error):
        resolved(adapters=adapters, train=train)


def test_recipes_without_adapters_are_what_they_were():
    recipe = resolve("recipes/mtil.yaml").recipe
    assert "adapters" not in recipe.model.options
    listed = CliRunner().invoke(main, ["list", "adapters"]).stdout
    assert "lora" in listed
    assert "somebodys-adapters" in listed


def test_a_step_in_the_null_space_leaves_the_leading_directions_alone(stream):
    plain, model = small_clip(), adapted(stream, NullSpace(rank=6))
    for repeat in range(2):
        before = {name: w.clone() for name, w in model.merged_weights().items() if w.ndim == 2}
        learn(model)
        model.after_task(repeat)
        after = model.merged_weights()
        for path in ("visual.transformer.resblocks.0.mlp.c_fc.weight", "transformer.resblocks.0.attn.in_proj_weight"):
            blocks = 3 if "in_proj" in path else 1
            for old, new in zip(before[path].chunk(blocks), after[path].chunk(blocks), strict=True):
                u, _, vh = torch.linalg.svd(old.double(), full_matrices=False)
                moved = new.double() - old.double()
                assert moved.norm() > 1e-3
                assert (moved @ vh[:-6].T).norm() <= 1e-6 * moved.norm() + 1e-6
                assert (u[:, :-6].T @ moved).norm() <= 1e-6 * moved.norm() + 1e-6
    assert plain.state_dict().keys() == model.merged_weights().keys()


def test_a_null_space_is_computed_anew_only_for_another_weight(stream, monkeypatch):
    model, svd, seen = adapted(stream, NullSpace(rank=6)), torch.linalg.svd, []
    before = {name: w.clone() for name, w in model.state_dict().items()}
    monkeypatch.setattr(torch.linalg, "svd", lambda *args, **kwargs: (seen.append(1), svd(*args, **kwargs))[1])
    model.before_task(0)
    model.after_task(0)  # as a resumed run passes a task again
    assert not seen
    assert same(model.state_dict(), before)
    learn(model)
    model.after_task(1)
    assert seen


def test_the_basis_of_a_null_space_depends_on_the_space_alone():
    torch.manual_seed(0)
    space = torch.linalg.qr(torch.randn(2, 9, 4, dtype=torch.double)).Q
    turned = space @ torch.linalg.qr(torch.randn(2, 4, 4, dtype=torch.double)).Q
    found = near_the_axes(space)
    torch.testing.assert_close(near_the_axes(turned), found)
    torch.testing.assert_close(found @ found.mT, space @ space.mT)
    torch.testing.assert_close(found.mT @ found, torch.eye(4, dtype=torch.double).expand(2, 4, 4))

    def near(basis):
        return basis[..., :4, :].diagonal(dim1=-2, dim2=-1).sum()

    assert near(found) > max(near(space), near(turned), near(-found.flip(-1)))
    axes = torch.eye(9, dtype=torch.double)[:, :4]
    torch.testing.assert_close(near_the_axes(axes.flip(-1)), axes)


CASES = {
    "null space": "[{null-space: {rank: 4}}]",
    "lora": "[{lora: {rank: 3}}]",
    "merged": "[{lora: {rank: 3, merge_each_task: true}}]",
    "growing": "[growing]",
    "both": "[growing, {lora: {rank: 2, towers: text}}]",
}


@pytest.mark.parametrize("strategy", ["finetune", "mulki-plus"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("at", [(2, 3), (2, 6), (3, 2)])
def test_a_killed_run_ends_as_if_it_had_never_been(tmp_path, kill_at, left_alone, case, strategy, at):
    if strategy == "mulki-plus" and (at != (2, 3) or case == "merged"):
        pytest.skip("one moment and the hardest cases suffice")
    without = ("strategy.connecting.importance=false",) if strategy == "mulki-plus" and case != "growing" else ()
    recipe = resolved(*without, strategy=strategy, adapters=CASES[case])
    whole, other = left_alone(recipe)
    kill_at(*at)
    with pytest.raises(Killed):
        run_experiment(recipe, 0, tmp_path / "killed")
    [folder] = (tmp_path / "killed").glob("*/*/seed-0")
    resumed = resume_experiment(recipe, 0, folder)
    assert resumed.matrix == whole.matrix
    last, again = (load_file(each / "checkpoints/task-03-third/weights.safetensors") for each in (other, folder))
    assert last.keys() == again.keys()
    assert all(torch.equal(last[name], again[name]) for name in last)


@pytest.mark.parametrize("every", [1, None])
def test_connecting_averages_the_weights_in_use_and_not_their_factors(stream, benchmark, every):
    seen = []

    class Spy(SupervisedPlugin):
        def after_training_iteration(self, strategy, **kwargs):
            seen.append({n: w.detach().clone() for n, w in strategy.model.merged_weights().items()})

    model = adapted(stream, LoRA(rank=2))
    before = model.merged_weights()
    naive(model, [Connecting(every=every, inter=0.25), Spy()], lr=0.5).train(benchmark.train_stream[0])
    after = model.merged_weights()
    steps = seen if every else seen[-1:]
    assert len(seen) > 2
    for name, value in after.items():
        mean = torch.stack([step[name].double() for step in steps]).mean(0)
        assert torch.allclose(value.double(), 0.75 * mean + 0.25 * before[name].double(), atol=1e-5), name
    assert not same(before, after)


def test_l2_is_the_distance_of_the_weights_in_use(stream, benchmark):
    class Spy(WeightConstraint):
        def after_forward(self, strategy, **kwargs):
            loss = strategy.loss
            super().after_forward(strategy, **kwargs)
            now = strategy.model.merged_weights()
            expected = sum(float((now[name] - start[name]).square().sum()) for name in start)
            assert float(strategy.loss - loss) == pytest.approx(2.0 * expected, rel=1e-3, abs=1e-6)
            distances.append(expected)

    model, distances = adapted(stream, LoRA(rank=2)), []
    start = model.merged_weights()
    naive(model, [Spy(weight=2.0)], lr=0.5).train(benchmark.train_stream[0])
    assert distances[-1] > 1e-4


def test_importance_of_computed_weights_is_refused(tmp_path):
    with pytest.raises(MulkiError, match="importance is defined for the model"):
        run_experiment(resolved(strategy="mulki-plus"), 0, tmp_path)


def test_a_run_trains_the_adapters_alone(tmp_path, benchmark, stream):
    model = adapted(stream, LoRA(rank=2))
    before = weights(model)
    naive(model, [], lr=0.1).train(benchmark.train_stream[0])
    changed = {n for n, w in weights(model).items() if not torch.equal(w, before[n])}
    assert changed
    assert changed <= {f"clip.{name}" for name in model.added_weights()}
    assert same(
        {n: w for n, w in weights(model).items() if n not in changed},
        {n: w for n, w in before.items() if n not in changed},
    )


def test_a_notice_says_that_the_whole_model_learns_beside_its_adapters():
    def notices(*settings, strategy="finetune"):
        changed = resolve("mtil", Changes(strategy=strategy, settings=("model.adapters=[lora]", *settings)))
        return [notice for notice in changed.notices if "$.model.train" in notice]

    [notice] = notices()
    assert "`--set model.train=adapters` trains the adapters alone" in notice
    assert not notices("model.train=all")
    assert not notices("model.train=adapters")
    assert not notices(strategy="lora")
    assert not notices(strategy="zero-shot")
