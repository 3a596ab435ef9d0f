"""Checkpoints without what is still as pre-trained: how small they are, and that nothing is lost."""

import json

import pytest
import torch
from avalanche.training.plugins import SupervisedPlugin
from safetensors.torch import load_file

from mulki_plugins.deploy.model import load_trained
from mulki_plugins.deploy.source import find_source
from mulki_plugins.errors import MulkiError
from mulki_plugins.models import ClipClassifier
from mulki_plugins.models.tensors import read_state
from mulki_plugins.models.weights import weight_file
from mulki_plugins.recipe.resolve import Changes, resolve
from mulki_plugins.registry.catalog import Catalog, Provenance
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.registry.register import Register
from mulki_plugins.testing.small import small_clip, small_model
from mulki_plugins.training.checkpoint import checkpoints, read_checkpoint
from mulki_plugins.training.final_weights import secure_final_weights
from mulki_plugins.training.pretrained import Pretrained, completed, has_references, resolved
from mulki_plugins.training.resume import resume_experiment
from mulki_plugins.training.run import run_experiment
from tests.conftest import Killed, same, small_stream, small_tokenizer

SMALL = (
    "stream={name: small}", "model={name: small-clip}", "train.iterations=6", "train.schedule.warmup=1",
    "train.batch_size=4", "train.checkpoint.every=2", "train.optimizer.lr=0.01", "device=cpu", "loggers=[csv]",
)  # fmt: skip
LORA = ("model.train=adapters", "model.adapters=[{lora: {rank: 2}}]")


class KeepsTheModelBefore(SupervisedPlugin):
    """Keeps the whole model before each task, as a teacher of its own."""

    def __init__(self):
        super().__init__()
        self.before = {}

    def before_training_exp(self, strategy, **kwargs):
        self.before = {name: w.detach().clone() for name, w in strategy.model.clip.state_dict().items()}

    def state_dict(self):
        return {"teacher": self.before, "tasks": [len(self.before)]}

    def load_state_dict(self, state):
        self.before = dict(state["teacher"])


@pytest.fixture(autouse=True)
def registered(small_parts):
    torch.set_num_threads(1)
    mine = Catalog()
    register = Register(mine, Provenance(distribution="somebody", version="1"))
    register.plugin("keeps-the-model", KeepsTheModelBefore)
    catalog().parts.update(mine.parts)
    yield
    for key in mine.parts:
        del catalog().parts[key]


def resolve_small(*settings, strategy="finetune"):
    return resolve("recipes/mtil.yaml", Changes(strategy=strategy, settings=(*SMALL, *settings)))


def run_folder(path):
    [folder] = path.glob("*/*/seed-0")
    return folder


def last(folder):
    return folder / "checkpoints/task-03-third"


def killed_and_resumed(recipe, tmp_path, kill_at, at):
    kill_at(*at)
    with pytest.raises((Killed, MulkiError)):
        run_experiment(recipe, 0, tmp_path)
    return resume_experiment(recipe, 0, run_folder(tmp_path))


def test_a_checkpoint_of_lora_holds_what_it_trains_and_nothing_else(tmp_path):
    result = run_experiment(resolve_small(*LORA), 0, tmp_path)
    folder = run_folder(tmp_path)
    checkpoint = read_checkpoint(last(folder))
    stored = checkpoint.weights()
    assert stored
    assert all(name.endswith((".A", ".B")) for name in stored)
    assert sum(w.numel() for w in stored.values()) == result.parameters["trained"]
    kept = load_file(folder / "weights/task-02-second/weights.safetensors")
    assert kept.keys() == stored.keys()
    whole = load_file(folder / "model.safetensors")
    assert whole.keys() == small_clip().state_dict().keys(), "the model itself is whole, under open_clip's names"
    assert len(json.loads((last(folder) / "manifest.json").read_text())["left_out"][0]) == len(whole)


def test_fine_tuning_is_stored_as_it_was(tmp_path):
    run_experiment(resolve_small(), 0, tmp_path)
    folder = run_folder(tmp_path)
    assert json.loads((last(folder) / "manifest.json").read_text())["format"] == 2
    assert (last(folder) / "weights.safetensors").stat().st_ino == (folder / "model.safetensors").stat().st_ino


@pytest.mark.parametrize(
    "settings",
    [
        LORA,
        ("model.train=image",),
        ("model.train=adapters", "model.adapters=[{lora: {rank: 2, merge_each_task: true}}]"),
    ],
)
@pytest.mark.parametrize("at", [(1, 3), (2, 3), (3, 2)])
def test_a_killed_run_ends_as_if_it_had_never_been(tmp_path, kill_at, left_alone, settings, at):
    recipe = resolve_small(*settings)
    whole, one = left_alone(recipe)
    assert killed_and_resumed(recipe, tmp_path / "killed", kill_at, at).matrix == whole.matrix
    other = run_folder(tmp_path / "killed")
    assert read_checkpoint(last(one)).files == read_checkpoint(last(other)).files
    assert same(load_file(one / "model.safetensors"), load_file(other / "model.safetensors"))


def test_other_pre_trained_weights_are_refused(tmp_path, kill_at, monkeypatch):
    recipe = resolve_small(*LORA)
    kill_at(2, 3)
    with pytest.raises(Killed):
        run_experiment(recipe, 0, tmp_path)

    def other():
        loaded = small_model()
        loaded.clip.load_state_dict(small_clip(seed=1).state_dict())
        return loaded

    monkeypatch.setitem(catalog().parts, ("model", "small-clip"), _replaced("small-clip", other))
    with pytest.raises(MulkiError, match="weights was"):
        resume_experiment(recipe, 0, run_folder(tmp_path))
    with pytest.raises(
        MulkiError, match=r"leaves out \d+ weights that stayed as pre-trained, and the model now has others"
    ):
        resume_experiment(recipe, 0, run_folder(tmp_path), force=True)


def _replaced(name, target):
    mine = Catalog()
    Register(mine, Provenance(distribution="mulki", version="")).model(name, target, summary="other weights")
    return mine.parts["model", name]


def test_a_checkpoint_that_leaves_nothing_out_still_loads(tmp_path, kill_at, monkeypatch):
    recipe = resolve_small(*LORA)
    whole = run_experiment(recipe, 0, tmp_path / "whole")
    with monkeypatch.context() as patch:  # as an earlier version wrote it
        patch.setattr(Pretrained, "without", lambda self, weights: (weights, None))
        patch.setattr(Pretrained, "with_references", lambda self, state, devices: (state, devices))
        kill_at(2, 3)
        with pytest.raises(Killed):
            run_experiment(recipe, 0, tmp_path / "killed")
    folder = run_folder(tmp_path / "killed")
    assert all(json.loads((c.path / "manifest.json").read_text())["format"] == 2 for c in checkpoints(folder)[0])
    assert resume_experiment(recipe, 0, folder).matrix == whole.matrix


def test_a_plugins_copy_of_the_pre_trained_part_is_a_reference(tmp_path, kill_at):
    recipe = resolve_small(*LORA, "strategy={name: mine, plugins: [keeps-the-model]}")
    whole = run_experiment(recipe, 0, tmp_path / "whole")
    folder = run_folder(tmp_path / "whole")
    state = read_checkpoint(last(folder)).state()
    assert has_references(state["plugins"])
    [[_, kept]] = state["plugins"]
    tensors = {name for name, value in kept["teacher"].items() if isinstance(value, torch.Tensor)}
    big = {name for name in tensors if kept["teacher"][name].numel() > 64}
    assert all(name.endswith((".A", ".B")) for name in big), "what LoRA adds is stored, the rest is referred to"
    stream = small_stream()
    fresh = ClipClassifier(small_clip(), small_tokenizer, stream.tasks).own_weights()
    names = {name.replace("parametrizations.", "").removesuffix(".original"): name for name in kept["teacher"]}
    again = resolved(kept, {names.get(n, n): w for n, w in fresh.items()}, "here")["teacher"]
    assert all(isinstance(value, torch.Tensor) for value in again.values())
    assert killed_and_resumed(recipe, tmp_path / "killed", kill_at, (3, 3)).matrix == whole.matrix
    other = run_folder(tmp_path / "killed")
    assert read_checkpoint(last(folder)).files == read_checkpoint(last(other)).files


@pytest.mark.parametrize("settings", [LORA, ("model.train=image",)])
def test_a_checkpoint_is_a_model_where_it_is_used(tmp_path, settings):
    run_experiment(resolve_small(*settings), 0, tmp_path)
    folder = run_folder(tmp_path)
    final = load_file(folder / "model.safetensors")
    loaded = load_trained(find_source(last(folder))).clip.state_dict()
    assert all(torch.allclose(final[name], loaded[name], atol=1e-6) for name in final)
    (folder / "model.safetensors").unlink()
    with pytest.raises(MulkiError, match=r"has weights and adapters apart|leaves out weights that are as pre-trained"):
        secure_final_weights(folder, 3)
    with pytest.raises(MulkiError, match=r"this checkpoint leaves out \d+ weights that are as pre-trained"):
        read_state(weight_file(str(last(folder))))


def test_random_weights_are_never_left_out(tmp_path):
    recipe = resolve_small("model={name: mulki-tiny, pretrained: random}", "model.train=image", "train.iterations=1")
    assert recipe.recipe.model.options["pretrained"] == "random"
    run_experiment(recipe, 0, tmp_path)
    assert read_checkpoint(last(run_folder(tmp_path))).left_out is None


def test_what_is_recognised_as_pre_trained():
    weights = {"big": torch.randn(40, 5), "same": torch.randn(200), "few": torch.ones(3), "none": torch.zeros(0)}
    known = Pretrained(weights)
    changed = {**{name: w.clone() for name, w in weights.items()}, "big": weights["big"].clone()}
    changed["big"][7, 3] += 1e-6
    stored, left_out = known.without(changed)
    assert stored.keys() == {"big"}
    assert set(left_out.names) == {"same", "few", "none"}
    assert same(completed(stored, left_out, weights, "here"), changed)
    with pytest.raises(MulkiError, match="has others"):
        completed(stored, left_out, {**weights, "few": torch.zeros(3)}, "here")
    state = {
        "plugins": [["p", {"copy": weights["same"].clone(), "other": weights["same"] + 1}]],
        "model": {"x": weights["same"]},
    }
    written, devices = known.with_references(state, ["cpu", "cpu", "cpu"])
    assert devices == ["cpu", "cpu"]
    assert has_references(written["plugins"])
    assert torch.equal(written["model"]["x"], weights["same"])
    [[_, again]] = resolved(written["plugins"], weights, "here")
    assert torch.equal(again["copy"], weights["same"])
    with pytest.raises(MulkiError, match="refers to the pre-trained weight 'same'"):
        resolved(written["plugins"], {**weights, "same": weights["same"] + 1}, "here")
