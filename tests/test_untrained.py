"""Methods that train nothing: plugins and heads still see every task, and the run is one like any other."""

import json

import pytest
import torch
from avalanche.training.plugins import SupervisedPlugin
from safetensors.torch import load_file
from torch import nn

from mulki_plugins.errors import MulkiError
from mulki_plugins.recipe.resolve import Changes, resolve
from mulki_plugins.registry.catalog import Catalog, Provenance
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.registry.register import Register
from mulki_plugins.stages.statistics import TaskImages
from mulki_plugins.training.checkpointing import Checkpointing
from mulki_plugins.training.resume import resume_experiment
from mulki_plugins.training.run import run_experiment
from tests.conftest import Killed, small_clip

SMALL = (
    "stream={name: small}", "model={name: small-clip}", "train.iterations=3", "train.schedule.warmup=0",
    "train.batch_size=4", "train.optimizer.lr=0.01", "device=cpu", "loggers=[csv]",
)  # fmt: skip
CALLS = []


class Counting(SupervisedPlugin):
    """Counts the images of each class of each task."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def before_training_exp(self, strategy, **kwargs):
        CALLS.append(("begins", strategy.experience.task_name, len(strategy.adapted_dataset)))

    def after_training_exp(self, strategy, **kwargs):
        task = strategy.experience.task_label
        moments = TaskImages.of(strategy, strategy.experience.dataset, task, self).moments()
        self.counts[str(task)] = moments.counts
        CALLS.append(("ends", strategy.experience.task_name, moments.counts.tolist()))

    def state_dict(self):
        return {"counts": self.counts}

    def load_state_dict(self, kept):
        self.counts = dict(kept["counts"])


class Watching(SupervisedPlugin):
    """Sees each batch."""

    per_sample = True

    def after_training_iteration(self, strategy, **kwargs):
        CALLS.append((len(strategy.mb_x), strategy.mb_output.requires_grad, float(strategy.loss) > 0))


class Biased(SupervisedPlugin):
    """Adds a bias to the image features."""

    def before_training(self, strategy, **kwargs):
        visual = strategy.model.clip.visual
        if not hasattr(visual, "bias"):
            visual.bias = nn.Parameter(torch.zeros(visual.output_dim))
            visual.register_forward_hook(lambda module, inputs, z: z + module.bias)

    def load_state_dict(self, kept):
        pass


@pytest.fixture(autouse=True)
def registered(small_parts):
    torch.set_num_threads(1)
    mine = Catalog()
    register = Register(mine, Provenance(distribution="somebodys-plugins", version="0.3"))
    for kind in (Counting, Watching, Biased):
        register.plugin(kind.__name__.lower(), kind)
    catalog().parts.update(mine.parts)
    CALLS.clear()
    yield
    for key in mine.parts:
        del catalog().parts[key]


def resolved(*settings, strategy="finetune", plugins=()):
    return resolve("recipes/mtil.yaml", Changes(strategy=strategy, with_plugins=plugins, settings=(*SMALL, *settings)))


def run_of(out):
    [folder] = out.glob("*/*/seed-0")
    return folder


def unchanged(folder):
    plain, kept = small_clip().state_dict(), load_file(folder / "model.safetensors")
    return plain.keys() == kept.keys() and all(torch.equal(plain[name], kept[name]) for name in plain)


WAYS = {
    "base none": (("strategy.base=none",), "finetune"), "zero-shot": ((), "zero-shot"),
    "train none": (("model.train=none",), "finetune"),
    "cumulative": (("model.train=none", "strategy.base=cumulative"), "finetune"),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_plugins_see_every_task_and_nothing_is_trained(tmp_path, way):
    settings, strategy = WAYS[way]
    result = run_experiment(resolved(*settings, strategy=strategy, plugins=("counting",)), 0, tmp_path)
    sizes = {"first": 16, "second": 24 + 16 * (way == "cumulative"), "third": 16 + 40 * (way == "cumulative")}
    begun = [call[1:] for call in CALLS if call[0] == "begins"]
    assert begun == list(sizes.items())
    assert [call[2] for call in CALLS if call[0] == "ends"] == [[8, 8], [8, 8, 8], [8, 8]]
    assert result.matrix == [result.zero_shot] * 3
    folder = run_of(tmp_path)
    written = json.loads((folder / "result.json").read_text())
    assert written["status"] == "complete"
    assert written["parameters"]["trained"] == 0
    assert len(written["seconds"]["train"]) == 3
    assert unchanged(folder)
    assert len(list((folder / "checkpoints").iterdir())) == 2
    assert "no steps" in (folder / "log.txt").read_text()


def test_zero_shot_alone_still_does_nothing(tmp_path):
    recipe = resolved(strategy="zero-shot").recipe
    assert recipe.strategy.base == "none"
    result = run_experiment(resolved(strategy="zero-shot"), 0, tmp_path)
    assert result.matrix == [result.zero_shot] * 3
    assert "train" not in result.seconds
    assert not (run_of(tmp_path) / "model.safetensors").exists()


@pytest.mark.parametrize(
    "settings", [(), ("train.accumulate=2",), ("train.precision=bf16",), ("train.gradient_clip=1",)]
)
def test_a_plugin_that_watches_steps_gets_them(tmp_path, settings):
    result = run_experiment(resolved("model.train=none", *settings, plugins=("watching",)), 0, tmp_path)
    assert CALLS == [(4, False, True)] * 9
    assert result.matrix == [result.zero_shot] * 3
    assert unchanged(run_of(tmp_path))


@pytest.mark.parametrize("strategy", ["mulki", "icarl", "lwf", "l2", "weight-ensemble", "lora"])
def test_strategies_run_with_nothing_that_learns(tmp_path, strategy):
    result = run_experiment(resolved("model.train=none", strategy=strategy), 0, tmp_path)
    assert result.matrix == [result.zero_shot] * 3


@pytest.mark.parametrize("adapter", ["experts", "prompts"])
def test_nor_does_what_an_adapter_grows_for_a_task(tmp_path, adapter):
    result = run_experiment(resolved("model.train=none", f"model.adapters=[{adapter}]"), 0, tmp_path)
    assert result.parameters["trained"] == 0


def test_what_a_plugin_adds_learns_all_the_same(tmp_path):
    result = run_experiment(resolved("model.train=none", "train.optimizer.lr=1", plugins=("biased",)), 0, tmp_path)
    assert result.parameters["trained"] == 16
    bias = load_file(run_of(tmp_path) / "model.safetensors")["visual.bias"]
    assert bias.abs().max() > 0.1


@pytest.mark.parametrize("strategy", ["finetune", "mulki", "lora"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_rate_of_0_makes_every_step_and_moves_nothing(tmp_path, strategy, optimizer):
    own = ("train.optimizer.lr=0", f"train.optimizer.name={optimizer}", "train.optimizer.weight_decay=0.1")
    result = run_experiment(resolved(*own, strategy=strategy, plugins=("watching",)), 0, tmp_path)
    assert [call[1:] for call in CALLS] == [(True, True)] * 9
    assert result.matrix == [result.zero_shot] * 3
    assert unchanged(run_of(tmp_path))


def test_a_rate_of_0_for_one_task(tmp_path):
    run_experiment(resolved("train.per_task={second: {lr: 0}}", "train.checkpoint.keep=3"), 0, tmp_path)
    first, second, third = (
        load_file(path / "weights.safetensors") for path in sorted((run_of(tmp_path) / "checkpoints").iterdir())
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(third[name], second[name]) for name in first)


@pytest.mark.parametrize("plugin", ["counting", "watching"])
def test_a_killed_run_ends_as_if_it_had_never_been(tmp_path, monkeypatch, plugin):
    recipe = resolved("model.train=none", plugins=(plugin,))
    whole = run_experiment(recipe, 0, tmp_path / "whole")
    learned, calls = Checkpointing.learned, len(CALLS)

    def killed(self, tasks, name):
        if tasks == 2:
            monkeypatch.setattr(Checkpointing, "learned", learned)
            raise Killed
        learned(self, tasks, name)

    monkeypatch.setattr(Checkpointing, "learned", killed)
    with pytest.raises((Killed, MulkiError)):  # blamed on the plugin, which stands in this file, too
        run_experiment(recipe, 0, tmp_path / "killed")
    CALLS.clear()
    folder = run_of(tmp_path / "killed")
    assert resume_experiment(recipe, 0, folder).matrix == whole.matrix
    assert len(CALLS) == calls * 2 // 3, "the tasks that were not finished, and no others"
    one, other = (
        torch.load(each / "checkpoints/task-03-third/state.pt", weights_only=True)["plugins"]
        for each in (run_of(tmp_path / "whole"), folder)
    )
    assert str(one) == str(other)


def test_the_base_none_with_plugins_is_written_out():
    recipe = resolved(strategy="zero-shot", plugins=("counting",)).recipe
    assert (recipe.strategy.base, recipe.model.options["train"]) == ("naive", "none")
    with_head = resolved("model.head=rail", "model.train=image", strategy="zero-shot").recipe
    assert (with_head.strategy.base, with_head.model.options["train"]) == ("naive", "none")
