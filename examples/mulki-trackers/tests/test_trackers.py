"""Both loggers in whole runs, with stand-ins for the trackers' packages."""

import json
import sys
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from matplotlib.figure import Figure
from mulki_trackers.mlflow_logger import MlflowLogger, allowed, flatten
from mulki_trackers.wandb_logger import WandbLogger

from mulki_plugins.cli import main

FEW = [
    "stream={name: mtil-mini, tasks: [scans, digits], shots: 4, evaluate_on: validation}",
    "train.iterations=2",
    "train.schedule.warmup=0",
    "train.batch_size=8",
]

COSTS = {"cost/train_seconds", "cost/evaluate_seconds", "cost/peak_memory_mib"}


class StandInRun:
    """A run of W&B that keeps what it is sent."""

    def __init__(self, **settings):
        self.settings, self.sent, self.axes, self.codes = settings, [], {}, []
        self.id = settings["id"] or "fresh"

    def define_metric(self, name, step_metric=None, hidden=False):
        self.axes[name] = step_metric

    def log(self, values):
        self.sent.append(values)

    def finish(self, exit_code):
        self.codes.append(exit_code)


@pytest.fixture
def wandb(monkeypatch):
    module = SimpleNamespace(runs=[], Image=lambda figure: ("image", figure))

    def init(**settings):
        module.runs.append(StandInRun(**settings))
        return module.runs[-1]

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


class StandInClient:
    """A client of MLflow that keeps what it is sent."""

    experiments: dict
    params: dict
    metrics: list
    figures: list
    states: list

    def get_experiment_by_name(self, name):
        return SimpleNamespace(experiment_id=name) if name in self.experiments else None

    def create_experiment(self, name):
        self.experiments[name] = []
        return name

    def create_run(self, experiment, run_name, tags):
        self.experiments[experiment].append((run_name, tags))
        return SimpleNamespace(info=SimpleNamespace(run_id=f"run-{len(self.experiments[experiment])}"))

    def log_param(self, run_id, key, value):
        self.params[key] = value

    def log_batch(self, run_id, metrics):
        self.metrics.extend(metrics)

    def log_figure(self, run_id, figure, file):
        assert isinstance(figure, Figure)
        self.figures.append(file)

    def update_run(self, run_id, status):
        self.states.append((run_id, status))

    def set_terminated(self, run_id, status):
        self.states.append((run_id, status))


@pytest.fixture
def mlflow(monkeypatch):
    kept = {"experiments": {}, "params": {}, "metrics": [], "figures": [], "states": []}
    client = type("Client", (StandInClient,), kept)
    entities = SimpleNamespace(Metric=lambda key, value, timestamp, step: (key, value, step))
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(MlflowClient=client, entities=entities))
    return client


def run_with(logger, out):
    settings = [word for setting in [*FEW, f"loggers=[csv,{logger}]"] for word in ("--set", setting)]
    arguments = ["run", "mtil", "--strategy", "finetune", *settings, "--name", "finetune", "--out", str(out), "--json"]
    return CliRunner().invoke(main, arguments)


def logged(out):
    """What the logger `csv` wrote: each tag, step and value."""
    lines = [line.split(",") for line in next(out.rglob("metrics.csv")).read_text().splitlines()[1:]]
    return [(tag, int(step), pytest.approx(float(value), rel=1e-6)) for tag, step, value in lines]


def test_wandb_gets_all_that_a_run_logs(wandb, tmp_path):
    done = run_with("wandb", tmp_path)
    assert done.exit_code == 0, done.output
    [run] = wandb.runs
    assert run.settings["name"] == "mtil/finetune/seed-0"
    assert run.settings["group"] == "mtil/finetune"
    assert "dir" not in run.settings, "W&B makes links, which a run's folder must not hold"
    assert run.settings["config"]["train"]["iterations"] == 2
    assert run.axes["train/*"] == "train/iteration"
    assert run.axes["*"] == "tasks_learned"
    numbers = [list(values.items()) for values in run.sent if "matrix" not in values]
    assert [(tag, step, value) for (tag, value), (_, step) in numbers if "cost/" not in tag] == logged(tmp_path)
    assert {tag for (tag, _), _ in numbers if "cost/" in tag} == COSTS
    assert all(
        axis == ("train/iteration" if tag.startswith("train/") else "tasks_learned") for (tag, _), (axis, _) in numbers
    )
    pictures = [values for values in run.sent if "matrix" in values]
    assert [values["tasks_learned"] for values in pictures] == [1, 2]
    assert run.codes == [0], "closed once, as complete"


def test_mlflow_gets_all_that_a_run_logs(mlflow, tmp_path):
    done = run_with("mlflow", tmp_path)
    assert done.exit_code == 0, done.output
    [(name, tags)] = mlflow.experiments["mtil"]
    assert name == "mtil/finetune/seed-0"
    assert tags["group"] == "mtil/finetune"
    assert mlflow.params["train.iterations"] == "2"
    assert mlflow.params["stream.tasks.1"] == "digits"
    assert [(tag, step, value) for tag, value, step in mlflow.metrics if "cost/" not in tag] == logged(tmp_path)
    assert {tag for tag, _, _ in mlflow.metrics if "cost/" in tag} == COSTS
    assert mlflow.figures == ["matrix-001.png", "matrix-002.png"]
    assert mlflow.states == [("run-1", "FINISHED")]


def test_a_resumed_run_goes_on_under_its_id(wandb, mlflow, tmp_path):
    for _ in range(2):
        WandbLogger(tmp_path).close()
        MlflowLogger(tmp_path).close()
    assert [run.settings["id"] for run in wandb.runs] == [None, "fresh"]
    assert [run.codes for run in wandb.runs] == [[1], [1]], "there is no result, so it is not complete"
    assert mlflow.states == [("run-1", "FAILED"), ("run-1", "RUNNING"), ("run-1", "FAILED")]
    assert len(mlflow.experiments["mulki"]) == 1


@pytest.mark.parametrize("tracker", ["wandb", "mlflow"])
def test_a_missing_package_costs_the_run_only_this_logger(tracker, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, tracker, None)  # as if it were not installed
    done = run_with(tracker, tmp_path)
    assert done.exit_code == 0, done.output
    assert f"pip install 'mulki-trackers[{tracker}]'" in done.stderr
    assert json.loads(done.stdout)["runs"][0]["status"] == "complete"


def test_a_tracker_that_fails_costs_the_run_only_this_logger(wandb, monkeypatch, tmp_path):
    def fails(self, values):
        raise ConnectionError("the network is gone")

    monkeypatch.setattr(StandInRun, "log", fails)
    done = run_with("wandb", tmp_path)
    assert done.exit_code == 0, done.output
    assert done.stderr.count("the network is gone") == 1
    assert json.loads(done.stdout)["runs"][0]["status"] == "complete"


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("eval/accuracy/digits", "eval/accuracy/digits"), ("eval/accuracy/花", "eval/accuracy/_82b1_"),
        ("eval/accuracy/a:b", "eval/accuracy/a_3a_b"), ("eval/accuracy/../x", "eval_2f_accuracy_2f__2e__2e__2f_x"),
        ("eval/accuracy//x", "eval_2f_accuracy_2f__2f_x"), ("", "_"),
    ],
)  # fmt: skip
def test_names_that_mlflow_takes(name, safe):
    assert allowed(name) == safe


def test_long_names_stay_apart():
    one, other = allowed("x" * 300), allowed("x" * 301)
    assert one != other
    assert len(one) == len(other) == 250


def test_flattened_values_have_dotted_paths():
    assert dict(flatten({"a": {"b": 1, "c": [2, {"d": 3}]}, "e": {}})) == {"a.b": 1, "a.c.0": 2, "a.c.1.d": 3, "e": {}}
