"""`evaluate.classes` on matrices worked out by hand: a CLIP on a circle, where the nearest direction is the answer."""

import math

import numpy as np
import pytest
import torch
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from torch import nn

from mulki_plugins.metrics import average, last, transfer
from mulki_plugins.models import ClipClassifier
from mulki_plugins.recipe.schema import Evaluate, Optimizer, Train
from mulki_plugins.streams import ArrayImages, Task, TaskStream, as_benchmark
from mulki_plugins.training.accuracy import AccuracyRecorder
from mulki_plugins.training.strategy import ContinualTemplate

DIRECTIONS = {"crane": 0, "duck": 100, "tower": 50, "ship": 30, "raft": 200}
"""In degrees: where the text of each class lies."""
TASKS = {
    "birds": {"crane": [10, 35, 60], "duck": [90, 70]},
    "sites": {"crane": [5, 20, 30], "tower": [45, 80]},
    "boats": {"ship": [28, 12], "raft": [190, 120, 100]},
}
"""For each task its classes, and where their test images lie. Both cranes are described by the same sentence."""


class Compass(nn.Module):
    """Texts and images as directions; an image's is its red channel in degrees, and how far training has turned it."""

    def __init__(self):
        super().__init__()
        self.visual = nn.Module()
        self.visual.turn = nn.Parameter(torch.zeros(()))
        self.logit_scale = nn.Parameter(torch.zeros(()))

    def encode_image(self, x):
        return _direction(x[:, 0, 0, 0] + self.visual.turn)

    def encode_text(self, tokens):
        return _direction(tokens[:, 0].float())


def _direction(degrees):
    radians = degrees * math.pi / 180
    return torch.stack([radians.cos(), radians.sin()], 1)


def tokens(texts):
    return torch.tensor([[DIRECTIONS[text.split()[1]]] for text in texts])


class TurnsInTheEnd(SupervisedPlugin):
    """After the third task every image lies 6 degrees further on."""

    def after_training_exp(self, strategy, **kwargs):
        if strategy.experience.task_name == "boats":
            strategy.model.clip.visual.turn.data.fill_(6.0)


def images(angles):
    pairs = [(angle, label) for label, found in enumerate(angles) for angle in found]
    pixels = np.zeros((len(pairs), 2, 2, 3), dtype=np.uint8)
    pixels[..., 0] = np.array([angle for angle, _ in pairs])[:, None, None]
    return ArrayImages(pixels, np.array([label for _, label in pairs]))


# Which class is nearest, by the boundaries half-way between the directions of the classes in question:
#   birds alone   crane < 50 < duck             sites alone   crane < 25 < tower            boats alone   ship < 115 < raft
#   birds and sites   crane < 25 < tower < 75 < duck
#   all three         crane < 15 < ship < 40 < tower < 75 < duck < 150 < raft
# Images by task, true class before the colon:
#   birds   crane: 10 35 60, duck: 90 70       sites   crane: 5 20 30, tower: 45 80         boats   ship: 28 12, raft: 190 120 100
# task, right answers:
#   birds   10 35 90 70 (60 is a duck)         sites   5 20 45 80 (30 is a tower)           boats   28 12 190 120 (100 is a ship)
#   after the third task (+6): birds 16 41 96 76, sites 11 51 86 (26 is a tower), boats 34 18 196 126
# birds and sites:
#   birds   10 90                              sites   5 20 45
# all three:
#   birds   10 90                              sites   5 45                                 boats   28 190
#   after the third task (+6): birds 96 76, sites 11 51, boats 34 18 196
# A crane is a crane, in birds as in sites.
EXPECTED = {
    "task": ([80, 80, 80], [[80, 80, 80], [80, 80, 80], [80, 60, 80]]),
    # seen: a task that was learned among the classes of all that were learned, another among its own
    "seen": ([80, 80, 80], [[80, 80, 80], [40, 60, 80], [40, 40, 60]]),
    "all": ([40, 40, 40], [[40, 40, 40], [40, 40, 40], [40, 40, 60]]),
}


def matrix(classes, batch_size=2):
    """The zero-shot row and the matrix, through the template that trains recipes."""
    torch.manual_seed(0)  # the gradients of some batches cancel, which a run refuses
    tasks = tuple(
        Task(name=name, class_names=tuple(kinds), templates=("a {} here.",), train=lie, test=lie)
        for name, kinds in TASKS.items()
        for lie in [images(kinds.values())]
    )
    benchmark = as_benchmark(TaskStream(name="circle", tasks=tasks), _tensor, _tensor)
    model = ClipClassifier(Compass(), tokens, tasks)
    recorder = AccuracyRecorder()
    strategy = ContinualTemplate(
        model=model,
        train=Train(iterations=1, batch_size=2, optimizer=Optimizer(name="sgd", lr=1e-4)),
        evaluate=Evaluate(classes=classes, batch_size=batch_size),
        device=torch.device("cpu"),
        plugins=[TurnsInTheEnd()],
        evaluator=EvaluationPlugin(recorder, loggers=[], collect_all=False),
    )

    strategy.checks.warn = lambda text: None  # some tasks have nothing to learn

    def row():
        strategy.eval(benchmark.test_stream)
        return [recorder.accuracies[name] for name in TASKS]

    zero_shot, rows = row(), []
    for experience in benchmark.train_stream:
        strategy.train(experience, eval_streams=[])
        rows.append(row())
    return zero_shot, rows


def _tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


@pytest.mark.parametrize("classes", ["task", "seen", "all"])
def test_each_scope_by_hand(classes):
    assert matrix(classes) == EXPECTED[classes]


def test_what_follows_for_the_metrics():
    found = {classes: matrix(classes, 64)[1] for classes in EXPECTED}
    assert transfer(found["seen"]) == transfer(found["task"]) == 80, "tasks to come have their own classes in both"
    assert transfer(found["all"]) == 40
    assert last(found["seen"]) == last(found["all"]) == pytest.approx(140 / 3), "in the end everything is seen"
    assert average(found["task"]) == pytest.approx(700 / 9)
    for wider, narrower in (("all", "seen"), ("seen", "task")):
        assert (np.array(found[wider]) <= np.array(found[narrower])).all()
