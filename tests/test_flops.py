"""The floating-point operations of a training: as counted by hand, in every kind of run, without an effect on the run."""

import json

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from mulki_plugins.cli import main
from mulki_plugins.recipe.resolve import Changes, resolve
from mulki_plugins.report.result import FILE, read_result
from mulki_plugins.stages.statistics import evaluation_batches, unobserved
from mulki_plugins.training import compilation, flops
from mulki_plugins.training.batches import TaskBatches
from mulki_plugins.training.flops import FlopCount, count_call
from mulki_plugins.training.resume import resume_experiment
from mulki_plugins.training.run import run_experiment
from tests.conftest import Killed

pytestmark = pytest.mark.flops
BATCH, STEPS = 4, 5
SMALL = (
    "stream={name: small}", "model={name: small-clip}", f"train.iterations={STEPS}", f"train.batch_size={BATCH}",
    "train.schedule.warmup=0", "train.checkpoint.every=2", "device=cpu", "loggers=[]",
)  # fmt: skip


@pytest.fixture(autouse=True)
def parts(small_parts):
    pass


def resolved(strategy, *settings):
    return resolve("mtil", Changes(strategy=strategy, settings=(*SMALL, *settings)))


def run(folder, strategy, *settings):
    return run_experiment(resolved(strategy, *settings), 0, folder, folder=folder)


def block(rows, length, width=32, mlp=128):
    """A transformer's block: its products of matrices, and those of its attention."""
    products = 2 * rows * length * (width * 3 * width + width * width + 2 * width * mlp)
    attention = 2 * (2 * rows * length * length * width)
    return products, attention


def forward_and_backward(images, sentences, attentions=3.5):
    """The small CLIP, all weights learning. Each product has two in its backward, one for each factor; flash attention has
    five for its two; the first convolution has one, for images need no gradient."""
    patches = 2 * images * 4 * (3 * 8 * 8) * 32
    products, attention = block(images, 5)
    image = 2 * patches + 3 * (products + 2 * images * 32 * 16) + attentions * attention
    products, attention = block(sentences, 12)
    text = 3 * (products + 2 * sentences * 32 * 16) + attentions * attention
    return image + text + 3 * 2 * images * sentences * 16


def test_a_step_of_finetuning_is_what_one_counts_by_hand(tmp_path):
    counted = run(tmp_path / "run", "finetune").flops
    assert counted["step"] == [forward_and_backward(BATCH, classes) for classes in (2, 3, 2)]
    assert counted["train"] == [STEPS * step for step in counted["step"]]
    assert counted["total"] == sum(counted["train"])
    assert "begun" not in counted


def test_parts_of_a_batch_count_as_the_batch_but_for_the_sentences(tmp_path):
    whole = run(tmp_path / "run", "finetune", "train.accumulate=2").flops["step"][0]
    assert whole == 2 * forward_and_backward(BATCH // 2, 2)


def test_a_frozen_tower_has_no_backward(tmp_path):
    image = run(tmp_path / "run", "finetune", "model.train=image").flops["step"][0]
    sentences_alone = forward_and_backward(0, 2)
    assert image == forward_and_backward(BATCH, 2) - sentences_alone - 2 * BATCH * 2 * 16


def test_teachers_and_passes_over_the_images_count(tmp_path):
    """In the first task one teacher encodes each batch; once it classifies all images, for the prototypes, in the
    sentences of both templates, and it encodes those of the first for the losses."""
    counted = run(tmp_path / "run", "mulki", "strategy.connecting.importance=false").flops
    step, products_and_attention = counted["step"][0], sum(block(BATCH, 5))
    teacher = 2 * BATCH * 4 * (3 * 8 * 8) * 32 + products_and_attention + 2 * BATCH * 32 * 16
    losses = step - forward_and_backward(BATCH, 2) - teacher
    assert 0 < losses < 0.05 * step
    images, classes, sentences = 16, 2, 4 + 2
    prototypes = 2 * images * 4 * (3 * 8 * 8) * 32 + sum(block(images, 5)) + 2 * images * 32 * 16
    prototypes += 2 * images * classes * 16
    texts = sum(block(sentences, 12)) + 2 * sentences * 32 * 16
    assert counted["train"][0] == STEPS * step + prototypes + texts


def test_nothing_is_trained_and_nothing_counted(tmp_path):
    assert run(tmp_path / "run", "zero-shot").flops == {"step": [], "train": [], "total": 0}


def test_of_a_compiled_run_the_towers_count_in_each_step(tmp_path, monkeypatch):
    """Without the logits and the projection of the texts; of attention the two products of each head in three passes."""
    monkeypatch.setattr(compilation.CompiledTowers, "backend", "aot_eager")
    torch.set_num_threads(1)
    few = ("train.iterations=2", "train.checkpoint.every=null", "train.compile=true")
    compiled = run(tmp_path / "compiled", "finetune", *few).flops
    rest = [3 * 2 * (BATCH * classes * 16 + classes * 32 * 16) for classes in (2, 3, 2)]
    whole = [forward_and_backward(BATCH, classes, attentions=3) for classes in (2, 3, 2)]
    assert compiled["step"] == [a - b for a, b in zip(whole, rest, strict=True)]
    assert compiled["total"] == 2 * sum(compiled["step"])


def test_counting_changes_no_digit(tmp_path, monkeypatch):
    def weights(folder):
        from safetensors.torch import load_file

        return load_file(folder / "model.safetensors")

    counted = run(tmp_path / "counted", "mulki")
    monkeypatch.setattr(flops, "EVERY", 1)
    monkeypatch.setattr(FlopCount, "__enter__", lambda self: self)
    monkeypatch.setattr(FlopCount, "__exit__", lambda self, *error: None)
    alone = run(tmp_path / "alone", "mulki")
    assert alone.flops["total"] == 0
    assert alone.matrix == counted.matrix
    a, b = weights(tmp_path / "counted"), weights(tmp_path / "alone")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_resumed_run_counts_as_one_that_was_never_stopped(tmp_path, kill_at):
    alone = run(tmp_path / "alone", "mulki")
    kill_at(2, 4)
    with pytest.raises(Killed):
        run(tmp_path / "killed", "mulki")
    resumed = resume_experiment(resolved("mulki"), 0, tmp_path / "killed")
    assert resumed.flops == alone.flops


def test_a_run_of_an_earlier_version_has_no_total(tmp_path):
    run(tmp_path / "run", "finetune")
    path = tmp_path / "run" / FILE
    data = json.loads(path.read_text())
    del data["flops"]
    path.write_text(json.dumps(data))
    assert read_result(path).flops == {}
    done = CliRunner().invoke(main, ["results", str(tmp_path / "run"), "--json"])
    assert "flops" not in json.loads(done.stdout)["summary"][0]["costs"]


@pytest.mark.parametrize("training", [True, False])
def test_attention_counts_the_same_in_training_and_in_evaluation(training):
    """Torch fuses the whole layer in evaluation mode, where its own counter sees nothing."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(32, 4, batch_first=True).train(training)
    x = torch.randn(3, 7, 32)
    with torch.no_grad(), FlopCount() as count:
        attention(x, x, x, need_weights=False)
    expected = 2 * 3 * 7 * (32 * 96 + 32 * 32) + 2 * (2 * 3 * 7 * 7 * 32)
    assert count.total == expected
    with torch.no_grad():
        assert count_call(attention, x, x, x, need_weights=False) == expected


def test_a_call_counts_only_the_gradients_that_are_needed():
    layers = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    x = torch.randn(5, 8)
    once = 2 * 5 * (8 * 16 + 16 * 4)
    with torch.no_grad():
        assert count_call(layers, x) == once
    assert count_call(layers, x) == 3 * once - 2 * 5 * 8 * 16  # x needs none
    assert count_call(layers, x.requires_grad_()) == 3 * once
    layers.requires_grad_(False)
    assert count_call(layers, x) == 2 * once
    assert all(p.grad is None and p.device.type == "cpu" for p in layers.parameters())


class Multiplied:
    """Images that are multiplied as they are read."""

    def __len__(self):
        return 5

    def __getitem__(self, index):
        return torch.ones(2, 2) @ torch.ones(2, 2), 0

    def eval(self):
        return self


@pytest.mark.parametrize(
    "batches",
    [lambda: evaluation_batches(Multiplied(), 2), lambda: TaskBatches(DataLoader(Multiplied(), batch_size=2), 4)],
    ids=["evaluation", "training"],
)
def test_the_preparation_of_images_does_not_count(batches):
    with FlopCount() as alone:
        Multiplied()[0]
    with FlopCount() as count:
        for number, batch in enumerate(batches(), 1):
            assert count.total == (number - 1) * alone.total
            torch.ones(2, 2) @ torch.ones(2, 2)  # what the caller computes counts
            assert batch[0].shape[1:] == (2, 2)
    assert count.total == number * alone.total > 0


def test_only_the_count_of_products_is_hidden_from():
    """The bench counts every operation, those of the optimizer and of the images, too."""

    class Every(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += 1
            return function(*args, **(kwargs or {}))

    with FlopCount() as products, unobserved():
        torch.ones(2, 2) @ torch.ones(2, 2)
    with Every() as every, unobserved():
        torch.ones(2, 2) @ torch.ones(2, 2)
    assert (products.total, every.count) == (0, 3)


def test_a_formula_that_fails_leaves_the_run_alone_and_its_count_unknown(tmp_path, monkeypatch):
    monkeypatch.setitem(flops._FORMULAS, torch.ops.aten.convolution, lambda *shapes, out_val: 1 / 0)
    counted = run(tmp_path / "run", "finetune")
    assert counted.status == "complete"
    assert counted.flops == {"step": [None] * 3, "train": [None] * 3, "total": None}
