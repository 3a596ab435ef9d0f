"""Recipes: layers and their origins, --set, --with, --without, and that what is shown is a recipe again."""

import itertools
import re
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from PIL import Image

from mulki_plugins.cli import main
from mulki_plugins.errors import Mistakes
from mulki_plugins.recipe.emit import dump_annotated, dump_yaml
from mulki_plugins.recipe.files import YamlFile, check_strategy, find, list_registered
from mulki_plugins.recipe.resolve import Changes, resolve
from mulki_plugins.recipe.schema import as_data
from mulki_plugins.recipe.yaml import parse_value, parse_yaml

ROOT = Path(__file__).parents[1]
RECIPES, STRATEGIES = sorted((ROOT / "recipes").glob("*.yaml")), sorted((ROOT / "strategies").glob("*.yaml"))


@pytest.fixture
def photographs(tmp_path, monkeypatch):
    """A current folder with the image folders that recipes/photos.yaml names, which `folders` looks for."""
    monkeypatch.chdir(tmp_path)
    for folder in re.findall(r"(?:train|test): (data/[^,}\s]+)", (ROOT / "recipes" / "photos.yaml").read_text()):
        (tmp_path / folder / "a class").mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / folder / "a class" / "image.png")


@pytest.mark.usefixtures("photographs")
@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_every_shipped_recipe_is_valid_and_opens_with_how_to_run_it(path):
    resolve(str(path))
    opening = list(itertools.takewhile(lambda line: line.startswith("#"), path.read_text().splitlines()))
    assert any(f"mulki run recipes/{path.name}" in line for line in opening)


@pytest.mark.usefixtures("photographs", "second_model")
@pytest.mark.parametrize("path", sorted((ROOT / "studies").glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_study_is_valid(path):
    done = CliRunner().invoke(main, ["validate", str(path)])
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("path", STRATEGIES, ids=lambda p: p.name)
def test_every_shipped_strategy_is_valid_and_named_as_its_file(path):
    strategy = check_strategy(find("strategies", str(path)))
    assert strategy.name == path.stem
    assert strategy.summary
    resolve("mtil", Changes(strategy=path.stem))


def test_what_is_shown_is_a_recipe_again(tmp_path):
    changes = Changes(
        strategy="mulki", without_plugins=("distinguishing",), with_plugins=("avalanche.ewc",), settings=("train.epochs=2",), seeds=(3, 4)
    )  # fmt: skip
    first = resolve("mtil", changes)
    for name, text in (("a", dump_annotated(first.tree)), ("b", dump_yaml(as_data(first.recipe)))):
        path = tmp_path / f"{name}.yaml"
        path.write_text(text)
        again = resolve(str(path))
        assert again.recipe == first.recipe
        assert as_data(again.recipe) == as_data(first.recipe)


def test_every_value_knows_where_it_comes_from(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: mine\nstream: mtil-mini\nmodel: mulki-tiny\nstrategy: mulki-plus\n"
        "train:\n  iterations: 7\n  optimizer: {lr: 1e-4}\n"
    )
    tree = resolve(str(path), Changes(settings=("strategy.adding.weight=0.5",), seeds=(2,))).tree
    expected = {
        ("train", "iterations"): f"{path}:6",
        ("train", "optimizer", "lr"): f"{path}:7",
        ("stream", "name"): f"{path}:2",
        ("strategy", "plugins", 2, "adding", "weight"): "--set strategy.adding.weight=0.5",
        ("strategy", "plugins", 5, "connecting", "every"): "strategies/mulki-plus.yaml:16",
        ("seeds",): "--seed",
    }
    for at, origin in expected.items():
        assert str(tree.origin(at)) == origin, at
    assert ("train", "batch_size") not in tree.origins


def test_strategy_defaults_lie_under_the_recipe(tmp_path):
    strategy = tmp_path / "slow.yaml"
    strategy.write_text(
        "name: slow\ndefaults:\n  train: {iterations: 9, batch_size: 3, schedule: linear}\nplugins: []\n"
    )
    recipe = tmp_path / "r.yaml"
    text = (
        "name: r\nstream: mtil-mini\nmodel: mulki-tiny\nstrategy: %s\ntrain:\n  optimizer: {lr: 0.1}\n  batch_size: 5\n"
    )
    recipe.write_text(text % strategy)
    train = resolve(str(recipe)).recipe.train
    assert (train.iterations, train.batch_size, train.schedule.name) == (9, 5, "linear")
    recipe.write_text(text % strategy + "  epochs: 2\n")
    train = resolve(str(recipe)).recipe.train
    assert (train.iterations, train.epochs) == (None, 2), "the recipe's budget takes the place of the strategy's"


def test_short_forms_of_strategy_defaults_are_laid_under_long_ones(tmp_path):
    strategy = tmp_path / "slow.yaml"
    strategy.write_text(
        "name: slow\ndefaults:\n  model: {head: rail, train: none}\n  train: {schedule: linear, optimizer: muon, iterations: 9}\n"
        "plugins: []\n"
    )
    check_strategy(YamlFile(strategy, "slow.yaml"))
    (tmp_path / "r.yaml").write_text(
        f"name: r\nstream: mtil-mini\nmodel: {{name: mulki-tiny, head: {{rail: {{width: 64}}}}}}\nstrategy: {strategy}\n"
        "train: {optimizer: {lr: 0.001}, schedule: {warmup: 2}, epochs: null}\n"
    )
    recipe = resolve(str(tmp_path / "r.yaml")).recipe
    assert (recipe.train.optimizer.name, recipe.train.optimizer.lr) == ("muon", 0.001)
    assert (recipe.train.schedule.name, recipe.train.schedule.warmup) == ("linear", 2)
    assert recipe.model.options["head"]["rail"]["width"] == 64
    assert recipe.train.iterations == 9, "null sets nothing, so it takes nothing away"


@pytest.mark.parametrize(
    ("setting", "read", "expected"),
    [
        ("train.iterations=50", lambda r: r.train.iterations, 50),
        ("$.train.iterations=50", lambda r: r.train.iterations, 50),
        ("train.epochs=2", lambda r: (r.train.epochs, r.train.iterations), (2, None)),
        ("train.optimizer.lr=1e-5", lambda r: r.train.optimizer.lr, 1e-5),
        ("strategy.plugins[2].adding.weight=3", lambda r: r.strategy.plugins[2].options["weight"], 3.0),
        ("strategy.plugins.adding.weight=3", lambda r: r.strategy.plugins[2].options["weight"], 3.0),
        ("strategy.adding.weight=3", lambda r: r.strategy.plugins[2].options["weight"], 3.0),
        ("strategy.adding.relations={image_to_text: 2}", lambda r: r.strategy.plugins[2].options["relations"], {"image_to_text": 2.0}),
        ("strategy.connecting.every=null", lambda r: r.strategy.plugins[5].options["every"], None),
        ("strategy=finetune", lambda r: (r.strategy.name, r.strategy.plugins), ("finetune", [])),
        ("stream.tasks=[flags, food]", lambda r: r.stream.options["tasks"], ["flags", "food"]),
        ("stream.order=[food, flags]", lambda r: r.stream.options["order"], ["food", "flags"]),
        ("train.per_task.flags.lr=0.1", lambda r: r.train.per_task["flags"].lr, 0.1),
        ("evaluate.classes=seen", lambda r: r.evaluate.classes, "seen"),
        ("model={name: ViT-B-32, pretrained: openai}", lambda r: (r.model.name, r.model.options["pretrained"]), ("ViT-B-32", "openai")),
        ("stream=mtil-mini", lambda r: r.stream.options["order"], None),
        ("model=mulki-tiny", lambda r: r.model.name, "mulki-tiny"),
        ("train.schedule=constant", lambda r: r.train.schedule.name, "constant"),
        ("strategy.plugins=[teachers]", lambda r: [p.name for p in r.strategy.plugins], ["teachers"]),
        ("train.optimizer.betas=[0.9, 0.98]", lambda r: r.train.optimizer.options["betas"], [0.9, 0.98]),
        ("train.epochs=null", lambda r: r.train.iterations, 50),
        ("strategy='finetune'", lambda r: r.strategy.name, "finetune"),
        ("strategy={plugins: [teachers]}", lambda r: r.strategy.name, "custom"),
        ("seeds=[1,2]", lambda r: r.seeds, [1, 2]),
        ("summary='a: b'", lambda r: r.summary, "a: b"),
    ],
)  # fmt: skip
def test_set(setting, read, expected):
    assert read(resolve("mtil", Changes(settings=(setting,))).recipe) == expected


def test_the_decay_of_importances_belongs_to_one_mode():
    online = Changes(strategy="ewc", settings=("strategy.avalanche.ewc.mode=online",))
    with pytest.raises(Mistakes, match=r"decay_factor: expected a number from 0 to 1, since mode is online"):
        resolve("mtil", online)
    decay = "strategy.avalanche.ewc.decay_factor=0.5"
    resolve("mtil", Changes(strategy="ewc", settings=(*online.settings, decay)))
    with pytest.raises(Mistakes, match=r"decay_factor: only mode online has a decay"):
        resolve("mtil", Changes(strategy="ewc", settings=(decay,)))


def test_merged_weights_and_interpolated_ones_exclude_each_other():
    with pytest.raises(Mistakes, match="magmax: does not work together with 'connecting'"):
        resolve("mtil", Changes(strategy="magmax", with_plugins=("connecting",)))


@pytest.mark.parametrize("option", ["avalanche.si.si_lambda", "avalanche.lwf.alpha"])
def test_a_list_of_factors_has_at_least_one(option):
    plugin = option.rpartition(".")[0]
    changes = Changes(strategy="finetune", with_plugins=(plugin,), settings=(f"strategy.{option}=[]",))
    with pytest.raises(Mistakes, match=f"{option}: expected a number, or a list with one for each task"):
        resolve("mtil", changes)


@pytest.mark.parametrize(
    ("settings", "read", "expected"),
    [
        (("train.optimizer=sgd", "train.optimizer.lr=0.1"), lambda r: r.train.optimizer.name, "sgd"),
        (("train.schedule=linear", "train.schedule.warmup=2"), lambda r: r.train.schedule.name, "linear"),
        (("model=ViT-B-32", "model.pretrained=openai"), lambda r: r.model.name, "ViT-B-32"),
        (("strategy.plugins=[teachers]", "strategy.teachers.use=initial"), lambda r: len(r.strategy.plugins), 1),
        (("stream=mtil-mini", "stream.order=II"), lambda r: r.stream.options["order"], "II"),
        (("model.head=rail", "model.head.rail.width=64"), lambda r: r.model.options["head"]["rail"]["width"], 64),
        (
            ("model.adapters=[lora]", "model.adapters.lora.rank=4"),
            lambda r: r.model.options["adapters"][0]["lora"]["rank"],
            4,
        ),
        (
            ("stream={name: mixed, of: [mtil-mini]}", "stream.of[0].shots=5"),
            lambda r: r.stream.options["of"],
            [{"name": "mtil-mini", "shots": 5}],
        ),
        (
            ("stream={name: split, of: mtil-mini, increment: 5}", "stream.of.tasks=[food]"),
            lambda r: r.stream.options["of"],
            {"name": "mtil-mini", "tasks": ["food"]},
        ),
    ],
)
def test_an_option_of_a_part_that_an_earlier_setting_names(settings, read, expected):
    assert read(resolve("mtil", Changes(settings=settings)).recipe) == expected


def test_a_recipe_that_is_written_out_keeps_its_model_under_another_strategy(tmp_path):
    (tmp_path / "mine.yaml").write_text(CliRunner().invoke(main, ["show", "mtil"]).stdout)
    mine = str(tmp_path / "mine.yaml")
    [notice] = resolve(mine, Changes(strategy="finetune")).notices
    assert notice.startswith("the recipe's model keeps `train: text` and `head: rail` with the strategy finetune")
    assert resolve(mine).notices == []
    assert not any("keeps" in line for line in resolve("mtil", Changes(strategy="finetune")).notices)


def test_an_entry_of_a_list_goes_by_its_own_name(tmp_path, monkeypatch):
    for name in ("one", "two"):
        for kind in ("a", "b"):
            (tmp_path / name / kind).mkdir(parents=True)
            for i in range(5):
                Image.new("RGB", (4, 4)).save(tmp_path / name / kind / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    stream = {
        "name": "folders",
        "tasks": [{"name": name, "images": name, "test_share": 0.2} for name in ("one", "two")],
    }
    Path("mine.yaml").write_text(
        yaml.safe_dump(
            {
                "name": "mine",
                "stream": stream,
                "model": "mulki-tiny",
                "strategy": "finetune",
                "train": {"iterations": 1, "optimizer": {"name": "adamw", "lr": 0.1}},
            }
        )
    )
    read = resolve("mine.yaml", Changes(settings=("stream.tasks.two.test_share=0.4",))).recipe.stream.options["tasks"]
    assert [each["test_share"] for each in read] == [0.2, 0.4]
    with pytest.raises(Mistakes, match=r"among one, two; write an option as stream\.tasks\.NAME\.OPTION"):
        resolve("mine.yaml", Changes(settings=("stream.tasks.test_share=0.4",)))


def test_a_quoted_sign_of_merging_is_a_key():
    assert parse_value("{'<<': 1}", "").value == {"<<": 1}
    with pytest.raises(Mistakes, match="merge keys"):
        parse_value("{<<: 1}", "")


@pytest.mark.parametrize(
    ("strategy", "added", "stack"),
    [
        ("ewc", ["connecting"], ["connecting", "avalanche.ewc"]),
        ("l2", ["magmax"], ["magmax", "l2"]),
        ("si", ["magmax"], ["magmax", "avalanche.si"]),
        ("finetune", ["teachers", "magmax"], ["magmax", "teachers"]),
        ("wise-ft", ["avalanche.mas"], ["connecting", "avalanche.mas"]),
        ("finetune", ["avalanche.mas", "connecting", "l2"], ["connecting", "avalanche.mas", "l2"]),
    ],
)
def test_an_added_plugin_stands_before_those_that_must_follow_it(strategy, added, stack):
    resolved = resolve("mtil", Changes(strategy=strategy, with_plugins=tuple(added)))
    assert [each.name for each in resolved.recipe.strategy.plugins] == stack
    with pytest.raises(Mistakes, match=r"plugins\[0\].avalanche.mas: must come after 'connecting'"):
        resolve("mtil", Changes(settings=("strategy.plugins=[avalanche.mas: {}, connecting: {}]",)))


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ("train.iterations", "expected key.path=value"),
        ("=5", "expected key.path=value"),
        ("train..x=5", "expected key.path=value"),
        ("train.iterations=[", "this is not YAML"),
        ("train.iterations=-5", r"\$.train.iterations: expected a whole number, at least 1, got -5"),
        ("train.itertions=5", r"\$.train.itertions: unknown option .*'iterations'"),
        ("strategy.addding.weight=5", "there is no entry 'addding' among teachers, eliciting, adding"),
        ("strategy.plugins[9].adding.weight=5", "there is no entry 9"),
        ("seeds.²=1", "there is no entry '²'"),
        ("seeds[99999999999999]=1", "expected key.path=value"),
        ("seeds[999]=1", "there is no entry 999"),
        ("summary=a\udcff", r"\$.summary: this is no UTF-8 text"),
        ("summary=*a", r"\$.summary: the alias"),
        ("train.iterations=", r"\$.train.iterations: expected a value after the ="),
        ("strategy=nobody", "no strategy is named 'nobody'"),
        ("train.iterations=!!python/name:os.system x", "tag"),
    ],
)
def test_set_wrongly(setting, why):
    with pytest.raises(Mistakes, match=why) as caught:
        resolve("mtil", Changes(settings=(setting,)))
    assert "--set" in str(caught.value)


def test_all_that_with_and_without_ask_in_vain_is_said_at_once():
    with pytest.raises(Mistakes) as caught:
        resolve("mtil", Changes(without_plugins=("adding2",), with_plugins=("adding", "nix")))
    first, second, third = caught.value.lines()
    assert first.startswith("--without adding2: $.strategy.plugins: the stack has no plugin 'adding2'")
    assert second == "--with adding: $.strategy.plugins: the stack has the plugin 'adding' already"
    assert third.startswith("--with nix: $.strategy.plugins[6].nix: no plugin is named 'nix'")


def test_with_and_without_name_the_stack():
    recipe = resolve("mtil", Changes(without_plugins=("distinguishing",), with_plugins=("avalanche.ewc",))).recipe
    assert recipe.strategy.name == "mulki-plus-without-distinguishing-with-avalanche.ewc"
    assert [e.name for e in recipe.strategy.plugins] == [
        "teachers",
        "eliciting",
        "adding",
        "preserving",
        "connecting",
        "avalanche.ewc",
    ]
    assert recipe.strategy.plugins[-1].options["ewc_lambda"] == 1.0
    with pytest.raises(Mistakes, match=r"the stack has no plugin 'adding2' .*did you mean 'adding'"):
        resolve("mtil", Changes(without_plugins=("adding2",)))
    with pytest.raises(Mistakes, match="has the plugin 'adding' already"):
        resolve("mtil", Changes(with_plugins=("adding",)))
    with pytest.raises(Mistakes, match="eliciting: needs the plugin 'teachers'"):
        resolve("mtil", Changes(without_plugins=("teachers",)))


def test_a_plugin_is_taken_out_and_put_back_with_its_defaults():
    changes = Changes(strategy="mulki", without_plugins=("connecting",), with_plugins=("connecting",))
    recipe = resolve("mtil", changes).recipe
    assert recipe.strategy.plugins[-1].name == "connecting"
    assert recipe.strategy.name == "mulki-without-connecting-with-connecting"


def test_names_and_paths(tmp_path, monkeypatch):
    assert "mtil" in list_registered("recipes")
    monkeypatch.chdir(tmp_path)
    for name in ("mtil", "mtil.yaml", "recipes/mtil.yaml"):
        assert "using the recipe 'mtil' of mulki" in find("recipes", name).notice
    (tmp_path / "mtil.yaml").write_text("name: mine\n")
    assert find("recipes", "mtil.yaml").notice == "", "an existing path wins"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("5.0e-4", 5e-4), ("-3", -3), ("+.5", 0.5), ("1_000", "1_000"), ("0x10", "0x10"), ("010", 10),
        ("no", "no"), ("yes", "yes"), ("on", "on"), ("true", True), ("False", False), ("~", None), ("", None),
        ("1:30", "1:30"), ("2026-11-22", "2026-11-22"), ("'5'", "5"), ('"true"', "true"), ("!!str 5", "5"), ("=", "="),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text, value):
    got = parse_value(text, "x").value
    assert got == value
    assert type(got) is type(value)


def test_anchors_are_followed():
    tree = parse_yaml("a: &x {b: [1, 2]}\nc: *x\nd: [*x, *x]\n", "x")
    assert tree.value == {"a": {"b": [1, 2]}, "c": {"b": [1, 2]}, "d": [{"b": [1, 2]}, {"b": [1, 2]}]}
    tree.value["c"]["b"].append(3)
    assert tree.value["a"] == {"b": [1, 2]}, "each is a copy"


def test_what_is_written_can_be_read_by_any_yaml_reader():
    data = {"a": "no", "b": "1e-4", "c": 1e-4, "d": 5e20, "e": "x: y", "f": "", "g": "ünï", "h": [None, True], "i": {}}
    assert yaml.safe_load(dump_yaml(data)) == data
    assert parse_yaml(dump_yaml(data), "x").value == data


def test_a_broken_strategy_is_told_by_its_own_lines(tmp_path):
    folder = tmp_path / "strategies"
    folder.mkdir()
    path = folder / "broken.yaml"
    path.write_text("name: broken\nplugins:\n  - adding: {temprature: 2}\n  - nobody\n")
    with pytest.raises(Mistakes) as caught:
        check_strategy(find("strategies", str(path)))
    first, second, third = caught.value.lines()
    assert f"{path}:3: $.plugins[0].adding.temprature: unknown option (did you mean 'temperature'?)" in (first, second)
    assert f"{path}:3: $.plugins[0].adding: needs the plugin 'teachers'" in first + second
    assert third.startswith(f"{path}:4: $.plugins[1].nobody: no plugin is named 'nobody'")
    path.write_text("name: broken\nplugin: []\ndefaults: {seeds: [1]}\n")
    with pytest.raises(Mistakes, match=r"broken.yaml:2: \$.plugin: unknown option"):
        check_strategy(find("strategies", str(path)))
    path.write_text("name: broken\ndefaults: {seeds: [1]}\n")
    with pytest.raises(Mistakes, match=r"broken.yaml:2: \$.defaults.seeds: expected one of train, evaluate"):
        check_strategy(find("strategies", str(path)))


def test_a_strategy_is_checked_whole(tmp_path):
    folder = tmp_path / "strategies"
    folder.mkdir()
    path = folder / "x.yaml"
    path.write_text(
        "name: ../x\nsumary: a\nplugins: [adding: {temprature: 1}, nobody]\n"
        "defaults:\n  train: {iteratons: 5, batch_size: many}\n  evaluate: 5\n  seeds: [0]\n"
    )
    with pytest.raises(Mistakes) as caught:
        check_strategy(find("strategies", str(path)))
    text = str(caught.value)
    for place in (
        ":1: $.name:", ":2: $.sumary:", ":3: $.plugins[0].adding.temprature:", ":3: $.plugins[1].nobody:",
        ":5: $.defaults.train.iteratons:", ":5: $.defaults.train.batch_size:", ":6: $.defaults.evaluate:", ":7: $.defaults.seeds:",
    ):  # fmt: skip
        assert place in text, (place, text)
    path.write_text("name: x\ndefaults:\n  train: {epochs: 2}\n  evaluate: {classes: seen}\n")
    assert check_strategy(find("strategies", str(path))).name == "x"
    path.write_text("name: x\ndefaults: {model: {train: adapters}}\n")
    check_strategy(find("strategies", str(path)))  # the recipe may add the adapters
    path.write_text("name: x\ndefaults: {model: {adapters: [lorra]}}\n")
    with pytest.raises(Mistakes, match=r"\$.defaults.model.adapters\[0\].lorra: no adapter is named 'lorra'"):
        check_strategy(find("strategies", str(path)))
    path.write_text("name: x\ndefaults: {train: {iterations: 5, epochs: 5}}\n")
    with pytest.raises(Mistakes, match="both iterations and epochs"):
        check_strategy(find("strategies", str(path)))


def test_what_is_shown_stays_a_recipe_whatever_was_typed(tmp_path):
    shown = dump_annotated(resolve("mtil", Changes(settings=('summary="a\n  b"',))).tree)
    (tmp_path / "s.yaml").write_text(shown)
    assert resolve(str(tmp_path / "s.yaml")).recipe.summary == "a b"


def test_a_wrong_strategy_is_reported_alone():
    with pytest.raises(Mistakes) as caught:
        resolve("mtil", Changes(strategy="nope", settings=("strategy.adding.weight=1",)))
    assert len(caught.value.lines()) == 1
