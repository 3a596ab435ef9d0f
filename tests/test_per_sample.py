"""`per_sample` is true where the gradients of two halves of a batch, each times its share, are those of the whole."""

import pytest
import torch

from mulki_plugins.baselines import (
    ICarl,
    LearningWithoutForgetting,
    ReferenceDistillation,
    SelectiveDistillation,
    WeightConstraint,
)
from mulki_plugins.baselines.avalanche import EWC, MAS, LwF, Replay, SynapticIntelligence
from mulki_plugins.stages import (
    Adding,
    Connecting,
    Distinguishing,
    Eliciting,
    Preserving,
    Recalling,
    Rehearsing,
    Rephrasing,
    Teachers,
)
from mulki_plugins.stages.stage import Stage
from tests.conftest import naive

STACKS = {
    "adding": lambda: [Teachers(), Adding(classes="seen")],
    "distinguishing": lambda: [Teachers(), Adding(), Distinguishing(temperature=0.1)],
    "l2": lambda: [WeightConstraint(weight=3.0)],
    "ewc": lambda: [EWC(50.0)],
    "mas": lambda: [MAS(2.0)],
    "eliciting": lambda: [Teachers(), Eliciting()],
    "recalling": lambda: [Teachers(), Recalling(count=1)],
    "lwf": lambda: [Teachers(), LearningWithoutForgetting()],
}


def gradients(strategy, classifier, x, y):
    """Of the loss of the plugins for one batch, in a step of their own."""
    torch.manual_seed(len(y))  # a draw is another for each part
    classifier.zero_grad(set_to_none=True)
    strategy.mbatch = [x, y, torch.full_like(y, 2)]
    for plugin in strategy.plugins[:-2]:
        plugin.before_forward(strategy)
    strategy.mb_output = strategy.forward()
    strategy.loss = torch.zeros(())
    for event in ("after_forward", "before_backward"):
        for plugin in strategy.plugins[:-2]:
            getattr(plugin, event)(strategy)
    strategy.loss.backward()
    return {n: p.grad.clone() for n, p in classifier.named_parameters() if p.grad is not None}


class Stop(Exception):
    pass


@pytest.mark.parametrize("name", STACKS)
def test_the_halves_of_a_batch_add_up_if_every_part_says_so(name, classifier, benchmark):
    plugins = STACKS[name]()
    strategy = naive(classifier, plugins, lr=0.1)
    for experience in list(benchmark.train_stream)[:2]:
        strategy.train(experience)

    class Halves(Stage):
        def after_training_iteration(self, strategy, **kwargs):
            if strategy.clock.train_exp_iterations == 1:
                raise Stop

    strategy.plugins.insert(len(plugins), Halves())
    with pytest.raises(Stop):
        strategy.train(benchmark.train_stream[2])
    strategy.plugins.pop(len(plugins))
    dataset = benchmark.train_stream[2].dataset
    x, y = torch.stack([dataset[i][0] for i in range(6)]), torch.tensor([dataset[i][1] for i in range(6)])
    whole = gradients(strategy, classifier, x, y)
    parts = [(gradients(strategy, classifier, x[rows], y[rows]), len(y[rows]) / 6) for rows in (slice(2), slice(2, 6))]
    assert any(g.abs().max() > 1e-4 for g in whole.values()), "or the test tells nothing"
    apart = max(
        float((whole[n] - sum(share * part[n] for part, share in parts)).abs().max() / whole[n].abs().max().clamp(1e-3))
        for n in whole
    )
    if all(plugin.per_sample for plugin in plugins):
        assert apart < 1e-5
    else:
        assert apart > 1e-4


def test_who_says_so():
    true = [Adding, Distinguishing, Connecting, Teachers, WeightConstraint, EWC, MAS, LwF, Replay, SynapticIntelligence]
    false = [
        Stage,
        Eliciting,
        Recalling,
        Preserving,
        Rehearsing,
        Rephrasing,
        LearningWithoutForgetting,
        ReferenceDistillation,
        SelectiveDistillation,
        ICarl,
    ]
    assert all(each.per_sample is True for each in true)
    assert all(each.per_sample is False for each in false)
