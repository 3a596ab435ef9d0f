"""A run as a process of its own: `mulki run ... --resume`, through torchrun where it has several GPUs or nodes."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

from attrs import frozen

from mulki_plugins.registry.discovery import ignored_packages
from mulki_plugins.study.plan import PlannedRun
from mulki_plugins.study.state import ATTEMPT, JobFiles, can_resume

_MULKI = ("-m", "mulki_plugins")


@frozen(kw_only=True)
class Room:
    """What a run gets: threads, and GPUs of this machine by the names that CUDA_VISIBLE_DEVICES has for them."""

    threads: int = 1
    gpus: tuple[str, ...] = ()


@frozen(kw_only=True)
class Rendezvous:
    """Where the processes of a run on several nodes meet."""

    nodes: int
    host: str
    port: int
    job: str


def arguments(run: PlannedRun) -> list[str]:
    """The words after `mulki` that make this run, here and now.

    They continue what is in the run's folder if they can, and leave out the packages that this process does.
    """
    changes, job = run.job.changes, run.job
    words = [word for package in ignored_packages() for word in ("--no-plugin", package)]
    words += ["run", job.recipe]
    words += ["--strategy", changes.strategy] if changes.strategy is not None else []
    for flag, values in (
        ("--without", changes.without_plugins), ("--with", changes.with_plugins), ("--set", changes.settings),
    ):  # fmt: skip
        for value in values:
            words += [flag, value]
    words += ["--seed", str(job.seed), "--out", str(run.out), "--name", run.name]
    return [*words, "--resume"] if can_resume(run) else words


def command(run: PlannedRun, processes: int = 1, meeting: Rendezvous | None = None) -> list[str]:
    """The whole command, see `arguments`."""
    words = [*_MULKI, *arguments(run), "-q"]
    if processes == 1 and meeting is None:
        return [sys.executable, *words]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    if meeting is None:
        torchrun.append("--standalone")
    else:
        torchrun += ["--nnodes", str(meeting.nodes), "--rdzv-backend", "c10d", "--rdzv-id", meeting.job]
        torchrun += ["--rdzv-endpoint", f"{meeting.host}:{meeting.port}"]
    return [*torchrun, *words]


def environment(room: Room, base: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a run: its threads and its GPUs."""
    result = dict(os.environ if base is None else base)
    result["OMP_NUM_THREADS"] = result["MKL_NUM_THREADS"] = str(room.threads)
    if room.gpus:
        result["CUDA_VISIBLE_DEVICES"] = ",".join(room.gpus)
    return result


class Running:
    """A run's process. It holds the lock of the run, also after this process has gone."""

    def __init__(self, run: PlannedRun, room: Room, process: subprocess.Popen[bytes], files: JobFiles) -> None:
        self.run, self.room, self.process, self.files = run, room, process, files

    def poll(self) -> int | None:
        """The exit status, which is also recorded; None while it runs."""
        code = self.process.poll()
        if code is not None:
            self.files.write(exit=code, ended=now())
        return code

    def wait(self, seconds: float) -> int | None:
        """The exit status once the process has ended, None if it has not within these seconds."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        return self.poll()

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Ask the process to stop with a checkpoint, or send another signal. Its own children get it too."""
        stop_group(self.process.pid, number)


def launch(run: PlannedRun, files: JobFiles, room: Room, lock: int, words: Sequence[str], **facts: object) -> Running:
    """Start a run. lock: the descriptor of its lock, which the process inherits. facts: more for the record."""
    attempt = int(files.read().get("attempts", 0)) + 1
    with files.log.open("ab") as log:
        log.write(f"{ATTEMPT}{attempt}, {now()}: {shlex.join(words)}\n".encode())
        log.flush()
        process = start_process(words, environment(room), log.fileno(), lock)
    began = {"began": now(), "host": socket.gethostname(), "pid": process.pid, "gpus": list(room.gpus)}
    afresh = {"slurm": "", "exit": None, "ended": None, "cancelled": False}  # `facts` may name a job
    files.write(**began | afresh | {"fingerprint": run.fingerprint, "attempts": attempt} | facts)
    return Running(run, room, process, files)


def start_process(words: Sequence[str], env: Mapping[str, str], log: int, lock: int) -> subprocess.Popen[bytes]:
    """A process in a session of its own, so that Ctrl-C in the terminal does not reach it."""
    return subprocess.Popen(
        words, env=dict(env), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, pass_fds=(lock,),
        preexec_fn=_ignore_user_signal,
    )  # fmt: skip


def _ignore_user_signal() -> None:
    """Slurm announces a job's end with SIGUSR2 to all of its processes, which would kill a run."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def stop_group(pid: int, number: int = signal.SIGTERM) -> None:
    """Send a signal to a process and its children, if it is there."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
