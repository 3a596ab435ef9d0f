"""The checks of what a plugin must leave alone, and of the circumstances in which it must work."""

from __future__ import annotations

import torch

from mulki_plugins.testing.laboratory import Laboratory
from mulki_plugins.testing.subject import Fault
from mulki_plugins.testing.surroundings import GENERATORS, generators, kept_random_state
from mulki_plugins.testing.trial import Place, Trial
from mulki_plugins.testing.witnesses import LEAVE_BATCH
from mulki_plugins.testing.world import small_stream, uneven_stream
from mulki_plugins.training.rng import seed_everything

SEED_LESS = "seed no global generator: use a torch.Generator of your own, or torch.random.fork_rng"


def batch(lab: Laboratory) -> None:
    lab.noted("batch", lab.ordinary)
    if what := _changed_images(lab.place_of_ordinary):
        raise Fault(f"it changes {what}", LEAVE_BATCH)


def _changed_images(place: Place) -> str:
    for used, fresh in zip(place.stream.tasks, small_stream().tasks, strict=True):
        for part in ("train", "test"):
            a, b = getattr(used, part), getattr(fresh, part)
            if a.images.tobytes() != b.images.tobytes():
                return f"the {'training' if part == 'train' else 'test'} images of a task in place"
            if a.labels.tobytes() != b.labels.tobytes():
                return "the classes of a task's images in place"
    return ""


def surroundings(lab: Laboratory) -> None:
    lab.noted("surroundings", lab.ordinary, lab.frozen)


def random_numbers(lab: Laboratory) -> None:
    one, other = lab.ordinary.generators, lab.frozen.generators
    moved = [moment for moment in one if moment[-1] != "before_training_exp"]
    for i, name in enumerate(GENERATORS):
        states = [one[moment][i] for moment in moved]
        if len(set(states)) < len(states):
            raise Fault(
                f"it seeds or resets the global generator of `{name}`: the same numbers are drawn again", SEED_LESS
            )
        if any(one[moment][i] == other[moment][i] for moment in one.keys() & other.keys()):
            raise Fault(
                f"it seeds the global generator of `{name}`: two runs with different seeds draw the same", SEED_LESS
            )


def random_at_making(lab: Laboratory) -> None:
    """Fault where the plugin seeds a generator when it is made."""
    with kept_random_state():
        found = []
        for seed in (0, 1):
            seed_everything(seed)
            lab.subject.made()
            found.append(generators())
    for name, one, other in zip(GENERATORS, *found, strict=True):
        if one == other:
            raise Fault(f"it seeds the global generator of `{name}` when it is made", SEED_LESS)


def files(lab: Laboratory) -> None:
    _ = lab.ordinary
    if lab.written:
        mend = "keep what you know in state_dict, and log by `self.log`; the run writes into its own folder"
        raise Fault(f"it {lab.written[0]}", mend)


def evaluation(lab: Laboratory) -> None:
    """The ordinary training's model once more: as before, and image by image in another order."""
    trial = lab.ordinary
    lab.noted("evaluation", trial, lab.frozen)
    mend = "an evaluation's answer follows from the weights and the image alone; keep no state from batch to batch"
    with kept_random_state():
        benchmark = lab.place_of_ordinary.benchmark()
        before = list(trial.outputs)
        if not alike(before, lab.evaluated(trial, benchmark)):
            raise Fault("a second evaluation gives other logits than the first", mend)
        trial.strategy.eval_mb_size = 1
        singly = lab.evaluated(trial, benchmark, order=(1, 0))
        trial.strategy.eval_mb_size = trial.parts["eval_mb_size"]
        if not alike(before, singly):
            raise Fault(
                "the logits of an image depend on the other images of its batch, or on the order of tasks", mend
            )


def alike(a: list[tuple[int, torch.Tensor]], b: list[tuple[int, torch.Tensor]]) -> bool:
    """Whether two evaluations give the same logits."""
    for task in (0, 1):
        one, other = (torch.cat([logits for t, logits in each if t == task]) for each in (a, b))
        if one.shape != other.shape or not torch.allclose(one, other, atol=1e-3, equal_nan=True):
            return False
    return True


def extremes(lab: Laboratory) -> None:
    one = "with batches of one image and a task of one class"
    _try(lab, one, Place(stream=uneven_stream(), batch=1, iterations=2))
    _try(lab, "in mixed precision (bf16)", Place(precision="bf16", iterations=2))


def _try(lab: Laboratory, where: str, place: Place) -> None:
    try:
        trial: Trial = lab.trained(place=place, tested=[0])
    except Fault as fault:
        raise Fault(f"{where}: {fault.wrong}", fault.mend) from fault
    if not all(torch.tensor(step.loss).isfinite() and not step.bad_gradients for step in trial.steps):
        raise Fault(f"{where} the loss or a gradient is not finite", "guard divisions, such as by a count less one")
