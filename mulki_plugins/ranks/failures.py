"""One rank's failure ends all: who reports it, and how the others hear of it while they wait for a rank that is gone.

The first rank that fails leaves a record in the store of the ranks. The first rank of all reports it; the others end in
silence, once it has. If a process is gone without a record, one that finds it missing leaves the record.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from attrs import astuple, define, field

from mulki_plugins.errors import MulkiError, Stopped, describe_error
from mulki_plugins.ranks.launch import Launch

_POLL = 0.25
_GRACE = 3.0
"""Seconds that a rank has to end by itself after another one has failed."""
_SILENT = 30.0
"""Seconds after which a process of another machine that gives no sign of life counts as gone."""


@define
class Record:
    """A failure as the other ranks learn of it."""

    rank: int
    message: str
    hint: str
    status: int
    stopped: bool = False
    """Whether a signal asked for the end."""
    trace: str = ""

    def error(self) -> MulkiError:
        error = (
            Stopped(self.message, self.hint, self.status - 128) if self.stopped else MulkiError(self.message, self.hint)
        )
        error.status = self.status
        if self.trace:
            error.__cause__ = ElsewhereError(f"on rank {self.rank}:\n{self.trace}")
        return error


class ElsewhereError(Exception):
    """An error of another rank, with its traceback as text."""


def record_of(error: BaseException, rank: int) -> Record:
    """What the other ranks are told of an error."""
    trace = ""
    if not isinstance(error, MulkiError) or error.__cause__ is not None:
        with contextlib.suppress(Exception):  # an error whose own text fails
            trace = "".join(traceback.format_exception(error))
    if isinstance(error, MulkiError):
        lines = error.lines()
        message, hint = (error.message, error.hint) if len(lines) == 1 else ("\n".join(lines), "")
        return Record(rank, message, hint, error.status, isinstance(error, Stopped), trace)
    status = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
    return Record(rank, describe_error(error), "", status, False, trace)


@define(eq=False)
class Watch:
    """Watches the other ranks from a thread, through a connection of its own to their store."""

    launch: Launch
    store: Any
    own_store: Any
    """The connection of the thread."""
    forced: Callable[[MulkiError], None] | None = None
    """Called by the thread of the rank that reports, before it ends a process that hangs: it writes down how the run ended."""
    print_error: Callable[[MulkiError], None] = lambda error: None
    ending: bool = False
    """Whether the main thread is on its way out."""
    _seen: dict[int, tuple[str, float]] = field(factory=dict)
    _over: threading.Event = field(factory=threading.Event)
    _thread: threading.Thread | None = None

    def begin(self) -> None:
        me = json.dumps([socket.gethostname(), os.getpid()])
        self.store.set(f"process/{self.launch.rank}", me)
        self._thread = threading.Thread(target=self._run, name="ranks", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """This rank has done its part: from here on it may be gone."""
        with contextlib.suppress(Exception):  # the store may be gone
            self.store.set(f"done/{self.launch.rank}", "1")
        self.ending = True
        self._over.set()
        if self._thread is not None:
            self._thread.join(timeout=2)

    def record(self, error: BaseException | None = None, wait: float = 0.0) -> Record | None:
        """The first record of the ranks: that of this error if there is none before; or one that comes within `wait` seconds."""
        with contextlib.suppress(Exception):  # the store may be gone
            return _first_record(self.store, None if error is None else record_of(error, self.launch.rank), wait)
        return None

    def heard(self) -> MulkiError | None:
        """The error of another rank, if there is one within moments."""
        record = self.record(wait=2.0)
        return None if record is None else record.error()

    def missing(self) -> MulkiError:
        """The error of a collective operation that did not come about: the record of who ended, or that a process is gone."""
        if (record := self.record(wait=2.0)) is not None:
            return record.error()
        with contextlib.suppress(Exception):
            if gone := [r for r in range(self.launch.world) if r != self.launch.rank and self._is_gone(self.store, r)]:
                return _gone(gone)
        return MulkiError("the ranks lost their connection", "continue with `mulki resume`; see docs/distributed.md")

    def wait_until_reported(self, record: Record | None) -> bool:
        """Whether the first rank has reported the failure, and is gone; False if this rank must."""
        deadline = time.monotonic() + _GRACE + 3
        while time.monotonic() < deadline:
            with contextlib.suppress(Exception):
                if self.store.check(["reported"]):
                    self._wait_for_end()
                    return True
                if not self._is_gone(self.store, 0):
                    time.sleep(_POLL / 5)
                    continue
            break
        with contextlib.suppress(Exception):
            if self.store.check(["reported"]):  # it may have reported and ended between the two questions above
                return True
            if int(self.store.add("reporter", 1)) > 1:
                time.sleep(1.0)  # the rank that reports must not be ended by torchrun before it has
                return True
            return False
        return record is not None or self.launch.rank > 1  # the first rank kept the store, and is gone with it

    def say_reported(self) -> None:
        with contextlib.suppress(Exception):
            self.store.set("reported", "1")

    def _wait_for_end(self) -> None:
        """torchrun ends all ranks when one has failed, and its first rank is still writing down why."""
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline and not self._is_gone(self.store, 0):
            time.sleep(_POLL / 5)

    # the thread

    def _run(self) -> None:
        beat, failures = 0, 0
        neighbour = (self.launch.rank + 1) % self.launch.world
        while not self._over.wait(_POLL):
            try:
                beat += 1
                self.own_store.set(f"alive/{self.launch.rank}", str(beat))
                record = _first_record(self.own_store, None)
                if record is None and self._is_gone(self.own_store, neighbour):
                    time.sleep(2 * _POLL)  # its record may be on the way
                    error = _gone([neighbour])
                    record = _first_record(self.own_store, record_of(error, self.launch.rank))
                failures = 0
            except Exception:  # the store is gone, and with it whoever kept it
                failures += 1
                if failures < 4:
                    continue
                problem = "the process that keeps the ranks together is gone"
                record = Record(self.launch.rank, problem, "continue with `mulki resume`", 2)
            if record is not None:
                self._force(record)
                return

    def _force(self, record: Record) -> None:
        """End the process if the main thread does not: it may wait for a rank that is gone, forever."""
        deadline = time.monotonic() + _GRACE
        while time.monotonic() < deadline:
            if self.ending:
                return
            time.sleep(_POLL)
        if self.ending:
            return
        error = record.error()
        if self.launch.rank == 0 or not self.wait_until_reported(record):
            if self.forced is not None:
                with contextlib.suppress(Exception):
                    self.forced(error)
            self.print_error(error)
            self.say_reported()
        sys.stdout.flush()
        os._exit(record.status)

    def _is_gone(self, store: Any, rank: int) -> bool:
        """Whether a rank's process has ended without having done its part."""
        if store.check([f"done/{rank}"]) or not store.check([f"process/{rank}"]):
            return False
        host, process = json.loads(store.get(f"process/{rank}"))
        if host == socket.gethostname():
            return not _runs(process)
        beat, now = store.get(f"alive/{rank}").decode() if store.check([f"alive/{rank}"]) else "", time.monotonic()
        before, since = self._seen.get(rank, ("", now))
        if beat != before or rank not in self._seen:
            self._seen[rank] = beat, now
            return False
        return now - since > _SILENT


def _first_record(store: Any, record: Record | None, wait: float = 0.0) -> Record | None:
    if record is not None:
        text = json.dumps(astuple(record))
        if int(store.add("failures", 1)) == 1:
            store.set("failure", text)
            return record
        store.wait(["failure"], timedelta(seconds=5))
    deadline = time.monotonic() + wait
    while not store.check(["failure"]):
        if time.monotonic() >= deadline:
            return None
        time.sleep(_POLL / 5)
    return Record(*json.loads(store.get("failure")))


def _gone(ranks: list[int]) -> MulkiError:
    which = f"rank {ranks[0]} was" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} were"
    return MulkiError(
        f"{which} killed: the process ended without a word",
        "it may have run out of memory; continue with `mulki resume`",
    )


def _runs(process: int) -> bool:
    """Whether a process of this machine runs; one that has ended and that nobody has asked about does not."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (OSError, IndexError):
        return True
