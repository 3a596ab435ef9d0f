"""One run: the zero-shot row, then task after task: train on one, evaluate on all, write down what was found."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from attrs import evolve
from avalanche.training.plugins import EvaluationPlugin

from mulki_plugins.recipe.emit import plain_yaml
from mulki_plugins.recipe.resolve import Resolved
from mulki_plugins.recipe.schema import Checkpoint, Recipe, as_data
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.report.folder import held, prepare_folder, run_folder, write_text
from mulki_plugins.report.plots import matrix_figure
from mulki_plugins.report.progress import ProgressLogger
from mulki_plugins.report.result import Result
from mulki_plugins.report.table import matrix_table
from mulki_plugins.training.accuracy import AccuracyRecorder
from mulki_plugins.training.bases import TEMPLATES
from mulki_plugins.training.build import Built, build, needs_reference
from mulki_plugins.training.checkpoints import save_weights
from mulki_plugins.training.hooks import tell_packages
from mulki_plugins.training.seeding import seed_everything


def run_experiment(resolved: Resolved, seed: int, out: Path) -> Result:
    """Run a recipe with one seed in its folder below `out`; returns what result.json holds."""
    recipe = evolve(resolved.recipe, seeds=[seed])
    seed_everything(seed)
    built = build(recipe)
    folder = run_folder(out, recipe, seed)
    aside = prepare_folder(folder)
    progress = ProgressLogger(len(built.stream.tasks))
    if aside:
        progress.say(f"{folder}: an earlier run was here; it is now {aside}")
    progress.say(f"{recipe.name} / {recipe.strategy.name} / seed {seed} -> {folder}")
    with held(folder):
        write_text(folder / "recipe.yaml", plain_yaml(as_data(recipe)))
        run = _Run(recipe, built, folder, seed, progress)
        tell_packages("mulki_run_started", recipe, run.result, folder, progress.say)
        try:
            return run.all_tasks()
        except BaseException as error:
            run.result.status = "failed"
            run.result.error = f"{type(error).__name__}: {error}".splitlines()[0]
            run.result.write(folder)
            raise
        finally:
            run.close()
            tell_packages("mulki_run_finished", recipe, run.result, folder, progress.say)


class _Run:
    """The objects of one run, and what it has found so far."""

    def __init__(self, recipe: Recipe, built: Built, folder: Path, seed: int, progress: ProgressLogger) -> None:
        self.recipe, self.built, self.folder, self.seed, self.progress = recipe, built, folder, seed, progress
        self.recorder = AccuracyRecorder()
        self.loggers: list[Any] = []
        self.result = _new_result(recipe, built, seed, folder)

    def all_tasks(self) -> Result:
        recipe, built = self.recipe, self.built
        self.loggers += [catalog().find("logger", name).load()(self.folder) for name in recipe.loggers]
        self.strategy = TEMPLATES[recipe.strategy.base](
            model=built.model,
            train=recipe.train,
            evaluate=recipe.evaluate,
            device=built.device,
            plugins=built.plugins,
            evaluator=EvaluationPlugin(self.recorder, loggers=[*self.loggers, self.progress], collect_all=False),
        )
        began = time.monotonic()
        self.result.zero_shot = self.evaluated()
        self.progress.say(f"zero-shot: mean accuracy {_mean(self.result.zero_shot):.1f} %")
        self.result.write(self.folder)
        if recipe.strategy.base == "none":
            self.no_task()
        elif recipe.strategy.base == "joint":
            self.all_at_once()
        else:
            for i, experience in enumerate(built.benchmark.train_stream):
                self.one_task(i, experience)
        self.result.seconds["total"] = round(time.monotonic() - began, 2)
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
        row = self.trained_and_evaluated(i + 1, name, experience)
        self.result.matrix.append(row)
        self.result.write(self.folder)
        self.progress.say(f"    {name} {row[i]:.1f} %, mean of all {_mean(row):.1f} %")

    def all_at_once(self) -> None:
        """One training on the whole stream; every row of the matrix is that one model's."""
        tasks = len(self.result.tasks)
        row = self.trained_and_evaluated(tasks, "all", self.built.benchmark.train_stream)
        self.result.matrix += [list(row) for _ in range(tasks)]
        self.progress.say(f"    mean of all {_mean(row):.1f} %")

    def trained_and_evaluated(self, learned: int, name: str, experiences: Any) -> list[float]:
        """Train, keep the weights, evaluate. learned: how many tasks will then have been learned."""
        seed_everything(self.seed, learned)
        began = time.monotonic()
        workers = self.recipe.train.workers
        self.strategy.train(experiences, eval_streams=[], num_workers=workers, persistent_workers=workers > 0)
        trained = time.monotonic()
        save_weights(self.built.model, self.folder, learned, name, self.recipe.train.checkpoint.keep)
        row = self.evaluated()
        self.result.seconds.setdefault("train", []).append(round(trained - began, 2))
        self.result.seconds.setdefault("evaluate", []).append(round(time.monotonic() - trained, 2))
        return row

    def evaluated(self) -> list[float]:
        """Accuracy in percent on every task's test set."""
        workers = self.recipe.train.workers
        self.strategy.eval(self.built.benchmark.test_stream, num_workers=workers, persistent_workers=workers > 0)
        return [self.recorder.accuracies[task.name] for task in self.built.stream.tasks]

    def finish(self) -> None:
        """Metrics, table and picture."""
        self.result.status = "complete"
        self.result.device["peak_memory_mib"] = _peak_memory(self.built.device)
        if len(self.result.tasks) > 1:
            for name in self.recipe.evaluate.metrics:
                metric = catalog().find("metric", name)
                if not (metric.sequential and self.recipe.strategy.base == "joint"):
                    self.result.metrics[name] = float(metric.load()(self.result.matrix))
        self.result.write(self.folder)
        write_text(self.folder / "matrix.csv", _csv(self.result))
        write_text(self.folder / "matrix.txt", matrix_table(self.result) + "\n")
        figure = matrix_figure(self.result)
        figure.savefig(self.folder / "matrix.png", dpi=130)
        for logger in self.loggers:
            for name, value in self.result.metrics.items():
                logger.log_single_metric(f"metrics/{name}", value, len(self.result.tasks))
            logger.log_single_metric("matrix", figure, len(self.result.tasks))

    def close(self) -> None:
        self.progress.stop()
        for logger in self.loggers:
            if hasattr(logger, "close"):
                logger.close()


def _new_result(recipe: Recipe, built: Built, seed: int, folder: Path) -> Result:
    plugins = []
    for entry in recipe.strategy.plugins:
        part = catalog().find("plugin", entry.name)
        brought = {"distribution": part.provenance.distribution, "version": part.provenance.version}
        plugins.append({"name": entry.name, **brought, "options": entry.options})
    return Result(
        recipe=recipe.name,
        strategy=recipe.strategy.name,
        seed=seed,
        tasks=[task.name for task in built.stream.tasks],
        base=recipe.strategy.base,
        protocol={"stream": recipe.stream.name, "model": recipe.model.name, "classes": recipe.evaluate.classes}
        | ({"images": part} if (part := recipe.stream.options.get("evaluate_on", "test")) != "test" else {}),
        settings=fingerprint(recipe),
        plugins=plugins,
        versions={"python": platform.python_version(), **_versions()},
        device={"type": built.device.type, "name": _device_name(built.device), "threads": torch.get_num_threads()},
        started=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        folder=str(folder),
    )


def fingerprint(recipe: Recipe) -> str:
    """Of everything that moves the numbers but the seed, so that only repetitions of one experiment are averaged."""
    train = evolve(recipe.train, workers=0, checkpoint=Checkpoint())
    reference = recipe.reference if needs_reference(recipe) else None
    said = as_data(evolve(recipe, summary="", train=train, reference=reference, seeds=[0], loggers=[], device="auto"))
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]


def _versions() -> dict[str, str]:
    found = {}
    for package in ("mulki", "torch", "avalanche-lib", "open_clip_torch"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # a checkout that was never installed
            found[package] = ""
    return found


def _peak_memory(device: torch.device) -> float:
    """MiB: on a GPU the most that tensors took, else the most that the process ever held."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    try:
        import resource
    except ImportError:  # Windows has none
        return 0.0
    unit = 1 if platform.system() == "Darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {os.cpu_count()} cores"


def _mean(row: Sequence[float]) -> float:
    return sum(row) / len(row)


def _csv(result: Result) -> str:
    """The zero-shot row and the matrix, with headings."""
    rows = [["after", *result.tasks], ["zero-shot", *map(_cell, result.zero_shot)]]
    rows += [[task, *map(_cell, row)] for task, row in zip(result.tasks, result.matrix, strict=False)]
    return "\n".join(",".join(row) for row in rows) + "\n"


def _cell(value: float) -> str:
    return f"{value:.4f}"
