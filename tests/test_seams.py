"""Methods of four kinds as a stranger writes them: each runs by name, passes the kit, survives a kill, and loads again."""

import json
import math

import pytest
import torch
from avalanche.training.plugins import SupervisedPlugin
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import nn

from mulki_plugins.adapters import Adapter
from mulki_plugins.cli import main
from mulki_plugins.errors import MulkiError
from mulki_plugins.recipe.resolve import Changes, resolve
from mulki_plugins.registry.catalog import Catalog, Provenance
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.registry.register import Register
from mulki_plugins.testing import check_adapter, check_plugin
from mulki_plugins.training.resume import resume_experiment
from mulki_plugins.training.run import run_experiment
from mulki_plugins.types import Count, Positive, checked
from tests.conftest import Killed, same

SMALL = (
    "stream={name: small}", "model.name=small-clip", "train.iterations=6", "train.schedule.warmup=1",
    "train.batch_size=4", "train.checkpoint.every=2", "train.optimizer.lr=0.02", "device=cpu", "loggers=[csv]",
)  # fmt: skip


class LowRankLinear(nn.Module):
    """The change of a linear layer: x -> scale · x Aᵀ Bᵀ."""

    def __init__(self, layer, rank, scale):
        super().__init__()
        self.scale = scale
        self.a = nn.Parameter(torch.empty(rank, layer.in_features))
        self.b = nn.Parameter(torch.zeros(layer.out_features, rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, x):
        return self.scale * x @ self.a.T @ self.b.T


def add_change(layer, inputs, output):
    return output + layer.change(inputs[0])


class HandMadeLoRA(Adapter):
    """LoRA by hand, on the layers of the MLPs.

    Args:
        rank: The rank of each change.
        scale: Factor of each change.
    """

    @checked
    def __init__(self, *, rank: Count = 2, scale: Positive = 1.0) -> None:
        self.rank, self.scale = rank, scale

    def apply(self, clip):
        for name, layer in list(clip.named_modules()):
            if isinstance(layer, nn.Linear) and name.endswith(("c_fc", "c_proj")):
                layer.change = LowRankLinear(layer, self.rank, self.scale)
                layer.register_forward_hook(add_change)

    @torch.no_grad()
    def merge(self, clip):
        for layer in clip.modules():
            if isinstance(change := getattr(layer, "change", None), LowRankLinear):
                layer.weight += change.scale * change.b @ change.a
                change.b.zero_()


class LearnableContext(Adapter):
    """Vectors in the place of the words between a sentence's first token and its class name, shared by all classes.

    Args:
        tokens: The number of vectors.
    """

    @checked
    def __init__(self, *, tokens: Count = 2) -> None:
        self.tokens = tokens

    def apply(self, clip):
        clip.token_embedding.context = nn.Parameter(torch.zeros(self.tokens, clip.token_embedding.embedding_dim))
        clip.token_embedding.register_forward_hook(add_context)


def add_context(embedding, inputs, output):
    """Add the vectors to the embeddings at places 1 to n: at 0 they are those of the template's own words."""
    n = min(len(embedding.context), output.shape[1] - 1)
    rest = output[:, n + 1 :]
    return torch.cat([output[:, :1], output[:, 1 : n + 1] + embedding.context[:n].to(output.dtype), rest], 1)


class PerTaskMatrix(Adapter):
    """A matrix for each task on the image features; those of earlier tasks are frozen."""

    def apply(self, clip):
        clip.visual.matrices = nn.ParameterDict()
        clip.visual.register_forward_hook(lambda tower, x, z: z + sum(z @ m for m in tower.matrices.values()))

    def before_task(self, clip, task):
        width = clip.text_projection.shape[1]
        clip.visual.matrices[str(task)] = nn.Parameter(torch.zeros(width, width))

    def after_task(self, clip, task):
        clip.visual.matrices[str(task)].requires_grad_(False)


class GradientProjection(SupervisedPlugin):
    """Keeps each step orthogonal to the mean gradients of earlier tasks.

    The step is projected, not the gradient: AdamW would turn a projected gradient back into the space.

    Args:
        strength: Share of the component along earlier gradients that is taken away.
    """

    per_sample = True

    @checked
    def __init__(self, *, strength: Positive = 1.0) -> None:
        super().__init__()
        self.strength = strength
        self.bases, self.sum, self.before = [], {}, {}

    def _learning(self, strategy):
        return {n: p for n, p in strategy.model.named_parameters() if p.requires_grad and p.grad is not None}

    def before_update(self, strategy, **kwargs):
        for name, p in self._learning(strategy).items():
            self.sum[name] = self.sum.get(name, 0) + p.grad
            self.before[name] = p.detach().clone()

    @torch.no_grad()
    def after_update(self, strategy, **kwargs):
        for name, p in self._learning(strategy).items():
            step = p - self.before[name]
            for basis in self.bases:
                if name in basis:
                    step = step - self.strength * (step * basis[name]).sum() * basis[name]
            p.copy_(self.before[name] + step)
        self.before = {}

    def after_training_exp(self, strategy, **kwargs):
        new = {}
        for name, total in self.sum.items():
            for basis in self.bases:  # so that the bases stay orthogonal
                total = total - (total * basis[name]).sum() * basis[name] if name in basis else total
            if total.norm() > 1e-12:
                new[name] = total / total.norm()
        self.bases, self.sum = [*self.bases, new], {}

    def state_dict(self):
        return {"bases": self.bases, "sum": self.sum}

    def load_state_dict(self, state):
        self.bases, self.sum = list(state["bases"]), dict(state["sum"])


METHODS = {
    "hand-made-lora": ("model={name: small-clip, train: adapters, adapters: [{hand-made-lora: {rank: 3}}]}",),
    "learnable-context": ("model={name: small-clip, train: adapters, adapters: [learnable-context]}",),
    "per-task-matrix": ("model={name: small-clip, train: adapters, adapters: [per-task-matrix]}",),
    "projection": ("strategy={name: projection, plugins: [projection]}",),
}


@pytest.fixture(autouse=True)
def registered(small_parts):
    torch.set_num_threads(1)
    mine = Catalog()
    register = Register(mine, Provenance(distribution="a-stranger", version="0.1"))
    register.adapter("hand-made-lora", HandMadeLoRA)
    register.adapter("learnable-context", LearnableContext)
    register.adapter("per-task-matrix", PerTaskMatrix)
    register.plugin("projection", GradientProjection)
    catalog().parts.update(mine.parts)
    yield
    for key in mine.parts:
        del catalog().parts[key]


def recipe_of(method):
    return resolve("recipes/mtil.yaml", Changes(strategy="finetune", settings=(*SMALL, *METHODS[method])))


def run_folder(path):
    [folder] = path.glob("*/*/seed-0")
    return folder


@pytest.mark.parametrize("factory", [HandMadeLoRA, LearnableContext, PerTaskMatrix])
def test_a_strangers_adapter_passes_the_kit(factory):
    check_adapter(factory)


def test_a_strangers_projection_passes_the_kit():
    check_plugin(GradientProjection, strength=0.5)


@pytest.mark.parametrize("method", METHODS)
def test_a_strangers_method_survives_kills_and_loads_again(tmp_path, kill_at, method):
    recipe = recipe_of(method)
    whole = run_experiment(recipe, 0, tmp_path / "whole")
    folder = run_folder(tmp_path / "whole")
    assert any(row != whole.zero_shot for row in whole.matrix), "it has learned"
    for at in ((2, 3), (3, 6)):
        kill_at(*at)
        with pytest.raises((Killed, MulkiError)):  # blamed on the plugin that lives in the tests, too
            run_experiment(recipe, 0, tmp_path / f"{at}")
        assert resume_experiment(recipe, 0, run_folder(tmp_path / f"{at}")).matrix == whole.matrix
        last = [
            each / "checkpoints/task-03-third/weights.safetensors" for each in (folder, run_folder(tmp_path / f"{at}"))
        ]
        assert same(*map(load_file, last))
    done = CliRunner().invoke(main, ["evaluate", str(folder), "--json"])
    assert done.exit_code == 0, done.output + done.stderr
    assert [task["accuracy"] for task in json.loads(done.stdout)["tasks"]] == whole.matrix[-1]
    if method == "projection":
        return
    stored = load_file(folder / "checkpoints/task-03-third/weights.safetensors")
    trained = whole.parameters["all"] - whole.parameters["trained"]
    assert sum(w.numel() for w in stored.values()) < trained, "the checkpoint leaves out what stayed as pre-trained"


def test_a_projected_step_is_orthogonal_to_earlier_gradients():
    from mulki_plugins.testing import train_two_tasks

    class Watch(SupervisedPlugin):
        def before_update(self, strategy, **kwargs):
            self.start = {n: p.detach().double() for n, p in strategy.model.named_parameters()}

        def after_update(self, strategy, **kwargs):
            if projection.bases:
                for name, p in strategy.model.named_parameters():
                    if name in projection.bases[0]:
                        step = p.detach().double() - self.start[name]
                        along = float((step * projection.bases[0][name]).sum().abs() / (step.norm() + 1e-12))
                        shares.append(along)

    projection, shares = GradientProjection(), []
    train_two_tasks([projection, Watch()])
    assert len(shares) > 20
    assert max(shares) < 1e-3
