"""The kit's checks of heads: good heads pass, and each check finds the head that breaks its rule."""

import random

import pytest
import torch
from torch import nn

from mulki_plugins.heads import Head, Rail
from mulki_plugins.testing import HEAD_CHECKS, CheckFailed, check_head
from mulki_plugins.testing.kit import CHECKS
from tests.test_heads import Linear, Means


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize(("head", "options"), [("text", {}), ("rail", {"width": 30}), (Means, {}), (Linear, {})])
def test_good_heads_pass(head, options):
    check_head(head, **options)


class NoHead(nn.Module):
    """A module."""


class NoForward(Head):
    """Answers nothing."""


class Seeds(Means):
    """Seeds torch."""

    def __init__(self):
        super().__init__()
        random.seed(3)


class Fails(Means):
    """Cannot learn."""

    def after_task(self, task, images):
        raise KeyError("y")


class ChangesModel(Head):
    """Has the weights of the model in its hands."""

    def before_task(self, task, classes):
        self.steps = nn.Parameter(torch.zeros(3))

    def after_task(self, task, images):
        with torch.no_grad():
            images.model.clip.visual.proj.mul_(1.1)

    def forward(self, z, scope):
        return scope.text_logits(z) + 0 * self.steps.sum() if hasattr(self, "steps") else scope.text_logits(z)


class OnlyLearned(Means):
    """Has columns for learned classes alone."""

    def forward(self, z, scope):
        logits = super().forward(z, scope)
        keep = [i for task, places in scope.places.items() for i in places if self.owners is not None]
        return logits[:, sorted(set(keep))] if keep else logits[:, :0]


class OwnOrder(Means):
    """Puts the classes of its tasks one after the other, whatever their places are."""

    def forward(self, z, scope):
        logits = scope.text_logits(z)
        column = 0
        for task, places in sorted(scope.places.items()):
            count = len(places)
            if self.owners is not None and bool((self.owners == task).any()) and column + count <= logits.shape[1]:
                logits[:, column : column + count] = z @ self.means[self.owners == task].to(z).T
            column += count
        return logits


class BatchNormal(Means):
    """Subtracts the batch's mean."""

    def forward(self, z, scope):
        return super().forward(z - 0.5 * z.mean(0), scope)


class Votes(Means):
    """Lets the batch vote on the class."""

    def forward(self, z, scope):
        logits = super().forward(z, scope)
        return logits + 5 * nn.functional.one_hot(logits.argmax(1), logits.shape[1]).float().mean(0)


class InPlace(Means):
    """Scales the features in place."""

    def forward(self, z, scope):
        z.mul_(2)
        return super().forward(z, scope)


class Adapts(Means):
    """Learns from the images that it is tested on."""

    def forward(self, z, scope):
        if self.means is not None:
            self.means = self.means + 0.01 * z.mean(0).double()
        return super().forward(z, scope)


class Unsaved(Means):
    """Keeps its means in a plain attribute."""

    def __init__(self):
        nn.Module.__init__(self)
        self.means = self.owners = None


class Transient(Means):
    """Keeps its means in a buffer that is not saved."""

    def __init__(self):
        nn.Module.__init__(self)
        self.register_buffer("means", None, persistent=False)
        self.register_buffer("owners", None)


class Drawn(Means):
    """Draws directions that it does not keep."""

    def begin(self, width):
        self.directions = [torch.randn(width, width)]

    def forward(self, z, scope):
        return super().forward(nn.functional.normalize(z @ self.directions[0], dim=1), scope)


class LateParameter(Means):
    """Makes a parameter when the task is over."""

    def after_task(self, task, images):
        super().after_task(task, images)
        self.scale = nn.Parameter(torch.ones(()))


class Unseeded(Head):
    """Draws from a generator that no seed reaches."""

    def begin(self, width):
        generator = torch.Generator()
        generator.seed()
        self.register_buffer("directions", torch.randn(width, width, generator=generator))

    def forward(self, z, scope):
        return scope.text_logits(z @ self.directions)


class Prints(Means):
    """Prints."""

    def after_task(self, task, images):
        super().after_task(task, images)
        print("learned", task)  # noqa: T201


class Writes(Means):
    """Writes a file."""

    def after_task(self, task, images):
        super().after_task(task, images)
        with open("means.txt", "w") as file:
            file.write("means")


class TwoClasses(Means):
    """Divides by the number of classes but one."""

    def after_task(self, task, images):
        super().after_task(task, images)
        self.factor = 1 // (images.classes - 1)


BAD = {
    "made": [NoHead, NoForward, Seeds], "learns": [Fails, ChangesModel, LateParameter],
    "answers": [OnlyLearned], "order": [OwnOrder],
    "independent": [BatchNormal, Votes], "unchanged": [InPlace, Adapts],
    "saved": [Unsaved, Transient, Drawn], "repeatable": [Unseeded], "quiet": [Prints], "files": [Writes],
    "extremes": [TwoClasses],
}  # fmt: skip


@pytest.mark.parametrize(("check", "head"), [(check, head) for check, heads in BAD.items() for head in heads])
def test_a_bad_head_is_caught(check, head, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckFailed) as caught:
        check_head(head)
    faults = caught.value.faults
    assert check in faults, str(caught.value)
    assert "ended in an error" not in faults[check].problem
    assert faults[check].fix


def test_each_check_has_a_bad_head_and_a_line():
    assert list(BAD) == list(HEAD_CHECKS) == list(CHECKS["head"])


def test_the_fixture_runs_each_check(mulki_head_check):
    mulki_head_check(Rail, width=20)
