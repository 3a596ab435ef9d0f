"""A small world for the tests: a CLIP of a few thousand weights, and tasks that it can learn in seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.supervised import Naive
from open_clip.model import CLIP

from mulki_plugins.models import ClipClassifier, LoadedClip
from mulki_plugins.registry.catalog import Catalog, Provenance, Register
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.stages import Adding, Connecting, Distinguishing, Eliciting, Teachers
from mulki_plugins.streams import ArrayImages, Task, TaskStream, as_benchmark
from tests.environments import ROOT, Environment, copied, wheel_of

SIZE = 16
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 200, 60),
    "blue": (50, 60, 220),
    "yellow": (230, 220, 60),
    "grey": (128, 128, 128),
}


@pytest.fixture(scope="session", autouse=True)
def pictures_of_these_tests_alone(tmp_path_factory):
    """A cache of their own, drawn by the code as it is now."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MULKI_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def small_clip(seed: int = 0) -> CLIP:
    """A CLIP with random weights for 16 x 16 images."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return CLIP(
            embed_dim=16,
            vision_cfg={"image_size": SIZE, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
            text_cfg={"context_length": 12, "vocab_size": 300, "width": 32, "heads": 2, "layers": 1},
        )


def small_tokenizer(texts: list[str]) -> torch.Tensor:
    """Bytes as tokens; the end token is the largest, as CLIP's text pooling wants it."""
    rows = []
    for text in texts:
        tokens = [1, *(b % 250 + 2 for b in text.encode()[-10:]), 299]
        rows.append(tokens + [0] * (12 - len(tokens)))
    return torch.tensor(rows)


def coloured_images(colours: list[str], each: int, seed: int) -> ArrayImages:
    rng = np.random.default_rng(seed)
    labels = np.arange(each * len(colours)) % len(colours)
    base = np.array([COLOURS[colours[label]] for label in labels])[:, None, None, :]
    noise = rng.normal(0, 25, (len(labels), SIZE, SIZE, 3))
    return ArrayImages(np.clip(base + noise, 0, 255).astype(np.uint8), labels.astype(np.int64))


def small_task(name: str, colours: list[str], seed: int = 0, each: int = 8, names: tuple[str, ...] = ()) -> Task:
    return Task(
        name=name,
        class_names=names or tuple(colours),
        templates=("a {} one.", "it is {}."),
        train=coloured_images(colours, each, seed),
        test=coloured_images(colours, 4, seed + 100),
    )


def small_stream() -> TaskStream:
    """Three tasks of two, three and two classes."""
    return TaskStream(
        name="small",
        tasks=(
            small_task("first", ["red", "green"], 1),
            small_task("second", ["blue", "yellow", "grey"], 2),
            small_task("third", ["green", "blue"], 3, names=("grass", "sea")),
        ),
    )


class SmallTokenizer:
    """The small tokenizer with what open_clip's says of itself."""

    sot_token_id, eot_token_id, vocab_size, context_length = 1, 299, 300, 12
    all_special_ids = (1, 299)

    def __call__(self, texts):
        return small_tokenizer(texts)


def small_model() -> LoadedClip:
    half = (0.5, 0.5, 0.5)
    return LoadedClip(clip=small_clip(), tokenizer=SmallTokenizer(), image_size=SIZE, mean=half, std=half)


def small_reference() -> TaskStream:
    return TaskStream(
        name="other", tasks=(small_task("other", ["grey", "yellow"], seed=9, each=5, names=("ash", "gold")),)
    )


@pytest.fixture
def small_parts():
    """The small world under names that a recipe can use: the streams small and small-other, the model small-clip."""
    mine = Catalog()
    register = Register(mine, Provenance(distribution="mulki", version=""))
    register.stream("small", small_stream, summary="three tasks of colours")
    register.stream("small-other", small_reference, summary="two other colours")
    register.model("small-clip", small_model, summary="a few thousand weights")
    catalog().parts.update(mine.parts)
    yield
    for key in mine.parts:
        del catalog().parts[key]


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
    """A logger that keeps what it is told."""

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
def environment(tmp_path_factory):
    """An environment of its own, with MulKI's wheel."""
    made = Environment(tmp_path_factory.mktemp("environment"))
    source = tmp_path_factory.mktemp("mulki") / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for name in ("mulki_plugins", "recipes", "strategies"):
        copied(ROOT / name, source / name)
    made.install(wheel_of(source, tmp_path_factory.mktemp("wheels")))
    where = made.run("-c", "import mulki_plugins; print(mulki_plugins.__file__)").stdout
    assert Path(where.strip()).is_relative_to(made.folder), "the wheel's files are the ones that run"
    return made
