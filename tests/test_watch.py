"""What keeps a plugin's weights from learning, and who made a loss or gradient that is no number: reported, with names."""

import math

import pytest
import torch
from avalanche.training.plugins import EvaluationPlugin, EWCPlugin, ReplayPlugin, SupervisedPlugin
from torch import nn
from torch.utils.data import DataLoader

from mulki_plugins.errors import MulkiError
from mulki_plugins.models import ClipClassifier
from mulki_plugins.recipe.schema import Evaluate, Optimizer, Schedule, Train
from mulki_plugins.stages import Adding, Distinguishing, Eliciting, Teachers
from mulki_plugins.stages.stage import Stage, by_task, features_of
from mulki_plugins.training.accuracy import AccuracyRecorder
from mulki_plugins.training.finite import Diverged
from mulki_plugins.training.rng import seed_everything
from mulki_plugins.training.strategy import ContinualTemplate
from tests.conftest import Quiet, naive, small_clip, small_tokenizer


class Values(Quiet):
    """Keeps every value with its step."""

    def log_metrics(self, values):
        self.values += [(v.name, v.x_plot, float(v.value)) for v in values]


def template(model, plugins, logger=None, **train):
    train = {"iterations": 3, "batch_size": 6, "optimizer": Optimizer(lr=0.01), **train}
    seed_everything(0)
    strategy = ContinualTemplate(
        model=model,
        train=Train(**train),
        evaluate=Evaluate(),
        device=torch.device("cpu"),
        plugins=plugins,
        evaluator=EvaluationPlugin(AccuracyRecorder(), loggers=[logger or Quiet()], collect_all=False),
    )
    strategy.warnings = []
    strategy.checks.warn = strategy.warnings.append
    return strategy


def doing(event, action, name="Doing"):
    """A plugin that does one thing at one event."""
    return type(name, (SupervisedPlugin,), {event: lambda self, strategy, **kwargs: action(strategy)})()


def train(model, benchmark, *plugins, tasks=1, **options):
    strategy = template(model, list(plugins), **options)
    for experience in list(benchmark.train_stream)[:tasks]:
        strategy.train(experience, eval_streams=[])
    return strategy


def failing(model, benchmark, *plugins, **options):
    with pytest.raises(MulkiError) as caught:
        train(model, benchmark, *plugins, **options)
    [line] = caught.value.lines()
    return line


class LowRank(nn.Module):
    """A linear layer with a low-rank addition."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.down = nn.Parameter(torch.randn(2, linear.in_features) * 0.1)
        self.up = nn.Parameter(torch.zeros(linear.out_features, 2))

    def forward(self, x):
        return self.linear(x) + x @ self.down.T @ self.up.T


def add_low_rank(strategy):
    block = strategy.model.clip.visual.transformer.resblocks[0].mlp
    if not isinstance(block.c_fc, LowRank):
        strategy.model.requires_grad_(False)
        block.c_fc = LowRank(block.c_fc)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_weights_added_at_a_tasks_begin_learn_as_the_only_ones(classifier, benchmark, optimizer):
    before = {n: p.clone() for n, p in classifier.named_parameters()}
    train(
        classifier,
        benchmark,
        doing("before_training_exp", add_low_rank),
        tasks=2,
        optimizer=Optimizer(name=optimizer, lr=0.1),
    )
    adapter = classifier.clip.visual.transformer.resblocks[0].mlp.c_fc
    assert adapter.up.abs().sum() > 0
    now = {n.replace(".linear.", "."): p for n, p in classifier.named_parameters()}
    assert all(torch.equal(p, now[n]) for n, p in before.items()), "the frozen base stays"


def test_a_model_that_is_frozen_from_the_start_takes_added_weights(classifier, benchmark):
    classifier.requires_grad_(False)
    train(classifier, benchmark, doing("before_training_exp", add_low_rank))
    assert classifier.clip.visual.transformer.resblocks[0].mlp.c_fc.up.abs().sum() > 0


def test_weights_unfrozen_at_a_tasks_begin_learn(stream, benchmark):
    model = ClipClassifier(small_clip(), small_tokenizer, stream.tasks, train="image")
    before = model.clip.text_projection.clone()
    train(model, benchmark, doing("before_training_exp", lambda s: s.model.clip.text_projection.requires_grad_(True)))
    assert not torch.equal(model.clip.text_projection, before)


def test_nothing_that_learns_is_an_error(classifier, benchmark):
    line = failing(classifier, benchmark, doing("before_training_exp", lambda s: s.model.requires_grad_(False)))
    assert line.startswith("task first, step 1: nothing learns")


def test_a_context_that_is_not_used_is_named(stream, benchmark):
    model = ClipClassifier(small_clip(), small_tokenizer, stream.tasks)

    def add(strategy):
        strategy.model.context = nn.Parameter(torch.zeros(4))

    strategy = train(model, benchmark, doing("before_training_exp", add))
    assert strategy.warnings == ["1 trainable weights get no gradient: context"]


def empty(strategy):
    for group in strategy.optimizer.param_groups:
        group["params"] = []


def replace(strategy):
    strategy.optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=1.0)


@pytest.mark.parametrize("change", [empty, replace, lambda s: s.optimizer.param_groups.clear()])
@pytest.mark.parametrize(
    "event", ["before_training_exp", "before_training_iteration", "before_forward", "before_update"]
)
def test_an_optimizer_that_a_plugin_empties_or_replaces(classifier, benchmark, change, event):
    line = failing(classifier, benchmark, doing(event, change, "Thief"))
    assert line.startswith("task first, step 1: ")
    assert "weights that learn are not in the optimizer: clip." in line
    assert f"the plugin 'Thief' in its {event} changed the optimizer" in line


@pytest.mark.parametrize("event", ["before_training_iteration", "after_forward"])
def test_weights_added_too_late_are_named(classifier, benchmark, event):
    def add(strategy):
        if strategy.step == 2 and not hasattr(strategy.model, "late"):
            strategy.model.late = nn.Parameter(torch.zeros(4))

    line = failing(classifier, benchmark, doing(event, add))
    assert line.startswith("task first, step 2: 1 weights that learn are not in the optimizer: late;")
    assert "add weights in before_training_exp at the latest" in line


def test_an_optimizer_set_before_the_first_task_is_not_lost_without_a_word(classifier, benchmark):
    strategy = train(classifier, benchmark, doing("before_training", replace))
    assert len(strategy.warnings) == 1
    assert "optimizer" in strategy.warnings[0]


def test_an_optimizer_of_a_plugins_own_is_kept_where_it_holds_what_learns(classifier, benchmark):
    def own(strategy):
        strategy.optimizer = torch.optim.SGD([p for p in strategy.model.parameters() if p.requires_grad], lr=0.3)

    before = classifier.clip.text_projection.clone()
    strategy = train(classifier, benchmark, doing("before_training_exp", own), tasks=2)
    assert strategy.warnings == []
    assert isinstance(strategy.optimizer, torch.optim.SGD)
    assert not torch.equal(before, classifier.clip.text_projection)


EVENTS = (
    "before_training", "before_training_exp", "before_training_epoch", "before_training_iteration", "before_forward",
    "after_update",
)  # fmt: skip


@pytest.mark.parametrize("event", EVENTS)
def test_a_model_left_in_evaluation_mode_is_put_back(classifier, benchmark, event):
    modes = []
    look = doing("after_forward", lambda s: modes.append(s.model.training))
    leave = doing(event, lambda s: s.model.eval(), "Leaver")
    strategy = train(classifier, benchmark, leave, look)
    assert modes == [True] * 3
    assert len(strategy.warnings) == 1
    assert f"the plugin 'Leaver' in its {event}" in strategy.warnings[0]


def no_gradients(strategy):
    for p in strategy.model.parameters():
        p.grad = None


def zero_gradients(strategy):
    for p in strategy.model.parameters():
        p.grad.zero_() if p.grad is not None else None


@pytest.mark.parametrize("take", [no_gradients, zero_gradients])
@pytest.mark.parametrize("event", ["after_backward", "before_update"])
def test_gradients_that_a_plugin_takes_away(classifier, benchmark, take, event):
    settings = Optimizer(name="sgd", lr=0.1)
    line = failing(classifier, benchmark, doing(event, take, "Taker"), optimizer=settings)
    assert "no weight moved" in line
    assert f"the plugin 'Taker' in its {event} took the gradients away" in line


def test_weights_that_a_plugin_puts_back(classifier, benchmark):
    start = {n: p.detach().clone() for n, p in classifier.named_parameters()}

    @torch.no_grad()
    def put_back(strategy):
        for n, p in strategy.model.named_parameters():
            p.copy_(start[n])

    assert "no weight moved" in failing(classifier, benchmark, doing("after_update", put_back))


def spoil_loss(strategy):
    strategy.loss = strategy.loss * float("nan")


def spoil_loss_in_place(strategy):
    strategy.loss += float("inf")


@pytest.mark.parametrize("spoil", [spoil_loss, spoil_loss_in_place])
@pytest.mark.parametrize("event", ["before_forward", "after_forward", "before_backward"])
def test_a_loss_that_is_no_number_names_its_plugin(classifier, benchmark, spoil, event):
    good = doing("before_backward", lambda s: setattr(s, "loss", s.loss + s.loss.detach() * 0), "Good")
    with pytest.raises(Diverged, match=f"made so by the plugin 'Spoiler' in its {event}"):
        train(
            classifier,
            benchmark,
            good,
            doing(event, spoil, "Spoiler"),
            good,
        )


def test_weights_and_images_that_are_no_numbers_are_named(classifier, stream, benchmark):
    @torch.no_grad()
    def spoil(strategy):
        strategy.model.clip.visual.proj.fill_(math.nan)

    with pytest.raises(Diverged, match=r"weights are not finite: clip\.visual\.proj"):
        train(classifier, benchmark, doing("after_update", spoil))
    other = ClipClassifier(small_clip(), small_tokenizer, stream.tasks)
    with pytest.raises(Diverged, match="images of the batch are not finite"):
        train(other, benchmark, doing("before_forward", lambda s: s.mb_x.fill_(math.nan)))


@pytest.mark.parametrize("event", ["after_backward", "before_update"])
def test_gradients_that_a_plugin_makes_no_numbers(classifier, benchmark, event):
    def spoil(strategy):
        if strategy.step == 2:
            strategy.model.clip.visual.proj.grad[0, 0] = math.nan

    before = {}
    keep = doing("before_update", lambda s: before.update({n: p.clone() for n, p in s.model.named_parameters()}))
    line = failing(classifier, benchmark, doing(event, spoil, "Spoiler"), keep)
    assert line.startswith("task first, step 2: the gradient of clip.visual.proj is not finite")
    assert f"it comes from the plugin 'Spoiler' in its {event}" in line
    assert all(torch.equal(p, before[n]) for n, p in classifier.named_parameters()), "the step was not made"


def test_a_gradient_that_is_no_number_names_the_loss_it_comes_from(classifier, benchmark):
    class Root(Stage):
        def after_forward(self, strategy, **kwargs):
            image = features_of(strategy, self).image
            self.add_loss(strategy, "root", (image - image).square().sum().sqrt())

    good = doing("after_forward", lambda s: setattr(s, "loss", s.loss + s.mb_output.square().mean()), "Good")
    line = failing(classifier, benchmark, good, Root(), good)
    assert "is not finite, though the loss is" in line
    assert "what the plugin 'Root' adds to the loss in its after_forward" in line


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda loss: 1.5, "a float"),
        (lambda loss: None, "a NoneType"),
        (lambda loss: loss.item(), "a float"),
        (lambda loss: loss + torch.zeros(6), "a tensor of shape (6,) and type float32"),
        (lambda loss: torch.tensor(2), "a tensor of shape () and type int64"),
    ],
)
@pytest.mark.parametrize("event", ["before_forward", "after_forward", "before_backward"])
def test_a_loss_that_is_no_tensor_of_one_number_names_its_plugin(classifier, benchmark, make, said, event):
    line = failing(classifier, benchmark, doing(event, lambda s: setattr(s, "loss", make(s.loss)), "Maker"))
    assert line.startswith(f"task first, step 1: the plugin 'Maker' in its {event} made strategy.loss {said}, expected")


def test_a_loss_that_is_detached_names_its_plugin(classifier, benchmark):
    detach = doing("before_backward", lambda s: setattr(s, "loss", s.loss.detach()), "Cutter")
    line = failing(classifier, benchmark, detach)
    assert line.startswith("task first, step 1: the plugin 'Cutter' in its before_backward detached the loss")


@pytest.mark.parametrize("event", ["after_forward", "before_backward"])
def test_a_term_without_a_gradient_is_warned_of(classifier, benchmark, event):
    def add(strategy):
        strategy.loss = strategy.loss + features_of(strategy, None).image.detach().square().sum()

    taught = doing(event, lambda s: setattr(s, "loss", s.loss + features_of(s, None).image.square().sum()), "Taught")
    scaled = doing("before_backward", lambda s: setattr(s, "loss", s.loss * 2), "Scaled")
    strategy = train(classifier, benchmark, taught, doing(event, add, "Idle"), scaled)
    assert strategy.warnings == [
        f"what the plugin 'Idle' in its {event} adds to the loss has no gradient, so it trains nothing"
    ]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_ordinary_stacks_are_not_warned_of(classifier, benchmark, precision):
    plugins = [Teachers(), Eliciting(), Adding(), Distinguishing(), EWCPlugin(10.0), ReplayPlugin(6)]
    assert train(classifier, benchmark, *plugins, tasks=3, precision=precision).warnings == []


def test_each_group_keeps_its_factor_of_the_learning_rate(classifier, benchmark):
    rates = []

    def add(strategy):
        strategy.optimizer.param_groups[0]["lr"] *= 10
        strategy.model.context = nn.Parameter(torch.zeros(4))
        strategy.optimizer.add_param_group({"params": [strategy.model.context], "lr": 0.5})

    plugins = [
        doing("before_training_exp", add),
        doing("before_update", lambda s: rates.append([group["lr"] for group in s.optimizer.param_groups])),
    ]
    train(classifier, benchmark, *plugins, schedule=Schedule(name="linear", warmup=2))
    assert rates == [pytest.approx([base * share for base in (0.1, 0.01, 0.5)]) for share in (0.5, 1.0, 1.0)]


def test_importances_are_those_of_the_training_loss(classifier, benchmark, monkeypatch):
    """Avalanche's EWC calls model.eval() to compute them; evaluations in between change nothing."""
    for strategy in (naive(classifier, [EWCPlugin(1.0)]), template(classifier, [EWCPlugin(1.0)])):
        [ewc] = [plugin for plugin in strategy.plugins if isinstance(plugin, EWCPlugin)]
        asked, encode = [], classifier.encode_text

        def count(task, *, all_templates, asked=asked, encode=encode):
            asked.append(all_templates)
            return encode(task, all_templates=all_templates)

        monkeypatch.setattr(classifier, "encode_text", count)
        strategy.eval(benchmark.test_stream[:1])
        assert set(asked) == {True}, "an evaluation asks all templates"
        asked.clear()
        experience = benchmark.train_stream[0]
        strategy.train(experience, eval_streams=[])
        assert set(asked) == {False}
        monkeypatch.undo()
        collected, arguments = experience.dataset, (strategy._criterion, strategy.optimizer, experience.dataset)
        torch.manual_seed(5)
        got = ewc.compute_importances(classifier, *arguments, "cpu", 6)["clip.text_projection"].data
        torch.manual_seed(5)
        squares = []
        for x, y, *_ in DataLoader(collected, batch_size=6, collate_fn=collected.collate_fn):
            logits = classifier.logits(classifier.encode_image(x), classifier.encode_text(0, all_templates=False))
            loss = nn.functional.cross_entropy(logits, y)
            squares.append(torch.autograd.grad(loss, classifier.clip.text_projection)[0].square())
        assert torch.allclose(got, torch.stack(squares).mean(0), rtol=1e-3, atol=1e-7)


def test_a_nested_evaluation_asks_all_templates_and_training_goes_on_with_the_first(classifier, benchmark):
    asked = []

    def look(strategy):
        if strategy.step == 2:
            strategy.eval(benchmark.test_stream[:1])
        asked.append(strategy.model.templates_in_use)

    inside = doing("after_eval_forward", lambda s: asked.append(s.model.templates_in_use))
    train(classifier, benchmark, doing("after_training_iteration", look), inside)
    assert asked == ["first", "all", "first", "first"]
    assert classifier.templates is None


class ByTask(Stage):
    """Logs and adds a part of the loss for each task of the batch."""

    def after_forward(self, strategy, **kwargs):
        features = features_of(strategy, self)
        for task, rows in by_task(features):
            self.add_loss(strategy, "parts", features.text[task].sum() * 0 + float(len(rows)))
            self.log(strategy, "train/rows", float(task), weight=len(rows))

    def before_backward(self, strategy, **kwargs):
        strategy.criterion()


class Twice(SupervisedPlugin):
    def after_forward(self, strategy, **kwargs):
        strategy.loss = strategy.loss + 0.25 * strategy.mb_output.sum() * 0 + 1

    def before_backward(self, strategy, **kwargs):
        strategy.loss += 2


def test_with_replay_each_tag_is_logged_once_a_step(classifier, benchmark):
    logger, sizes = Values(), []
    plugins = [
        ReplayPlugin(mem_size=6), Teachers(), Adding(), Distinguishing(), ByTask(), Twice(),
        doing("after_forward", lambda s: sizes.append(len(s.mb_x))),
    ]  # fmt: skip
    train(classifier, benchmark, *plugins, tasks=2, logger=logger)
    places = [(name, step) for name, step, _ in logger.values]
    assert len(places) == len(set(places))
    by_name = {name: [v for n, _, v in logger.values if n == name] for name, *_ in logger.values}
    assert max(sizes) > 6, "two tasks in a batch"
    assert by_name["train/loss/parts"] == sizes
    assert by_name["train/loss/twice"] == pytest.approx([3.0] * 6, abs=1e-4)
    assert len(by_name["train/loss/cross_entropy"]) == 6
    assert all(0 < value < 1 for value in by_name["train/share/initial"])


def test_the_shares_are_logged_once_in_any_strategy(classifier, benchmark):
    logger = Values()
    strategy = naive(classifier, [ReplayPlugin(mem_size=6), Teachers(), Adding(), Distinguishing()], logger)
    for experience in list(benchmark.train_stream)[:2]:
        strategy.train(experience, eval_streams=[])
    steps = [step for name, step, _ in logger.values if name == "train/share/initial"]
    assert steps
    assert len(steps) == len(set(steps))
