"""The final weights of runs, with and without adapters: one plain file that everything else reads."""

import json

import pytest
import torch
from avalanche.training.plugins import SupervisedPlugin
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import nn

from mulki_plugins.cli import main
from mulki_plugins.models.weights import weight_file
from mulki_plugins.recipe.resolve import Changes, resolve
from mulki_plugins.registry.catalog import Catalog, Provenance
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.registry.register import Register
from mulki_plugins.training.run import run_experiment
from tests.conftest import same, small_clip, small_world

FEW = ("train.iterations=4", "train.batch_size=4", "train.schedule.warmup=0", "loggers=[]")
LARGE_STEPS = "train.optimizer={name: adamw, lr: 0.02}"
ADAPTERS = {
    "lora": "[{lora: {rank: 2}}]",
    "merged": "[{lora: {rank: 2, merge_each_task: true}}]",
    "null-space": "[{null-space: {rank: 4}}]",
    "two": "[{lora: {rank: 2, towers: text}}, {null-space: {rank: 3, towers: image}}]",
}


def trained(folder, adapters, *settings, model="{name: small-clip}", stream="small", strategy="finetune"):
    own = ("model.train=adapters", f"model.adapters={adapters}") if adapters else ()
    chosen = (f"stream={stream}", f"model={model}", *own, *FEW, LARGE_STEPS, *settings)
    return run_experiment(resolve("mtil", Changes(strategy=strategy, settings=chosen)), 0, folder, folder=folder)


def mulki(*arguments, status=0):
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    assert done.exit_code == status, done.output + done.stderr
    return done


def accuracies(*arguments):
    return [task["accuracy"] for task in json.loads(mulki("evaluate", *arguments, "--json").stdout)["tasks"]]


@pytest.fixture(scope="module", params=ADAPTERS)
def run(request, tmp_path_factory):
    """A run with adapters, and what result.json holds."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    with small_world():
        result = trained(folder, ADAPTERS[request.param])
        yield folder, result


def test_adapters_are_merged_under_the_models_own_names(run):
    folder, _ = run
    weights = load_file(folder / "model.safetensors")
    assert weights.keys() == small_clip().state_dict().keys()
    small_clip().load_state_dict(weights)
    kept = load_file(folder / "checkpoints" / "task-03-third" / "weights.safetensors")
    assert kept.keys() - weights.keys(), "the checkpoint keeps the adapters by themselves"


def test_the_final_weights_and_every_checkpoint_repeat_their_row(run):
    folder, result = run
    assert not same(load_file(folder / "model.safetensors"), small_clip().state_dict()), "it has learned"
    assert accuracies(folder) == result.matrix[-1]
    for tasks, name in enumerate(("first", "second", "third"), 1):
        assert accuracies(folder / "weights" / f"task-{tasks:02d}-{name}") == result.matrix[tasks - 1]
    assert accuracies(folder / "checkpoints" / "task-03-third") == result.matrix[-1]


def test_cleaning_keeps_the_merged_weights(run):
    folder, result = run
    before = (folder / "model.safetensors").read_bytes()
    mulki("clean", folder)
    assert (folder / "model.safetensors").read_bytes() == before
    (folder / "model.safetensors").unlink()
    done = mulki("clean", folder, "--all", status=2)
    assert "weights and adapters apart" in done.stderr
    assert (folder / "checkpoints" / "task-03-third").is_dir()
    (folder / "model.safetensors").write_bytes(before)
    mulki("clean", folder, "--all")
    assert accuracies(folder) == result.matrix[-1]


class Adds(SupervisedPlugin):
    """Adds a weight beside the CLIP."""

    def before_training(self, strategy, **kwargs):
        strategy.model.beside = nn.Parameter(torch.ones(2))


def test_a_model_to_which_a_plugin_has_added_weights_is_not_used_without_them(tmp_path, monkeypatch):
    mine, run = Catalog(), tmp_path / "run"
    Register(mine, Provenance(distribution="mulki", version="")).plugin(
        "adds", Adds, summary="adds", adds_parameters=True
    )
    with small_world():
        for key, part in mine.parts.items():
            monkeypatch.setitem(catalog().parts, key, part)
        settings = ("stream=small", "model={name: small-clip}", *FEW)
        run_experiment(
            resolve("mtil", Changes(strategy="finetune", settings=settings, with_plugins=("adds",))), 0, run, folder=run
        )
        end = run / "checkpoints" / "task-03-third"
        for where in (end, run):
            said = mulki("evaluate", where, status=2).stderr
            assert f"{where}: a plugin has added weights to the model ('beside')" in said
        (run / "model.safetensors").unlink()
        mulki("clean", run, "--all")
        assert not end.exists()
        assert "('beside')" in mulki("evaluate", run, status=2).stderr


@pytest.mark.parametrize("adapters", [None, ADAPTERS["lora"]])
def test_a_run_starts_from_another_runs_final_weights(tmp_path, adapters):
    one, stream = tmp_path / "one", "{name: mtil-mini, tasks: [scans], evaluate_on: validation}"
    first = trained(one, adapters, "train.iterations=2", stream=stream, model="{name: mulki-tiny}")
    mulki("clean", "--all", one)
    assert weight_file(str(one)).path == one / "model.safetensors"
    model = f"{{name: mulki-tiny, pretrained: {one}}}"
    again = trained(tmp_path / "two", None, stream=stream, model=model, strategy="zero-shot")
    assert again.zero_shot == first.matrix[-1]
