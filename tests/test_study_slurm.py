"""A study on a real Slurm: preempted jobs resume, nothing runs twice, and the table is the one made locally.

Needs submitit, and partitions `low` and `high` of which jobs of `high` preempt and requeue those of `low`. It takes some
minutes, because Slurm waits two before it starts a requeued job again.
"""

import csv
import importlib.util
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from mulki_plugins.errors import MulkiError
from mulki_plugins.registry import discovery
from mulki_plugins.study import slurm


def partitions():
    if shutil.which("sbatch") is None or importlib.util.find_spec("submitit") is None:
        return set()
    shown = subprocess.run(["sinfo", "--noheader", "--format", "%R"], capture_output=True, text=True)
    return set(shown.stdout.split())


on_slurm = pytest.mark.skipif(not {"low", "high"} <= partitions(), reason="no Slurm with partitions low and high here")
STUDY = {
    "name": "preempted",
    "recipes": ["mtil"],
    "strategies": ["finetune", "lwf"],
    "seeds": [0, 1],
    "orders": {"I": ["digits", "scans"], "back": ["scans", "digits"]},
    "device": "cpu",
    "settings": ["loggers=[]", "train.iterations=60", "train.batch_size=8", "train.schedule.warmup=0"],
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("study.yaml").write_text(yaml.safe_dump(STUDY))
    return tmp_path


def command(*words):
    return [sys.executable, "-m", "mulki_plugins", "study", *words]


def status(out):
    done = subprocess.run(command("status", "study.yaml", "--out", out, "--json"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def wait_for(condition, seconds):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "Slurm did not get there in time"
        time.sleep(1.0)
    return found


def numbers(path):
    with path.open() as file:
        rows = list(csv.DictReader(file))
    key = ("part", "order", "label", "seed")
    return {
        tuple(row[k] for k in key): {k: v for k, v in row.items() if k not in ("seconds", "memory")} for row in rows
    }


@on_slurm
def test_preempted_killed_and_started_again(folder):
    """Two jobs are preempted, the submitting process is killed and started again: each run runs once, to the same digits."""
    on = ("--on", "slurm", "--partition", "low", "--time", "60", "--out", "slurm")
    first = subprocess.Popen(command("study.yaml", *on), stderr=subprocess.DEVNULL, start_new_session=True)
    logs = folder / "slurm" / "preempted" / "study"
    wait_for(lambda: len([p for p in logs.rglob("log.txt") if "training" in p.read_text()]) >= 2, 180)
    high = ["sbatch", "--partition", "high", "--ntasks", "2", "--output", "/dev/null", "--wrap", "sleep 10"]
    subprocess.run(high, check=True, capture_output=True)
    jobs = folder / "slurm" / "preempted" / "jobs"
    wait_for(lambda: len([p for p in jobs.glob("*-?-*.json") if json.loads(p.read_text()).get("exit") == 143]) == 2, 60)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert status("slurm")["counts"].keys() <= {"running", "waiting", "done"}
    again = subprocess.run(command("study.yaml", *on), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "submitted" not in again.stderr, "every run was in the queue already"
    assert "8 runs: 8 done" in again.stderr
    attempts = [json.loads(path.read_text())["attempts"] for path in jobs.glob("*-?-*.json")]
    assert sorted(attempts) == [1] * 6 + [2] * 2
    assert not list(logs.rglob("*.before-*")), "no run has started anew"
    assert len([log for log in jobs.glob("*.log") if "--resume" in log.read_text()]) == 2
    local = subprocess.run(command("study.yaml", "--threads", "1", "--out", "local"), capture_output=True, text=True)
    assert local.returncode == 0, local.stderr
    assert numbers(folder / "slurm/preempted/study.csv") == numbers(folder / "local/preempted/study.csv")


@on_slurm
def test_cancelled_jobs_stay_out_of_the_queue(folder):
    on = ("--on", "slurm", "--partition", "low", "--time", "60", "--out", "slurm")
    submitted = subprocess.run(command("study.yaml", *on, "--no-wait"), capture_output=True, text=True)
    assert submitted.returncode == 0, submitted.stderr
    assert "submitted 8 runs" in submitted.stderr
    again = subprocess.run(command("study.yaml", *on, "--no-wait"), capture_output=True, text=True)
    assert "submitted" not in again.stderr
    wait_for(lambda: status("slurm")["counts"].get("running"), 120)
    done = subprocess.run(command("cancel", "study.yaml", "--out", "slurm"), capture_output=True, text=True)
    assert done.stdout == "cancelled 8 runs\n"
    wait_for(lambda: "running" not in status("slurm")["counts"], 60)
    assert status("slurm")["counts"] == {"stopped": 8}


@on_slurm
def test_a_refused_submission_says_why(folder):
    refused = subprocess.run(
        command("study.yaml", "--on", "slurm", "--partition", "nowhere", "--out", "slurm"),
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 2
    assert "invalid partition" in refused.stderr
    assert status("slurm")["counts"] == {"missing": 8}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, 1440),
        (90, 90),
        ("90", 90),
        ("90:30", 90),
        ("1:30:00", 90),
        ("1:30:30", 91),
        ("2-12", 3600),
        ("1-0:30:00", 1470),
    ],
)
def test_time_limits_are_those_of_sbatch(text, expected):
    assert slurm.minutes(text) == expected


def test_a_wrong_time_limit_says_what_is_expected():
    with pytest.raises(MulkiError, match="expected minutes or"):
        slurm.minutes("tomorrow")


def test_a_job_leaves_out_the_packages_that_its_study_leaves_out(monkeypatch):
    monkeypatch.setattr(discovery, "_off", ("slow",))
    job = pickle.loads(pickle.dumps(slurm.RunOnNode(None, Path(), 1, 1, 0)))
    monkeypatch.setattr(discovery, "_off", ())
    with pytest.raises(MulkiError, match="--no-plugin names 'slow'"):
        job()
    discovery.catalog.cache_clear()


def test_without_submitit_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(MulkiError, match="needs submitit") as error:
        slurm.require_slurm()
    assert "pip install 'mulki[slurm]'" in error.value.hint
