"""Optimizers by name, and groups of weights with a learning rate and a weight decay of their own."""

import json
import re

import pytest
import torch
from avalanche.training.plugins import SupervisedPlugin
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import nn

from mulki_plugins.cli import main
from mulki_plugins.errors import Mistakes, MulkiError
from mulki_plugins.models import ClipClassifier
from mulki_plugins.recipe.resolve import Changes, resolve
from mulki_plugins.recipe.schema import Optimizer, ParameterGroup
from mulki_plugins.recipe.settings import fingerprint, known_fingerprints
from mulki_plugins.registry.catalog import Catalog, Provenance
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.registry.register import Register
from mulki_plugins.training.groups import Grouping, make_optimizer
from mulki_plugins.training.optimizers import Muon, sgd
from mulki_plugins.training.resume import resume_experiment
from mulki_plugins.training.run import run_experiment
from tests.conftest import Killed, same, small_clip, small_tokenizer

SMALL = (
    "stream={name: small}", "model={name: small-clip}", "train.iterations=6", "train.schedule.warmup=1",
    "train.batch_size=4", "train.checkpoint.every=2", "device=cpu", "loggers=[csv]",
)  # fmt: skip


class SignDescent(torch.optim.Optimizer):
    """Steps by the sign of the gradient."""

    def __init__(self, params, lr=1e-3, strength=1.0):
        super().__init__(params, {"lr": lr, "strength": strength})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["step"] = self.state[p].get("step", 0) + 1
                    p -= group["lr"] * group["strength"] * p.grad.sign()


def not_an_optimizer(params, lr):
    """Returns no optimizer."""
    return []


def broken(params, lr):
    """Fails."""
    raise KeyError("lost")


class Context(SupervisedPlugin):
    """A vector that the plugin holds itself, added to the image features by a hook on the model."""

    adds_parameters = True

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(16))

    def before_training(self, strategy, **kwargs):
        if not hasattr(strategy.model, "shifted"):
            strategy.model.shifted = True
            strategy.model.clip.visual.register_forward_hook(lambda module, inputs, z: z + self.shift)

    def state_dict(self):
        return {"shift": self.shift}

    def load_state_dict(self, state):
        self.shift.data.copy_(state["shift"])


@pytest.fixture(autouse=True)
def registered(small_parts):
    torch.set_num_threads(1)
    mine = Catalog()
    register = Register(mine, Provenance(distribution="somebodys-optimizers", version="0.3"))
    register.optimizer("sign", SignDescent)
    register.optimizer("nothing", not_an_optimizer)
    register.optimizer("broken", broken)
    register.optimizer("radam", "torch.optim:RAdam", summary="rectified Adam", kinds={"betas": tuple[float, float]})
    register.plugin("context", Context)
    catalog().parts.update(mine.parts)
    yield
    for key in mine.parts:
        del catalog().parts[key]


def resolved(*settings, strategy="finetune"):
    return resolve("recipes/mtil.yaml", Changes(strategy=strategy, settings=(*SMALL, *settings)))


def problems(*settings):
    with pytest.raises(Mistakes) as caught:
        resolved(*settings)
    return "\n".join(caught.value.lines())


def run_folder(path):
    [folder] = path.glob("*/*/seed-0")
    return folder


# optimizers


def test_nesterov_has_a_momentum():
    weight = torch.nn.Parameter(torch.ones(2))
    [group] = sgd([{"params": [weight]}], lr=0.1, nesterov=True).param_groups
    assert (group["momentum"], group["nesterov"]) == (0.9, True)
    [group] = sgd([{"params": [weight]}], lr=0.1).param_groups
    assert (group["momentum"], group["nesterov"]) == (0, False)


def test_optimizers_are_parts_like_others():
    listed = CliRunner().invoke(main, ["list", "optimizers", "--json"]).stdout
    names = {entry["name"]: entry["distribution"] for entry in json.loads(listed)["optimizers"]}
    assert {"adamw", "adam", "sgd", "muon"} <= names.keys()
    assert names["sign"] == "somebodys-optimizers"
    recipe = resolved("train.optimizer={name: sign, lr: 0.1}").recipe
    assert recipe.train.optimizer.options == {"strength": 1.0}
    assert "has no option 'strength'" not in problems("train.optimizer={name: sign, lr: 0.1, strenth: 2}")
    assert "did you mean" in problems("train.optimizer={name: sign, lr: 0.1, strenth: 2}")
    assert "no weight decay" in problems("train.optimizer={name: sign, lr: 0.1, weight_decay: 0.1}")
    assert "sgd have it" in problems("train.optimizer={name: adamw, lr: 0.1, momentum: 0.9}")
    schema = CliRunner().invoke(main, ["schema", "recipe"]).stdout
    [by_name] = [
        s for s in json.loads(schema)["properties"]["train"]["properties"]["optimizer"]["anyOf"] if "enum" in s
    ]
    assert {"muon", "sign"} <= set(by_name["enum"])


def test_a_recipe_of_an_earlier_version_is_the_same_experiment(tmp_path):
    before = "train.optimizer={name: sgd, lr: 0.1, weight_decay: 0.0, betas: null, momentum: 0.9}"
    now = "train.optimizer={name: sgd, lr: 0.1, momentum: 0.9}"
    assert fingerprint(resolved(before).recipe) == fingerprint(resolved(now).recipe)
    recipe = resolve("recipes/mtil.yaml", Changes(strategy="wise-ft")).recipe
    assert "12505d8ac61f" in known_fingerprints(recipe), "published results carry it"


@pytest.mark.parametrize(("name", "error"), [("nothing", "returned a list"), ("broken", "KeyError: 'lost'")])
def test_an_optimizer_that_cannot_be_used(tmp_path, name, error):
    with pytest.raises(MulkiError, match=f"{name!r} of somebodys-optimizers 0.3.*{error}"):
        run_experiment(resolved(f"train.optimizer={{name: {name}, lr: 0.1}}"), 0, tmp_path)


@pytest.mark.parametrize("name", ["sgd", "muon", "sign", "radam"])
def test_a_killed_run_with_any_optimizer_ends_as_if_it_had_never_been(tmp_path, kill_at, name):
    recipe = resolved(
        f"train.optimizer={{name: {name}, lr: 0.01}}", "train.groups=[{match: image, lr: 0.5}]",
        "train.per_task={second: {lr: 0.02}}",
    )  # fmt: skip
    whole = run_experiment(recipe, 0, tmp_path / "whole")
    kill_at(2, 3)
    with pytest.raises((Killed, MulkiError)):  # blamed on the optimizer that lives in the tests, too
        run_experiment(recipe, 0, tmp_path / "killed")
    folder = run_folder(tmp_path / "killed")
    assert resume_experiment(recipe, 0, folder).matrix == whole.matrix
    other = run_folder(tmp_path / "whole")
    assert same(load_file(other / "model.safetensors"), load_file(folder / "model.safetensors"))
    assert (other / "metrics.csv").read_bytes() == (folder / "metrics.csv").read_bytes()


def test_muon_makes_the_steps_of_torchs_two_optimizers():
    torch.manual_seed(0)
    shapes = {"layer.weight": (6, 4), "token_embedding.weight": (9, 4), "conv.weight": (3, 2, 2, 2), "bias": (4,)}
    one = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    other = {name: nn.Parameter(p.detach().clone()) for name, p in one.items()}
    names = {id(p): name for name, p in one.items()}
    groups = [{"params": list(one.values()), "lr": 0.1, "weight_decay": 0.02}]
    mine = Muon(groups, lr=0.1, name_of=lambda p: names[id(p)])
    matrices = torch.optim.Muon([other["layer.weight"]], 0.1, 0.02, adjust_lr_fn="match_rms_adamw")
    rest = torch.optim.AdamW([p for name, p in other.items() if name != "layer.weight"], 0.1, weight_decay=0.02)
    for step in range(4):
        for name in one:
            one[name].grad = torch.randn(shapes[name])
            other[name].grad = one[name].grad.clone()
        for optimizer in (mine, matrices, rest):
            optimizer.step()
        if step == 1:  # as a resume does
            state = mine.state_dict()
            mine = Muon([{"params": list(one.values()), "lr": 9.0}], lr=9.0, name_of=lambda p: names[id(p)])
            mine.load_state_dict(state)
    for name in one:
        assert torch.equal(one[name], other[name]), name


# groups


def grouped(*rules, adapters=(), train="all"):
    from mulki_plugins.testing.small import small_stream

    model = ClipClassifier(small_clip(), small_tokenizer, small_stream().tasks, train=train, adapters=adapters)
    settings = Optimizer(lr=0.1, weight_decay=0.5)
    grouping = Grouping([ParameterGroup(**rule) for rule in rules], model)
    weights = dict(model.named_parameters())
    optimizer = make_optimizer(weights, settings, grouping)
    by_id = {id(p): name.removeprefix("clip.") for name, p in weights.items()}
    rates = {by_id[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    return model, rates, grouping


def test_the_first_group_that_matches_takes_a_weight():
    _, rates, _ = grouped(
        {"match": "*.attn.in_proj_weight", "lr": 3.0},
        {"match": "visual.*", "lr": 0.5, "decay": 0},
        {"match": "text", "decay": 2},
    )
    for name, (lr, decay) in rates.items():
        attention, image = name.endswith("in_proj_weight"), name.startswith("visual.")
        assert lr == pytest.approx(0.3 if attention else 0.05 if image else 0.1), name
        matrix = ("weight" in name and "ln" not in name) or name.endswith(("proj", "positional_embedding"))
        if matrix:
            assert decay == (0.5 if attention else 0 if image else 1.0), name
        if name.endswith("bias"):
            assert decay == 0


def test_without_groups_the_optimizer_is_what_it_was():
    model, _, _ = grouped()
    groups = make_optimizer(dict(model.named_parameters()), Optimizer(lr=0.1), Grouping([], model)).param_groups
    learning = [p for p in model.parameters() if p.requires_grad]
    assert [id(p) for p in groups[0]["params"]] == [id(p) for p in learning if p.ndim >= 2]
    assert [id(p) for p in groups[1]["params"]] == [id(p) for p in learning if p.ndim < 2]
    assert len(groups) == 2
    assert "group" not in groups[0]


def test_what_adapters_add_is_a_group_by_word_and_by_name():
    from mulki_plugins.adapters import LoRA

    _, rates, _ = grouped({"match": "adapters", "lr": 2.0}, adapters=[LoRA(rank=2)], train="image")
    added = {name for name in rates if name.endswith((".A", ".B"))}
    assert added
    assert {name for name, (lr, _) in rates.items() if lr == 0.2} == added
    _, rates, _ = grouped({"match": "*.attn.in_proj_weight", "lr": 2.0}, adapters=[LoRA(rank=2)])
    assert [n for n, (lr, _) in rates.items() if lr == 0.2 and n.endswith("in_proj_weight.original")], (
        "by its plain name"
    )


@pytest.mark.parametrize(
    ("rules", "error"),
    [
        (
            [{"match": "visul.*"}],
            "'visul.\\*' matches no weight; did you mean 'visual.\\*'.; the model has the parts image, text and the names",
        ),
        ([{"match": "adapters"}], "'adapters' matches no weight"),
        ([{"match": "visual.*"}, {"match": "visual.proj"}], "matches only weights of groups before it"),
        ([{"match": "logit_scale"}], "matches only weights that do not learn, such as logit_scale"),
    ],
)
def test_a_group_without_weights_is_an_error_before_anything_is_measured(tmp_path, rules, error):
    with pytest.raises(MulkiError) as caught:
        run_experiment(resolved(f"train.groups={json.dumps(rules)}"), 0, tmp_path)

    assert re.search(error, "; ".join(caught.value.lines())), caught.value.lines()
    assert not list(tmp_path.iterdir())


def test_the_schedule_scales_every_group_and_the_curves_show_it(tmp_path):
    rules = '[{match: "visual.*", lr: 0.1, decay: 0}, {match: [text], lr: 2}]'
    run_experiment(resolved(f"train.groups={rules}", "train.per_task={second: {lr: 0.05}}"), 0, tmp_path)
    rows = [line.split(",") for line in (run_folder(tmp_path) / "metrics.csv").read_text().splitlines()]
    tag, at, value = (rows[0].index(name) for name in ("tag", "step", "value"))
    curves = {}
    for row in rows[1:]:
        curves.setdefault(row[tag], {})[row[at]] = float(row[value])
    assert len(curves["train/lr"]) == 18
    for step, rate in curves["train/lr"].items():
        assert curves["train/lr/visual.*"][step] == pytest.approx(0.1 * rate)
        assert curves["train/lr/text"][step] == pytest.approx(2 * rate)
    assert max(curves["train/lr"].values()) == pytest.approx(0.05)


def test_weights_that_a_plugin_holds_itself_learn_in_a_group_of_their_own(tmp_path, kill_at):
    recipe = resolved(
        "strategy={name: mine, plugins: [context]}", "train.groups=[{match: plugins, lr: 3}]", "model.train=image"
    )
    seen = {}
    whole = run_experiment(recipe, 0, tmp_path / "whole")
    state = torch.load(run_folder(tmp_path / "whole") / "checkpoints/task-03-third/state.pt", weights_only=True)
    seen["shift"] = state["plugins"][0][1]["shift"]
    assert float(seen["shift"].abs().max()) > 1e-3, "it has learned"
    kill_at(2, 3)
    with pytest.raises((Killed, MulkiError)):
        run_experiment(recipe, 0, tmp_path / "killed")
    folder = run_folder(tmp_path / "killed")
    assert resume_experiment(recipe, 0, folder).matrix == whole.matrix
    again = torch.load(folder / "checkpoints/task-03-third/state.pt", weights_only=True)
    assert torch.equal(again["plugins"][0][1]["shift"], seen["shift"])
