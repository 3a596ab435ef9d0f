"""Every script in tools/ can be imported and answers --help, and the benchmarks run."""

import importlib
import os
import sys
from functools import partial

import pytest
from click.testing import CliRunner
from torch.utils.tensorboard import SummaryWriter

from mulki_plugins.bench import measure
from mulki_plugins.bench.hardware import peak_product
from tests.environments import ROOT

TOOLS = ROOT / "tools"
SCRIPTS = sorted(path.stem for path in TOOLS.glob("*.py"))


@pytest.fixture(autouse=True)
def tools_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    for script in SCRIPTS:  # another test may have imported another version
        monkeypatch.delitem(sys.modules, script, raising=False)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_imported_and_answers_help(name, monkeypatch, capsys):
    script = importlib.import_module(name)
    assert script.__doc__
    if 'if __name__ == "__main__":' not in (TOOLS / f"{name}.py").read_text("utf-8"):
        return  # a module for the others
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code in (0, None)
    assert "--help" in capsys.readouterr().out


def bench(*words):
    done = CliRunner().invoke(importlib.import_module("bench").main, words)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_benchmark_of_the_list():
    assert "   2 packages: median" in bench("list", "--packages", "2", "--repeats", "1")


def test_the_benchmark_of_the_input_pipeline(monkeypatch):
    monkeypatch.setenv("MULKI_CACHE", os.environ["MULKI_CACHE"])  # restored afterwards: the benchmark sets its own
    rows = bench("loading", "--images", "82", "--workers", "0", "--rounds", "1").splitlines()
    ways = ["decoder", "decoder, transform", "pipeline", "evaluation", "from the cache"]
    assert [row.split("  ")[0] for row in rows[2:7]] == ways
    assert "times as fast as decoding" in rows[8]


def test_the_benchmark_of_checkpoints(monkeypatch):
    """Its arithmetic: five checkpoints cost 10 s more; the runs themselves are those of `mulki run`."""
    script = importlib.import_module("bench")

    def train(strategy, settings, out):
        checkpoints = "train.checkpoint={every: 1, keep: 2}" in settings
        return (22.0, 130.0, 2**20) if checkpoints else (12.0, 100.0, 0)

    monkeypatch.setattr(script, "_train", train)
    text = bench("checkpoints", "--steps", "6", "--every", "100")
    assert "a step                             2.00 s" in text
    assert "a checkpoint                       2.00 s, 1 MiB" in text
    assert "costs         1.00 % of the time" in text
    assert "30 MiB more" in text


def test_the_benchmark_of_a_step():
    done = CliRunner().invoke(importlib.import_module("bench").main, ["step", "--steps", "2", "--warmup", "1"])
    assert "warning" not in done.stderr
    rows = done.stdout.splitlines()
    assert [row.split()[0] for row in rows] == ["mulki", "by", "ratio"]
    assert 0.2 < float(rows[2].split()[1]) < 5


def test_killed_runs_are_compared_by_what_does_not_depend_on_time_and_place(tmp_path):
    points = importlib.import_module("torture").points
    found = []
    for seconds, loss in ((1.0, 0.5), (2.0, 0.5), (1.0, 0.6)):
        with SummaryWriter(tmp_path / str(len(found))) as writer:
            writer.add_text("recipe", f"it took {seconds} s", 0)
            writer.add_scalar("cost/training_seconds", seconds, 1)
            writer.add_scalar("train/loss/total", loss, 1)
        found.append(list(points(tmp_path / str(len(found)))))
    assert [tag for tag, *_ in found[0]] == ["train/loss/total"]
    assert found[0] == found[1] != found[2]


def test_the_benchmark_of_a_gpu_runs_small_and_is_refused_without_one(monkeypatch):
    monkeypatch.setattr(measure, "peak_product", partial(peak_product, seconds=0.05))
    rows = bench(
        "gpu", "--device", "cpu", "--small", "--steps", "2", "--strategy", "finetune", "--strategy", "zscl", "--mode", "fp32"
    ).splitlines()  # fmt: skip
    assert rows[1].split()[0] == "strategy"
    assert [row.split()[:2] for row in rows[2:]] == [["finetune", "fp32"], ["zscl", "fp32"]]
    assert all(row.count(" ms") >= 2 for row in rows[2:]), rows
    left_out = bench("gpu", "--device", "cpu", "--small", "--minutes", "0", "--strategy", "finetune", "--mode", "bf16")
    assert "left out" in left_out
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    done = CliRunner().invoke(importlib.import_module("bench").main, ["gpu"])
    assert done.exit_code == 2
    assert "no CUDA GPU" in done.stderr
