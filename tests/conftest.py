"""Fixtures: the kit's small CLIP and coloured tasks, an environment with MulKI's wheel, and what keeps the tests fast."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import signal
import weakref
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.supervised import Naive
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from mulki_plugins.heads.rail import Rail
from mulki_plugins.models import ClipClassifier, LoadedClip
from mulki_plugins.registry.catalog import Catalog, Provenance
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.registry.register import Register
from mulki_plugins.report.result import Result
from mulki_plugins.stages import Adding, Connecting, Distinguishing, Eliciting, Teachers
from mulki_plugins.streams import TaskStream, as_benchmark
from mulki_plugins.testing import subject
from mulki_plugins.testing.small import SIZE, SmallTokenizer, small_clip, small_model, small_task
from mulki_plugins.training.checkpointing import Checkpointing
from mulki_plugins.training.run import run_experiment
from tests.environments import ROOT, Environment, copied, wheel_of

small_tokenizer = SmallTokenizer()

_LOADING: weakref.WeakSet = weakref.WeakSet()
"""The iterators of loaders with worker processes."""


@functools.wraps(_MultiProcessingDataLoaderIter.__init__)
def _begin(iterator, loader, begin=_MultiProcessingDataLoaderIter.__init__):
    begin(iterator, loader)
    _LOADING.add(iterator)


_MultiProcessingDataLoaderIter.__init__ = _begin
if not torch.cuda.is_available():
    torch.cuda.manual_seed_all = lambda seed: None  # until a GPU is used, torch keeps the stack of each call that seeds

__all__ = ["SIZE", "SmallTokenizer", "small_clip", "small_model", "small_task", "small_tokenizer"]


TOGETHER = {
    "test_adapters.py::test_a_killed_run": "adapters",
    "test_checkpoints.py::test_whenever_the_clock": "clock",
    "test_clean.py": "clean",
    "test_deploy.py": "deploy",
    "test_docs.py::test_every_block_of_a_tutorial": "environment",
    "test_examples.py": "environment",
    "test_final_weights.py": "final weights",
    "test_gaps.py": "gaps",
    "test_kit.py::test_the_fixture": "kit",
    "test_latex.py": "latex",
    "test_models.py::test_the_bundled_model": "mini",
    "test_packaging.py": "environment",
    "test_page_browser.py": "browser",
    "test_ranks.py": "ranks",
    "test_routes.py::test_a_killed_run": "routes",
    "test_small_checkpoints.py::test_a_killed_run": "small checkpoints",
    "test_streams.py": "mini",
    "test_tensorboard.py": "tensorboard",
    "test_warm.py": "warm",
}
"""How the names of tests begin that share a costly fixture, and their group: one worker runs it."""


def pytest_collection_finish():
    """The objects of the libraries and of the collected tests stay: each full collection would look at all of them."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Give each worker the next test or group of tests: pytest-xdist's own groups, by marker, do nothing with pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            name = nodeid.partition("[")[0].rpartition("/")[2]
            return next((group for beginning, group in TOGETHER.items() if name.startswith(beginning)), nodeid)

    return Groups(config, log)


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_counts():
    """SIGINT raises KeyboardInterrupt, as in a terminal. A shell's background job begins with it ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def narrow_heads():
    """At most 32 random features: each checkpoint of the default strategy would hold, hash and write 32 MB."""
    begin = Rail.begin

    def begin_narrow(head, width):
        head.width = min(head.width, 32)
        begin(head, width)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rail, "begin", begin_narrow)
        yield


@pytest.fixture(scope="session", autouse=True)
def session_cache(tmp_path_factory):
    """A cache folder for this test session, shared by its workers: images are drawn once, by the code as it is now."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MULKI_CACHE", str(shared_folder(tmp_path_factory) / "cache"))
        yield


def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all parallel workers of this test session."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


def end_loaders() -> None:
    """End the workers of loaders that a failed run leaves behind. The garbage collector waits five seconds for each."""
    for iterator in list(_LOADING):
        iterator._shutdown_workers()


@pytest.fixture(autouse=True)
def one_author_per_file(monkeypatch):
    """To the kit the author of a plugin of a test wrote its file and the modules that serve all tests, not the other tests."""

    def modules_of(plugin, factory):
        own = {getattr(factory, "__module__", ""), *map(subject._defining_module, type(plugin).__mro__)}
        found = subject.author_modules(plugin, factory)
        return {name for name in found if not name.startswith("tests.test_") or name in own}

    monkeypatch.setattr("mulki_plugins.testing.laboratory.author_modules", modules_of)
    monkeypatch.setattr("mulki_plugins.testing.head_checks.author_modules", modules_of)


@pytest.fixture(autouse=True)
def no_loader_goes_on():
    yield
    end_loaders()


@pytest.fixture(autouse=True)
def no_slow_output(request):
    """Leaves out what the markers `figures` and `flops` name, unless the test has the marker; `undo()` ends it earlier."""
    with pytest.MonkeyPatch.context() as patch:
        if not request.node.get_closest_marker("figures"):
            patch.setattr(FigureCanvasAgg, "draw", _draw_blank)
            patch.setattr("mulki_plugins.training.records.matrix_figure", blank_figure)
            patch.setattr(os, "fsync", lambda descriptor: None)
        if not request.node.get_closest_marker("flops"):
            without_flops(patch)
        yield patch


def without_flops(patch: pytest.MonkeyPatch) -> None:
    """Count no operations, which takes as long as to compute them."""
    patch.setattr("mulki_plugins.training.flops.FlopCount.__enter__", lambda self: self)
    patch.setattr("mulki_plugins.training.flops.FlopCount.__exit__", lambda self, *error: None)


def blank_figure(result: Result) -> Figure:
    """Stands in for a run's picture of its matrix."""
    return Figure(figsize=(1, 1))


def _draw_blank(canvas):
    canvas.renderer = canvas.get_renderer()
    canvas.renderer.clear()


def small_stream() -> TaskStream:
    """Three tasks of two, three and two classes."""
    return TaskStream(
        name="small",
        tasks=(
            small_task("first", ("red", "green"), 1),
            small_task("second", ("blue", "yellow", "grey"), 2),
            small_task("third", ("green", "blue"), 3, class_names=("grass", "sea")),
        ),
    )


def small_reference() -> TaskStream:
    task = small_task("other", ("grey", "yellow"), seed=9, each=5, class_names=("ash", "gold"))
    return TaskStream(name="other", tasks=(task,))


@contextlib.contextmanager
def small_world():
    """The small world under names that a recipe can use: the streams small and small-other, the model small-clip."""
    small = Catalog()
    register = Register(small, Provenance(distribution="mulki", version=""))
    register.stream("small", small_stream, summary="three tasks of colours")
    register.stream("small-other", small_reference, summary="two other colours")
    register.model("small-clip", small_model, summary="a few thousand weights")
    catalog().parts.update(small.parts)
    yield
    for key in small.parts:
        catalog().parts.pop(key, None)


@pytest.fixture
def small_parts():
    with small_world():
        yield


@pytest.fixture
def second_model():
    """A model of the name that studies/mini-vit.yaml asks for, as if it had been pre-trained and installed."""
    there = Catalog()
    Register(there, Provenance(distribution="mulki-vit-12", version="1")).model(
        "mulki-vit-12", small_model, summary="a ViT"
    )
    catalog().parts.update(there.parts)
    yield
    for key in there.parts:
        catalog().parts.pop(key, None)


@pytest.fixture
def stream() -> TaskStream:
    return small_stream()


@pytest.fixture
def loaded() -> LoadedClip:
    return small_model()


@pytest.fixture
def classifier(stream: TaskStream, loaded: LoadedClip) -> ClipClassifier:
    return ClipClassifier(loaded.clip, loaded.tokenizer, stream.tasks)


@pytest.fixture
def eval_transform(loaded: LoadedClip) -> Callable:
    return open_clip.image_transform(SIZE, is_train=False, mean=loaded.mean, std=loaded.std)


@pytest.fixture
def benchmark(stream, loaded):
    return as_benchmark(stream, loaded.transform(train=True), loaded.transform(train=False))


class Quiet:
    """A logger that keeps every value and prints nothing."""

    def __init__(self):
        self.values = []

    def log_metrics(self, values):
        self.values += [(v.name, float(v.value)) for v in values]


def naive(model, plugins, logger=None, lr=0.02, **options):
    torch.manual_seed(0)
    return Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=lr),
        train_mb_size=6,
        train_epochs=1,
        eval_mb_size=16,
        plugins=plugins,
        evaluator=EvaluationPlugin(loggers=[logger or Quiet()]),
        **options,
    )


def every_stage():
    return [Teachers(), Eliciting(), Adding(), Distinguishing(), Connecting(every=2)]


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """MulKI's wheel, built from a copy of the checkout. Tests that need it are in the group "environment"."""
    source = tmp_path_factory.mktemp("mulki") / "source"
    source.mkdir()
    for path in (*ROOT.glob("*.toml"), *ROOT.glob("*.md"), ROOT / "LICENSE", ROOT / "mulki.py"):
        (source / path.name).write_bytes(path.read_bytes())
    for name in ("mulki_plugins", "recipes", "strategies", "studies"):
        if (ROOT / name).is_dir():
            copied(ROOT / name, source / name)
    return wheel_of(source, tmp_path_factory.mktemp("wheels"))


@pytest.fixture(scope="session")
def environment(wheel, tmp_path_factory):
    """A virtual environment with MulKI's wheel. Tests that need it are in the group "environment"."""
    created = Environment(tmp_path_factory.mktemp("environment"))
    created.install(wheel)
    where = created.run("-c", "import mulki_plugins; print(mulki_plugins.__file__)").stdout
    assert Path(where.strip()).is_relative_to(created.folder), "the wheel's files are the ones that run"
    created.start_server()
    yield created
    created.server.close()


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory):
    """Run a recipe with seed 0 and leave it alone; returns the result and the folder. The tests of a file share its runs."""
    runs = {}

    def run(resolved):
        key = repr(resolved.recipe)
        if key not in runs:
            folder = tmp_path_factory.mktemp("left-alone") / "run"
            runs[key] = run_experiment(resolved, 0, folder, folder=folder), folder
        return runs[key]

    return run


class Killed(BaseException):
    """Stands in for SIGKILL: no code of ours catches it for good."""


@pytest.fixture
def kill_at(monkeypatch):
    """Kill the run after a step of a task, after a checkpoint that is due there."""

    def at(task, step):
        after_step = Checkpointing.after_step

        def killed(self):
            after_step(self)
            if (self.tasks + 1, self.strategy.clock.train_exp_iterations) == (task, step):
                monkeypatch.setattr(Checkpointing, "after_step", after_step)
                raise Killed

        monkeypatch.setattr(Checkpointing, "after_step", killed)

    return at
