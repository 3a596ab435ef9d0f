"""Runs as arrays of Slurm jobs, through submitit. A job that is preempted or reaches its limit is requeued, and its run resumes.

What waits and runs is asked of `squeue`, by the names of the arrays, so that it is found again whatever became of the
process that submitted it. What came of a run stands in its folder.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import define, evolve, field

from mulki_plugins.errors import MulkiError
from mulki_plugins.files import write_text
from mulki_plugins.registry.discovery import ignore_packages, ignored_packages
from mulki_plugins.study.launch import Rendezvous, Room, Running, command, launch
from mulki_plugins.study.plan import PlannedRun
from mulki_plugins.study.schema import Slurm
from mulki_plugins.study.state import files_of, held, is_on, result_of

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission

FOLDER = "slurm"
"""The folder, in the study's, of what was submitted."""
DAY = 24 * 60
"""Minutes that a job may take unless the study says otherwise."""
NOTICE = 120
"""Seconds before its end at which Slurm tells a job."""
GRACE = 110
"""Seconds that a run gets for its checkpoint."""
MOST = 1000
"""Jobs of an array at most; Slurm's own limit is 1,001 unless a cluster sets another."""
REQUEUES = 1000
"""How often a job that reaches its limit may be requeued."""


def minutes(time_: str | int | None) -> int:
    """A time limit as sbatch takes it, in minutes: 90, `90`, `1:30:00`, `2-12`, `2-12:30:00`. MulkiError if it is none."""
    text = str(DAY if time_ is None else time_).strip()
    if match := re.fullmatch(r"(\d+)-(\d{1,2})(?::(\d{1,2})(?::\d{1,2})?)?", text):
        return (int(match[1]) * 24 + int(match[2])) * 60 + int(match[3] or 0)
    if match := re.fullmatch(r"(\d+):(\d{1,2}):(\d{1,2})", text):
        return int(match[1]) * 60 + int(match[2]) + (int(match[3]) > 0)
    if match := re.fullmatch(r"(\d+)(?::\d{1,2})?", text):
        return int(match[1])
    raise MulkiError(f"the time limit {text!r}: expected minutes or [DAYS-]HOURS:MINUTES:SECONDS", "such as 4:00:00")


def require_slurm() -> None:
    """MulkiError unless submitit is installed and this machine can submit jobs."""
    try:
        import submitit  # noqa: F401
    except ImportError:
        raise MulkiError("--on slurm needs submitit", "type: pip install 'mulki[slurm]'") from None
    for program in ("sbatch", "srun", "squeue", "scontrol"):
        if shutil.which(program) is None:
            raise MulkiError(f"--on slurm: there is no {program} on this machine", "submit from a node of the cluster")


def submit(runs: Sequence[PlannedRun], root: Path, wanted: Slurm, threads: int) -> str:
    """Submit these runs as one array; returns the id of the job. MulkiError if Slurm refuses it."""
    import submitit

    folder = root / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{_names_begin(root)}-{int(time.time() * 1000):x}"
    write_text(folder / f"{name}.json", json.dumps([run.key for run in runs], indent=1) + "\n")
    executor = submitit.SlurmExecutor(folder=folder / "logs", max_num_timeout=REQUEUES)
    limit = minutes(wanted.time)
    asked = {"partition": wanted.partition, "mem": wanted.memory, "gpus_per_node": wanted.gpus or None}
    executor.update_parameters(
        job_name=name,
        time=limit,
        nodes=wanted.nodes,
        ntasks_per_node=1,
        cpus_per_task=max(1, threads),
        signal_delay_s=min(NOTICE, 15 * limit),
        array_parallelism=wanted.at_once or len(runs),
        stderr_to_stdout=True,
        additional_parameters={"requeue": True, **wanted.options},
        **{key: value for key, value in asked.items() if value is not None},
    )
    for run in runs:
        files_of(root, run).write(slurm="", exit=None, cancelled=False, fingerprint=run.fingerprint)
    calls = [RunOnNode(run, root.absolute(), threads, wanted.nodes, wanted.gpus) for run in runs]
    try:
        jobs = executor.submit_array(calls)
    except Exception as error:  # submitit passes on what sbatch printed
        text = " ".join(str(getattr(error, "stderr", "") or error).split())
        (folder / f"{name}.json").unlink(missing_ok=True)
        for files in (files_of(root, run) for run in runs):
            if not files.read().get("began"):
                files.record.unlink(missing_ok=True)
        raise MulkiError(
            f"Slurm refuses the jobs: {text}", "see --partition, --time, --memory, --gpus and --nodes"
        ) from error
    return str(jobs[0].job_id).partition("_")[0]


def queued(root: Path) -> dict[str, str]:
    """For each run that is in Slurm's queue, by its key, the state of its job: `RUNNING 12:10`, `PENDING Priority`.

    Empty where there is no Slurm, or where the study has submitted nothing. MulkiError if squeue does not answer.
    """
    submitted = {path.stem: path for path in sorted((root / FOLDER).glob(f"{_names_begin(root)}-*.json"))}
    if not submitted or shutil.which("squeue") is None:
        return {}
    found = {}
    for name, index, job, state, elapsed, reason in _squeue():
        if name in submitted:
            keys = json.loads(submitted[name].read_text("utf-8"))
            position = int(index) if index.isdigit() else 0
            if position < len(keys):
                found[keys[position]] = f"{state} {elapsed if state == 'RUNNING' else reason} {job}"
    return found


def _squeue() -> list[list[str]]:
    """Name, array index, job id, state, elapsed time and reason of this user's jobs."""
    words = ["squeue", "--noheader", "--array", "--user", getpass.getuser(), "--format", "%j|%K|%i|%T|%M|%r"]
    for wait in (0.5, 2.0, None):  # a controller that is busy, or just restarting
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode == 0:
            return [parts for line in done.stdout.splitlines() if len(parts := line.strip().split("|", 5)) == 6]
        if wait is not None:
            time.sleep(wait)
    raise MulkiError(f"squeue: {' '.join(done.stderr.split())}", "is Slurm running, and SLURM_CONF set?")


def cancel_in_queue(runs: Sequence[PlannedRun], root: Path, queue: Mapping[str, str]) -> int:
    """Cancel the jobs of these runs. Returns their number."""
    chosen = [run for run in runs if run.key in queue]
    for run in chosen:
        files_of(root, run).write(cancelled=True)
    jobs = [queue[run.key].rpartition(" ")[2] for run in chosen]
    if jobs:
        done = subprocess.run(["scancel", *jobs], capture_output=True, text=True)
        if done.returncode:
            raise MulkiError(f"scancel: {' '.join(done.stderr.split())}", "`squeue` shows the jobs")
    return len(jobs)


def _names_begin(root: Path) -> str:
    """How the names of the study's arrays begin: by its folder, so that two studies are told apart."""
    place = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:10]
    return f"mulki-{re.sub(r'[^A-Za-z0-9._-]+', '-', root.name)[:40]}-{place}"


@define
class RunOnNode:
    """What a job does: the run, in a process of its own. submitit calls `checkpoint` before the job is requeued."""

    run: PlannedRun
    root: Path
    threads: int
    nodes: int
    gpus: int
    ignored: tuple[str, ...] = field(factory=ignored_packages)
    """The packages that the process ignores which submitted the run."""
    _running: Running | None = field(init=False, default=None)

    def __call__(self) -> int:
        """The exit status of the run."""
        ignore_packages(self.ignored)
        result = result_of(self.run)
        device = self.run.recipe.device.partition(":")[0]
        if result is not None and result.status == "complete" and is_on(result, device):
            return 0
        node = int(os.environ.get("SLURM_NODEID", "0"))
        files = files_of(self.root, self.run)
        files = files if node == 0 else evolve(files, key=f"{files.key}.node-{node}")
        with held(files.lock) as lock:
            if lock is None:
                raise RuntimeError(f"another process has the run {self.run.job.title}")
            words = command(self.run, max(1, self.gpus), self._meeting())
            room = Room(threads=max(1, self.threads // max(1, self.gpus)))
            self._running = launch(self.run, files, room, lock, words, slurm=_job_id())
            while (code := self._running.wait(1.0)) is None:
                pass
        if code in (128 + signal.SIGTERM, -signal.SIGTERM) and self._is_preempted():
            self._requeue()
        if code:
            raise RuntimeError(f"the run ended with status {code}; see {files.log}")
        return code

    def checkpoint(self, *arguments: object) -> DelayedSubmission:
        """Stop the run with a checkpoint; what is submitted again."""
        from submitit.helpers import DelayedSubmission

        if self._running is not None:
            self._running.stop()
            self._running.wait(GRACE)
        again = RunOnNode(self.run, self.root, self.threads, self.nodes, self.gpus)
        return DelayedSubmission(again)

    def _meeting(self) -> Rendezvous | None:
        if self.nodes == 1:
            return None
        shown = subprocess.run(
            ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]],
            capture_output=True,
            text=True,
            check=True,
        )
        job = os.environ["SLURM_JOB_ID"]
        port = 20_000 + int(job) % 20_000
        return Rendezvous(nodes=self.nodes, host=shown.stdout.split()[0], port=port, job=job)

    def _is_preempted(self) -> bool:
        """Whether Slurm is about to take the node away from a job that has not been cancelled."""
        if files_of(self.root, self.run).read().get("cancelled"):
            return False
        shown = subprocess.run(
            ["scontrol", "show", "job", "--oneliner", os.environ["SLURM_JOB_ID"]], capture_output=True, text=True
        )
        return re.search(r"\bJobState=RUNNING\b", shown.stdout) is not None

    def _requeue(self) -> None:
        """Put the job back into the queue, which Slurm does not if it ends by itself within its grace time. Wait for its end."""
        subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], capture_output=True)
        time.sleep(GRACE)


def _job_id() -> str:
    array, index = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{index}" if array else os.environ.get("SLURM_JOB_ID", socket.gethostname())
