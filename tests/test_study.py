"""`mulki study`: what it plans, that it runs only what is missing and each run once, and what it writes."""

import csv
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from threading import Timer
from types import SimpleNamespace

import attrs
import pytest
import torch
import yaml
from click.testing import CliRunner
from PIL import Image

from mulki_plugins.cli import main
from mulki_plugins.errors import MulkiError, Stopped
from mulki_plugins.files import is_locked
from mulki_plugins.recipe.settings import fingerprint, known_fingerprints
from mulki_plugins.registry.catalog import Catalog, Provenance
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.registry.register import Register
from mulki_plugins.streams import TaskStream
from mulki_plugins.streams.mini.stream import ORDERS
from mulki_plugins.study import execute, launch, slurm, state
from mulki_plugins.study.conduct import seconds_left
from mulki_plugins.study.plan import choice_jobs, plan_run, reported_jobs
from mulki_plugins.study.read import read_study
from mulki_plugins.study.state import ATTEMPT, JobFiles, State, _explain, held
from mulki_plugins.study.table import Line, find_line, read_lines, write_lines
from tests.conftest import small_stream

ROOT = Path(__file__).parent.parent


def ordered_stream(*, tasks: list[str] | None = None, order: str | list[str] = "I", evaluate_on: str = "test"):
    """The small tasks with the options that a study sets."""
    small = {task.name: task for task in small_stream().tasks}
    names = tasks or list(small)
    if isinstance(order, list):
        names = [name for name in order if name in names]
    return TaskStream(name="ordered", tasks=tuple(small[name] for name in names))


class Forked:
    """A run's process that shares the test's libraries and parts: as `subprocess.Popen`, without the seconds of imports."""

    def __init__(self, words, env, log):
        self.returncode = None
        self.pid = os.fork()
        if self.pid:
            return
        os.setsid()
        for descriptor in (1, 2):
            os.dup2(log, descriptor)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        os.environ.update(env)
        torch.set_num_threads(1)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        code = 1
        try:
            main.main(list(words[words.index("mulki_plugins") + 1 :]), prog_name="mulki")
        except SystemExit as end:
            code = end.code or 0
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


@pytest.fixture
def in_forks(monkeypatch):
    """Runs begin as forks of this process. Yields their command lines."""
    started = []

    def start(words, env, log, lock):
        started.append((words, env))
        return Forked(words, env, log)

    monkeypatch.setattr(launch, "start_process", start)
    monkeypatch.setattr(execute, "POLL", 0.02)
    return started


@pytest.fixture
def small_study(tmp_path, small_parts, monkeypatch):
    """Two strategies on two small tasks in two orders, with an ablation; each run takes about a second."""
    parts = Catalog()
    register = Register(parts, Provenance(distribution="mulki", version=""))
    register.stream("ordered", ordered_stream, summary="small tasks in an order")
    for key, part in parts.parts.items():
        monkeypatch.setitem(catalog().parts, key, part)
    recipe = yaml.safe_load((ROOT / "recipes" / "mtil.yaml").read_text())
    recipe["stream"] = {"name": "ordered", "tasks": ["first", "second"]}
    recipe["model"] = {"name": "small-clip"}
    recipe["train"] |= {"iterations": 2, "batch_size": 4, "schedule": {"warmup": 0}}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(recipe | {"name": "small"}))
    monkeypatch.chdir(tmp_path)
    return {
        "name": "tried",
        "recipes": ["small.yaml"],
        "device": "cpu",
        "settings": ["loggers=[]"],
        "orders": {"I": "I", "random": ["second", "first"]},
        "parts": {
            "study": {
                "title": "Order {order}",
                "runs": [
                    {"strategies": ["zero-shot"], "orders": ["I", "random"], "in_tables": False},
                    {"strategies": ["mulki", "finetune"], "orders": ["I"], "seeds": [0, 1]},
                    {"strategies": ["mulki", "finetune"], "orders": ["random"]},
                ],
            },
            "ablation": {
                "beside": {"part": "study", "label": "mulki"},
                "runs": [
                    {
                        "strategies": ["mulki"],
                        "orders": ["I"],
                        "variants": {
                            "without adding": {"without": ["adding"]},
                            "only the previous teacher": {"settings": ["strategy.teachers.use=previous"]},
                        },
                    }
                ],
            },
        },
        "choice": {
            "seed": 9,
            "settings": {"wise-ft": [["strategy.connecting.inter=0.1"], ["strategy.connecting.inter=0.9"]]},
        },
    }  # fmt: skip


def mulki(*words, status=0):
    done = CliRunner().invoke(main, ["study", *map(str, words)])
    assert done.exit_code == status, done.output
    return done


def written(study, name="tried.yaml"):
    Path(name).write_text(yaml.safe_dump(study, sort_keys=False))
    return name


def rows(path="runs/studies/tried/study.csv"):
    with open(path) as file:
        return list(csv.DictReader(file))


# The study of docs/results.md


def test_the_shipped_study_covers_what_is_promised():
    study = read_study("mini").study
    jobs = list(reported_jobs(study))
    assert len({(j.part, j.order, j.label, j.seed) for j in jobs}) == len(jobs) == 299
    count = {}
    for job in jobs:
        count[job.part, job.order, job.label] = count.get((job.part, job.order, job.label), 0) + 1
    for name in ("mulki-plus", "finetune", "lwf", "wise-ft", "weight-ensemble", "snd", "zscl"):
        assert count["study", "I", name] >= 5
        assert min(count["study", "II", name], count["study", "random", name]) >= 3
    assert all(count["study", order, "zero-shot"] == 1 for order in study.orders)
    assert sum(part == "alone" for part, _, _ in count) == 11
    for name in {path.stem for path in (ROOT / "strategies").glob("*.yaml")} - {"zero-shot"}:
        orders = ["I"] if name == "joint" else study.orders
        assert min(count["study", order, name] for order in orders) >= 3
    assert sorted(study.orders["random"]) == sorted(catalog().find("stream", "mtil-mini").tasks)
    assert study.orders["random"] not in (list(ORDERS["I"]), list(ORDERS["II"]))
    for job in [*jobs, *choice_jobs(study)]:
        recipe = plan_run(job, Path()).recipe
        assert recipe.seeds == [job.seed]
        assert recipe.stream.options["evaluate_on"] == ("validation" if job.part == "choice" else "test")
    assert {len(settings) for settings in study.choice.settings.values()} == {4, 5}, (
        "every method is given as many settings, and one more where the best lay at their edge"
    )


def test_what_was_measured_is_not_measured_again(tmp_path):
    """The documentation says how many runs are still to come; of each method all candidates have been tried."""
    counts = json.loads(mulki("status", "mini", "--out", tmp_path, "--json").stdout)["counts"]
    said = re.search(
        r"(\d+) of the plan's 299 runs (?:is|are) still to come", (ROOT / "docs" / "results.md").read_text()
    )
    missing = {"missing": int(said[1])} if said else {}
    assert counts == {"done": 299 - sum(missing.values()), **missing}, (
        "a new option whose default changes nothing belongs to _LATER_GROUPS"
    )
    study = read_study("mini")
    lines = read_lines(study.measured)
    tried = [plan_run(job, tmp_path) for job in choice_jobs(study.study)]
    assert all(find_line(run, lines, "cpu") for run in tried)
    assert not any(find_line(run, lines, "cuda") for run in tried), "a line of a CPU is no line of a GPU"


def test_a_line_of_an_earlier_version_is_known_by_its_options():
    study = read_study("mini").study
    job = next(job for job in reported_jobs(study) if job.label == "wise-ft")
    recipe = plan_run(job, Path()).recipe
    known = known_fingerprints(recipe)
    assert {"12505d8ac61f", fingerprint(recipe)} <= known, "as docs/study.csv has it, and as it is now"
    [connecting] = [entry for entry in recipe.strategy.plugins if entry.name == "connecting"]
    connecting.options["initial"] = 0.1
    assert "12505d8ac61f" not in known_fingerprints(recipe), "an option that changes the numbers makes another run"
    connecting.options["initial"] = 0.0


@pytest.mark.usefixtures("second_model")
@pytest.mark.parametrize(
    ("study", "page"),
    [
        ("mini", "results.md"),
        ("photos", "photographs.md"),
        ("photos-tuned", "photographs-tuned.md"),
        ("mini-vit", "second-model.md"),
        ("leads", "exploration.md"),
    ],
)
def test_the_tables_of_the_documentation_come_from_its_lines(tmp_path, monkeypatch, study, page):
    document = tmp_path / page
    document.write_text((ROOT / "docs" / page).read_text())
    if study.startswith("photos"):  # the fingerprints of its runs need the folders, not the photographs
        monkeypatch.chdir(tmp_path)
        for path in (
            f"cifar-photos/part{i}/{part}/{name}" for i in range(1, 6) for part in ("train", "test") for name in "ab"
        ):
            Path("data", path).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(Path("data", path, "0.png"))
    mulki("collect", study, "--out", tmp_path, "--into", document)
    assert document.read_text() == (ROOT / "docs" / page).read_text()


# Running


def test_runs_what_is_missing_and_collects(small_study, in_forks, no_slow_output):
    name = written(small_study)
    planned = mulki(name, "--dry-run").stdout.splitlines()
    assert len(planned) == 10
    assert all(line.startswith("mulki run small.yaml --strategy ") for line in planned)
    mulki(name, "--only", "study", "--only", "random", "--processes", "1", "--threads", "1")
    assert [row["label"] for row in rows()] == ["zero-shot", "mulki", "finetune"]
    assert {row["order"] for row in rows()} == {"random"}
    done = mulki(name, "--processes", "2", "--threads", "1")
    assert "10 runs: 3 done, 7 missing" in done.stderr
    assert "10 runs: 10 done" in done.stderr
    assert len(in_forks) == 10
    assert {env["OMP_NUM_THREADS"] for _, env in in_forks} == {"1"}
    mulki(name)
    assert len(in_forks) == 10, "nothing runs twice"
    assert len(rows()) == 10
    Path("results.md").write_text(
        "Before.\n<!-- study: begin -->\nold\n<!-- study: end -->\n<!-- choice: begin -->\n<!-- choice: end -->\nAfter.\n"
    )
    no_slow_output.undo()  # the figure is real
    table = mulki("collect", name, "--into", "results.md", "--figure", "study.png").stdout
    document = Path("results.md").read_text()
    assert document.startswith("Before.\n")
    assert document.endswith("After.\n")
    assert "old" not in document
    assert "| without adding | 1 |" in document
    assert "| only the previous teacher | 1 |" in table
    assert Path("study.png").stat().st_size > 10_000
    mulki_rows = [row for row in rows() if (row["part"], row["order"], row["label"]) == ("study", "I", "mulki")]
    mean = sum(float(row["last"]) for row in mulki_rows) / 2
    assert f"{mean:.1f} ±" in next(line for line in table.splitlines() if line.startswith("| mulki | 2"))
    assert float(mulki_rows[0]["memory"]) > 100
    assert float(mulki_rows[0]["seconds"]) > 0
    small_study["parts"]["ablation"]["runs"][0]["variants"]["only the previous teacher"]["settings"] = [
        "strategy.teachers.use=initial"
    ]
    assert "10 runs: 9 done, 1 missing" in mulki(written(small_study), "--dry-run").stderr


def test_a_lost_table_is_collected_again(small_study, in_forks):
    name = written(small_study)
    mulki(name, "--only", "zero-shot")
    before = sorted(rows(), key=str)
    Path("runs/studies/tried/study.csv").unlink()
    mulki("collect", name)
    assert sorted(rows(), key=str) == before
    mulki("collect", name, "--table", "other.csv")
    assert sorted(rows("other.csv"), key=str) == before


def test_the_same_numbers_as_the_run_of_the_command_line(small_study, in_forks):
    name = written(small_study)
    mulki(name, "--only", "finetune", "--only", "seed-1")
    words = next(line for line in mulki(name, "--dry-run", "--only", "zero-shot", "--out", "x").stdout.splitlines())
    assert " --seed 0 --out x/tried/study/I --name zero-shot" in words
    alone = ["run", "small.yaml", "--strategy", "finetune", "--seed", "1", "--set", "stream.order=I", "--out", "alone"]
    assert CliRunner().invoke(main, alone).exit_code == 0
    [result] = Path("alone").rglob("result.json")
    assert float(rows()[0]["last"]) == round(json.loads(result.read_text())["metrics"]["last"], 4)


def test_chooses_by_the_rule(small_study, in_forks):
    table = mulki("choose", written(small_study), "--processes", "2").stdout
    found = [row for row in table.splitlines() if row.startswith("| wise-ft:")]
    assert len(found) == 2
    means = [float(row.split("|")[5]) for row in found]
    assert means == sorted(means, reverse=True)
    assert {row["part"] for row in rows()} == {"choice"}


def test_the_chosen_settings_are_applied(small_study, in_forks):
    small_study["choice"]["apply"] = True
    small_study["parts"] = {"study": {"runs": [{"strategies": ["wise-ft", "finetune"], "orders": ["I"]}]}}
    name = written(small_study)
    done = mulki(name, "--dry-run", "--only", "finetune")
    assert len(done.stdout.splitlines()) == 1
    assert "wait" not in done.stderr
    done = mulki(name, "--dry-run", "--only", "wise-ft")
    assert len(done.stdout.splitlines()) == 2, "the candidates come first"
    assert "1 run waits for the choice of settings" in done.stderr
    table = mulki("choose", name).stdout
    best = next(row for row in table.splitlines() if row.startswith("| wise-ft:")).split("|")[1].split(": ")[1].strip()
    mulki(name)
    [recipe] = Path("runs/studies/tried/study").rglob("wise-ft/seed-0/recipe.yaml")
    [stack] = yaml.safe_load(recipe.read_text())["strategy"]["plugins"]
    assert stack["connecting"]["inter"] == float(best.rpartition("=")[2])


def test_candidates_that_fail_end_no_run_of_another_method(small_study, in_forks):
    small_study["choice"] |= {"apply": True, "settings": {"wise-ft": [["device=cuda:7"]]}}
    small_study["parts"] = {"study": {"runs": [{"strategies": ["wise-ft", "finetune"], "orders": ["I"]}]}}
    del small_study["device"]
    name = written(small_study)
    done = mulki(name, "--only", "wise-ft", status=1)
    assert "FAILED: $.device: cuda:7" in done.stderr
    assert "1 run waits for the choice of settings" in done.stderr
    done = mulki(name, status=1)
    assert "1 run waits for the choice of settings" in done.stderr
    assert [row["label"] for row in rows()] == ["finetune"]
    assert "2 runs: 1 done, 1 failed" in mulki("status", name).stdout


def test_candidates_without_apply_are_in_the_status_once_they_have_begun(small_study, in_forks):
    small_study["parts"] = {"study": {"runs": [{"strategies": ["finetune"], "orders": ["I"]}]}}
    name = written(small_study)
    assert "1 run: 1 missing" in mulki("status", name).stdout
    mulki("choose", name)
    assert "3 runs: 2 done, 1 missing" in mulki("status", name).stdout


def test_options_of_another_place_are_refused(small_study):
    name = written(small_study)
    for words in (["--partition", "low"], ["--no-wait"], ["--gpus", 2], ["--slurm", "account=lab"]):
        assert f"{words[0]}: the runs go --on local" in mulki(name, "--dry-run", *words, status=2).stderr
    assert "--gpus-per-run is for --on gpus" in mulki(name, "--dry-run", "--gpus-per-run", 2, status=2).stderr
    mulki(name, "--dry-run", "--on", "slurm", "--partition", "low")


def test_a_run_that_fails_ends_no_other(small_study, in_forks):
    small_study["parts"] = {
        "study": {
            "runs": [{"strategies": ["finetune"], "orders": ["I"], "variants": {"broken": {"settings": ["device=cuda:7"]}}}]
        },
        "more": {"runs": [{"strategies": ["finetune"], "orders": ["I"]}]},
    }  # fmt: skip
    del small_study["device"]
    name = written(small_study)
    failed = mulki(name, "--processes", "1", status=1)
    reason = "$.device: cuda:7 is not on this machine"
    assert f"study I broken seed 0: FAILED: {reason}" in failed.stderr
    assert "2 runs: 1 done, 1 failed" in failed.stderr
    shown = mulki("status", name).stdout
    assert "2 runs: 1 done, 1 failed" in shown
    assert reason in shown
    data = json.loads(mulki("status", name, "--json").stdout)
    assert data["counts"] == {"done": 1, "failed": 1}
    assert next(run["reason"] for run in data["runs"] if run["status"] == "failed").startswith(reason)


def test_a_killed_run_ends_no_other(small_study, in_forks, monkeypatch):
    """A process that dies takes only its own run with it, and the run is started again by the next call."""
    forked = Forked.__init__

    def dying(self, words, env, log):
        forked(self, words, env, log)
        if "finetune" in words:
            os.kill(self.pid, signal.SIGKILL)

    monkeypatch.setattr(Forked, "__init__", dying)
    small_study["parts"] = {"study": {"runs": [{"strategies": ["finetune", "zero-shot"], "orders": ["I"]}]}}
    name = written(small_study)
    assert "was ended by SIGKILL" in mulki(name, "--processes", "2", status=1).stderr
    assert [row["label"] for row in rows()] == ["zero-shot"]
    monkeypatch.setattr(Forked, "__init__", forked)
    mulki(name)
    assert {row["label"] for row in rows()} == {"zero-shot", "finetune"}


def test_a_changed_setting_moves_the_earlier_run_aside(small_study, in_forks):
    small_study["parts"] = {"study": {"runs": [{"strategies": ["finetune"], "orders": ["I"]}]}}
    mulki(written(small_study))
    small_study["settings"].append("train.iterations=3")
    mulki(written(small_study))
    runs = Path("runs/studies/tried/study/I/small/finetune")
    assert sorted(path.name for path in runs.iterdir()) == ["seed-0", "seed-0.before-1"]
    assert len({row["fingerprint"] for row in rows()}) == 2


# Stopped, adopted, cancelled


@pytest.mark.parametrize(
    ("plugins", "change", "status"),
    [(["avalanche.agem"], {"status": "stopped"}, "stopped"), ([], {"device": {"type": "cuda"}}, "missing")],
    ids=["a plugin that cannot go on", "another device"],
)
def test_a_run_that_cannot_go_on_starts_anew(small_study, in_forks, plugins, change, status):
    variants = {"one": {"add": plugins}}
    small_study["parts"] = {"study": {"runs": [{"strategies": ["finetune"], "orders": ["I"], "variants": variants}]}}
    mulki(name := written(small_study))
    result = Path("runs/studies/tried/study/I/small/one/seed-0/result.json")
    result.write_text(json.dumps(json.loads(result.read_text()) | change))
    Path("runs/studies/tried/study.csv").unlink()
    assert f"1 run: 1 {status}" in mulki("status", name).stdout
    mulki(name)
    assert [word for words, _ in in_forks for word in words if word == "--resume"] == []
    assert json.loads(result.read_text())["status"] == "complete"
    assert result.parent.with_name("seed-0.before-1").is_dir()


def test_runs_of_a_study_that_was_killed_are_picked_up(small_study, in_forks):
    """The lock of a run is its process's: a second study waits for it and starts nothing."""
    small_study["parts"] = {"study": {"runs": [{"strategies": ["finetune"], "orders": ["I"]}]}}
    name = written(small_study)
    study = read_study(name).study
    run = plan_run(next(reported_jobs(study)), Path("runs/studies/tried"))
    files = state.files_of(Path("runs/studies/tried"), run)
    with held(files.lock) as lock:
        assert lock is not None
        orphan = subprocess.Popen(["sleep", "2"], pass_fds=(lock,))
    files.write(began="x", pid=orphan.pid, host=socket.gethostname(), exit=None)
    assert is_locked(files.lock), "the process holds it, not this one"
    shown = mulki("status", name).stdout
    assert f"process {orphan.pid} on {socket.gethostname()}" in shown
    again = mulki(name, status=1)
    assert "1 run: 1 running" in again.stderr
    assert "its process ended without a result" in again.stderr
    assert not in_forks, "the study has waited, and started nothing"
    orphan.wait()
    mulki(name)
    assert len(in_forks) == 1


def test_two_studies_at_once_are_refused(small_study, in_forks):
    name = written(small_study)
    jobs = Path("runs/studies/tried/jobs")
    with held(jobs / "study.lock") as lock:
        assert lock is not None
        (jobs / "runner.json").write_text(json.dumps({"pid": 42, "host": "elsewhere"}))
        refused = mulki(name, status=2)
        assert "process 42 on elsewhere is running this study" in refused.stderr
        assert "process 42 on elsewhere is running this study" in mulki("status", name).stdout
        assert mulki("cancel", name).stdout == "cancelled 0 runs\n", "a process elsewhere gets no signal from here"
    assert not in_forks


@pytest.mark.parametrize("seconds", [0.1, 0.6])
def test_a_run_whose_lock_is_taken_for_a_moment_is_started_all_the_same(small_study, monkeypatch, seconds):
    run = plan_run(_jobs(written(small_study))[0], root := Path("runs"))
    lock = state.files_of(root, run).lock
    lock.parent.mkdir(parents=True)
    glance = os.open(lock, os.O_RDONLY | os.O_CREAT)
    fcntl.flock(glance, fcntl.LOCK_SH)
    Timer(seconds, os.close, [glance]).start()
    monkeypatch.setattr(launch, "start_process", lambda *_: subprocess.Popen(["true"]))
    monkeypatch.setattr(execute, "POLL", 0.02)
    ended = []
    execute.Workers(root, [launch.Room()], ended.append, lambda line: None).work_off([run])
    assert ended == [run]


def test_cancel_stops_the_process_of_a_run(small_study):
    small_study["parts"] = {"study": {"runs": [{"strategies": ["finetune"], "orders": ["I"], "seeds": [0, 1]}]}}
    name, root = written(small_study), Path("runs/studies/tried")
    started = []
    for job in reported_jobs(read_study(name).study):
        files = state.files_of(root, plan_run(job, root))
        with held(files.lock) as lock:
            process = subprocess.Popen(["sleep", "60"], pass_fds=(lock,), start_new_session=True)
        files.write(began="x", pid=process.pid, host=socket.gethostname(), exit=None)
        started.append(process)
    assert mulki("cancel", name, "--only", "seed-1").stdout == "cancelled 1 run\n"
    assert started[1].wait(10) == -signal.SIGTERM
    assert started[0].poll() is None
    assert "1 running, 1 stopped" in mulki("status", name).stdout
    assert mulki("cancel", name).stdout == "cancelled 1 run\n"
    assert started[0].wait(10) == -signal.SIGTERM


def test_a_run_started_here_after_slurm_is_no_job_of_it(small_study, monkeypatch):
    name, root = written(small_study), Path("runs/studies/tried")
    run = plan_run(_jobs(name)[0], root)
    files = state.files_of(root, run)
    files.folder.mkdir(parents=True)
    files.write(slurm="17_0", began="x", exit=1)

    def start(words, env, log, lock):
        return subprocess.Popen(["sleep", "5"], pass_fds=(lock,), start_new_session=True)

    monkeypatch.setattr(launch, "start_process", start)
    with held(files.lock) as lock:
        process = launch.launch(run, files, launch.Room(), lock, ["mulki"]).process
    assert mulki("cancel", name).stdout == "cancelled 1 run\n"
    assert process.wait(10) == -signal.SIGTERM


def test_a_job_that_waits_in_the_queue_has_not_failed(small_study, monkeypatch):
    name, root = written(small_study), Path("runs/studies/tried")
    run = plan_run(_jobs(name)[0], root)
    files = state.files_of(root, run)
    files.folder.mkdir(parents=True)
    files.write(slurm="", exit=None)
    monkeypatch.setattr(slurm, "queued", lambda root: {run.key: "PENDING Priority 17_0"})
    monkeypatch.setattr(execute, "POLL", 0.02)
    told = mulki(name, "--only", "I", "--only", "zero-shot").stderr
    assert "zero-shot seed 0: waiting; Slurm: PENDING Priority 17_0" in told
    assert "FAILED" not in told


def test_a_signal_stops_the_runs_and_the_next_call_goes_on(small_study, in_forks):
    small_study["settings"] += ["train.iterations=4000"]
    small_study["parts"] = {"study": {"runs": [{"strategies": ["finetune"], "orders": ["I"]}]}}
    name = written(small_study)
    child = os.fork()
    if not child:  # the study in a process of its own, which gets the signal
        os.setsid()
        code = CliRunner().invoke(main, ["study", name]).exit_code
        os._exit(code)
    checkpoints = Path("runs/studies/tried/study/I/small/finetune/seed-0/checkpoints")
    deadline = time.monotonic() + 60
    while not checkpoints.is_dir() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGTERM
    assert "1 stopped" in mulki("status", name).stdout
    assert mulki(name, "--dry-run").stdout.endswith(" --resume\n")
    assert any("step" in path.name for path in checkpoints.iterdir()), "it stopped with a checkpoint within the task"
    [run] = [state.files_of(Path("runs/studies/tried"), plan_run(j, Path("runs/studies/tried"))) for j in _jobs(name)]
    assert run.read()["exit"] == 128 + signal.SIGTERM


def test_a_signal_while_a_run_is_being_started_stops_it_too(small_study, monkeypatch):
    run = plan_run(_jobs(written(small_study))[0], root := Path("runs"))

    def start(words, env, log, lock):
        process = subprocess.Popen(["sleep", "5"], pass_fds=(lock,), start_new_session=True)
        os.kill(os.getpid(), signal.SIGTERM)
        return process

    monkeypatch.setattr(launch, "start_process", start)
    monkeypatch.setattr(execute, "POLL", 0.02)
    ended = []
    with pytest.raises(Stopped):
        execute.Workers(root, [launch.Room()], ended.append, lambda line: None).work_off([run])
    record = state.files_of(root, run).read()
    assert (ended, record["cancelled"], record["exit"]) == ([run], True, -signal.SIGTERM)


def _jobs(name):
    return list(reported_jobs(read_study(name).study))


# Where runs go


def test_rooms_share_out_the_machine():
    threads = [room.threads for room in execute.local_rooms(None, None, 8, False)]
    assert threads == [1] * 8
    assert [room.threads for room in execute.local_rooms(3, None, 8, False)] == [2, 2, 2]
    assert [room.threads for room in execute.local_rooms(None, 4, 8, False)] == [4, 4]
    assert [room.threads for room in execute.local_rooms(None, None, 8, True)] == [8], (
        "one GPU is not shared by default"
    )
    rooms = execute.gpu_rooms(["0", "1", "GPU-3", "5"], 2, None, 16)
    assert [(room.gpus, room.threads) for room in rooms] == [(("0", "1"), 4), (("GPU-3", "5"), 4)]
    with pytest.raises(execute.MulkiError, match="a run needs 2, and this machine shows 1"):
        execute.gpu_rooms(["0"], 2, None, 16)


def test_each_gpu_gets_a_run(small_study, in_forks, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    mulki(written(small_study), "--on", "gpus", "--only", "random")
    assert {env["CUDA_VISIBLE_DEVICES"] for _, env in in_forks} == {"2", "3"}
    assert len(in_forks) == 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "this machine shows none" in mulki("tried.yaml", "--on", "gpus", "--only", "I", status=2).stderr


def test_several_gpus_share_a_run_through_torchrun(small_study):
    run = plan_run(_jobs(written(small_study))[0], Path("out"))
    words = launch.command(run, 4)
    assert words[:6] == [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4", "--standalone"]
    assert words[6:9] == ["-m", "mulki_plugins", "run"]
    meeting = launch.Rendezvous(nodes=2, host="node-1", port=20_001, job="17")
    words = launch.command(run, 4, meeting)
    assert words[words.index("--nnodes") + 1] == "2"
    assert words[words.index("--rdzv-endpoint") + 1] == "node-1:20001"
    assert "--resume" not in words, "there is no folder to continue"


def test_the_time_left_is_counted_from_finished_runs(small_study):
    jobs = _jobs(written(small_study))
    runs = {(run.job.label, run.job.order, run.job.seed): run for run in (plan_run(j, Path("none")) for j in jobs)}

    def finished(label, seconds):
        run = runs[label, "I", 0]
        line = Line(
            part="study", order="I", label=label, seed=0, fingerprint="", device="cpu", code="", seconds=seconds
        )
        return State(run=run, status="done", line=line)

    left = [State(run=runs["mulki", "I", 1], status="running"), State(run=runs["finetune", "I", 1], status="running")]
    assert seconds_left(left) is None
    assert seconds_left([finished("mulki", 100.0), finished("finetune", 20.0), *left]) == 60.0
    assert seconds_left([finished("mulki", 100.0), *left]) == 100.0, "what has not run takes as long as the others"


def test_a_damaged_record_is_no_record(tmp_path):
    files = JobFiles(folder=tmp_path, key="x")
    files.record.write_text("{")
    assert files.read() == {}
    files.write(pid=3)
    assert files.read() == {"pid": 3}


# The file


MISTAKES = """\
name: wrong
recipes: [mtil]
strategies: [mulki, finetun]
seeds: [0]
orders: {I: I, odd: [digits, nothing]}
settings: [train.iteration=5]
choice:
  seed: 1
  settings:
    lwf: [[strategy.lwf.imag=3]]
"""


def test_all_mistakes_are_reported_with_their_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("wrong.yaml").write_text(MISTAKES)
    lines = mulki("wrong.yaml", "--dry-run", status=2).stderr.splitlines()
    assert "error: wrong.yaml:3: $.strategies[1]: no strategy is named 'finetun'" in lines[0]
    assert lines[1].startswith("error: wrong.yaml:5: $.orders.odd: ")
    assert "no task 'nothing'" in lines[1]
    assert lines[2].startswith("error: wrong.yaml:6: $.settings[0]: train.iteration=5: ")
    assert "did you mean 'iterations'" in lines[2] or "train.iterations" in lines[2]
    assert lines[3].startswith("error: wrong.yaml:10: $.choice.settings.lwf[0][0]: strategy.lwf.imag=3: ")
    assert len(lines) == 4


def test_a_wrong_value_hides_no_other_and_causes_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = {"name": "bad", "recipes": ["mtil"], "orders": {"I": 5}, "settings": ["train.iteration=3"]}
    study["parts"] = {"a": {"runs": [{"orders": ["I"], "seeds": [0, -1]}]}}
    Path("bad.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    lines = mulki("status", "bad.yaml", status=2).stderr.splitlines()
    places = ["$.orders.I: ", "$.settings[0]: train.iteration=3: ", "$.parts.a.runs[0].seeds[1]: "]
    assert len(lines) == len(places)
    assert all(place in line for place, line in zip(places, lines, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strategys": []}, "$.strategys: unknown option (did you mean 'strategies'?)"),
        ({"seeds": ["a"]}, "$.seeds[0]: expected a whole number, got 'a'"),
        ({"name": "../x"}, "names a folder"),
        ({"recipes": []}, "$.recipes: expected at least one recipe"),
        ({"recipes": ["nowhere"]}, "$.recipes[0]: nowhere: no such file, and no recipe of that name"),
        ({"parts": {"jobs": {"runs": [{}]}}}, "a part cannot be called 'jobs'"),
        ({"parts": {"a": {"runs": []}}}, "$.parts.a.runs: expected at least one block of runs"),
        ({"parts": {"a": {"runs": [{"orders": ["III"]}]}}}, "no order is named 'III'"),
        ({"parts": {"a": {"runs": [{}, {}]}}}, "is there 2 times; name variants apart"),
        ({"choice": {"seed": 0, "settings": {"lwf": [[]]}}}, "the seed 0 is one of the reported runs"),
        (
            {"choice": {"seed": 5, "budget": 1, "settings": {"l2": [["strategy.l2.weight=1"], ["strategy.l2.weight=2"]]}}},
            "2 candidates, but the budget (choice.budget) is 1",
        ),
        ({"cost": {"strategies": ["lwf"]}}, "$.cost.base: expected one of the strategies that are measured"),
        ({"run": {"on": "moon"}}, "expected 'local' or 'gpus' or 'slurm', got 'moon'"),
        ({"seeds": []}, "$.seeds: expected at least one seed"),
        ({"parts": {"one": {"runs": [{"seeds": []}]}}}, "$.parts.one.runs[0].seeds: expected at least one seed"),
        (
            {"choice": {"seed": 5, "by": [], "settings": {"l2": [["strategy.l2.weight=1"]]}}},
            "$.choice.by: expected at least one metric",
        ),
        (
            {"choice": {"seed": 5, "settings": {"joint": [["train.iterations=1"]]}}},
            "$.choice.by: joint learns one task here, and has no transfer and no average",
        ),
        (
            {"choice": {"seed": 5, "apply": True, "settings": {"mulki": [[]]}}, "strategies": ["strategies/mulki.yaml"]},
            "$.choice.settings.mulki: no run names the strategy 'mulki' (known: strategies/mulki.yaml)",
        ),
        (
            {"choice": {"seed": 5, "apply": True, "settings": {"lwf": [[]]}},
             "parts": {"a": {"runs": [{"strategies": ["lwf"]}, {"strategies": ["lwf"], "recipes": ["mtil-5shot"]}]}}},
            "$.parts.a: the settings of 'lwf' are chosen on 'mtil' alone, and its runs of 'mtil-5shot' get none",
        ),
        ({"seeds": [0, -1], "settings": ["train.iteration=5"]}, "$.settings[0]: train.iteration=5: "),
        ({"measured": 5, "settings": ["train.iteration=5"]}, "$.measured: "),
        ({"strategies": ["lwf"], "main": "lfw"}, "$.main: no run has the label 'lfw' (did you mean 'lwf'?)"),
        (
            {"parts": {"a": {"runs": [{"seeds": [0]}, {"seeds": [1], "settings": ["train.iterations=4"]}]}}},
            "$.parts.a: the runs of 'mulki-plus' differ in more than their seed; name variants apart",
        ),
        (
            {"parts": {"a": {"runs": [{}]}, "b": {"runs": [{}], "beside": {"part": "a", "label": "mulki-plus"}}}},
            "$.parts.b.beside.label: 'b' has runs with the label 'mulki-plus' itself; name variants apart",
        ),
        (
            {"parts": {"one": {"runs": [{"strategies": ["lwf"]}], "beside": {"part": "one", "label": "lfw"}}}},
            "$.parts.one.beside.label: no run of 'one' has the label 'lfw' (did you mean 'lwf'?)",
        ),
    ],
)  # fmt: skip
def test_a_mistake_says_where_and_what(tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text(yaml.safe_dump({"name": "bad", "recipes": ["mtil"]} | change))
    assert message in mulki("status", "bad.yaml", status=2).stderr


def test_a_seed_that_every_block_replaces_is_free_for_the_choice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = {"name": "own", "recipes": ["mtil"], "choice": {"seed": 0, "settings": {"lwf": [[]]}}}
    own |= {"parts": {"one": {"runs": [{"seeds": [1]}]}}}
    Path("own.yaml").write_text(yaml.safe_dump(own))
    assert [job.seed for job in choice_jobs(read_study("own.yaml").study)] == [0]


def test_the_settings_of_a_run_prevail_over_those_of_all(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    variants = {f"{steps} steps": {"settings": [f"train.iterations={steps}"]} for steps in (2, 8)}
    block = {"settings": ["train.batch_size=16"], "strategies": ["lwf", "finetune"], "variants": variants}
    candidates = {"lwf": [["train.batch_size=4"], ["train.batch_size=8"]]}
    own = {"name": "own", "recipes": ["mtil"], "settings": ["train.iterations=3", "train.batch_size=32"]}
    own |= {"parts": {"one": {"runs": [block]}}, "choice": {"seed": 5, "settings": candidates, "apply": True}}
    Path("own.yaml").write_text(yaml.safe_dump(own))
    study = read_study("own.yaml").study
    chosen = {("mtil", "lwf"): ("train.batch_size=8", "train.iterations=5", "strategy.lwf.image=2")}
    trains = [plan_run(job, Path()).recipe.train for job in reported_jobs(study, chosen)]
    assert [(train.iterations, train.batch_size) for train in trains] == [(2, 16), (2, 16), (8, 16), (8, 16)]
    assert [plan_run(job, Path()).recipe.train.batch_size for job in choice_jobs(study)] == [4, 8]
    plugins = [plan_run(job, Path()).recipe.strategy.plugins for job in reported_jobs(study, chosen)]
    assert [each[-1].options["image"] for each in plugins if each] == [2, 2]


def test_the_chosen_settings_reach_a_recipes_own_strategy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = {"name": "own", "recipes": ["mtil"]}
    own |= {"choice": {"seed": 5, "settings": {"mulki-plus": [["train.iterations=7"]]}, "apply": True}}
    Path("own.yaml").write_text(yaml.safe_dump(own))
    study = read_study("own.yaml").study
    [job] = reported_jobs(study, {("mtil", "mulki-plus"): ("train.iterations=7",)})
    assert plan_run(job, Path()).recipe.train.iterations == 7
    assert not list(reported_jobs(study)), "it waits for the choice"
    assert "study own, 1 run, 1 to choose settings" in CliRunner().invoke(main, ["validate", "own.yaml"]).stdout


def test_a_recipes_own_strategy_is_that_with_the_settings_of_the_study(small_study):
    recipe = yaml.safe_load(Path("small.yaml").read_text())
    del recipe["stream"]
    Path("part.yaml").write_text(yaml.safe_dump(recipe))
    settings = ["strategy=lwf", "stream={name: ordered, tasks: [first, second]}"]
    [job] = _jobs(written({"name": "own", "recipes": ["part.yaml"], "settings": settings}))
    assert (job.label, plan_run(job, Path()).recipe.strategy.name) == ("lwf", "lwf")


def test_a_recipe_is_no_study_and_a_study_no_recipe():
    assert (
        "this is a recipe, not a study; type `mulki run recipes/mtil.yaml`"
        in mulki("recipes/mtil.yaml", status=2).stderr
    )
    assert (
        "studies/mini.yaml:1: $: this is a study, not a recipe; type `mulki study studies/mini.yaml`"
        in CliRunner().invoke(main, ["run", "studies/mini.yaml"]).stderr
    )
    assert "this is a strategy, not a study; use it with --strategy" in mulki("strategies/lwf.yaml", status=2).stderr
    assert "'mini' is a study; type `mulki study mini`" in CliRunner().invoke(main, ["run", "mini"]).stderr
    assert "'mtil' is a recipe; type `mulki run mtil`" in mulki("mtil", status=2).stderr


def test_every_candidate_must_suit_the_runs_that_may_get_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    variants = {"plain": {}, "no connecting": {"without": ["connecting"]}}
    candidates = {"mulki": [["train.batch_size=16"], ["strategy.connecting.inter=0.6"]]}
    own = {"name": "own", "recipes": ["mtil"], "choice": {"seed": 5, "apply": True, "settings": candidates}}
    own |= {"parts": {"one": {"runs": [{"strategies": ["mulki"], "variants": variants}]}}}
    Path("own.yaml").write_text(yaml.safe_dump(own))
    [said] = mulki("status", "own.yaml", status=2).stderr.splitlines()
    assert "$.choice.settings.mulki: strategy.connecting.inter=0.6: " in said
    assert "there is no entry 'connecting'" in said
    own["choice"]["apply"] = False
    Path("own.yaml").write_text(yaml.safe_dump(own))
    mulki("status", "own.yaml")


def test_a_label_of_several_words_is_a_word(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    variants = {"all of it": {}, "all of a part": {"settings": ["stream.tasks=[food, digits]"]}}
    Path("own.yaml").write_text(yaml.safe_dump({"name": "own", "recipes": ["mtil"], "variants": variants}))
    assert "1 run: 1 missing" in mulki("status", "own.yaml", "--only", "all of it").stdout
    assert "words: all of a part, all of it" in mulki("status", "own.yaml", "--only", "none", status=2).stderr


def test_the_first_of_several_errors_explains_a_failed_run(tmp_path):
    files = SimpleNamespace(log=tmp_path / "x.log")
    files.log.write_text("error: an earlier attempt\n" + ATTEMPT + "\nerror: MNIST is missing\nerror: a hint\n")
    assert _explain(files, {}, None) == f"MNIST is missing (and 1 more in {files.log})"


def test_only_words_of_its_runs(small_study):
    wrong = mulki(written(small_study), "--only", "mulkee", status=2)
    assert "no run matches mulkee" in wrong.stderr
    assert "finetune" in wrong.stderr


def test_several_recipes_have_their_own_lines(small_study, in_forks):
    recipe = Path("small.yaml").read_text()
    Path("other.yaml").write_text(recipe.replace("name: small\n", "name: other\n").replace("- second", "- third"))
    study = {"name": "two", "recipes": ["small.yaml", "other.yaml"], "strategies": ["zero-shot"]}
    table = mulki(written(study)).stdout
    assert "| small: zero-shot | 1 |" in table
    assert "| other: zero-shot | 1 |" in table
    assert len(list(Path("runs/studies/two").rglob("result.json"))) == 2


def test_a_table_that_is_none_is_reported(small_study):
    Path("notes.csv").write_text("a,b\n1,2\n")
    assert "not the table of a study" in mulki("status", written(small_study), "--table", "notes.csv", status=2).stderr


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text.rstrip("\n").rpartition(",c,")[0], "t.csv:3: a damaged line: it has not as many values"),
        (lambda text: text + "a,b,c\n", "t.csv:4: a damaged line"),
        (lambda text: text.replace(",9.5,", ",nan,"), "t.csv:3: last: expected a number, got 'nan'"),
        (lambda text: text.replace(",4,", ",four,"), "t.csv:3: seed: expected a number, got 'four'"),
        (lambda text: text.replace(",7.5,", ",,"), "t.csv:3: seconds: expected a number, got ''"),
        (lambda text: text.replace("seed", "sead"), "t.csv: not the table of a study: it has no column 'seed'"),
        (lambda text: text.replace(",", ";"), "it has no column 'part'; it is a CSV file with commas"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, damage, said):
    lines = [Line(part="a", order="", label="x", seed=i, fingerprint="f", device="cpu", code="c", last=9.5, seconds=7.5)
             for i in (3, 4)]  # fmt: skip
    lines[0] = attrs.evolve(lines[0], last=1.5, seconds=2.5)
    write_lines(tmp_path / "t.csv", lines)
    text = (tmp_path / "t.csv").read_text()
    (tmp_path / "t.csv").write_text("\ufeff" + text)
    assert read_lines(tmp_path / "t.csv") == lines, "a mark of the byte order is none of the text"
    (tmp_path / "t.csv").write_text(damage(text))
    with pytest.raises(MulkiError) as caught:
        read_lines(tmp_path / "t.csv")
    assert said in str(caught.value.lines()[0])


def test_a_table_is_read_as_it_was_written(tmp_path):
    line = Line(
        part="a", order="", label="x, y", seed=3, fingerprint="f", device="cpu", code="c", last=1.25, average=None
    )
    write_lines(tmp_path / "t.csv", [line])
    assert read_lines(tmp_path / "t.csv") == [line]


def test_planning_imports_no_torch():
    code = "import sys; from mulki_plugins.cli import main; main(['study', 'status', 'mini'], standalone_mode=False);"
    code += "assert not {'torch', 'avalanche', 'matplotlib'} & set(sys.modules), 'torch'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
