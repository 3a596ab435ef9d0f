"""`mulki clean`: what goes, what stays, and what is refused."""

import json
import os
import shutil

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file

from mulki_plugins.cli import main
from mulki_plugins.files import locked
from mulki_plugins.recipe.resolve import Changes, resolve
from mulki_plugins.report.result import read_result
from mulki_plugins.training.run import run_experiment
from tests.conftest import same, small_world

FEW = ("stream=small", "model=small-clip", "train.iterations=2", "train.batch_size=4", "train.schedule.warmup=0",
       "loggers=[]")  # fmt: skip


def toy(*settings, strategy="finetune"):
    return resolve("mtil", Changes(strategy=strategy, settings=(*FEW, *settings)))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run with its checkpoints."""
    with small_world():
        folder = tmp_path_factory.mktemp("finished") / "run"
        run_experiment(toy(), 0, folder, folder=folder)
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy, in which hard links are still links."""
    return shutil.copytree(finished, tmp_path / "run", copy_function=_copied(finished, tmp_path / "run"))


def _copied(source, target):
    known = {}

    def copy(one, other):
        number = os.stat(one).st_ino
        if number in known:
            os.link(known[number], other)
        else:
            known[number] = shutil.copy2(one, other)

    return copy


def clean(*arguments):
    return CliRunner().invoke(main, ["clean", *map(str, arguments)])


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def space(folder):
    """The bytes that a folder takes on the disk, each file once."""
    return sum({path.stat().st_ino: path.stat().st_size for path in folder.rglob("*") if path.is_file()}.values())


def test_the_final_weights_are_kept_without_taking_room_twice(run):
    end = run / "checkpoints" / "task-03-third" / "weights.safetensors"
    assert same(load_file(end), load_file(run / "model.safetensors"))
    assert end.stat().st_ino == (run / "model.safetensors").stat().st_ino


def test_without_checkpoints_they_are_written_all_the_same(small_parts, finished, tmp_path):
    run_experiment(toy("train.checkpoint.keep=0"), 0, tmp_path, folder=tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()
    written, reference = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run", finished))
    assert same(written, reference)


def test_the_number_of_trained_parameters_is_recorded(small_parts, finished, tmp_path):
    parameters = read_result(finished / "result.json").parameters
    weights = load_file(finished / "model.safetensors")
    assert parameters["all"] == sum(weight.numel() for weight in weights.values())
    assert parameters["trained"] == parameters["all"] - weights["logit_scale"].numel(), "the scale is frozen"
    nothing = run_experiment(toy(strategy="zero-shot"), 0, tmp_path, folder=tmp_path / "run")
    assert nothing.parameters["trained"] == 0
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_what_goes_and_what_stays(run):
    before, room = files(run), space(run)
    done = clean(run, "--json")
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert data["runs"][0]["removed"] == ["checkpoints/task-02-second"]
    assert data["freed"] == room - space(run) > 1_000  # its weights have another name in weights/
    gone = {name for name in before if name.startswith("checkpoints/task-02-second/")}
    assert files(run) == {name: content for name, content in before.items() if name not in gone}


def test_all_takes_what_only_extend_needs(run):
    weights = (run / "weights" / "task-01-first" / "weights.safetensors").stat().st_size
    for _ in range(2):  # also when the checkpoints that share these weights have gone
        assert json.loads(clean(run, "--json").stdout)["runs"][0]["kept"] > 2 * weights
    assert (run / "weights" / "task-01-first").is_dir()
    before, room = files(run), space(run)
    done = clean(run, "--all")
    assert done.exit_code == 0, done.output
    assert "removed weights/task-01-first" in done.stdout
    assert files(run) == {
        name: data for name, data in before.items() if name.split("/")[0] not in ("weights", "checkpoints")
    }
    assert not (run / "checkpoints").exists()
    assert room - space(run) > 1000
    again = clean(run, "--all", "--json")
    assert json.loads(again.stdout)["freed"] == 0
    assert CliRunner().invoke(main, ["results", str(run)]).exit_code == 0


def test_a_dry_run_says_the_same_and_removes_nothing(run):
    before = files(run)
    for options in ([], ["--all"]):
        said = json.loads(clean(run, "--json", "--dry-run", *options).stdout)
        assert files(run) == before
        assert said["freed"] > 0
    room = space(run)
    assert json.loads(clean(run, "--json", "--all").stdout)["freed"] == said["freed"] == room - space(run)


def test_an_older_run_gets_its_final_weights_first(run):
    wanted = load_file(run / "model.safetensors")
    (run / "model.safetensors").unlink()
    expected = json.loads(clean(run, "--all", "--dry-run", "--json").stdout)["freed"]
    room = space(run)
    assert clean(run, "--all").exit_code == 0
    assert room - space(run) == expected
    assert same(load_file(run / "model.safetensors"), wanted)


def test_damaged_final_weights_are_made_again_or_nothing_goes(run):
    good = (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").unlink()
    (run / "model.safetensors").write_bytes(good[:-4] + b"\0\1\2\3")
    assert clean(run).exit_code == 0
    assert (run / "model.safetensors").read_bytes() == good
    (run / "model.safetensors").unlink()
    end = run / "checkpoints" / "task-03-third" / "weights.safetensors"
    end.write_bytes(good[:-4] + b"\0\1\2\3")
    done = clean(run, "--all")
    assert done.exit_code == 2
    assert "its final weights are damaged" in done.stderr
    assert end.exists()


def spoil_weights(run):
    data = bytearray((run / "model.safetensors").read_bytes())
    data[-400:] = bytes(each ^ 1 for each in data[-400:])
    (run / "model.safetensors").unlink()  # the checkpoint may have the same file
    (run / "model.safetensors").write_bytes(data)


def test_weights_that_no_checkpoint_has_are_compared_with_their_own_checksum(small_parts, tmp_path):
    run = tmp_path / "run"
    adapters = ("model.adapters=[{lora: {rank: 2}}]", "model.train=adapters")
    run_experiment(toy(*adapters), 0, tmp_path, folder=run)
    before = files(run)
    spoil_weights(run)
    refused = clean(run, "--all")
    assert refused.exit_code == 2
    assert "has no intact model.safetensors, and its checkpoint has weights and adapters apart" in refused.stderr
    assert files(run).keys() == before.keys()
    (run / "model.safetensors").write_bytes(before["model.safetensors"])
    assert clean(run, "--all").exit_code == 0
    assert not (run / "checkpoints").exists()


def test_only_what_extend_can_use_is_kept_for_it(small_parts, tmp_path):
    for strategy in ("zero-shot", "joint"):
        run_experiment(toy(strategy=strategy), 0, tmp_path, folder=tmp_path / strategy)
        assert clean(tmp_path / strategy).exit_code == 0
    assert [path.name for path in (tmp_path / "zero-shot" / "checkpoints").iterdir()] == ["start"]
    assert not (tmp_path / "joint" / "checkpoints").exists()


def spoil_status(run, status):
    data = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps({**data, "status": status, "matrix": data["matrix"][:1]}))


def test_an_unfinished_run_is_refused_unless_forced(run):
    spoil_status(run, "failed")
    before = files(run)
    done = clean(run)
    assert done.exit_code == 2
    assert "not finished (failed)" in done.stderr
    assert "--force" in done.stderr
    below = clean(run.parent)
    assert below.exit_code == 0
    assert "left as it is" in below.stderr
    assert files(run) == before
    assert clean(run, "--force").exit_code == 0
    assert not (run / "checkpoints").exists()


def test_a_run_that_goes_on_is_refused_even_if_forced(run):
    spoil_status(run, "running")
    with locked(run):
        done = clean(run, "--force")
    assert done.exit_code == 2
    assert "still going" in done.stderr
    assert (run / "checkpoints" / "task-02-second").is_dir()


def test_nothing_is_removed_through_a_link(run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    (run / "checkpoints" / "task-01-link").symlink_to(tmp_path / "mine")
    done = clean(run, "--all")
    assert done.exit_code == 2
    assert "is a link" in done.stderr
    assert (tmp_path / "mine" / "file").exists()
    assert (run / "checkpoints" / "task-02-second").is_dir()
