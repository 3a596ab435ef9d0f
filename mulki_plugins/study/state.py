"""How far each run of a study is: read from its result, from the lock that its process holds, and from what Slurm says."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from attrs import frozen

from mulki_plugins.errors import MulkiError
from mulki_plugins.files import is_locked, take_lock, write_text
from mulki_plugins.recipe.settings import list_settings
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.report.folder import settings_at
from mulki_plugins.report.result import FILE, Result, read_result
from mulki_plugins.study.plan import PlannedRun
from mulki_plugins.study.table import Line, find_line, line_of

Status = Literal["done", "running", "waiting", "failed", "stopped", "missing"]
LAUNCHED: tuple[Status, ...] = ("running", "waiting")
"""Runs that are not started again: a process has them, or they are in Slurm's queue."""
ATTEMPT = "--- attempt "
"""How the log of a run's output announces each start."""
_TAIL = 64 * 1024
"""Bytes of a log's end that are searched for an error."""


@frozen(kw_only=True)
class State:
    """A run and how far it is. reason: why it failed, or where it is. line: its numbers, once it is done."""

    run: PlannedRun
    status: Status
    reason: str = ""
    line: Line | None = None


@frozen(kw_only=True)
class JobFiles:
    """The files of a run in the study's folder: how it was started, its output, and the lock that its process holds."""

    folder: Path
    key: str

    @property
    def record(self) -> Path:
        return self.folder / f"{self.key}.json"

    @property
    def lock(self) -> Path:
        return self.folder / f"{self.key}.lock"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.key}.log"

    def read(self) -> dict[str, Any]:
        """What was recorded when the run was last started and when it ended; empty without a record."""
        try:
            data = json.loads(self.record.read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return data if isinstance(data, dict) else {}

    def write(self, **facts: Any) -> None:
        """Change the record."""
        write_text(self.record, json.dumps({**self.read(), **facts}, indent=1) + "\n")

    def is_held(self) -> bool:
        """Whether a process has this run."""
        return bool(is_locked(self.lock))


def files_of(root: Path, run: PlannedRun) -> JobFiles:
    return JobFiles(folder=root / "jobs", key=run.key)


@contextmanager
def held(path: Path) -> Iterator[int | None]:
    """Hold a file's lock, for this process and those that inherit the descriptor. Yields None if another process has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    try:
        try:
            take_lock(descriptor)
        except BlockingIOError:
            yield None
            return
        except OSError:  # a file system without locks
            pass
        yield descriptor
    finally:
        os.close(descriptor)


def states(
    runs: Sequence[PlannedRun], root: Path, lines: Sequence[Line], device: str, queued: Mapping[str, str] | None = None
) -> list[State]:
    """The state of each run. lines: of earlier tables. queued: by the key of a run what Slurm says of it."""
    return [_state(run, root, lines, device, queued or {}) for run in runs]


def _state(run: PlannedRun, root: Path, lines: Sequence[Line], device: str, queued: Mapping[str, str]) -> State:
    files = files_of(root, run)
    if (line := find_line(run, lines, device)) is not None:
        return State(run=run, status="done", line=line)
    result = result_of(run)
    if result is not None and result.status == "complete" and is_on(result, device):
        return State(run=run, status="done", line=line_of(run, result))
    record = files.read()
    if files.is_held() or is_locked(run.folder):
        return State(run=run, status="running", reason=_where(record))
    if run.key in queued:
        slurm = queued[run.key]
        return State(run=run, status="running" if slurm.startswith("RUNNING") else "waiting", reason=f"Slurm: {slurm}")
    if record.get("fingerprint", run.fingerprint) not in run.known:  # of a run with other settings
        record = {}
    elsewhere = result is not None and result.status == "complete"  # on another device
    if (result is None and not record) or (elsewhere and not record.get("exit")):
        return State(run=run, status="missing")
    if record.get("cancelled") or (result is not None and result.status == "stopped"):
        return State(run=run, status="stopped", reason="resumes when the study runs again")
    if "slurm" in record and not record.get("began"):
        return State(
            run=run,
            status="failed",
            reason=f"its job left the queue before the run began; see {root / 'slurm' / 'logs'}",
        )
    if record.get("exit") in (None, 0) and (result is None or result.status != "failed"):
        return State(run=run, status="stopped", reason="its process ended without a result")
    return State(run=run, status="failed", reason=_explain(files, record, result))


def _where(record: Mapping[str, Any]) -> str:
    if job := record.get("slurm"):
        return f"Slurm job {job} on {record.get('host', '')}"
    return f"process {record['pid']} on {record.get('host', '')}" if record.get("pid") else "another process"


def result_of(run: PlannedRun) -> Result | None:
    """The result in a run's folder, if it has the run's settings and seed."""
    try:
        result = read_result(run.folder / FILE)
    except MulkiError:
        return None
    return result if result.settings in run.known and result.seed == run.job.seed else None


def can_resume(run: PlannedRun) -> bool:
    """Whether the run's folder holds this run, on the same type of device, and all of its plugins can go on.

    Whatever else is there is moved aside when the run starts.
    """
    if not run.folder.is_dir() or settings_at(run.folder) != list_settings(run.recipe):
        return False
    result = result_of(run)
    if result is not None and not is_on(result, run.recipe.device.partition(":")[0]):
        return False
    return not any(catalog().find("plugin", entry.name).no_resume for entry in run.recipe.strategy.plugins)


def is_on(result: Result, device: str) -> bool:
    """Whether a result is from this type of device. `auto` is any; a run that failed early may not tell."""
    return device in ("auto", result.device.get("type", device))


def _explain(files: JobFiles, record: Mapping[str, Any], result: Result | None) -> str:
    """Why a run failed: the error that it printed, else what its result says, else how its process ended."""
    try:
        with files.log.open("rb") as file:
            file.seek(max(0, files.log.stat().st_size - _TAIL))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    starts = [i for i, line in enumerate(lines) if line.startswith(ATTEMPT)]
    lines = lines[starts[-1] + 1 :] if starts else lines
    if errors := [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]:
        return errors[0] + (f" (and {len(errors) - 1} more in {files.log})" if len(errors) > 1 else "")
    if result is not None and result.error:
        return result.error
    code = record.get("exit")
    if isinstance(code, int) and code < 0:
        with suppress(ValueError):
            return f"its process was ended by {signal.Signals(-code).name}"
    last = next((line for line in reversed(lines) if line.strip()), "")
    return f"its process ended with status {code}" + (f": {last}" if last else "")
