"""What is put together: bases, stages, Avalanche's plugins and reference data; and what is refused, with its reason."""

import itertools
import json
from collections import Counter

import pytest
import torch

from mulki_plugins.errors import Mistakes, MulkiError
from mulki_plugins.recipe.resolve import Changes, resolve
from mulki_plugins.training.run import run_experiment

FEW = ("train.iterations=2", "train.schedule.warmup=0", "train.batch_size=8", "loggers=[]", "train.checkpoint.keep=0")
MINI = ("stream.tasks=[digits,scans]", *FEW)
SPLIT_FOOD = "{name: split, of: {name: mtil-mini, tasks: [food]}, increment: 2}"
SMALL = (
    "stream={name: small}", "model={name: small-clip}", "device=cpu", "reference=small-other", *FEW,
)  # fmt: skip


@pytest.fixture(autouse=True)
def small_streams(small_parts):
    torch.set_num_threads(1)


def resolved(strategy, *settings, with_plugins=(), without=(), few=MINI):
    changes = Changes(strategy=strategy, settings=(*few, *settings), with_plugins=with_plugins, without_plugins=without)
    return resolve("recipes/mtil.yaml", changes)


def run(tmp_path, strategy, *settings, **changes):
    return run_experiment(resolved(strategy, *settings, few=SMALL, **changes), 0, tmp_path)


def refusal(strategy, *settings, **changes):
    with pytest.raises(Mistakes) as caught:
        resolved(strategy, *settings, **changes)
    return "\n".join(caught.value.lines())


@pytest.mark.parametrize(
    ("strategy", "words"),
    [
        ("mulki", ("--with", "avalanche.replay")), ("mulki", ("--with", "avalanche.ewc")),
        ("mulki", ("--with", "avalanche.si")), ("mulki", ("--with", "avalanche.mas")),
        ("mulki", ("--with", "avalanche.agem")), ("mulki", ("--with", "avalanche.lwf")),
        ("mulki", ("--with", "zscl")), ("mulki", ("strategy.base=cumulative",)), ("mulki", ("strategy.base=joint",)),
        ("ewc", ("strategy.base=cumulative",)), ("lwf", ("strategy.base=joint",)), ("icarl", ()), ("snd", ()),
    ],
)  # fmt: skip
def test_what_goes_together(tmp_path, strategy, words):
    added = words[1:] if words[:1] == ("--with",) else ()
    result = run(tmp_path, strategy, *(() if added else words), with_plugins=added)
    assert result.status == "complete"
    assert len(result.matrix) == 3
    assert all(0 <= value <= 100 for row in result.matrix for value in row)


def test_joint_training_is_one_training_and_has_no_transfer(tmp_path):
    result = run(tmp_path, "joint")
    assert result.matrix[0] == result.matrix[1] == result.matrix[2]
    assert set(result.metrics) == {"last"}
    assert len(result.seconds["train"]) == 1
    table = (tmp_path / "mtil" / "joint" / "seed-0" / "matrix.txt").read_text()
    assert "all tasks" in table
    assert "after" in table.splitlines()[0]
    assert not any(line.startswith(("first", "second", "third")) for line in table.splitlines()), (
        "no row for what was no moment"
    )
    data = json.loads((tmp_path / "mtil" / "joint" / "seed-0" / "result.json").read_text())
    assert data["base"] == "joint"


def test_bases_see_what_they_say(tmp_path, monkeypatch):
    """Naive: a task's own images; cumulative: those of all so far; joint: all, in the budget of all tasks."""
    from mulki_plugins.training.strategy import ContinualTemplate

    seen = []
    original = ContinualTemplate.criterion

    def spy(self):
        if self.is_training:
            seen.append((self.clock.train_exp_counter, set(self.mb_task_id.tolist())))
        return original(self)

    monkeypatch.setattr(ContinualTemplate, "criterion", spy)
    budget = ("train.iterations=4", "train.batch_size=16")
    for base, expected in {
        "naive": [{0}, {1}, {2}], "cumulative": [{0}, {0, 1}, {0, 1, 2}], "joint": [{0, 1, 2}],
    }.items():  # fmt: skip
        seen.clear()
        run(tmp_path / base, "finetune", f"strategy.base={base}", *budget)
        tasks = [set().union(*(found for task, found in seen if task == i)) for i in range(len(expected))]
        assert tasks == expected
        assert len(seen) == 12, "the same number of steps in all"


@pytest.mark.parametrize("base", ["cumulative", "joint"])
def test_images_of_several_tasks_are_drawn_alike(tmp_path, monkeypatch, base):
    """In an epoch each image comes once, however small its task is, and a batch may be smaller than there are tasks."""
    from mulki_plugins.training.strategy import ContinualTemplate

    seen, original = [], ContinualTemplate.criterion

    def spy(self):
        if self.is_training:
            seen.append(self.mb_task_id.tolist())
        return original(self)

    monkeypatch.setattr(ContinualTemplate, "criterion", spy)
    run(tmp_path, "finetune", f"strategy.base={base}", "train.iterations=null", "train.epochs=1", "train.batch_size=2")
    last = seen[-28:]  # 16, 24 and 16 images
    assert Counter(itertools.chain(*last)) == {0: 16, 1: 24, 2: 16}
    assert len(seen) == 28 + (8 + 20) * (base == "cumulative")
    assert any(len(set(batch)) == 2 for batch in last)


@pytest.mark.parametrize("strategy", ["ewc", "mas", "si"])
def test_importances_of_weights_that_are_merged_away_are_refused(tmp_path, strategy):
    merged = ("model.adapters=[{lora: {rank: 2, merge_each_task: true}}]", "model.train=adapters")
    with pytest.raises(MulkiError, match=f"avalanche.{strategy}: holds the weights that learn"):
        run(tmp_path, strategy, *merged)


@pytest.mark.parametrize(
    ("strategy", "use", "needs"),
    [
        ("snd", "previous", "snd needs both teachers"),
        ("snd", "initial", "snd needs both teachers"),
        ("icarl", "initial", "icarl needs the previous teacher"),
    ],
)
def test_who_compares_with_a_teacher_that_does_not_teach_is_refused(tmp_path, strategy, use, needs):
    with pytest.raises(MulkiError, match=f"{needs}, and \\$.strategy.teachers.use is {use}"):
        run(tmp_path, strategy, f"strategy.teachers.use={use}")


def test_sentences_that_no_route_leads_to_cannot_be_preserved(tmp_path):
    routed = ("model.adapters=[{prompts: {length: 2}}]", "model.train=adapters", "strategy.preserving.texts=1")
    with pytest.raises(
        MulkiError, match="preserving: sentences of no task take no route through the adapter ContextPrompts"
    ):
        run(tmp_path, "finetune", *routed, with_plugins=("teachers", "preserving"))


@pytest.mark.parametrize(
    ("strategy", "settings", "added", "reason"),
    [
        ("finetune", ["strategy.base=joint"], ["avalanche.replay"], "trains on the images of all tasks at once already"),
        ("finetune", ["strategy.base=cumulative"], ["icarl", "teachers"], "trains on the images of all tasks so far already"),
        ("finetune", ["strategy.base=joint"], ["avalanche.ewc"], "trains once on all of them"),
        ("mulki", ["strategy.adding.targets=divided"], [], "set classes to seen"),
        ("zscl", ["reference=null"], [], "needs reference images; declare a stream of them"),
        ("snd", ["reference=null"], [], "such as `reference: mtil-mini-reference`"),
        ("joint", ["train.per_task={digits: {lr: 0.1}}"], [], "all tasks at once, in one budget"),
        ("icarl", [], ["avalanche.replay"], "does not work together with 'avalanche.replay'"),
        ("finetune", [], ["lwf"], "needs the plugin 'teachers'"),
        ("finetune", [], ["avalanche.der"], "a fixed width"),
        ("finetune", [], ["avalanche.gem"], "use avalanche.agem"),
        ("finetune", [], ["avalanche.lfl"], "get_features"),
        ("finetune", ["strategy.base=jiont"], [], "expected 'naive' or 'cumulative' or 'joint' or 'none'"),
        ("zscl", ["reference=mtil-mini-refrence"], [], "did you mean 'mtil-mini-reference'"),
        ("zscl", ["strategy.zscl.reference=mtil-mini-reference"], [], "unknown option"),
        ("zscl", ["reference=mtil-mini"], [], "shares no task with the one that is learned"),
        ("zscl", ["reference={name: mtil-mini, tasks: [food, scans]}"], [], "shares no task"),
        ("zscl", ["reference={name: mtil-mini, tasks: [fod]}", "stream.tasks=[flags]"], [], "did you mean 'food'"),
        ("zscl", [f"stream={SPLIT_FOOD}", "reference=mtil-mini"], [], "shares no task"),
        ("zscl", ["stream={name: mixed, of: [mtil-mini], order: [food]}", f"reference={SPLIT_FOOD}"], [], "shares no task"),
        ("icarl", ["strategy.base=[joint]"], [], "expected 'naive' or 'cumulative'"),
        ("replay", ["strategy.base={joint: 1}"], [], "expected 'naive' or 'cumulative'"),
    ],
)  # fmt: skip
def test_what_is_refused_says_why(strategy, settings, added, reason):
    assert reason in refusal(strategy, *settings, with_plugins=tuple(added))


@pytest.mark.parametrize(
    ("stream", "reference"),
    [
        ("{name: mtil-mini, order: [flags]}", "{name: mtil-mini, order: [food]}"),
        ("{name: mixed, of: [mtil-mini], order: [flags]}", "{name: mtil-mini, tasks: [food]}"),
        (SPLIT_FOOD, "{name: mtil-mini, tasks: [flags]}"),
        ("{name: mixed, of: [mtil-mini]}", "mtil-mini-reference"),
    ],
)
def test_a_reference_may_be_other_tasks_of_the_same_stream(stream, reference):
    assert resolved("zscl", f"stream={stream}", f"reference={reference}")


def test_a_reference_is_no_setting_of_those_who_need_none():
    from mulki_plugins.training.provenance import fingerprint

    assert fingerprint(resolved("lwf").recipe) == fingerprint(resolved("lwf", "reference=null").recipe)
    other = fingerprint(resolved("zscl", "reference={name: mtil-mini, tasks: [faces]}").recipe)
    assert fingerprint(resolved("zscl").recipe) != other


def test_a_strategy_may_say_which_towers_learn(tmp_path):
    (tmp_path / "one.yaml").write_text("name: one\nplugins: []\ndefaults: {model: {train: image}}\n")
    one = str(tmp_path / "one.yaml")
    assert resolved(one).recipe.model.options["train"] == "image"
    assert resolved(one, "model.train=all").recipe.model.options["train"] == "all"
    assert resolved(one, "model={name: ViT-B-32, pretrained: openai}").recipe.model.options["train"] == "image"
    assert (
        resolved(one, "model={name: ViT-B-32, pretrained: openai, train: text}").recipe.model.options["train"] == "text"
    )
    assert resolved("mulki").recipe.model.options["train"] == "all"
