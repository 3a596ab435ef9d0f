"""Several ranks on one machine without torchrun: forks of this process, which has the libraries imported already."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from attrs import define
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch exports it in an `if`


@define
class Forks:
    """The processes of some ranks, in their order."""

    processes: list[int]
    _statuses: dict[int, int] | None = None

    def wait(self) -> list[int]:
        """The exit status of each rank; −n if signal n ended it."""
        if self._statuses is None:
            self._statuses = {p: os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in self.processes}
        return [self._statuses[process] for process in self.processes]


@contextmanager
def forked_ranks(command: Callable[[], object], ranks: int, output: Path | None = None) -> Iterator[Forks]:
    """Call a command of `mulki` on so many ranks, over gloo; they are ended with the block. POSIX only.

    output: a folder for what each rank prints, `stdout-RANK` and `stderr-RANK`; None for this process's own.
    """
    store = TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )  # as torchrun keeps it, outside of the ranks
    sys.stdout.flush()
    sys.stderr.flush()
    forks = Forks([_fork(command, rank, ranks, store.port, output) for rank in range(ranks)])
    try:
        yield forks
        forks.wait()
    finally:
        for process in forks.processes:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                if os.waitpid(process, os.WNOHANG)[0] == 0:
                    os.kill(process, 9)
                    os.waitpid(process, 0)


def run_on_ranks(command: Callable[[], object], ranks: int, output: Path | None = None) -> list[int]:
    """Call a command of `mulki` on so many ranks; returns the exit status of each."""
    with forked_ranks(command, ranks, output) as forks:
        return forks.wait()


def _fork(command: Callable[[], object], rank: int, ranks: int, port: int, output: Path | None) -> int:
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        numbers = {
            "RANK": rank,
            "WORLD_SIZE": ranks,
            "LOCAL_RANK": rank,
            "LOCAL_WORLD_SIZE": ranks,
            "MASTER_PORT": port,
        }
        os.environ.update({name: str(number) for name, number in numbers.items()}, MASTER_ADDR="127.0.0.1")
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        if os.path.isdir("/sys/class/net/lo"):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        if output is not None:
            for number, name in ((1, "stdout"), (2, "stderr")):
                os.dup2(os.open(output / f"{name}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), number)
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        command()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
