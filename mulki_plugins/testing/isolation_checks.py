"""Checks that a plugin leaves alone what others rely on: images, settings, random numbers, files, teachers."""

from __future__ import annotations

import contextlib
import io

import torch

from mulki_plugins.stages.teachers import Teachers
from mulki_plugins.testing.laboratory import TASKS, Laboratory
from mulki_plugins.testing.observers import LEAVE_BATCH, features_on
from mulki_plugins.testing.process import GENERATORS, preserved_state
from mulki_plugins.testing.small import small_stream
from mulki_plugins.testing.subject import Fault
from mulki_plugins.testing.training_checks import UNSEEDED
from mulki_plugins.testing.trial import Setup


def quiet(lab: Laboratory) -> None:
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        if lab.subject.kind != "optimizer":  # which is made of a model's weights
            lab.subject.create()
    if printed := (text.getvalue() + lab.ordinary.printed).strip():
        raise Fault(
            f"it prints on stdout: {printed.splitlines()[0][:80]!r}",
            "log a value by `self.log(strategy, tag, value)`; stdout is for results, such as those of --json",
        )


def batch(lab: Laboratory) -> None:
    lab.raise_noted("batch", lab.ordinary)
    if changed := _changed_images(lab.ordinary_setup):
        raise Fault(f"it changes {changed}", LEAVE_BATCH)


def _changed_images(setup: Setup) -> str:
    for used, fresh in zip(setup.stream.tasks, small_stream().tasks, strict=True):
        for split in ("train", "test"):
            a, b = getattr(used, split), getattr(fresh, split)
            if a.images.tobytes() != b.images.tobytes():
                return f"the {'training' if split == 'train' else 'test'} images of a task in place"
            if a.labels.tobytes() != b.labels.tobytes():
                return "the classes of a task's images in place"
    return ""


def surroundings(lab: Laboratory) -> None:
    lab.raise_noted("surroundings", lab.ordinary, lab.frozen)


def random_numbers(lab: Laboratory) -> None:
    one, other = lab.ordinary.generators, lab.frozen.generators
    moments = [moment for moment in one if moment[-1] != "before_training_exp"]
    for i, name in enumerate(GENERATORS):
        states = [one[moment][i] for moment in moments]
        if len(set(states)) < len(states):
            raise Fault(f"it seeds or resets the global generator of `{name}`, which then repeats itself", UNSEEDED)
        if any(one[moment][i] == other[moment][i] for moment in one.keys() & other.keys()):
            raise Fault(
                f"it seeds the global generator of `{name}`: two runs with different seeds draw the same numbers",
                UNSEEDED,
            )


def files(lab: Laboratory) -> None:
    _ = lab.ordinary  # fills `writes`
    if lab.writes:
        fix = "keep state in state_dict and log by `self.log`; the run writes into its own folder"
        raise Fault(f"it {lab.writes[0]}", fix)


def teachers(lab: Laboratory) -> None:
    if "teachers" in lab.subject.declared("conflicts"):
        return  # the two never share a stack
    with preserved_state():
        setup = lab.setup(iterations=3)
        benchmark, stack = setup.benchmark(), lab.stack(teachers=True)
        trial = setup.trial(stack.plugins, adapters=stack.adapters)
        trial.probe = torch.stack([benchmark.test_stream[task].dataset[0][0] for task in TASKS])
        pretrained = features_on(trial.model, trial.probe)
        lab.train(trial, benchmark, TASKS, tested=[0])
        holder = next(plugin for plugin in stack.plugins if isinstance(plugin, Teachers))
        fix = "call teachers under no_grad by `Teachers.of(strategy, self)`, and keep no module of theirs on the model"
        in_optimizer = {id(p) for group in trial.strategy.optimizer.param_groups for p in group["params"]}
        in_model = {id(p) for p in trial.model.parameters()}
        for which, teacher, task, expected in (
            ("pre-trained", holder.initial, 0, pretrained),
            ("previous", holder.previous, 1, trial.probe_features[1]),
        ):
            if teacher is None:
                raise Fault(f"the {which} teacher is gone", fix)
            if teacher.model.training:
                raise Fault(f"the {which} teacher is in training mode", "call `.train()` on the strategy's model only")
            changed = f"the {which} teacher is no longer the model before task {task + 1}"
            for name, p in teacher.model.named_parameters():
                if p.requires_grad or p.grad is not None:
                    raise Fault(f"the {which} teacher learns: {name} has a gradient or may have one", fix)
                if id(p) in in_optimizer or id(p) in in_model:
                    raise Fault(f"the {which} teacher's {name} is a weight of the model or of its optimizer", fix)
                if name in trial.before[task] and not torch.equal(p.float(), trial.before[task][name].float()):
                    raise Fault(f"{changed}: {name} differs", fix)
            features = features_on(teacher.model, trial.probe)
            if not all(torch.allclose(a, b, atol=1e-5) for a, b in zip(features, expected, strict=True)):
                raise Fault(f"{changed}: its features differ", fix)
