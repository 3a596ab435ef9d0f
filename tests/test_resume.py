"""A run that was stopped or killed ends as if it had not been: whatever keeps a state, wherever it stopped."""

import errno
import importlib.util
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from mulki_plugins.baselines.l2 import WeightConstraint
from mulki_plugins.errors import MulkiError
from mulki_plugins.recipe.resolve import Changes, resolve
from mulki_plugins.stages import prototypes
from mulki_plugins.training import checkpointing, compilation
from mulki_plugins.training.checkpoint import checkpoints
from mulki_plugins.training.resume import resume_experiment
from mulki_plugins.training.run import run_experiment
from mulki_plugins.training.signals import Stopped, StopRequest
from tests.conftest import Killed
from tests.warm import run_fork, start_fork

ROOT = Path(__file__).parent.parent
SMALL = (
    "stream={name: small}", "model={name: small-clip}", "reference=small-other", "train.iterations=5",
    "train.schedule.warmup=1", "train.batch_size=4", "train.checkpoint.every=2", "device=cpu", "loggers=[csv]",
)  # fmt: skip


@pytest.fixture(scope="module")
def torture():
    spec = importlib.util.spec_from_file_location("torture", ROOT / "tools" / "torture.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["torture"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def small_world(small_parts):
    torch.set_num_threads(1)


def resolved(strategy, *settings, with_plugins=()):
    changes = Changes(strategy=strategy, settings=(*SMALL, *settings), with_plugins=with_plugins)
    return resolve("recipes/mtil.yaml", changes)


def folder_of(out, strategy):
    return out / "mtil" / strategy / "seed-0"


EVERYTHING_WITH_A_STATE = [
    ("mulki-plus", ("loggers=[tensorboard,csv]",), ()), ("mulki", (), ()),
    ("mulki-plus", ("strategy.adding.relations={image_to_image: 1.0}",), ()), ("weight-ensemble", (), ()),
    ("zscl", (), ()), ("snd", (), ()), ("lwf-vr", (), ()), ("icarl", (), ()), ("replay", (), ()), ("ewc", (), ()),
    ("si", ("strategy.avalanche.si.si_lambda=1000",), ()), ("mas", (), ()), ("finetune", (), ("avalanche.lwf",)),
    ("finetune", ("strategy.base=cumulative",), ()), ("joint", (), ()),
    ("finetune", ("train.iterations=null", "train.epochs=2", "train.batch_size=5"), ()),
    ("mulki-plus", ("train.precision=bf16", "train.optimizer={name: sgd, lr: 0.01, momentum: 0.9}"), ()),
    ("finetune", ("train.precision=bf16", "train.compile=true"), ()),
    ("replay", ("train.accumulate=3", "train.precision=bf16"), ()), ("finetune", ("train.accumulate=2",), ()),
]  # fmt: skip


@pytest.mark.parametrize(("strategy", "settings", "added"), EVERYTHING_WITH_A_STATE)
def test_it_ends_as_if_it_had_never_been_killed(tmp_path, torture, kill_at, monkeypatch, strategy, settings, added):
    monkeypatch.setattr(compilation.CompiledTowers, "backend", "aot_eager")  # no C++ compiler in the tests
    recipe = resolved(strategy, *settings, with_plugins=added)
    run_experiment(recipe, 0, tmp_path / "alone")
    folder = folder_of(tmp_path / "killed", recipe.recipe.strategy.name)
    kill_at(1 if strategy == "joint" else 2, 3)
    with pytest.raises(Killed):
        run_experiment(recipe, 0, tmp_path / "killed")
    [latest, *_], wrong = checkpoints(folder)
    assert wrong == []
    assert latest.moment.steps == 2
    resume_experiment(recipe, 0, folder)
    assert torture.differing(folder_of(tmp_path / "alone", recipe.recipe.strategy.name), folder) == []


def test_wherever_it_was_killed(tmp_path, torture, kill_at, monkeypatch, capsys):
    """At the first step, right after a checkpoint, in a task's last step, in an evaluation; each time the same run."""
    recipe = resolved("mulki-plus")
    run_experiment(recipe, 0, tmp_path / "alone")
    folder = folder_of(tmp_path / "killed", "mulki-plus")
    kill_at(1, 1)
    with pytest.raises(Killed):
        run_experiment(recipe, 0, tmp_path / "killed")
    for task, step, begun in ((1, 2, "start"), (1, 5, "task-01-step-000002"), (2, 4, "task-01-step-000004")):
        kill_at(task, step)
        with pytest.raises(Killed):
            resume_experiment(recipe, 0, folder)
        assert f"resuming from {begun}" in capsys.readouterr().err
    learned = checkpointing.Checkpointing.learned

    def killed(self, *arguments):
        learned(self, *arguments)
        raise Killed

    monkeypatch.setattr(checkpointing.Checkpointing, "learned", killed)
    with pytest.raises(Killed):
        resume_experiment(recipe, 0, folder)
    monkeypatch.setattr(checkpointing.Checkpointing, "learned", learned)
    resume_experiment(recipe, 0, folder)
    assert "resuming from task-02-second" in capsys.readouterr().err
    assert torture.differing(folder_of(tmp_path / "alone", "mulki-plus"), folder) == []
    again = resume_experiment(recipe, 0, folder)
    assert "already complete" in capsys.readouterr().err
    assert len(again.matrix) == 3


def test_within_the_first_task_before_training_is_called_once(tmp_path, torture, kill_at, monkeypatch):
    """A plugin that adds weights in it adds those of the first task, and no more."""

    def before_training(self, strategy, **kwargs):
        visual = strategy.model.clip.visual
        number = sum(name.startswith("added") for name, _ in visual.named_parameters())
        visual.register_parameter(f"added_{number}", torch.nn.Parameter(torch.zeros(3), requires_grad=False))

    monkeypatch.setattr(WeightConstraint, "before_training", before_training, raising=False)
    recipe = resolved("zscl")
    run_experiment(recipe, 0, tmp_path / "alone")
    kill_at(1, 3)
    with pytest.raises(Killed):
        run_experiment(recipe, 0, tmp_path / "killed")
    folder = folder_of(tmp_path / "killed", "zscl")
    resume_experiment(recipe, 0, folder)
    assert torture.differing(folder_of(tmp_path / "alone", "zscl"), folder) == []


@pytest.fixture
def half(tmp_path, kill_at):
    """A run that was killed in its second task, with checkpoints at steps 2 and 4."""
    recipe = resolved("finetune")
    kill_at(2, 4)
    with pytest.raises(Killed):
        run_experiment(recipe, 0, tmp_path)
    return recipe, folder_of(tmp_path, "finetune")


@pytest.mark.parametrize("harm", ["truncated", "changed", "gone", "manifest", "signature", "empty"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(half, capsys, harm):
    recipe, folder = half
    last = folder / "checkpoints" / "task-02-step-000004"
    weights, manifest = last / "weights.safetensors", last / "manifest.json"
    data = weights.read_bytes()
    if harm == "truncated":
        weights.write_bytes(data[: len(data) // 2])
    elif harm == "changed":
        weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif harm == "gone":
        weights.unlink()
    elif harm == "manifest":
        manifest.write_text(manifest.read_text()[:-200])
    elif harm == "signature":
        manifest.write_text(manifest.read_text().replace('"steps": 4', '"steps": 3'))
    else:
        manifest.write_text("")
    resume_experiment(recipe, 0, folder)
    said = capsys.readouterr().err
    assert "task-02-step-000004" in said
    assert "it is skipped" in said
    assert "resuming from task-02-step-000002" in said
    assert json.loads((folder / "result.json").read_text())["status"] == "complete"


def test_where_no_checkpoint_is_whole_the_run_begins_anew_and_nothing_is_lost(half, capsys):
    recipe, folder = half
    for manifest in (folder / "checkpoints").glob("*/manifest.json"):
        manifest.write_text("{}")
    resume_experiment(recipe, 0, folder)
    said = capsys.readouterr().err
    assert "starts again" in said
    assert (folder.parent / "seed-0.before-1" / "metrics.csv").exists()
    assert len(json.loads((folder / "result.json").read_text())["matrix"]) == 3


def test_another_recipe_is_refused_and_may_be_forced(half, capsys):
    _, folder = half
    changed = resolved("finetune", "train.optimizer.lr=0.001", "train.workers=1")
    with pytest.raises(MulkiError) as caught:
        resume_experiment(changed, 0, folder)
    [line] = caught.value.lines()
    assert "recipe.train.optimizer.lr was 0.0005, is 0.001" in line
    assert "recipe.workers was 0, is 1" in line
    assert "--force" in line
    resume_experiment(changed, 0, folder, force=True)
    assert "resuming although recipe.train.optimizer.lr was 0.0005" in capsys.readouterr().err


def test_other_words_loggers_and_checkpoints_are_no_other_run(half):
    _, folder = half
    changed = resolved("finetune", "summary=another", "train.checkpoint.keep=3")
    assert resume_experiment(changed, 0, folder).status == "complete"


@pytest.mark.parametrize("what", ["code", "versions", "data", "weights"])
def test_other_code_data_versions_or_weights_are_refused(half, monkeypatch, what):
    recipe, folder = half
    from mulki_plugins.training import provenance, resume

    if what == "code":
        monkeypatch.setattr(provenance, "_CODE", ("losses.py",))
    elif what == "versions":
        monkeypatch.setattr(provenance, "_versions", lambda: {"torch": "9.9"})
    elif what == "data":
        monkeypatch.setattr(provenance, "_data", lambda stream: {"first": "other images"})
    else:
        built = resume.build_seeded

        def other(*arguments):
            result = built(*arguments)
            with torch.no_grad():
                next(result.model.parameters()).add_(1)
            return result

        monkeypatch.setattr(resume, "build_seeded", other)
    with pytest.raises(MulkiError, match=f"cannot resume: changed since the checkpoint: .*{what}.* was "):
        resume_experiment(recipe, 0, folder)


def test_a_plugin_whose_state_cannot_be_stored_is_refused(tmp_path, kill_at):
    recipe = resolved("finetune", with_plugins=("avalanche.agem",))
    kill_at(2, 3)
    with pytest.raises(Killed):
        run_experiment(recipe, 0, tmp_path)
    with pytest.raises(MulkiError, match=r"'avalanche.agem': .* iterator"):
        resume_experiment(recipe, 0, folder_of(tmp_path, "finetune"))


def test_a_signal_while_prototypes_are_computed_ends_the_run_before_the_next_batch(tmp_path, torture, monkeypatch):
    recipe = resolved("mulki")
    run_experiment(recipe, 0, tmp_path / "alone")
    folder = folder_of(tmp_path / "told", "mulki")
    sums, asked = prototypes.class_sums, []

    def told(*arguments):
        if len(json.loads((folder / "result.json").read_text())["matrix"]) == 1:
            asked.append(arguments)
            signal.raise_signal(signal.SIGTERM)
        return sums(*arguments)

    monkeypatch.setattr(prototypes, "class_sums", told)
    with pytest.raises(Stopped):
        run_experiment(recipe, 0, tmp_path / "told")
    first, second = asked  # the sums of the two teachers over the first batch
    assert torch.equal(first[1], second[1])
    monkeypatch.undo()
    resume_experiment(recipe, 0, folder)
    assert torture.differing(folder_of(tmp_path / "alone", "mulki"), folder) == []


def test_a_signal_ends_the_run_at_the_next_step_with_a_checkpoint(tmp_path, torture, monkeypatch):
    recipe = resolved("mulki-plus", "train.checkpoint.every=null")
    run_experiment(recipe, 0, tmp_path / "alone")
    folder = folder_of(tmp_path / "told", "mulki-plus")
    after_step = checkpointing.Checkpointing.after_step

    def told(self):
        if (self.tasks, self.strategy.clock.train_exp_iterations) == (1, 3):
            signal.raise_signal(signal.SIGTERM)
        after_step(self)

    monkeypatch.setattr(checkpointing.Checkpointing, "after_step", told)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped) as caught:
        run_experiment(recipe, 0, tmp_path / "told")
    assert signal.getsignal(signal.SIGTERM) is before
    assert caught.value.status == 128 + signal.SIGTERM
    assert caught.value.lines() == [f"stopped by SIGTERM; resume it with `mulki resume {folder}`"]
    assert json.loads((folder / "result.json").read_text())["status"] == "stopped"
    monkeypatch.setattr(checkpointing.Checkpointing, "after_step", after_step)
    resume_experiment(recipe, 0, folder)
    assert torture.differing(folder_of(tmp_path / "alone", "mulki-plus"), folder) == []


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_unless_it_was_ignored_from_the_start(number):
    before = signal.getsignal(number)
    try:
        for ignored in (False, True):
            signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL)
            stop = StopRequest()
            with stop.listening():
                signal.raise_signal(number)
            assert stop.number == (None if ignored else number)
    finally:
        signal.signal(number, before)


def test_a_signal_is_noted_where_stderr_is_gone(monkeypatch):
    def gone(descriptor, data):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("mulki_plugins.training.signals.os.write", gone)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored
    try:
        stop = StopRequest()
        with stop.listening():
            signal.raise_signal(signal.SIGHUP)
        assert stop.number == signal.SIGHUP
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_number_of_checkpoints_does_not_grow(tmp_path):
    run_experiment(resolved("finetune", "train.checkpoint={every: 1, keep: 2}"), 0, tmp_path)
    kept = sorted(path.name for path in (folder_of(tmp_path, "finetune") / "checkpoints").iterdir())
    assert kept == ["task-02-second", "task-03-step-000004", "task-03-third"]


def test_none_are_written_where_none_are_wanted(tmp_path):
    run_experiment(resolved("finetune", "train.checkpoint={every: 1, keep: 0}"), 0, tmp_path)
    assert not (folder_of(tmp_path, "finetune") / "checkpoints").exists()


TORTURE = """
import multiprocessing
fork = multiprocessing.get_context("fork")
fork.set_forkserver_preload = lambda modules: None
multiprocessing.get_context = lambda method: fork
import torture
from tests.conftest import small_world
with small_world():
    torture.main()
"""
"""Its runs are forks of a process that has the libraries and the small world."""


def test_killed_at_random_it_ends_the_same(tmp_path):
    """The maintainer's tool in short: SIGKILL, also while a checkpoint is written."""
    settings = (*SMALL, "train.checkpoint.minutes=0.002")
    words = ["--strategy", "mulki-plus", "--kills", "3", "--seed", "1", "--out", tmp_path / "torture"]
    words += [word for setting in settings for word in ("--set", setting)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tools")])
    done = run_fork("-c", TORTURE, *words, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stdout + done.stderr
    *runs, said = done.stdout.splitlines()[1:]
    assert sum(int(line.split()[2]) for line in runs) == 3
    assert said == f"3 kills, {len(runs)} runs, 0 differ"


@pytest.mark.parametrize(
    ("signals", "status"), [([signal.SIGINT], 130), ([signal.SIGTERM], 143), ([signal.SIGINT] * 2, -signal.SIGINT)]
)
def test_the_command_stops_when_it_is_told(tmp_path, signals, status):
    """One signal: at the next step, with a checkpoint and what to type. A second Ctrl-C: at once."""
    words = ["--set", "stream.tasks=[digits,scans]", "--set", "train.batch_size=256", "--strategy", "finetune"]
    read, write = os.pipe()
    with open(os.devnull, "r+") as nothing, open(read) as stderr:
        files = (nothing.fileno(), nothing.fileno(), write)
        process = start_fork("-m", "mulki_plugins", "run", "mtil", *words, "--out", tmp_path, files=files, cwd=ROOT)
        os.close(write)
        for line in stderr:
            if "digits: training" in line:
                break
        process.send_signal(signals[0])
        for number in signals[1:]:
            assert any("Ctrl-C again" in line for line in stderr)
            process.send_signal(number)
        said = stderr.read()
    assert process.wait() == status
    assert "Traceback" not in said
    [folder] = tmp_path.glob("mtil/finetune+*/seed-0")
    if len(signals) == 1:
        assert f"stopped by {signals[0].name}; resume it with `mulki resume {folder}`" in said
        assert list((folder / "checkpoints").glob("task-01-step-*/manifest.json"))
