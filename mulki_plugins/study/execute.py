"""Runs on this machine: as many at the same time as it has room for, each in a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType

from attrs import define, field

from mulki_plugins.errors import MulkiError, Stopped
from mulki_plugins.study.launch import Room, Running, command, launch, stop_group
from mulki_plugins.study.plan import PlannedRun
from mulki_plugins.study.state import files_of, held

POLL = 0.2
"""Seconds between two looks at the processes."""


def local_rooms(processes: int | None, threads: int | None, cores: int, has_gpu: bool) -> list[Room]:
    """The room of each process. By default one thread each, and as many as there are cores; one where they share a GPU."""
    if processes is None:
        processes = 1 if has_gpu else max(1, cores // (threads or 1))
        threads = threads or (cores if has_gpu else 1)
    return [Room(threads=threads or max(1, cores // processes))] * processes


def gpu_rooms(gpus: Sequence[str], per_run: int, threads: int | None, cores: int) -> list[Room]:
    """The GPUs in groups of `per_run`, with the cores shared out. MulkiError if there are too few."""
    groups = [tuple(gpus[i : i + per_run]) for i in range(0, len(gpus) - per_run + 1, per_run)]
    if not groups:
        message = f"--on gpus: a run needs {per_run}, and this machine shows {len(gpus) or 'none'}"
        raise MulkiError(message, "use --on local, or fewer with --gpus-per-run")
    return [Room(threads=threads or max(1, cores // len(groups) // per_run), gpus=group) for group in groups]


def visible_gpus() -> list[str]:
    """The GPUs of this machine by the names that CUDA_VISIBLE_DEVICES has for them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]


def has_gpu() -> bool:
    """Whether there is a GPU that a run would use. Imports no torch."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return bool(list(Path("/dev").glob("nvidia[0-9]*"))) if named is None else bool(named.strip())


@define
class Workers:
    """Works off runs in these rooms.

    ended: called with each run when its process has ended, whatever came of it. running: runs that a process of an earlier
    study still has; they are waited for, and take their rooms.
    """

    root: Path
    rooms: Sequence[Room]
    ended: Callable[[PlannedRun], None]
    say: Callable[[str], None]
    _signal: int = field(init=False, default=0)
    _running: list[Running] = field(init=False, factory=list)

    def work_off(self, waiting: Sequence[PlannedRun], running: Sequence[PlannedRun] = ()) -> None:
        """Run everything. Stopped if a signal came: the processes have then stopped, with a checkpoint each."""
        left, earlier = list(waiting), list(running)
        with self._listening():
            while (left and not self._signal) or self._running or (earlier and not self._signal):
                while left and not self._signal and (room := self._free_room(earlier)) is not None:
                    run = left.pop(0)
                    if not self._start(run, room):
                        left.append(run)
                        break
                time.sleep(POLL)
                for process in [p for p in self._running if p.poll() is not None]:
                    self._running.remove(process)
                    self.ended(process.run)
                for run in [run for run in earlier if not files_of(self.root, run).is_held()]:
                    earlier.remove(run)
                    self.ended(run)
        if self._signal:
            name = signal.Signals(self._signal).name
            hint = "the same command goes on with what is missing"
            raise Stopped(f"stopped by {name}; its runs have stopped too", hint, self._signal)

    def _free_room(self, earlier: Sequence[PlannedRun]) -> Room | None:
        """A room that no process is in; those of earlier processes are known by their GPUs."""
        rooms = list(self.rooms)
        for room in [process.room for process in self._running]:
            rooms.remove(room)
        for run in earlier:
            gpus = set(files_of(self.root, run).read().get("gpus", ()))
            taken = next((room for room in rooms if not room.gpus or gpus & set(room.gpus)), None)
            if taken is not None:
                rooms.remove(taken)
        return rooms[0] if rooms else None

    def _start(self, run: PlannedRun, room: Room) -> bool:
        """Start a run, unless another process has it."""
        files = files_of(self.root, run)
        with held(files.lock) as lock:
            if lock is None:
                return False
            running = launch(run, files, room, lock, command(run, max(1, len(room.gpus))))
            self._running.append(running)
            if self._signal and not files.read().get("cancelled"):  # it came before the run was in the list
                self._stop(running, signal.SIGTERM)
        self.say(f"started {run.job.title}")
        return True

    def _stop(self, running: Running, number: int) -> None:
        with suppress(OSError):  # without this, a run that has not begun yet counts as failed
            running.files.write(cancelled=True)
        running.stop(number)

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Pass SIGINT, SIGTERM and SIGHUP on to the runs; the second one kills them."""
        if threading.current_thread() is not threading.main_thread():  # others cannot handle signals
            yield
            return

        def stop(number: int, frame: FrameType | None) -> None:
            again, self._signal = bool(self._signal), number
            for process in self._running:
                self._stop(process, signal.SIGKILL if again else signal.SIGTERM)
            if not again:
                os.write(2, b"\nstopping the runs, each after its current step; Ctrl-C again kills them\n")

        with ExitStack() as stack:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if (before := signal.getsignal(number)) is not signal.SIG_IGN:
                    signal.signal(number, stop)
                    stack.callback(signal.signal, number, before)
            yield


def cancel_here(runs: Sequence[PlannedRun], root: Path) -> tuple[int, list[str]]:
    """Stop those of these runs that processes of this machine have. Returns their number, and a line for each elsewhere."""
    stopped, elsewhere = 0, []
    for run in runs:
        files = files_of(root, run)
        record = files.read()
        if record.get("slurm") or not files.is_held():
            continue
        if record.get("host") != socket.gethostname():
            elsewhere.append(f"{run.job.title}: it runs on {record.get('host')}; cancel it there")
        elif pid := record.get("pid"):
            files.write(cancelled=True)
            stop_group(int(pid))
            stopped += 1
    return stopped, elsewhere
