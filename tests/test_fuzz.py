"""Recipes and run folders at random: located errors or a right answer, never a traceback, never a wrong number."""

import copy
import io
import json
import shutil

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mulki_plugins.errors import MulkiError
from mulki_plugins.recipe.emit import dump_annotated
from mulki_plugins.recipe.resolve import Changes, resolve
from mulki_plugins.report.compare import comparison_data
from mulki_plugins.report.result import Result, find_results, read_result
from mulki_plugins.report.tables import comparison_text
from mulki_plugins.training.checkpoint import Moment, checkpoints, latest_checkpoint, write_checkpoint
from mulki_plugins.training.snapshot import storable

QUIET = settings(deadline=None, max_examples=60, derandomize=True, suppress_health_check=list(HealthCheck))

STREAMS = st.sampled_from([{}, {"order": "II"}, {"tasks": ["digits", "food"]}]).map(
    lambda o: {"name": "mtil-mini", **o}
)
MODELS = [
    {"name": "mulki-tiny"},
    {"name": "mulki-tiny", "train": "image"},
    {"name": "ViT-B-16", "pretrained": "openai"},
]
STRATEGIES = st.sampled_from(["mulki", "mulki-plus", "finetune", "zscl", "replay", "wise-ft", "joint", "zero-shot"])
POSITIVE = st.floats(1e-6, 1e3, allow_nan=False)

RECIPES = st.fixed_dictionaries(
    {
        "name": st.from_regex(r"[a-z][a-z0-9-]{0,12}", fullmatch=True),
        "stream": STREAMS,
        "reference": st.just("mtil-mini-reference"),
        "model": st.sampled_from(MODELS),
        "strategy": STRATEGIES,
        "train": st.fixed_dictionaries(
            {
                "iterations": st.integers(1, 10**6),
                "optimizer": st.fixed_dictionaries({"lr": POSITIVE}, optional={"weight_decay": POSITIVE}),
            },
            optional={
                "batch_size": st.integers(1, 4096), "label_smoothing": st.floats(0, 0.99), "gradient_clip": POSITIVE,
                "precision": st.sampled_from(["fp32", "tf32", "bf16", "fp16"]),
                "compile": st.booleans(), "accumulate": st.just(1), "workers": st.integers(0, 64),
                "checkpoint": st.fixed_dictionaries({"every": st.none() | st.integers(1, 999), "keep": st.integers(0, 9)}),
                "unreadable": st.sampled_from(["stop", "skip"]),
            },
        ),
    },
    optional={
        "summary": st.text(st.characters(exclude_categories=["C"]), max_size=40),
        "evaluate": st.fixed_dictionaries({"classes": st.sampled_from(["task", "seen", "all"])}),
        "seeds": st.lists(st.integers(0, 2**31), min_size=1, max_size=4, unique=True),
    },
)  # fmt: skip

JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@QUIET
@given(recipe=RECIPES)
def test_a_valid_recipe_is_the_same_when_what_is_shown_is_read_again(tmp_path_factory, recipe):
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "one.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True))
    first = resolve(str(folder / "one.yaml"), Changes())
    (folder / "two.yaml").write_text(dump_annotated(first.tree))
    assert resolve(str(folder / "two.yaml"), Changes()).recipe == first.recipe


def mistakes(function):
    """The lines of a user's mistakes, None where there are none; any other error is one of ours."""
    try:
        function()
    except MulkiError as error:
        return error.lines()
    return None


def places(value, path=()):
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


@QUIET
@given(recipe=RECIPES, data=st.data())
def test_a_mutated_recipe_is_read_or_refused_with_a_place(tmp_path_factory, recipe, data):
    path = data.draw(st.sampled_from([p for p in places(recipe) if p]))
    parent = recipe = copy.deepcopy(recipe)
    for key in path[:-1]:
        parent = parent[key]
    how = data.draw(st.sampled_from(["replace", "drop", "rename"]))
    if how == "replace":
        parent[path[-1]] = data.draw(JUNK)
    else:
        value = parent.pop(path[-1])
        if how == "rename" and isinstance(parent, dict):
            parent[data.draw(st.text(max_size=8))] = value
    file = tmp_path_factory.mktemp("recipes") / "mutated.yaml"
    file.write_text(yaml.safe_dump(recipe, allow_unicode=True))
    lines = mistakes(lambda: resolve(str(file), Changes()))
    assert lines is None or lines
    for line in lines or ():
        assert "mutated.yaml" in line or "$." in line, line
        assert "\n" not in line


@QUIET
@given(text=st.text(max_size=200) | st.binary(max_size=200))
def test_no_text_at_all_makes_a_traceback(tmp_path_factory, text):
    file = tmp_path_factory.mktemp("recipes") / "text.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "replace"))
    with pytest.raises(MulkiError):
        resolve(str(file), Changes())


def square(values, n):
    return st.lists(st.lists(values, min_size=n, max_size=n), min_size=n, max_size=n)


def a_result(matrix):
    tasks = [f"t{i}" for i in range(len(matrix[0]))]
    return Result(
        recipe="r", strategy="s", seed=0, status="complete", tasks=tasks, matrix=matrix, zero_shot=matrix[0],
        metrics={"last": sum(matrix[-1]) / len(matrix[-1])}, protocol={"stream": "mtil-mini"}, settings="x",
    )  # fmt: skip


@QUIET
@given(
    matrix=st.integers(1, 4).flatmap(
        lambda n: st.lists(st.lists(st.floats(0, 100), min_size=n, max_size=n), min_size=n, max_size=n)
    )
)
def test_a_result_is_what_was_written(tmp_path_factory, matrix):
    folder = tmp_path_factory.mktemp("run")
    a_result(matrix).write(folder)
    assert read_result(folder / "result.json").matrix == matrix


@QUIET
@given(data=st.data())
def test_a_mutated_result_is_refused_or_its_numbers_are_its_own(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("run")
    a_result([[50.0, 40.0], [30.0, 60.0]]).write(folder)
    value = json.loads((folder / "result.json").read_text())
    path = data.draw(st.sampled_from([p for p in places(value) if p]))
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = data.draw(JUNK)
    (folder / "result.json").write_text(json.dumps(value))
    if (lines := mistakes(lambda: find_results([folder]))) is not None:
        assert lines
        return
    [result], _ = find_results([folder])
    assert result.matrix == value["matrix"]
    assert comparison_text([result])
    json.dumps(comparison_data([result]), allow_nan=False)


@QUIET
@given(cut=st.integers(0, 10**4), flip=st.none() | st.integers(0, 10**4), which=st.integers(0, 20))
def test_a_checkpoint_that_was_harmed_is_never_taken(tmp_path_factory, cut, flip, which):
    import torch

    folder = tmp_path_factory.mktemp("run")
    state = {"plugins": [["a", {"x": torch.arange(9.0), "n": {1: (2, {3})}}]], "model": {}}
    for steps in (1, 2):
        write_checkpoint(
            folder, f"step-{steps}", Moment(0, steps), base=None, weights={"w": torch.full((5,), float(steps))},
            state=state, progress={"result": {}},
        )  # fmt: skip
    files = sorted((folder / "checkpoints" / "step-2").iterdir())
    file = files[which % len(files)]
    data = bytearray(file.read_bytes())
    if flip is None:
        del data[cut % len(data) :]
    else:
        data[flip % len(data)] ^= 1 << (cut % 8)
    file.write_bytes(bytes(data))
    chosen, wrong = latest_checkpoint(folder)
    assert chosen is not None
    if chosen.moment.steps == 2:  # a bit that says nothing, such as one of a blank
        assert torch.equal(chosen.weights()["w"], torch.full((5,), 2.0))
        assert chosen.state()["plugins"][0][1]["n"] == {1: (2, {3})}
    else:
        assert any("step-2" in line for line in wrong)
    shutil.rmtree(folder / "checkpoints" / "step-1")
    assert len(checkpoints(folder)[0]) <= 1


NESTED = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=6) | st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)


@QUIET
@given(state=NESTED)
def test_state_survives_packing(state):
    import torch

    file = io.BytesIO()
    torch.save(storable(state), file)
    file.seek(0)
    again = torch.load(file, weights_only=True)
    assert again == state
    assert type(again) is type(state)
