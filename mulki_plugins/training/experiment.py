"""One run: the zero-shot row, then task after task: train on one, evaluate on all, write down what was found."""

from __future__ import annotations

import contextlib
import csv
import io
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from attrs import evolve
from avalanche.training.plugins import EvaluationPlugin

from mulki_plugins.characters import printable
from mulki_plugins.errors import MulkiError, UnexpectedError, describe_error
from mulki_plugins.recipe.emit import dump_yaml
from mulki_plugins.recipe.resolve import Resolution, resolve
from mulki_plugins.recipe.schema import Recipe, as_data
from mulki_plugins.recipe.settings import select_decisive
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.report.folder import held, prepare_folder, refuse_links, run_folder, write_bytes, write_text
from mulki_plugins.report.plots import matrix_figure, png
from mulki_plugins.report.progress import ProgressLogger
from mulki_plugins.report.result import FILE, Result, read_result
from mulki_plugins.report.run_log import RunLog
from mulki_plugins.report.table import matrix_table
from mulki_plugins.training.accuracy import AccuracyRecorder
from mulki_plugins.training.bases import TEMPLATES
from mulki_plugins.training.blame import blamed
from mulki_plugins.training.build import Built, build
from mulki_plugins.training.checkpoints import Checkpoint, checkpoints
from mulki_plugins.training.faults import LastTerms, explained, quiet_writers, undisturbed
from mulki_plugins.training.hooks import tell_packages
from mulki_plugins.training.loggers import GuardedLogger
from mulki_plugins.training.provenance import differences, identity, new_result, other_threads, peak_memory, unmet_of
from mulki_plugins.training.saving import Saving, choose_checkpoint, refuse_another
from mulki_plugins.training.scores import scores
from mulki_plugins.training.seeding import seed_everything
from mulki_plugins.training.snapshot import Named
from mulki_plugins.training.stopping import Stopped, StopRequest


def run_experiment(resolved: Resolution, seed: int, out: Path, *, folder: Path | None = None) -> Result:
    """Run a recipe with one seed in its folder below `out`, or in another; returns what result.json holds."""
    recipe = evolve(resolved.recipe, seeds=[seed])
    return _anew(recipe, seed, folder or run_folder(out, recipe, seed))


def _anew(recipe: Recipe, seed: int, folder: Path) -> Result:
    built = _built(recipe, seed)
    aside = prepare_folder(folder)
    progress = ProgressLogger(len(built.stream.tasks))
    if aside:
        progress.say(f"{folder}: an earlier run was here; it is now {aside}")
    with held(folder):
        return _Run(recipe, built, folder, seed, progress).carried_out()


def resume_experiment(resolved: Resolution, seed: int, folder: Path, *, force: bool = False) -> Result:
    """Go on with a run in its folder, from its latest whole checkpoint; one that is complete is compared and read.

    MulkiError where recipe, data, code or versions have changed since, unless forced, and where a plugin cannot go on.
    """
    recipe = evolve(resolved.recipe, seeds=[seed])
    progress = ProgressLogger(0)
    if (found := _complete(folder)) is not None:
        for line in _changed_since(found, recipe, seed, folder, force):
            progress.say(line)
        progress.say(f"{folder}: complete already")
        return found
    for entry in recipe.strategy.plugins:
        if reason := catalog().find("plugin", entry.name).no_resume:
            raise MulkiError(f"{folder}: a run with the plugin {entry.name!r} cannot go on: {reason}", "run it anew")
    with held(folder):
        refuse_links(folder)
        checkpoint, wrong = choose_checkpoint(folder)
        for line in wrong:
            progress.say(f"{line}; it is left out")
        if checkpoint is not None:
            built = _built(recipe, seed)
            progress.tasks = len(built.stream.tasks)
            return _Run(recipe, built, folder, seed, progress).carried_out(checkpoint, force)
    progress.say(f"{folder}: no checkpoint to go on from, so the run begins anew")
    return _anew(recipe, seed, folder)


def _built(recipe: Recipe, seed: int) -> Built:
    seed_everything(seed)
    try:
        return build(recipe)
    except MulkiError:
        raise
    except BaseException as error:
        if (said := blamed(error, recipe)) is None:
            raise
        raise MulkiError(said) from error


def _complete(folder: Path) -> Result | None:
    try:
        found = read_result(folder / FILE)
    except MulkiError:  # a run that was killed may have left none
        return None
    return found if found.status == "complete" else None


def _changed_since(found: Result, recipe: Recipe, seed: int, folder: Path, force: bool) -> list[str]:
    """What to say of a complete run that is asked for again. MulkiError where its numbers are not those asked for."""
    changed: list[str] = []
    said: list[str] = []
    try:
        before = resolve(str(folder / "recipe.yaml")).recipe
    except MulkiError:
        said.append(f"{folder}: its recipe cannot be read, and is not compared")
    else:
        changed = differences({"recipe": select_decisive(before)}, {"recipe": select_decisive(recipe)})
    known = found.identity or next((c.run["identity"] for c in checkpoints(folder)[0]), {})
    if known and not changed:
        try:
            now = identity(recipe, _built(recipe, seed), seed)
        except MulkiError as error:
            said.append(f"{folder}: its data and weights cannot be compared: {error.lines()[0]}")
        else:
            measured, around = ("data", "files", "weights"), ("code", "versions", "device")
            changed, other = (
                differences({k: known[k] for k in keys if k in known}, {k: now[k] for k in keys if k in known})
                for keys in (measured, around)
            )
            said += [f"{folder}: measured when {line}" for line in other]
    if changed and not force:
        raise MulkiError(
            f"{folder}: this run is complete, and not the one asked for: {'; '.join(changed)}",
            "undo the change, begin a new run without --resume, or see this one with --force",
        )
    return [*said, *(f"{folder}: shown although {line}" for line in changed)]


class _Run:
    """The objects of one run, and what it has found so far."""

    def __init__(self, recipe: Recipe, built: Built, folder: Path, seed: int, progress: ProgressLogger) -> None:
        self.recipe, self.built, self.folder, self.seed, self.progress = recipe, built, folder, seed, progress
        self.log = progress.log = RunLog(folder)
        self.recorder = AccuracyRecorder()
        self.terms = LastTerms()
        self.stop = StopRequest()
        self.loggers: list[GuardedLogger] = []
        self.plugins = [Named(e.name, p) for e, p in zip(recipe.strategy.plugins, built.plugins, strict=True)]
        self.result = new_result(recipe, built, seed, folder)

    def carried_out(self, checkpoint: Checkpoint | None = None, force: bool = False) -> Result:
        """All tasks, or those that are left; whatever happens is written into result.json."""
        for notice in (
            *(f"warning: {text}" for text in self.result.incomparable),
            *self.built.stream.notices,
            *self.built.notices,
        ):
            self.progress.say(printable(notice))
        for line in unmet_of(self.recipe):
            self.warn(line)
        self.progress.say(f"{self.recipe.name} / {self.recipe.strategy.name} / seed {self.seed} -> {self.folder}")
        known = identity(self.recipe, self.built, self.seed)
        changed = refuse_another(checkpoint, known, force) if checkpoint else []
        for line in changed:
            self.progress.say(f"going on although {line}")
        if checkpoint is not None and (warning := other_threads(checkpoint.run["identity"], known)):
            self.progress.say(warning)
        self.result.identity = {key: value for key, value in known.items() if key != "recipe"}
        if checkpoint is not None:
            self.result.zero_shot, self.result.matrix = (checkpoint.run["result"][k] for k in ("zero_shot", "matrix"))
        try:
            with self.stop.listening(), quiet_writers():
                write_text(self.folder / "recipe.yaml", dump_yaml(as_data(self.recipe)))
                tell_packages("mulki_run_started", self.recipe, self.result, self.folder, self.warn)
                self.set_up(known)
                if checkpoint is not None:
                    self.go_on_from(checkpoint)
                result = self.all_tasks()
                self.close()
                self.log.line("complete")
                return result
        except BaseException as error:
            with undisturbed():
                about = explained(error, self.plugins, self.terms, self.place(), self.folder, self.recipe)
                said = self.logged(error, about)
                self.write_down(said or error)
            if said is None or said is error:
                raise
            raise said from error
        finally:
            with contextlib.suppress(OSError):  # of the error that is on its way
                self.close()
            tell_packages("mulki_run_finished", self.recipe, self.result, self.folder, self.warn)

    def set_up(self, known: dict[str, Any]) -> None:
        recipe, built = self.recipe, self.built
        self.loggers += [
            GuardedLogger(catalog().find("logger", name), self.folder, self.warn) for name in recipe.loggers
        ]
        loggers = [*self.loggers, self.terms, self.progress]
        self.strategy = TEMPLATES[recipe.strategy.base](
            model=built.model,
            train=recipe.train,
            evaluate=recipe.evaluate,
            device=built.device,
            plugins=built.plugins,
            evaluator=EvaluationPlugin(self.recorder, loggers=loggers, collect_all=False),
        )
        self.strategy.watch.names = {id(entry.plugin): entry.name for entry in self.plugins}
        self.strategy.watch.warn = lambda text: self.progress.say(f"warning: {printable(text)}")
        self.strategy.say = self.progress.say
        self.saving = Saving(
            recipe, self.folder, self.strategy, self.plugins, self.loggers, self.result, known, self.stop
        )

    def go_on_from(self, checkpoint: Checkpoint) -> None:
        datasets = [experience.dataset for experience in self.built.benchmark.train_stream]
        self.saving.go_on_from(checkpoint, datasets)
        self.progress.say(f"going on from {checkpoint.path.name}")

    def all_tasks(self) -> Result:
        base = self.recipe.strategy.base
        if not self.result.zero_shot:
            self.result.zero_shot = self.evaluated()
            self.progress.say(f"zero-shot: mean accuracy {_mean(self.result.zero_shot):.1f} %")
            self.result.write(self.folder)
            self.saving.started()
        if base == "none":
            self.no_task()
        elif base == "joint":
            self.all_at_once()
        else:
            for i, experience in enumerate(self.built.benchmark.train_stream):
                self.one_task(i, experience)
        self.result.seconds["total"] = round(self.saving.seconds(), 2)
        self.finish()
        return self.result

    def no_task(self) -> None:
        """No training: every row is the zero-shot row, but for what is told apart, which may grow."""
        for i in range(len(self.result.tasks)):
            self.strategy.learned.add(i)
            grows = self.recipe.evaluate.classes == "seen"
            self.result.matrix.append(self.evaluated() if grows else list(self.result.zero_shot))

    def one_task(self, i: int, experience: Any) -> None:
        name = self.built.stream.tasks[i].name
        if i >= len(self.result.matrix):
            row = self.trained_and_evaluated(i + 1, name, experience, lambda row: [row])
            self.progress.say(f"    {name} {row[i]:.1f} %, mean of all {_mean(row):.1f} %")

    def all_at_once(self) -> None:
        """One training on the whole stream; every row of the matrix is that one model's."""
        tasks = len(self.result.tasks)
        if not self.result.matrix:
            row = self.trained_and_evaluated(
                tasks, "all", self.built.benchmark.train_stream, lambda row: [list(row) for _ in range(tasks)]
            )
            self.progress.say(f"    mean of all {_mean(row):.1f} %")

    def trained_and_evaluated(
        self, learned: int, name: str, experiences: Any, rows: Callable[[list[float]], list[list[float]]]
    ) -> list[float]:
        """Train, keep the weights, evaluate. learned: how many tasks will then have been learned."""
        if self.saving.tasks < learned:
            seed_everything(self.seed, learned)
            self.saving.task_begins()
            workers = self.recipe.train.workers
            self.strategy.train(experiences, eval_streams=[], num_workers=workers, persistent_workers=workers > 0)
            self.result.seconds.setdefault("train", []).append(round(self.saving.task_seconds(), 2))
            self.saving.learned(learned, name)
        began = time.monotonic()
        row = self.evaluated()
        self.result.seconds.setdefault("evaluate", []).append(round(time.monotonic() - began, 2))
        self.result.matrix += rows(row)
        self.count_left_out()
        self.result.write(self.folder)
        self.saving.evaluated()
        return row

    def evaluated(self) -> list[float]:
        """Accuracy in percent on every task's test set."""
        workers = self.recipe.train.workers
        self.strategy.eval(self.built.benchmark.test_stream, num_workers=workers, persistent_workers=workers > 0)
        return [self.recorder.accuracies[task.name] for task in self.built.stream.tasks]

    def count_left_out(self) -> None:
        """Note the images that could not be read, and say so of each kind once."""
        if self.recipe.train.unreadable == "stop":
            return
        streams = {"train": self.built.benchmark.train_stream, "test": self.built.benchmark.test_stream}
        for kind, experiences in streams.items():
            for experience in experiences:
                name = f"{experience.task_name}/{kind}"
                known = self.result.left_out.get(name, [])
                if new := set(experience.images.left_out) - set(known):
                    self.result.left_out[name] = sorted({*known, *new})
                    some = ", ".join(map(str, sorted(new)[:3]))
                    self.progress.say(f"    {name}: {len(new)} images cannot be read and are left out, such as {some}")

    def finish(self) -> None:
        """Metrics, table and picture."""
        self.result.status, self.result.error = "complete", ""
        self.result.device["peak_memory_mib"] = peak_memory(self.built.device)
        if len(self.result.tasks) > 1:
            self.result.metrics = scores(self.recipe, self.result, self.warn)
        for file, text in {"matrix.csv": _csv(self.result), "matrix.txt": matrix_table(self.result) + "\n"}.items():
            with self.survived(f"{file} cannot be written"):
                write_text(self.folder / file, text)
        figure = None
        with self.survived("the picture of the matrix cannot be drawn"):
            figure = matrix_figure(self.result)
            write_bytes(self.folder / "matrix.png", png(figure))
        for logger in self.loggers:
            for name, value in self.result.metrics.items():
                if value is not None:
                    logger.log_single_metric(f"metrics/{name}", value, len(self.result.tasks))
            if figure is not None:
                own = figure if logger.part.is_ours else matrix_figure(self.result)  # another package may draw on it
                logger.log_single_metric("matrix", own, len(self.result.tasks))
        self.result.write(self.folder)  # last, so that a run that is called complete has everything

    def warn(self, text: str, error: BaseException | None = None) -> None:
        """A line that something went wrong which the run survives; the error's traceback goes into the log."""
        self.progress.say(printable(f"warning: {text}"))
        if error is not None:
            self.log.traceback(error)

    @contextlib.contextmanager
    def survived(self, what: str) -> Iterator[None]:
        """For what only shows the numbers: an error of it is a warning, since result.json has them all."""
        try:
            yield
        except Exception as error:
            self.warn(f"{what}; the run goes on: {describe_error(error)}", error)

    def place(self) -> str:
        """Where the run is, for an error."""
        strategy = getattr(self, "strategy", None)
        experience = getattr(strategy, "experience", None)
        if strategy is None or experience is None:
            return str(self.folder)
        name = getattr(experience, "task_name", "")
        return f"task {name}, {f'step {strategy.step}' if strategy.is_training else 'evaluation'}"

    def logged(self, error: BaseException, said: MulkiError | None) -> MulkiError | None:
        """What to report of an error, whose traceback goes into the log; one that nobody foresaw says where that is."""
        if not isinstance(error, MulkiError) or error.__cause__ is not None:
            where = f"the full traceback is in {self.log.path}" if self.log.traceback(error) else ""
            if said is None and isinstance(error, Exception):
                said = UnexpectedError(f"{self.place()}: {describe_error(error)}", where)
            elif said is not None and not said.hint:
                said.hint = where
        for line in said.lines() if said else [type(error).__name__]:
            self.log.line(f"ended: {line}")
        return said

    def write_down(self, error: BaseException) -> None:
        """Leave word of how the run ended, where that can still be done."""
        self.result.status = "stopped" if isinstance(error, Stopped) else "failed"
        self.result.error = describe_error(error)
        with contextlib.suppress(OSError):  # such as no room, which is what the error says already
            self.result.write(self.folder)

    def close(self) -> None:
        self.progress.stop()
        for logger in self.loggers:
            logger.close()


def _mean(row: Sequence[float]) -> float:
    return sum(row) / len(row)


def _csv(result: Result) -> str:
    """The zero-shot row and the matrix, with headings."""
    rows = [["after", *result.tasks], ["zero-shot", *map(_cell, result.zero_shot)]]
    rows += [[task, *map(_cell, row)] for task, row in zip(result.tasks, result.matrix, strict=False)]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)  # a task's name may have a comma in it
    return text.getvalue()


def _cell(value: float) -> str:
    return f"{value:.4f}"
