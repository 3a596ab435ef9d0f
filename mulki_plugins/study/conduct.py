"""A study from its plan to its table: what is missing is run where the study says, and every finished run becomes a line."""

from __future__ import annotations

import json
import os
import socket
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attrs import evolve, fields, frozen

from mulki_plugins.cores import usable_cores
from mulki_plugins.errors import MulkiError, Stopped
from mulki_plugins.files import is_locked, write_text
from mulki_plugins.study import execute, slurm
from mulki_plugins.study.choose import winners
from mulki_plugins.study.costs import CostLine, cost_line, costs_beside, with_earlier
from mulki_plugins.study.plan import COST, Chosen, Job, PlannedRun, choice_jobs, cost_jobs, plan_run, reported_jobs
from mulki_plugins.study.read import StudyFile
from mulki_plugins.study.schema import Execution
from mulki_plugins.study.state import LAUNCHED, State, files_of, held, result_of, states
from mulki_plugins.study.table import Line, read_lines, read_rows, write_lines, write_rows

SLURM_POLL = 3.0
"""Seconds between two questions to Slurm."""


@frozen(kw_only=True)
class Conductor:
    """A study in its folder. table: where its lines go, beside those of earlier runs that the study names."""

    file: StudyFile
    root: Path
    table: Path
    say: Callable[[str], None]

    # State

    def lines(self) -> list[Line]:
        """The lines of earlier runs, then the study's own."""
        earlier = self.file.measured
        own = earlier is not None and self.table.exists() and earlier.exists() and earlier.samefile(self.table)
        return [*([] if own else read_lines(earlier)), *read_lines(self.table)]

    def look(self, jobs: Iterable[Job]) -> list[State]:
        """The state of these runs now."""
        runs = [plan_run(job, self.root) for job in jobs]
        return states(runs, self.root, self.lines(), self.file.study.device, slurm.queued(self.root))

    def chosen(self) -> Chosen:
        """The settings that the rule chooses, of each method whose candidates are all done."""
        rule = self.file.study.choice
        return winners(self.look(choice_jobs(self.file.study)), rule) if rule is not None and rule.apply else {}

    def reported(self) -> list[Job]:
        """The runs of the study's parts; without those that wait for the choice of their settings."""
        return list(reported_jobs(self.file.study, self.chosen()))

    def begun(self, jobs: Iterable[Job]) -> list[Job]:
        """Those of these runs that have been started or submitted here."""
        return [job for job in jobs if files_of(self.root, plan_run(job, self.root)).record.exists()]

    def collect(self, jobs: Iterable[Job]) -> list[State]:
        """The state of these runs; those that are done are in the table afterwards."""
        found = self.look(jobs)
        self.add([state.line for state in found if state.line is not None])
        return found

    def add(self, new: Sequence[Line]) -> None:
        """Add lines to the table, unless they are in it or among the earlier ones. Runs that measure costs have another file."""
        with self._table_locked():
            there = set(self.lines())
            if missing := [line for line in dict.fromkeys(new) if line not in there and line.part != COST]:
                write_lines(self.table, [*read_lines(self.table), *missing])

    def costs(self) -> list[CostLine]:
        """What strategies cost: as measured here, else as it says in the file beside the table of earlier runs.

        Without the lines that were measured with other settings than the study's present ones.
        """
        earlier = self.file.measured
        lines = read_rows(costs_beside(self.table), CostLine) or (
            read_rows(costs_beside(earlier), CostLine) if earlier is not None else []
        )
        known = {job.label: plan_run(job, self.root).known for job in cost_jobs(self.file.study)}
        return [line for line in lines if line.fingerprint in known.get(line.label, {line.fingerprint})]

    def collect_costs(self, jobs: Iterable[Job]) -> list[CostLine]:
        """The costs that these runs have measured, those that are done; they are in the file beside the table afterwards."""
        lines = []
        for state in self.look(jobs):
            if state.status == "done" and (result := result_of(state.run)) is not None:
                lines.append(cost_line(state.run, result))
        if lines:
            with self._table_locked():
                file = costs_beside(self.table)
                write_rows(file, CostLine, with_earlier(lines, read_rows(file, CostLine)))
        return lines

    @contextmanager
    def _table_locked(self) -> Iterator[None]:
        """One process at a time changes the table."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with held(self.root / "jobs" / "table.lock") as lock:
                if lock is not None:
                    yield
                    return
            time.sleep(0.1)
        raise MulkiError(f"{self.table}: another process keeps it locked", "try again later")

    # What is missing

    def run(self, jobs: Sequence[Job], how: Execution, *, wait: bool = True) -> list[State]:
        """Run what is missing of these. Returns how far each is in the end. MulkiError if another process runs the study."""
        if os.name != "posix":
            raise MulkiError("mulki study runs on Linux and macOS only", "`--dry-run` prints the commands of its runs")
        with self._alone():
            found = self.collect(jobs)
            self.say(summary(found))
            left = [state.run for state in found if state.status != "done" and state.status not in LAUNCHED]
            running = [state.run for state in found if state.status in LAUNCHED]
            if how.on == "slurm":
                self._submit(left, running, how, wait)
            elif left or running:
                self._work_off(left, running, how)
        return self.look(jobs)

    def _work_off(self, left: list[PlannedRun], running: list[PlannedRun], how: Execution) -> None:
        cores = usable_cores()
        if how.on == "gpus":
            rooms = execute.gpu_rooms(execute.visible_gpus(), how.gpus_per_run, how.threads, cores)
        else:
            gpu = self.file.study.device != "cpu" and execute.has_gpu()
            rooms = execute.local_rooms(how.processes, how.threads, cores, gpu)
        told = _Told(self, len(left) + len(running))
        execute.Workers(self.root, rooms, told.ended, self.say).work_off(left, running)

    def _submit(self, left: list[PlannedRun], running: list[PlannedRun], how: Execution, wait: bool) -> None:
        slurm.require_slurm()
        for i in range(0, len(left), slurm.MOST):
            array = left[i : i + slurm.MOST]
            job = slurm.submit(array, self.root, how.slurm, how.threads or 1)
            self.say(f"submitted {len(array)} runs as job {job}")
        if not wait:
            return
        told, waiting = _Told(self, len(left) + len(running)), [*left, *running]
        try:
            while waiting:
                time.sleep(SLURM_POLL)
                now = states(waiting, self.root, self.lines(), self.file.study.device, slurm.queued(self.root))
                for state in now:
                    if state.status not in LAUNCHED:
                        waiting.remove(state.run)
                        told.ended(state.run)
        except KeyboardInterrupt:
            hint = "`mulki study status` shows them, `mulki study cancel` cancels them"
            raise Stopped("stopped; the jobs stay in Slurm's queue", hint, 2) from None

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep another process from running the same study in the same folder."""
        runner = self.root / "jobs" / "runner.json"
        with held(self.root / "jobs" / "study.lock") as lock:
            if lock is None:
                who = _read(runner)
                where = f"process {who.get('pid')} on {who.get('host')}" if who else "another process"
                raise MulkiError(
                    f"{self.root}: {where} is running this study", "`mulki study status` shows how far it is"
                )
            write_text(runner, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}) + "\n")
            try:
                yield
            finally:
                runner.unlink(missing_ok=True)

    def cancel(self, jobs: Sequence[Job]) -> tuple[int, list[str]]:
        """Stop the processes and jobs that have these runs. Returns their number, and what could not be stopped."""
        runs = [state.run for state in self.look(jobs) if state.status in LAUNCHED]
        stopped = slurm.cancel_in_queue(runs, self.root, slurm.queued(self.root))
        here, elsewhere = execute.cancel_here(runs, self.root)
        return stopped + here, elsewhere

    def runner(self) -> dict[str, object]:
        """The process that is running this study: its pid and host; empty if there is none."""
        jobs = self.root / "jobs"
        return _read(jobs / "runner.json") if is_locked(jobs / "study.lock") else {}


class _Told:
    """Adds the line of each run that ends, and says how it ended."""

    def __init__(self, conductor: Conductor, runs: int) -> None:
        self.conductor, self.runs, self.done, self.began = conductor, runs, 0, time.monotonic()

    def ended(self, run: PlannedRun) -> None:
        conductor = self.conductor
        self.done += 1
        [state] = conductor.look([run.job])
        if state.line is not None:
            conductor.add([state.line])
        passed = (time.monotonic() - self.began) / 60
        conductor.say(f"[{self.done}/{self.runs}, {passed:.0f} min] {run.job.title}: {_outcome(state)}")


def _outcome(state: State) -> str:
    if (line := state.line) is None:
        return (
            f"{state.status.upper()}: {state.reason}" if state.status == "failed" else f"{state.status}; {state.reason}"
        )
    known = (("Transfer", line.transfer), ("Average", line.average), ("Last", line.last))
    numbers = [f"{name} {value:.1f}" for name, value in known if value is not None]
    return f"{' '.join(numbers)} ({line.seconds:.0f} s of training)"


def _read(path: Path) -> dict[str, object]:
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def has_words(job: Job, only: Sequence[str]) -> bool:
    """Whether a run has all of these words in its part, order, strategy or label, or as seed-N."""
    words = (job.part, job.order, job.changes.strategy, job.label, *job.label.split(), f"seed-{job.seed}")
    return all(word in words for word in only)


def choose_jobs(jobs: Sequence[Job], only: Sequence[str]) -> list[Job]:
    """The runs that have all of these words. MulkiError if none has."""
    chosen = [job for job in jobs if has_words(job, only)]
    if not chosen and jobs:
        named = {word for job in jobs for word in (job.part, job.order, job.changes.strategy, job.label)}
        words = sorted(word for word in named if word)
        raise MulkiError(f"--only: no run matches {' and '.join(only)}", f"words: {', '.join(words[:60])}")
    return chosen


def summary(found: Sequence[State]) -> str:
    """`8 runs: 5 done, 1 running, 2 missing`."""
    count = Counter(state.status for state in found)
    parts = [f"{count[status]} {status}" for status in ("done", "running", "waiting", "failed", "stopped", "missing")
             if count[status]]  # fmt: skip
    return f"{len(found)} run{'s' if len(found) != 1 else ''}: {', '.join(parts) or 'none'}"


def seconds_left(found: Sequence[State]) -> float | None:
    """How long the unfinished runs still take, as many at the same time as are running now; None before one is done.

    A run is expected to take the median of the finished ones with its label, or of all.
    """
    taken: dict[str, list[float]] = defaultdict(list)
    for state in found:
        if state.line is not None:
            result = result_of(state.run)
            total = result.seconds.get("total") if result is not None else None
            taken[state.run.job.label].append(float(total or state.line.seconds))
    if not any(taken.values()):
        return None
    typical = statistics.median(seconds for each in taken.values() for seconds in each)
    left = 0.0
    for state in found:
        if state.status != "done":
            expected = statistics.median(taken.get(state.run.job.label, [typical]))
            left += expected * (1 - share_done(state))
    return left / max(1, sum(state.status == "running" for state in found))


def share_done(state: State) -> float:
    """The share of its tasks that an unfinished run has finished."""
    result = result_of(state.run)
    return 0.0 if result is None else len(result.matrix) / max(1, len(result.tasks))


def with_options(how: Execution, **options: Any) -> Execution:
    """The study's own way of running with what the command line says otherwise; None leaves a value as it is."""
    given = {name: value for name, value in options.items() if value is not None}
    own = {attribute.name for attribute in fields(Execution)}
    of_slurm = {name: value for name, value in given.items() if name not in own}
    of_slurm["options"] = {**how.slurm.options, **given.get("options", {})}
    return evolve(how, **{k: v for k, v in given.items() if k in own}, slurm=evolve(how.slurm, **of_slurm))
