"""The kit's checks of conduct: each fault that changes what others rely on is caught; plugins that adapt a model pass."""

import functools
import os
import random
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from avalanche.training.plugins import SupervisedPlugin
from torch import nn
from torch.nn import functional as F

from mulki_plugins.stages.stage import Stage, features_of
from mulki_plugins.testing import CheckFailed, check_plugin
from mulki_plugins.testing.kit import CHECKS, check_one

SEEN = []


def doing(callback, action):
    """A plugin that does one thing in one callback."""

    def call(self, strategy, **kwargs):
        action(self, strategy)

    return type(f"Does{callback.title().replace('_', '')}", (SupervisedPlugin,), {callback: call})


def scale_in_place(self, strategy):
    strategy.mb_x.mul_(0.5)


def relabel(self, strategy):
    strategy.mb_y.zero_()


def put_into_list(self, strategy):
    strategy.mbatch[0] = strategy.mb_x + 1


def new_batch(self, strategy):
    strategy.mbatch = [strategy.mb_x * 2, *strategy.mbatch[1:]]


def paint_images(self, strategy):
    """The stream's own pixels."""
    strategy.experience.images.images.images[:] = 0


def change_labels(self, strategy):
    strategy.experience.images.images.labels[:] = 0


def mask_logits(self, strategy):
    strategy.mb_output = strategy.mb_output * 2


def mask_logits_in_place(self, strategy):
    strategy.mb_output.data[:, 0] = -100


def shift_features(self, strategy):
    strategy.model.features.image.data.mul_(2)


def replace_loss(self, strategy):
    strategy.loss = strategy.model.features.image.square().sum() + strategy.model.features.image.sum()


def detach_loss(self, strategy):
    strategy.loss = strategy.loss.detach() + strategy.model.features.image.sum()


def own_backward(self, strategy):
    strategy.model.features.image.sum().backward(retain_graph=True)


def clear_gradients(self, strategy):
    strategy.optimizer.zero_grad()


def zero_gradients(self, strategy):
    for p in strategy.model.parameters():
        if p.grad is not None:
            p.grad.zero_()


def freeze_something(self, strategy):
    strategy.model.clip.visual.proj.requires_grad_(False)


def freeze_at_third_step(self, strategy):
    if strategy.clock.train_exp_iterations == 2:
        strategy.model.clip.visual.proj.requires_grad_(False)


def evaluate_mode(self, strategy):
    strategy.model.eval()


def tower_in_evaluation_mode(self, strategy):
    strategy.model.clip.visual.eval()


def train_mode(self, strategy):
    strategy.model.train()


def write_buffer(self, strategy):
    strategy.model.clip.attn_mask.zero_()


def save_weights(self, strategy):
    torch.save({"a": torch.zeros(1)}, "kit-was-here.pt")


def write_log(self, strategy):
    with open("kit-was-here.log", "a") as file:
        file.write("here")


def write_elsewhere(self, strategy):
    (Path.home() / ".kit-was-here").mkdir(exist_ok=True)


def other_attribute(name, value):
    def action(self, strategy):
        setattr(strategy, name, value)

    return action


def other_method(self, strategy):
    strategy.criterion = lambda: F.cross_entropy(strategy.mb_output, strategy.mb_y) * 2


def calls(function, *arguments, **options):
    return lambda self, strategy: function(*arguments, **options)


BATCH = [
    (doing("before_training_iteration", scale_in_place), "changes the batch in place, at step 1 of task 1"),
    (doing("before_forward", scale_in_place), "in place"),
    (doing("before_forward", put_into_list), "in place"),
    (doing("before_forward", relabel), "in place"),
    (doing("after_forward", scale_in_place), "after the forward"),
    (doing("before_backward", new_batch), "after the forward"),
    (doing("after_training_iteration", relabel), "after the forward"),
    (doing("after_training_exp", paint_images), "the training images"),
    (doing("before_training_exp", change_labels), "comes with class"),
    (doing("after_eval_exp", paint_images), "the test images"),
    (doing("after_forward", mask_logits), "logits"),
    (doing("after_forward", mask_logits_in_place), "logits"),
    (doing("after_forward", shift_features), "features"),
]

GRADIENTS = [
    (doing("before_backward", replace_loss), "drops from the loss"),
    (doing("after_forward", detach_loss), "drops from the loss"),
    (doing("after_forward", own_backward), "before the strategy's backward"),
    (doing("after_backward", clear_gradients), "clears the gradients"),
    (doing("before_update", zero_gradients), "clears the gradients"),
    (doing("after_update", freeze_at_third_step), "visual.proj within a task, at step 3 of task 1"),
    (doing("before_training_exp", write_buffer), "attn_mask, a buffer, is changed"),
]


class Inverts(SupervisedPlugin):
    """Loses what it was told in an evaluation that comes first."""

    def before_eval(self, strategy, **kwargs):
        features_of(strategy, self)


TRAINS = [(Inverts, "the evaluation before the first task ended in an error")]

SURROUNDINGS = [
    (doing("before_training_exp", evaluate_mode), "leaves the model in evaluation mode"),
    (doing("after_update", evaluate_mode), "leaves the model in evaluation mode"),
    (doing("after_training_iteration", tower_in_evaluation_mode), "in evaluation mode"),
    (doing("before_eval_forward", train_mode), "training mode in an evaluation"),
    (doing("after_training_exp", calls(torch.set_grad_enabled, False)), "whether gradients are computed"),
    (doing("before_forward", calls(torch.set_grad_enabled, False)), "whether gradients are computed"),
    (doing("before_training", calls(torch.set_default_dtype, torch.float64)), "default dtype"),
    (doing("after_eval", calls(torch.use_deterministic_algorithms, True, warn_only=True)), "deterministic"),
    (doing("after_update", calls(torch.set_float32_matmul_precision, "medium")), "matrix products"),
    (doing("before_eval", calls(torch.set_num_threads, 3)), "threads"),
    (doing("before_training_epoch", calls(np.seterr, all="raise")), "numpy"),
    (doing("before_forward", other_attribute("train_mb_size", 1)), "`train_mb_size`"),
    (doing("before_training_exp", other_attribute("_criterion", nn.CrossEntropyLoss())), "`_criterion`"),
    (doing("before_training_exp", other_method), "`criterion`"),
    (doing("before_training", lambda self, strategy: strategy.plugins.append(SupervisedPlugin())), "plugins"),
]


def seed_everywhere(self, strategy):
    random.seed(1)


def seed_by_its_own_seed(self, strategy):
    torch.manual_seed(torch.initial_seed())


class SeedsWhenMade(SupervisedPlugin):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)


RANDOM = [
    (doing("before_training_exp", calls(torch.manual_seed, 0)), "torch"),
    (doing("before_training", calls(np.random.seed, 0)), "numpy"),
    (doing("after_update", seed_everywhere), "random"),
    (doing("after_forward", seed_by_its_own_seed), "torch"),
    (doing("after_eval_exp", calls(torch.manual_seed, 0)), "torch"),
    (doing("before_eval", calls(random.seed, 0)), "random"),
    (doing("after_training_exp", calls(np.random.seed, 5)), "numpy"),
]

FILES = [
    (doing("after_training_exp", save_weights), "kit-was-here.pt"),
    (doing("after_update", write_log), "kit-was-here.log"),
    (doing("before_eval", write_elsewhere), "kit-was-here"),
]


class TimeOfDay(SupervisedPlugin):
    """The day, which is the same in two trainings that follow one another."""

    def before_backward(self, strategy, **kwargs):
        strategy.loss = strategy.loss * (1 + (time.time() // 86400) % 7)


class Hashes(SupervisedPlugin):
    def before_backward(self, strategy, **kwargs):
        strategy.loss = strategy.loss * (1 + hash("weight") % 7)


class Once(SupervisedPlugin):
    used = False

    def before_backward(self, strategy, **kwargs):
        if not Once.used:
            strategy.loss = strategy.loss * 2

    def after_training_exp(self, strategy, **kwargs):
        Once.used = True


REPEATABLE = [(TimeOfDay, "same seed"), (Hashes, "same seed"), (Once, "from step 1 on")]


class CountsEvaluations(SupervisedPlugin):
    evaluations = 0

    def after_eval(self, strategy, **kwargs):
        self.evaluations += 1

    def after_forward(self, strategy, **kwargs):
        strategy.loss = strategy.loss + self.evaluations * strategy.model.features.image.sum()


NESTED = [(CountsEvaluations, "in the middle")]


class OfTheBatch(SupervisedPlugin):
    """Centres the features by the mean of the batch."""

    def before_training(self, strategy, **kwargs):
        hook(strategy.model)

    def before_eval(self, strategy, **kwargs):
        hook(strategy.model)


def hook(model):
    visual = model.clip.visual
    if not visual._forward_hooks:
        visual.register_forward_hook(lambda module, given, z: z - z.mean(0) / 2)


class Remembers(SupervisedPlugin):
    """Adds the features of earlier batches of the evaluation."""

    def before_eval(self, strategy, **kwargs):
        visual = strategy.model.clip.visual
        if not visual._forward_hooks:
            self.last = 0

            def add(module, given, z):
                z, self.last = z + self.last, z.mean(0).detach()
                return z

            visual.register_forward_hook(add)


def change_loss(self, strategy):
    strategy.loss = strategy.loss * 0


def nudge_weights(self, strategy):
    strategy.model.clip.visual.proj.mul_(0.99)


EVALUATION = [
    (doing("before_eval_iteration", scale_in_place), "changes the batch"),
    (doing("after_eval_forward", new_batch), "changes the batch"),
    (doing("after_eval_forward", mask_logits), "logits"),
    (doing("after_eval_iteration", change_loss), "strategy.loss"),
    (doing("after_eval", nudge_weights), "changes weights"),
    (doing("before_eval", freeze_something), "which weights learn"),
    (OfTheBatch, "depend on the other images"),
    (Remembers, "evaluation gives other logits|depend on the other"),
]


class Quieter(SupervisedPlugin):
    """Knows what it has counted, and forgets half of it."""

    def __init__(self):
        super().__init__()
        self.steps, self.tasks = 0, 0

    def after_training_iteration(self, strategy, **kwargs):
        self.steps += 1

    def after_training_exp(self, strategy, **kwargs):
        self.tasks += 1

    def state_dict(self):
        return {"steps": self.steps, "tasks": self.tasks}

    def load_state_dict(self, state):
        self.steps = state["steps"]


class EvaluatesByTraining(SupervisedPlugin):
    """Works while the process that trained lives."""

    mean = None

    def after_training_exp(self, strategy, **kwargs):
        self.mean = torch.ones(16)

    def before_eval(self, strategy, **kwargs):
        if strategy.clock.train_exp_counter and self.mean is None:
            raise RuntimeError("no mean yet")


class LosesWeights(SupervisedPlugin):
    """Adds its weights too late for a resume to load them."""

    def before_training_exp(self, strategy, **kwargs):
        if strategy.experience.current_experience == 0:
            strategy.model.extra = nn.Parameter(torch.randn(16))
            strategy.optimizer.add_param_group({"params": [strategy.model.extra]})

    def after_forward(self, strategy, **kwargs):
        if hasattr(strategy.model, "extra"):
            strategy.loss = strategy.loss + (features_of(strategy, self).image @ strategy.model.extra).mean()


RESUME = [
    (Quieter, "state after task 2"),
    (EvaluatesByTraining, "no mean yet"),
    (LosesWeights, "extra"),
]


class OnTheClass(SupervisedPlugin):
    seen = []  # noqa: RUF012 (the fault)

    def after_training_iteration(self, strategy, **kwargs):
        self.seen.append(float(strategy.loss.detach()))


class InTheModule(SupervisedPlugin):
    def after_training_iteration(self, strategy, **kwargs):
        SEEN.append(strategy.mb_x.clone())


@functools.cache
def remembered(number):
    return [number]


class InACache(SupervisedPlugin):
    steps = 0

    def after_training_iteration(self, strategy, **kwargs):
        self.steps += 1
        remembered((id(self), self.steps))


class InADefault(SupervisedPlugin):
    def after_training_iteration(self, strategy, seen=[], **kwargs):  # noqa: B006 (the fault)
        seen.append(0)


class InAnAttribute(SupervisedPlugin):
    def after_training_exp(self, strategy, **kwargs):
        setattr(self, f"task_{strategy.clock.train_exp_counter}", {n: n for n in range(20)})


class OnTheStrategy(SupervisedPlugin):
    def after_training_iteration(self, strategy, **kwargs):
        strategy.history = [*getattr(strategy, "history", []), float(strategy.loss.detach())]


class Closure(SupervisedPlugin):
    def __init__(self):
        super().__init__()
        seen = []
        self.note = lambda value: seen.append(value)

    def after_training_iteration(self, strategy, **kwargs):
        self.note(1)


class Chain(SupervisedPlugin):
    """Each step's record refers to the one before."""

    class Record:
        def __init__(self, before):
            self.before = before

    last = None

    def after_training_iteration(self, strategy, **kwargs):
        self.last = Chain.Record(self.last)


class KeepsGraph(SupervisedPlugin):
    def before_training_exp(self, strategy, **kwargs):
        self.total = torch.zeros(1)

    def before_backward(self, strategy, **kwargs):
        self.total = self.total + strategy.loss


class KeepsImagesOfATask(SupervisedPlugin):
    """No more from step to step than before, and forgotten at each task's end."""

    def before_training_exp(self, strategy, **kwargs):
        self.images = []

    def after_training_iteration(self, strategy, **kwargs):
        self.images.append(strategy.mb_x.clone())

    def after_training_exp(self, strategy, **kwargs):
        self.images = []


class KeepsLastImages(SupervisedPlugin):
    """As many as before, and of the task before."""

    def after_training_exp(self, strategy, **kwargs):
        self.kept = torch.stack([strategy.experience.dataset[i][0] for i in range(2)])


GROWTH = [
    (OnTheClass, "entries more"),
    (InTheModule, "bytes more"),
    (InACache, "entries more"),
    (InADefault, "entries more"),
    (InAnAttribute, "entries more"),
    (OnTheStrategy, "entries more"),
    (Closure, "entries more"),
    (Chain, "entries more"),
    (KeepsGraph, "autograd graph"),
    (KeepsImagesOfATask, "steps of a task"),
    (KeepsLastImages, "keeps a task.s images"),
]


class NeedsTwoImages(SupervisedPlugin):
    def after_forward(self, strategy, **kwargs):
        strategy.loss = strategy.loss + strategy.model.features.image.std(0).mean()


class NeedsTwoClasses(SupervisedPlugin):
    def after_forward(self, strategy, **kwargs):
        strategy.loss = strategy.loss + strategy.mb_output.topk(2).values.detach().mean()


class NeedsSinglePrecision(SupervisedPlugin):
    def before_training(self, strategy, **kwargs):
        def check(module, given, out):
            return torch.where(out > 0, out, out).lerp(torch.zeros(out.shape), 0.0)

        if not strategy.model.clip.visual.conv1._forward_hooks:
            strategy.model.clip.visual.conv1.register_forward_hook(check)


EXTREMES = [
    (NeedsTwoImages, "batches of one image .*not finite"),
    (NeedsTwoClasses, "task of one class"),
    (NeedsSinglePrecision, "mixed precision"),
]


class PrintsWhenMade(SupervisedPlugin):
    def __init__(self):
        super().__init__()
        print("made")  # noqa: T201 (the fault)


class AddsLate(SupervisedPlugin):
    def after_forward(self, strategy, **kwargs):
        if not hasattr(strategy.model, "late"):
            strategy.model.late = nn.Parameter(torch.zeros(3))


class AddsUnused(SupervisedPlugin):
    def before_training(self, strategy, **kwargs):
        if not hasattr(strategy.model, "unused"):
            strategy.model.unused = nn.Parameter(torch.zeros(3))


class LinksModels(SupervisedPlugin):
    """A hook that holds the model itself, and so ties every copy of it to the one that learns."""

    def before_training(self, strategy, **kwargs):
        model = strategy.model
        if not hasattr(model.clip.visual, "scales"):
            model.clip.visual.scales = nn.Parameter(torch.ones(16))
            model.clip.visual.register_forward_hook(lambda module, given, z: z * model.clip.visual.scales)


FAULTS = {
    "quiet": [
        (doing("after_eval", calls(os.write, 1, b"past sys.stdout\n")), "'past sys.stdout'"),
        (PrintsWhenMade, "'made'"),
    ],
    "teachers": [(LinksModels, "previous teacher is no longer the model before task 2")],
    "trains": TRAINS,
    "batch": BATCH,
    "gradients": [*GRADIENTS, (AddsUnused, "never has a gradient")],
    "optimizer": [(AddsLate, "not in the optimizer and so do not learn: late")],
    "surroundings": SURROUNDINGS,
    "random_numbers": RANDOM,
    "made": [(SeedsWhenMade, "when it is created")],
    "files": FILES,
    "repeatable": REPEATABLE,
    "nested_evaluation": NESTED,
    "evaluation": EVALUATION,
    "resume": RESUME,
    "growth": GROWTH,
    "extremes": EXTREMES,
}
CASES = [(check, *fault) for check, faults in FAULTS.items() for fault in faults]


@pytest.mark.parametrize(
    ("check", "plugin", "said"), CASES, ids=[f"{c[0]}-{c[1].__name__}-{i}" for i, c in enumerate(CASES)]
)
def test_each_fault_is_caught_by_its_check(check, plugin, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    Path.home().mkdir()
    Once.used = False
    before = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(), np.geterr()
    with pytest.raises(CheckFailed) as caught:
        check_one("plugin", check, plugin, {})
    fault = caught.value.faults[check]
    assert re.search(said, fault.problem), caught.value
    after = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(), np.geterr()
    assert after == before, "settings that a plugin changes are put back"


class LowRank(nn.Module):
    """A linear layer with W + B·A in W's place."""

    def __init__(self, inner, rank=2):
        super().__init__()
        self.inner = inner.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, inner.in_features) * 0.1)
        self.b = nn.Parameter(torch.zeros(inner.out_features, rank))

    @property
    def weight(self):
        return self.inner.weight

    def forward(self, x):
        return self.inner(x) + x @ self.a.T @ self.b.T


class Adapter(SupervisedPlugin):
    """LoRA in both towers, of which all else is frozen."""

    adds_parameters = True

    def before_training(self, strategy, **kwargs):
        clip = strategy.model.clip
        if isinstance(clip.visual.transformer.resblocks[0].mlp.c_fc, LowRank):
            return
        clip.requires_grad_(False)
        for tower in (clip.visual.transformer, clip.transformer):
            for block in tower.resblocks:
                block.mlp.c_fc = LowRank(block.mlp.c_fc)


class GrowingAdapter(SupervisedPlugin):
    """A matrix for each task on the image features; only the last learns."""

    adds_parameters = True

    def before_training(self, strategy, **kwargs):
        visual = strategy.model.clip.visual
        if not hasattr(visual, "added"):
            strategy.model.clip.requires_grad_(False)
            visual.added = nn.ParameterList()
            visual.register_forward_hook(lambda module, given, z: z + sum(z @ w for w in module.added))
        for old in visual.added:
            old.requires_grad_(False)
        visual.added.append(nn.Parameter(torch.zeros(16, 16)))


class Context(SupervisedPlugin):
    """Factors of the image features, beside a model of which nothing else learns."""

    adds_parameters = True

    def before_training(self, strategy, **kwargs):
        model = strategy.model
        if not hasattr(model.clip.visual, "scales"):
            model.clip.requires_grad_(False)
            model.clip.visual.scales = nn.Parameter(torch.ones(16))
            model.clip.visual.register_forward_hook(lambda module, given, z: z * module.scales)


class FreezesTexts(SupervisedPlugin):
    def before_training(self, strategy, **kwargs):
        for name, p in strategy.model.clip.named_parameters():
            if not name.startswith("visual."):
                p.requires_grad_(False)


class FreezesLate(SupervisedPlugin):
    """After the optimizer is made."""

    def before_training_exp(self, strategy, **kwargs):
        for p in strategy.model.clip.visual.transformer.parameters():
            p.requires_grad_(False)


class Mixes(SupervisedPlugin):
    """Mixup of images, in a batch of its own."""

    def before_forward(self, strategy, **kwargs):
        x = strategy.mb_x
        strategy.mbatch = [0.9 * x + 0.1 * x[torch.randperm(len(x))], *strategy.mbatch[1:]]


class MasksGradients(SupervisedPlugin):
    def before_update(self, strategy, **kwargs):
        strategy.model.clip.visual.proj.grad[0] = 0


class LooksOn(Stage):
    """Forwards in evaluation mode, without gradients and from a seed of its own, and puts all back."""

    def before_training_exp(self, strategy, **kwargs):
        self.mean = torch.zeros(16)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            mode = strategy.model.training
            strategy.model.eval()
            self.noise = torch.randn(16)
            strategy.model.train(mode)

    def after_forward(self, strategy, **kwargs):
        features = features_of(strategy, self)
        self.add_loss(strategy, "looks", (features.image @ self.noise).mean(), 0.1)

    def after_eval_forward(self, strategy, **kwargs):
        self.accuracy = float((strategy.mb_output.argmax(1) == strategy.mb_y).float().mean())


class Scheduled(SupervisedPlugin):
    """Weighs the whole loss by the step, which changes no one's share."""

    def before_backward(self, strategy, **kwargs):
        strategy.loss = strategy.loss * (0.5 if strategy.clock.train_exp_iterations < 2 else 1.0)


class Merges(Adapter):
    """Adds B·A to the weights at the end of each task, and begins the next with B = 0."""

    @torch.no_grad()
    def after_training_exp(self, strategy, **kwargs):
        layer = strategy.model.clip.visual.transformer.resblocks[0].mlp.c_fc
        layer.inner.weight += layer.b @ layer.a
        layer.b.zero_()


GOOD = [Adapter, GrowingAdapter, Context, FreezesTexts, FreezesLate, Mixes, MasksGradients, LooksOn, Scheduled, Merges]


@pytest.mark.parametrize("plugin", GOOD)
def test_what_harms_nobody_passes(plugin):
    check_plugin(plugin)


def test_a_check_that_fails_in_itself_is_reported(monkeypatch):
    def broken(lab):
        raise KeyError("lost")

    monkeypatch.setitem(CHECKS["plugin"], "quiet", broken)
    with pytest.raises(CheckFailed, match="KeyError: 'lost'"):
        check_one("plugin", "quiet", Mixes, {})
