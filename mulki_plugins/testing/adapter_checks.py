"""Checks of an adapter that no plugin needs: how it starts, what learns, and whether it merges."""

from __future__ import annotations

import torch
from torch import Tensor

from mulki_plugins.errors import MulkiError
from mulki_plugins.models.adapter import Adapter
from mulki_plugins.models.classifier import ClipClassifier
from mulki_plugins.testing.laboratory import TASKS, Laboratory
from mulki_plugins.testing.observers import features_on
from mulki_plugins.testing.process import preserved_state
from mulki_plugins.testing.small import small_model, small_stream
from mulki_plugins.testing.subject import Fault
from mulki_plugins.training.rng import seed_everything

START = "begin with weights that change nothing, such as zeros in the last factor"


def made(lab: Laboratory) -> None:
    adapter = lab.subject.create()
    if not isinstance(adapter, Adapter):
        raise Fault(f"it is a {type(adapter).__name__}", "derive it from mulki_plugins.adapters.Adapter")
    if lab.subject.create() is adapter:
        raise Fault("every call returns the same object", "create a new one at each call, so that runs share no state")


def start(lab: Laboratory) -> None:
    with preserved_state():
        setup = lab.setup()
        images = _images(lab)
        plain = features_on(_plain(), images)
        try:
            model = setup.trial([], adapters=lab.stack().adapters).model
        except MulkiError as error:
            raise Fault(error.lines()[0], "add weights beside a layer, or with torch.nn.utils.parametrize") from error
        _compare(plain, features_on(model, images), "a model with a fresh one answers otherwise than without it", START)
        model.before_task(0)
        _compare(plain, features_on(model, images), "before_task of the first task changes the answers", START)


def learning(lab: Laboratory) -> None:
    lab.raise_noted("gradients", lab.ordinary, lab.frozen)
    trial = lab.ordinary
    if not trial.model.added_weights():
        fix = "add them as parameters of the model's modules in apply or before_task"
        raise Fault("it adds no weights to the model", fix)
    for task in TASKS:
        began, ended = trial.began[task], trial.ended[task]
        kept = {name: value for name, value in ended.items() if name in began and value.is_floating_point()}
        changed = {name for name, value in kept.items() if not torch.equal(began[name], value)}  # counters may count
        for name in sorted(changed - trial.learned[task]):
            raise Fault(
                f"{name} does not require a gradient and changes within task {task + 1}",
                "change only weights that learn; merge or freeze in after_task",
            )


def merged(lab: Laboratory) -> None:
    with preserved_state():
        model = lab.ordinary.model
        try:
            weights = model.merged_weights()
        except MulkiError:
            return  # as by default: it stays beside the weights
        images = _images(lab)
        plain = _plain()
        try:
            plain.clip.load_state_dict(weights)
        except RuntimeError as error:
            fix = "merge into the model's own weights and leave their names"
            raise Fault(
                f"its merged weights do not fit the model: {str(error).splitlines()[-1].strip()}", fix
            ) from error
        fix = "add exactly what it does in the forward to the plain weights"
        now = features_on(model, images)
        _compare(now, features_on(plain, images), "the merged weights answer otherwise than the adapted model", fix)
        for adapter in model.adapters:
            with torch.no_grad():
                adapter.merge(model.clip)
        _compare(now, features_on(model, images), "after merge, the model itself answers otherwise", fix)
        again = model.merged_weights()
        if not all(torch.allclose(weights[name].float(), again[name].float(), atol=1e-5) for name in weights):
            raise Fault("merging twice changes the weights again", "reset what it adds when it has been merged")


def _plain() -> ClipClassifier:
    loaded = small_model()
    return ClipClassifier(loaded.clip, loaded.tokenizer, small_stream().tasks)


def _images(lab: Laboratory) -> Tensor:
    benchmark = lab.setup().benchmark()
    seed_everything(0)
    return torch.stack([benchmark.test_stream[task].dataset[i][0] for task in TASKS for i in range(3)])


def _compare(one: list[Tensor], other: list[Tensor], problem: str, fix: str) -> None:
    """Fault if features differ by more than rounding does. Features have unit norm."""
    worst = max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))
    if not worst <= 1e-5:
        raise Fault(f"{problem}, by {worst:.2g}", fix)
