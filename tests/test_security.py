"""Files from a stranger: they run no code, and nothing is read or written where it should not be."""

import json
import pickle
from pathlib import Path

import pytest
import torch

from mulki_plugins.errors import MulkiError
from mulki_plugins.recipe.resolve import Changes, resolve
from mulki_plugins.training.checkpoint import MANIFEST, Damaged, _signed, read_checkpoint
from mulki_plugins.training.checkpointing import Checkpointing
from mulki_plugins.training.resume import resume_experiment
from mulki_plugins.training.run import run_experiment
from tests.test_run import mulki

SMALL = (
    "stream={name: small}", "model={name: small-clip}", "train.iterations=4", "train.schedule.warmup=1",
    "train.batch_size=4", "train.checkpoint.every=2", "device=cpu",
)  # fmt: skip


class Touches:
    """Unpickled, it leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def half(tmp_path, small_parts, monkeypatch):
    """A run that was stopped in its second task."""
    torch.set_num_threads(1)
    recipe = resolve("recipes/mtil.yaml", Changes(strategy="finetune", settings=SMALL))
    after_step = Checkpointing.after_step

    def stopped(self):
        after_step(self)
        if (self.tasks, self.strategy.clock.train_exp_iterations) == (1, 2):
            raise MulkiError("stopped here")

    monkeypatch.setattr(Checkpointing, "after_step", stopped)
    with pytest.raises(MulkiError, match="stopped here"):
        run_experiment(recipe, 0, tmp_path / "runs")
    monkeypatch.setattr(Checkpointing, "after_step", after_step)
    return recipe, tmp_path / "runs" / "mtil" / "finetune" / "seed-0"


def contents(path):
    return sorted((file, file.read_bytes()) for file in [path, *path.rglob("*")] if file.is_file())


@pytest.mark.parametrize(
    "what", ["metrics.csv", "result.json", "recipe.yaml", "checkpoints", "checkpoints/task-01-first"]
)
def test_nothing_is_written_through_a_link(half, tmp_path, what):
    recipe, folder = half
    outside = tmp_path / "outside"
    (folder / what).rename(outside)
    (folder / what).symlink_to(outside)
    before = contents(outside)
    with pytest.raises(MulkiError, match=r"is a link"):
        resume_experiment(recipe, 0, folder)
    assert contents(outside) == before


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("files", {"../../../secret.safetensors": "0"}),
        ("base", "../elsewhere"),
        ("base", "/etc"),
        ("files", {"/etc/passwd": "0"}),
    ],
)
def test_a_manifest_names_no_file_elsewhere(half, key, value):
    _, folder = half
    path = folder / "checkpoints" / "task-02-step-000002"
    manifest = json.loads((path / MANIFEST).read_text())
    del manifest["sha256"]
    (path / MANIFEST).write_text(_signed({**manifest, key: value}))
    with pytest.raises(Damaged, match="it names a file outside its folder"):
        read_checkpoint(path)


@pytest.mark.parametrize("name", ["weights.safetensors", "state.pt"])
def test_a_pickle_in_a_checkpoint_runs_no_code(half, tmp_path, capsys, name):
    recipe, folder = half
    (folder / "checkpoints" / "task-02-step-000002" / name).write_bytes(pickle.dumps(Touches(tmp_path / "run")))
    assert resume_experiment(recipe, 0, folder).status == "complete"
    assert not (tmp_path / "run").exists()
    assert f"{name}: " in capsys.readouterr().err


def test_a_pickle_as_weights_runs_no_code(tmp_path):
    for name in ("weights.pt", "weights.safetensors", "weights.bin"):
        (tmp_path / name).write_bytes(pickle.dumps(Touches(tmp_path / "run")))
        words = ["--set", f"model.pretrained={tmp_path / name}", "--set", "stream.tasks=[digits,scans]"]
        done = mulki("run", "mtil", *words, "--out", tmp_path / "runs", ok=False)
        assert "Traceback" not in done.stderr
        assert str(tmp_path / name) in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_result_cannot_steer_the_terminal(half):
    _, folder = half
    data = json.loads((folder / "result.json").read_text())
    escape = "\x1b]0;owned\x07\x1b[2Jfirst"
    data["tasks"][0], data["recipe"], data["strategy"] = escape, escape, escape
    (folder / "result.json").write_text(json.dumps(data))
    done = mulki("results", folder)
    assert "\x1b" not in done.stdout + done.stderr
    assert "\x07" not in done.stdout + done.stderr
    assert "first" in done.stdout
