"""The checks of a head. Each raises Fault."""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Iterator, Sequence

import torch
from attrs import frozen
from avalanche.benchmarks.scenarios import CLScenario
from avalanche.logging import BaseLogger
from avalanche.training.plugins import EvaluationPlugin
from torch import Tensor

from mulki_plugins.models.classifier import ClipClassifier
from mulki_plugins.models.head import Head, Scope
from mulki_plugins.models.precision import autocast
from mulki_plugins.recipe.schema import Evaluate, Optimizer, Train
from mulki_plugins.registry.guard import cause_of
from mulki_plugins.streams.benchmark import as_benchmark
from mulki_plugins.streams.task import TaskStream
from mulki_plugins.testing.process import GENERATORS, audited, descriptor_captured, generators, preserved_state
from mulki_plugins.testing.small import small_model, small_stream, uneven_stream
from mulki_plugins.testing.subject import Fault, Subject, author_modules
from mulki_plugins.testing.trial import LOADER, same_weights
from mulki_plugins.training.rng import seed_everything
from mulki_plugins.training.snapshot import storable
from mulki_plugins.training.strategy import ContinualTemplate

LEARNED = (0, 1, 2)
"""The tasks that are learned; the small stream has a fourth, which shares a class with the first."""
SCOPES: tuple[tuple[int, ...], ...] = ((0,), (1,), (2,), (3,), (0, 1, 2), (0, 1, 2, 3))
"""Each task's own classes, those of all learned tasks, and those of the whole stream."""
CLOSE = 1e-3
KEEP = "make everything that it keeps a parameter or a registered buffer: register_buffer(name, None) if there is nothing yet"


@frozen(eq=False)
class Pupil:
    """A model with the head under test, in a strategy that trains nothing but the head."""

    model: ClipClassifier
    strategy: ContinualTemplate
    benchmark: CLScenario

    def learn(self, tasks: Sequence[int]) -> None:
        for task in tasks:
            seed_everything(0, task + 1)
            self.strategy.train(self.benchmark.train_stream[task], eval_streams=[], **LOADER)
        self.model.eval()

    @torch.no_grad()
    def features(self) -> Tensor:
        """What the head reads of the test images of all tasks, those of different tasks next to each other: [B, d] or wider."""
        images = [e.dataset[i][0] for i in range(4) for e in self.benchmark.test_stream]
        return self.model.encode_for_head(torch.stack(images))

    @torch.no_grad()
    def scope(self, tasks: Sequence[int]) -> Scope:
        with self.model.using("all"):
            texts = torch.cat([self.model.text_features(task) for task in tasks])
        union = self.model.union(tasks)
        return Scope(texts[union.first], self.model.scale, dict(zip(tasks, union.places, strict=True)))

    @torch.no_grad()
    def answer(self, z: Tensor, scope: Scope) -> Tensor:
        logits: Tensor = self.model.head(z.clone(), scope)
        return logits

    def state(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.model.head.state_dict().items()}


class HeadBench:
    """A head under test, and the models that learn with it."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.printed = ""
        self.writes: list[str] = []

    def pupil(self, seed: int = 0, stream: TaskStream | None = None) -> Pupil:
        """A model with a new head that has learned nothing."""
        seed_everything(seed)
        loaded, stream = small_model(), stream or small_stream()
        head = self.subject.create()
        with _blamed("when the model is built"):
            model = ClipClassifier(loaded.clip, loaded.tokenizer, stream.tasks, train="none", head=head)
        strategy = ContinualTemplate(
            model=model, train=Train(iterations=4, batch_size=4, optimizer=Optimizer(lr=0.01)),
            evaluate=Evaluate(batch_size=8), device=torch.device("cpu"), plugins=[],
            evaluator=EvaluationPlugin(loggers=[BaseLogger()]),
        )  # fmt: skip
        strategy.checks.warn = lambda text: None  # a head that keeps weights of earlier tasks need not train them
        return Pupil(model, strategy, as_benchmark(stream, loaded.transform(train=True), loaded.transform(train=False)))

    @functools.cached_property
    def learned(self) -> Pupil:
        """The head after three tasks."""
        text = io.StringIO()
        modules = author_modules(self.subject.create(), self.subject.factory)
        with preserved_state(), audited(modules) as self.writes, descriptor_captured() as printed:
            with contextlib.redirect_stdout(text):
                pupil = self.pupil()
                with _blamed("when it learns three tasks"):
                    pupil.learn(LEARNED)
            self.printed = text.getvalue() + printed()
        return pupil


@contextlib.contextmanager
def _blamed(when: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise Fault(f"it fails {when}: {cause_of(error)}", "fix the error at the line named") from error


def made(bench: HeadBench) -> None:
    head = bench.subject.create()
    if not isinstance(head, Head):
        raise Fault(f"it is a {type(head).__name__}", "derive it from mulki_plugins.heads.Head")
    if type(head).forward is Head.forward:
        raise Fault("it has no `forward`", "define forward(self, z, scope) -> logits [B, C]")
    if bench.subject.create() is head:
        raise Fault("every call returns the same object", "create a new one at each call, so that runs share no state")
    states = []
    with preserved_state():
        for seed in (0, 1):
            bench.pupil(seed)
            states.append(generators())
    for name, one, other in zip(GENERATORS, *states, strict=True):
        if one == other:
            raise Fault(
                f"it seeds the global generator of `{name}`", "draw from torch's generator, which the run seeds"
            )


def learns(bench: HeadBench) -> None:
    with preserved_state():
        before = dict(bench.pupil().model.clip.state_dict())
        if not same_weights(before, dict(bench.learned.model.clip.state_dict())):
            raise Fault(
                "it changes weights of the model", "keep its own weights in itself; an adapter changes the model"
            )


def answers(bench: HeadBench) -> None:
    fix = "return a row for each image and a column for each candidate, len(scope.text), also of tasks that it has not learned"
    with preserved_state():
        for pupil, when in ((bench.pupil(), "before it has learned anything"), (bench.learned, "after three tasks")):
            z = pupil.features()
            scopes = [(f"a scope of the tasks {each}", pupil.scope(each)) for each in SCOPES]
            nowhere = Scope(pupil.scope((0, 1)).text, pupil.model.scale, {})
            for what, scope in (*scopes, ("candidates of no task", nowhere)):
                with _blamed(f"over {what}, {when}"):
                    logits = pupil.answer(z, scope)
                expected = (len(z), len(scope.text))
                if not isinstance(logits, Tensor) or tuple(logits.shape) != expected:
                    got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                    raise Fault(f"over {what}, {when}, it returns {got}, expected logits of shape {expected}", fix)
                if not logits.is_floating_point() or bool(logits.isnan().any()):
                    raise Fault(
                        f"over {what}, {when}, its logits are no numbers", "return floating-point logits, not NaN"
                    )


def order(bench: HeadBench) -> None:
    with preserved_state():
        pupil = bench.learned
        z = pupil.features()
        for tasks in SCOPES:
            scope = pupil.scope(tasks)
            count = len(scope.text)
            moved = torch.randperm(count, generator=torch.Generator().manual_seed(3))
            place_of = moved.argsort().tolist()
            places = {task: [place_of[i] for i in scope.places[task]] for task in reversed(tasks)}
            other = pupil.answer(z, Scope(scope.text[moved], scope.scale, places))
            if not torch.allclose(pupil.answer(z, scope)[:, moved], other, atol=CLOSE):
                raise Fault(
                    f"its columns are not in the order of the candidates, over a scope of the tasks {tasks}",
                    "put the logit of class c of a task into the column scope.places[task][c]",
                )


def independent(bench: HeadBench) -> None:
    fix = "compute a row from the features of its image alone: no mean, sort, softmax or vote over the batch"
    with preserved_state():
        pupil = bench.learned
        z = pupil.features()
        for tasks in SCOPES:
            scope = pupil.scope(tasks)
            whole = pupil.answer(z, scope)
            single = torch.cat([pupil.answer(row[None], scope) for row in z])
            backwards = pupil.answer(z.flip(0), scope).flip(0)
            halves = torch.cat([pupil.answer(part, scope) for part in (z[: len(z) // 2], z[len(z) // 2 :])])
            if not all(torch.allclose(whole, other, atol=CLOSE) for other in (single, backwards, halves)):
                raise Fault("an image's logits depend on the other images of its batch", fix)


def unchanged(bench: HeadBench) -> None:
    with preserved_state():
        pupil = bench.learned
        z, before = pupil.features(), pupil.state()
        first = []
        for tasks in SCOPES:
            scope = pupil.scope(tasks)
            given, text = z.clone(), scope.text.clone()
            with torch.no_grad():
                first.append(pupil.model.head(given, scope))
            if not torch.equal(given, z) or not torch.equal(scope.text, text):
                raise Fault("it changes the features in place", "copy a tensor before writing to it")
        again = [pupil.answer(z, pupil.scope(tasks)) for tasks in SCOPES]
        if not all(map(torch.equal, first, again)) or not same_weights(before, pupil.state()):
            raise Fault("an evaluation changes what it keeps or answers", "change nothing in `forward`")


def saved(bench: HeadBench) -> None:
    """A new head with what a checkpoint keeps must answer, and go on learning, like the old one."""
    with preserved_state():
        old = bench.pupil()
        old.learn(LEARNED[:2])
        new = bench.pupil(seed=7)
        for task in LEARNED[:2]:
            new.model.before_task(task)
        kept = _written(old.state())
        new.model.head.make_room(kept)
        try:
            new.model.head.load_state_dict(kept)
        except RuntimeError as error:
            what = f"a checkpoint's state does not fit a new head: {cause_of(error)}"
            raise Fault(what, f"{KEEP}; make parameters in `begin` or `before_task`") from error
        new.model.eval()
        new.strategy.learned = set(LEARNED[:2])
        _compare(old, new, "after a resume it answers differently")
        for each in (old, new):
            each.learn(LEARNED[2:])
        _compare(old, new, "after a resume it learns the next task differently")


def _written(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state as it is read from a checkpoint."""
    file = io.BytesIO()
    torch.save(storable(state), file)
    file.seek(0)
    kept: dict[str, Tensor] = torch.load(file, weights_only=True)
    return kept


def _compare(old: Pupil, new: Pupil, what: str) -> None:
    z = old.features()
    for tasks in SCOPES:
        try:
            same = torch.equal(old.answer(z, old.scope(tasks)), new.answer(z, new.scope(tasks)))
        except Exception as error:
            raise Fault(f"{what}: it fails with {cause_of(error)}", KEEP) from error
        if not same:
            raise Fault(f"{what}, over a scope of the tasks {tasks}", KEEP)


def repeatable(bench: HeadBench) -> None:
    with preserved_state():
        again = bench.pupil()
        again.learn(LEARNED)
        z = again.features()
        for tasks in SCOPES:
            if not torch.equal(bench.learned.answer(z, again.scope(tasks)), again.answer(z, again.scope(tasks))):
                raise Fault("the same seed gives other answers", "draw from torch's generator, which the run seeds")


def quiet(bench: HeadBench) -> None:
    _ = bench.learned
    if printed := bench.printed.strip():
        raise Fault(f"it prints on stdout: {printed.splitlines()[0][:80]!r}", "stdout is for results; print nothing")


def files(bench: HeadBench) -> None:
    _ = bench.learned
    if bench.writes:
        raise Fault(f"it {bench.writes[0]}", KEEP)


def extremes(bench: HeadBench) -> None:
    with preserved_state():
        pupil = bench.pupil(stream=uneven_stream())
        with _blamed("with a task of one class"):
            pupil.learn(LEARNED[:2])
            pupil.answer(pupil.features()[:1], pupil.scope((0,)))
        pupil = bench.learned
        with _blamed("in mixed precision (bf16)"), autocast("bf16", torch.device("cpu")):
            logits = pupil.model.classify(pupil.features(), LEARNED)
        if bool(logits.isnan().any()):
            raise Fault("in mixed precision (bf16) its logits are not numbers", "guard divisions and logarithms")
