"""The check that a plugin holds no more from step to step and from task to task, and no images unless it says so."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from mulki_plugins.testing.growth import Held, Possessions, held_by, hooks_on, images_held
from mulki_plugins.testing.laboratory import Laboratory
from mulki_plugins.testing.subject import Fault
from mulki_plugins.testing.surroundings import kept_random_state
from mulki_plugins.testing.trial import BATCH, Place
from mulki_plugins.testing.world import LARGEST, SIZE, WIDTH

STEPS = 9
LOOKS = (2, 5, 8)
"""The steps of the third task after which is looked at what is held."""
KEEP_LITTLE = (
    "keep a fixed amount, or at most a few numbers for each class; a plugin that keeps images declares keeps_images"
)


def growth(lab: Laboratory) -> None:
    """Four tasks; what is held after the third and the fourth more than before, and within the third."""
    keeps_images = lab.subject.declared("keeps_images")
    with kept_random_state():
        place = Place(iterations=STEPS)
        benchmark, stack = place.benchmark(), lab.stack()
        trial = place.trial(stack.plugins)
        beside = [
            trial, benchmark, benchmark.train_stream, benchmark.test_stream,
            *(plugin for plugin in stack.plugins if plugin is not stack.subject),
        ]  # fmt: skip
        possessions = Possessions.of(stack.subject, lab.modules, beside, [trial.strategy, trial.model])
        images = _Images(possessions)
        parameters = len(list(trial.model.parameters()))
        held: list[Held] = []
        within: list[Held] = []
        hooks: list[int] = []

        def look(strategy: Any) -> None:
            if trial.task == 3 and trial.in_task in LOOKS:
                within.append(held_by(possessions))
            if trial.in_task == 3:
                images.look(trial.task)

        trial.after_step = look
        for task in range(4):
            lab.train(trial, benchmark, [task], tested=[0])
            trial.clear()
            held.append(held_by(possessions))
            hooks.append(hooks_on(trial.model))
            images.task_ended()
    more, rise = _least(held[1:]), _least(within)
    if rise.graph > 0 or more.graph > 0:
        raise Fault(
            "it keeps the graph of each step, and so all of its tensors", "keep `loss.detach()` or `float(loss)`"
        )
    if not keeps_images:
        if more.data > 4 * LARGEST * WIDTH * 4:
            raise Fault(f"it holds about {more.data:,} bytes more after each task", KEEP_LITTLE)
        if more.items > 8:
            raise Fault(f"it holds about {more.items} entries more after each task", KEEP_LITTLE)
        if rise.data > (LOOKS[1] - LOOKS[0]) * BATCH * SIZE * SIZE * 3 // 2:
            raise Fault(f"it holds about {rise.data:,} bytes more after each {LOOKS[0]} steps of a task", KEEP_LITTLE)
        if images.found:
            mend = "declare keeps_images, or drop the images when the task ends"
            raise Fault("it keeps images of a task when the next one is trained", mend)
    if len(list(trial.model.parameters())) != parameters and not lab.subject.declared("adds_parameters"):
        raise Fault("it adds weights to the model", "register it with adds_parameters=True")
    if hooks[3] > hooks[2] > hooks[1] and not lab.subject.declared("adds_parameters"):
        raise Fault("it hangs a hook on the model in every task and takes none away", "remove it in after_training_exp")


def _least(held: Sequence[Held]) -> Held:
    more = [after - before for before, after in itertools.pairwise(held)]
    return Held(*(min(getattr(each, name) for each in more) for name in ("data", "items", "graph")))


class _Images:
    """Images that are still held when another task has been trained for some steps."""

    def __init__(self, possessions: Possessions) -> None:
        self.possessions = possessions
        self.given = {id(each): each for each in images_held(possessions, SIZE)}
        """Those that it was made with, such as reference images."""
        self.ended: list[Any] = []
        self.found = False

    def task_ended(self) -> None:
        self.ended = [each for each in images_held(self.possessions, SIZE) if id(each) not in self.given]

    def look(self, task: int) -> None:
        earlier = {id(each) for each in self.ended}
        self.found = self.found or any(id(each) in earlier for each in images_held(self.possessions, SIZE))
