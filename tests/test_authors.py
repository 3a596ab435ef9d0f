"""The page of what an author writes with: its table of callbacks is what a training does."""

import sys

import pytest
import torch
from avalanche.training.plugins import SupervisedPlugin

from mulki_plugins.registry.callbacks import CALLBACKS
from mulki_plugins.testing import train_two_tasks
from tests.environments import ROOT


@pytest.fixture
def authors(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    yield __import__("authors")
    sys.modules.pop("authors", None)


def spy():
    """A plugin that notes, at each callback: the loss, the optimizer, how far it is, and the model's features."""
    seen = []

    def note(name):
        def callback(self, strategy, **kwargs):
            loss = strategy.loss
            number = float(loss.detach()) if isinstance(loss, torch.Tensor) else float(loss or 0)
            age = max((int(s["step"]) for s in strategy.optimizer.state.values()), default=0)
            seen.append((name, number, id(strategy.optimizer), age, id(strategy.model.features)))

        return callback

    return type("Spy", (SupervisedPlugin,), {name: note(name) for name in CALLBACKS})(), seen


def test_every_callback_is_listed_in_its_order(authors):
    plugin, seen = spy()
    train_two_tasks([plugin])
    names = [name for name, *_ in seen]
    training = [name for name in names if "eval" not in name]
    assert list(dict.fromkeys(training)) == [row[0] for row in authors.TASK]
    assert list(dict.fromkeys(name for name in names if "eval" in name)) == [name for name, _ in authors.EVALUATION]
    assert {row[0] for row in authors.TASK} | {name for name, _ in authors.EVALUATION} == set(CALLBACKS)


def test_loss_optimizer_and_features_are_what_the_table_says(authors):
    plugin, seen = spy()
    train_two_tasks([plugin])
    second = max(i for i, each in enumerate(seen) if each[0] == "before_training")
    task = [each for each in seen[second:] if "eval" not in each[0]]
    first = {}
    for each in task:
        first.setdefault(each[0], each)
    optimizer, features = first["after_training_exp"][2], first["after_forward"][4]
    before = next(each for each in reversed(seen[:second]) if each[0] == "after_training")
    last = [each for each in task if each[0] in ("after_training_epoch", "after_training_exp", "after_training")]
    for name, _, loss, which, of in authors.TASK:
        _, number, used, age, now = first[name]
        if which == "the last task's":
            assert used == before[2] != optimizer, name
        else:
            assert used == optimizer, name
            assert (age > 0) == (which == "stepped"), name
        if loss in ("0", "terms so far"):
            assert number == 0, f"{name}: no plugin adds a term here, and the criterion has not joined"
        if loss == "all terms":
            assert number > 0, name
        if of == "earlier":
            assert now != features, name
        elif name not in {each[0] for each in last}:
            assert now == features, name
