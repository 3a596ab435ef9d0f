"""A run: the zero-shot row, then task after task: train on one, evaluate on all, write down the result."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from attrs import evolve
from avalanche.training.plugins import EvaluationPlugin

from mulki_plugins.characters import printable
from mulki_plugins.errors import MulkiError, describe_error
from mulki_plugins.files import locked, write_text
from mulki_plugins.ranks.collectives import is_first, of_all
from mulki_plugins.ranks.session import on_forced_end
from mulki_plugins.recipe.emit import dump_yaml
from mulki_plugins.recipe.resolve import Resolution
from mulki_plugins.recipe.schema import Recipe, as_data
from mulki_plugins.registry.discovery import call_run_hooks, catalog
from mulki_plugins.registry.hookspecs import Event
from mulki_plugins.registry.hookspecs import Run as RunOfHooks
from mulki_plugins.report.classes import write_classes
from mulki_plugins.report.folder import prepare_folder, run_folder
from mulki_plugins.report.progress import ProgressLogger
from mulki_plugins.report.result import Result, as_plain_data
from mulki_plugins.report.run_log import RunLog, SilentLog
from mulki_plugins.training.accuracy import AccuracyRecorder, compute_metrics
from mulki_plugins.training.build import Built, build_seeded
from mulki_plugins.training.checkpoint import Checkpoint
from mulki_plugins.training.checkpointing import Checkpointing
from mulki_plugins.training.contents import StackEntry
from mulki_plugins.training.earlier_rows import restore
from mulki_plugins.training.ending import log_error, where
from mulki_plugins.training.explain import explain, quiet_writers, undisturbed
from mulki_plugins.training.final_weights import write_final_weights
from mulki_plugins.training.flops import TrainingFlops
from mulki_plugins.training.logbook import GuardedLogger, LastTerms
from mulki_plugins.training.over_ranks import check_weights, unknown_on_ranks
from mulki_plugins.training.provenance import (
    count_parameters,
    differences,
    identity,
    new_result,
    other_threads,
    peak_memory,
    unmet_of,
)
from mulki_plugins.training.records import Records
from mulki_plugins.training.rng import seed_everything
from mulki_plugins.training.signals import Stopped, StopRequest
from mulki_plugins.training.strategy import TEMPLATES


def run_experiment(
    resolved: Resolution, seed: int, out: Path, *, folder: Path | None = None, verbosity: int = 0
) -> Result:
    """Run a recipe with one seed in its folder below `out`, or in `folder`; returns what result.json holds."""
    recipe = evolve(resolved.recipe, seeds=[seed])
    return start(recipe, seed, folder or run_folder(out, recipe, seed), ProgressLogger(0, verbosity=verbosity))


def start(recipe: Recipe, seed: int, folder: Path, progress: ProgressLogger) -> Result:
    """Run a recipe from its beginning. An earlier run in the folder is moved aside."""
    with progress.during(f"building the stream {recipe.stream.name} and the model {recipe.model.name}"):
        built = build_seeded(recipe, seed)
    if not is_first():
        return Run(recipe, built, folder, seed, progress).execute()
    aside = prepare_folder(folder)
    if aside:
        progress.say(f"{folder}: moved an earlier run to {aside}")
    with locked(folder):
        return Run(recipe, built, folder, seed, progress).execute()


class Run:
    """One run: its set-up, its task loop, and what it leaves behind however it ends."""

    def __init__(self, recipe: Recipe, built: Built, folder: Path, seed: int, progress: ProgressLogger) -> None:
        self.recipe, self.built, self.folder, self.seed, self.progress = recipe, built, folder, seed, progress
        self.log = progress.log = RunLog(folder) if is_first() else SilentLog(folder)
        self.recorder = AccuracyRecorder()
        self.terms = LastTerms()
        self.stop = StopRequest()
        self.loggers: list[GuardedLogger] = []
        self.plugins = [StackEntry(e.name, p) for e, p in zip(recipe.strategy.plugins, built.plugins, strict=True)]
        self.result = new_result(recipe, built, seed, folder)
        images = {task.name: (len(task.train), len(task.test)) for task in built.stream.tasks}
        progress.expect(recipe, images, held_out=sum(len(task.test) for task in built.stream.held_out))

    # From beginning to end, and what happens if it fails

    def execute(self, checkpoint: Checkpoint | None = None, force: bool = False) -> Result:
        """Run all tasks, or those left after a checkpoint. However the run ends, result.json says so."""
        self.say_notices()
        if checkpoint is not None and self.recipe.train.workers == "auto":  # the batches depend on their number
            recorded = checkpoint.run["identity"]["recipe"].get("workers", self.built.workers)
            self.built = evolve(self.built, workers=recorded)
        measured_with = identity(self.recipe, self.built, self.seed)
        if checkpoint is not None:
            self.say_changes(checkpoint, measured_with, force)
            self.result.continue_from(checkpoint.run["result"])
        self.result.identity = {key: value for key, value in measured_with.items() if key != "recipe"}
        try:
            with self.stop.listening(), quiet_writers():
                on_forced_end(self.write_failure)
                if is_first():
                    write_text(self.folder / "recipe.yaml", dump_yaml(as_data(self.recipe)))
                    write_classes(self.folder, self.built.stream.tasks)
                self.call_hooks("mulki_run_started")
                self.set_up(measured_with)
                if checkpoint is not None:
                    restore(self, checkpoint)
                self.run_tasks()
                self.finish()
                self.close()
                self.log.line("complete")
                return self.result
        except BaseException as error:
            with undisturbed():
                explanation = explain(error, self.plugins, self.terms.values, where(self), self.folder, self.recipe)
                report = log_error(self, error, explanation)
                self.write_failure(report or error)
            if report is None or report is error:
                raise
            raise report from error
        finally:
            on_forced_end(None)
            with contextlib.suppress(OSError):  # the run's own error is on its way
                self.close()
            self.call_hooks("mulki_run_finished")

    def say_notices(self) -> None:
        warnings = [f"warning: {text}" for text in self.result.incomparable]
        for notice in (*warnings, *self.built.stream.notices, *self.built.notices):
            self.progress.say(printable(notice))
        for line in (*unmet_of(self.recipe), *unknown_on_ranks(self.plugins)):
            self.warn(line)
        self.progress.say(f"{self.recipe.name} / {self.recipe.strategy.name} / seed {self.seed} -> {self.folder}")

    def say_changes(self, checkpoint: Checkpoint, now: dict[str, Any], force: bool) -> None:
        """Say what has changed since the checkpoint. MulkiError if anything has, unless forced."""
        before = checkpoint.run["identity"]
        changed = differences(before, now)
        if changed and not force:
            raise MulkiError(
                f"{checkpoint.path}: cannot resume: changed since the checkpoint: {'; '.join(changed)}",
                "undo the change, or resume anyway with --force",
            )
        if (tasks := list(before["data"])) != list(now["data"]):
            raise MulkiError(
                f"{checkpoint.path}: the run began with the tasks {', '.join(tasks)}, "
                f"and the recipe has {', '.join(now['data'])}",
                "their numbers must not be mixed; start the run again, without --resume",
            )
        for line in changed:
            self.progress.say(f"resuming although {line}")
        if warning := other_threads(before, now):
            self.progress.say(warning)

    def set_up(self, measured_with: dict[str, Any]) -> None:
        """Make the loggers, the strategy and the checkpointing."""
        recipe, built = self.recipe, self.built
        parts = [catalog().find("logger", name) for name in recipe.loggers] if is_first() else []
        self.loggers += [GuardedLogger(part, self.folder, self.warn) for part in parts]
        self.records = Records(
            folder=self.folder, result=self.result, stream=built.stream, loggers=self.loggers,
            only_warning=self.only_warning, predictions=recipe.evaluate.predictions and is_first(),
        )  # fmt: skip
        loggers = [*self.loggers, self.terms, self.progress]
        self.strategy = TEMPLATES[recipe.strategy.base](
            model=built.model,
            train=recipe.train,
            evaluate=recipe.evaluate,
            device=built.device,
            plugins=built.plugins,
            evaluator=EvaluationPlugin(self.recorder, loggers=loggers, collect_all=False),
        )
        self.strategy.checks.names = {id(entry.plugin): entry.name for entry in self.plugins}
        self.strategy.checks.warn = self.warn
        self.strategy.say = self.progress.say
        self.strategy.held_out = frozenset(range(len(built.stream.tasks), len(built.model.prompts)))
        self.checkpointing = Checkpointing(
            recipe, self.folder, self.strategy, self.plugins, self.loggers, self.result, measured_with, self.stop
        )
        self.flops = TrainingFlops(self.strategy, self.result)
        self.progress.follow(self.strategy)

    def finish(self) -> None:
        """Compute the metrics; write the final weights, tables and pictures."""
        self.progress.doing("writing the results")
        self.result.seconds["total"] = round(self.checkpointing.seconds(), 2)
        self.result.status, self.result.error = "complete", ""
        self.result.device["peak_memory_mib"] = peak_memory(self.built.device)
        self.result.parameters = count_parameters(self.recipe, self.built.model)
        if len(self.result.tasks) > 1:
            self.result.metrics = compute_metrics(self.recipe, self.result, self.warn)
        if not is_first():
            return
        if self.recipe.strategy.base != "none":
            with self.only_warning("the final weights cannot be written"):
                write_final_weights(self.folder, len(self.result.tasks), self.strategy.model)
        self.records.write_end()
        self.result.write(self.folder)  # last, so that a run called complete has everything

    def close(self) -> None:
        self.progress.stop()
        if hasattr(self, "checkpointing"):
            self.checkpointing.close(self.warn)
        for logger in self.loggers:
            logger.close()

    def call_hooks(self, event: Event) -> None:
        """Call this hook of every package. A failure in one is reported and changes nothing."""
        if not is_first():
            return
        result = None
        if event == "mulki_run_finished":
            result = as_plain_data(self.result)
            del result["folder"]
        data = as_data(self.recipe)
        call_run_hooks(
            event, RunOfHooks(folder=self.folder.absolute(), recipe=data, seed=self.seed, result=result), self.warn
        )

    def warn(self, text: str, error: BaseException | None = None) -> None:
        """Print a warning. The traceback of an error goes into the log."""
        self.progress.say(printable(f"warning: {text}"))
        if error is not None:
            self.log.traceback(error)

    @contextlib.contextmanager
    def only_warning(self, what: str) -> Iterator[None]:
        """Turn errors into a warning: result.json has all numbers that a table or picture shows."""
        try:
            yield
        except Exception as error:
            self.warn(f"{what}; the run goes on: {describe_error(error)}", error)

    def write_failure(self, error: BaseException) -> None:
        """Write into result.json how the run ended, if that is still possible."""
        self.result.status = "stopped" if isinstance(error, Stopped) else "failed"
        self.result.error = describe_error(error)
        with contextlib.suppress(OSError):  # such as a full disk, which may be the error itself
            self.save_result()

    def save_result(self) -> None:
        """Write result.json, on the first rank."""
        if is_first():
            self.result.write(self.folder)

    # The task loop

    def run_tasks(self) -> None:
        base = self.recipe.strategy.base
        if not self.result.zero_shot:
            self.result.zero_shot = self.evaluate()
            self.result.add_held_out(self.recorder.accuracies)
            self.records.keep_predictions(self.recorder.answers, [0])
            self.records.log_row(0, peak_memory(self.built.device))
            self.progress.say(f"zero-shot: mean accuracy {fmean(self.result.zero_shot):.1f} %")
            self.save_result()
            self.checkpointing.started()
        if base == "none":
            self.train_nothing()
        elif base == "joint":
            self.train_jointly()
        else:
            for i, experience in enumerate(self.built.benchmark.train_stream):
                self.train_task(i, experience)

    def train_task(self, i: int, experience: Any) -> None:
        name = self.built.stream.tasks[i].name
        if i >= len(self.result.matrix):
            row = self.train_and_evaluate(i + 1, name, experience, lambda row: [row])
            self.progress.say(f"    {name} {row[i]:.1f} %, mean of all {fmean(row):.1f} %")

    def train_jointly(self) -> None:
        """Train once, on the whole stream. Every row of the matrix is that one model's."""
        tasks = len(self.result.tasks)
        if not self.result.matrix:
            every = self.built.benchmark.train_stream
            row = self.train_and_evaluate(tasks, "all", every, lambda row: [list(row) for _ in range(tasks)])
            self.progress.say(f"    mean of all {fmean(row):.1f} %")

    def train_nothing(self) -> None:
        """Every row is the zero-shot row, unless the classes to choose from grow with the tasks."""
        for i in range(len(self.result.tasks)):
            self.strategy.learned.add(i)
            if self.recipe.evaluate.classes == "seen":
                self.result.matrix.append(self.evaluate())
                self.records.keep_predictions(self.recorder.answers, [i + 1])
            else:
                self.result.matrix.append(list(self.result.zero_shot))
                self.records.keep_predictions({}, [i + 1])
            self.result.add_held_out(self.recorder.accuracies)
            self.records.log_row(i + 1, peak_memory(self.built.device))

    def train_and_evaluate(
        self, learned: int, name: str, experiences: Any, rows: Callable[[list[float]], list[list[float]]]
    ) -> list[float]:
        """Train, save the weights, evaluate. learned: the number of tasks learned by then; rows: what joins the matrix."""
        if self.checkpointing.tasks < learned:
            seed_everything(self.seed, learned)
            self.checkpointing.task_begins()
            self.progress.task_begins(learned - 1 if name != "all" else 0, name)
            workers = self.built.workers
            with self.flops.of_task():
                self.strategy.train(experiences, eval_streams=[], num_workers=workers, persistent_workers=workers > 0)
            check_weights(self.strategy.model, name)
            self.result.seconds.setdefault("train", []).append(round(self.checkpointing.task_seconds(), 2))
            self.checkpointing.learned(learned, name)
        began = time.monotonic()
        row = self.evaluate()
        self.result.seconds.setdefault("evaluate", []).append(round(time.monotonic() - began, 2))
        before = len(self.result.matrix)
        self.result.matrix += rows(row)
        self.result.add_held_out(self.recorder.accuracies)
        self.records.keep_predictions(self.recorder.answers, range(before + 1, len(self.result.matrix) + 1))
        self.records.log_row(learned, peak_memory(self.built.device))
        self.count_left_out()
        self.save_result()
        self.checkpointing.evaluated()
        return row

    def evaluate(self, experiences: Sequence[Any] | None = None) -> list[float]:
        """Accuracy in percent on the test sets of these experiences; None for every task's, with held-out ones tested too."""
        tested, workers = experiences or self.built.tested, self.built.workers
        self.strategy.eval(tested, num_workers=workers, persistent_workers=workers > 0)
        for problem in self.built.cache.problems() if self.built.cache else ():
            self.warn(problem)
        return [self.recorder.accuracies[each.task_name] for each in experiences or self.built.benchmark.test_stream]

    def count_left_out(self) -> None:
        """Record the images that could not be read, and report new ones."""
        if self.recipe.train.unreadable == "stop":
            return
        streams = {"train": self.built.benchmark.train_stream, "test": self.built.tested}
        for kind, experiences in streams.items():
            every = of_all([list(experience.images.left_out) for experience in experiences])
            for experience, left_out in zip(experiences, zip(*every, strict=True), strict=True):
                name = f"{experience.task_name}/{kind}"
                known = self.result.left_out.get(name, [])
                if new := {image for each in left_out for image in each} - set(known):
                    self.result.left_out[name] = sorted({*known, *new})
                    first = ", ".join(map(str, sorted(new)[:3]))
                    self.progress.say(f"    {name}: {len(new)} images cannot be read and are left out, such as {first}")
