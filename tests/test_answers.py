"""Wrong calls, keys, values and files: each is answered on one line, with what to type next."""

import codecs
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from mulki_plugins.cli import main
from mulki_plugins.errors import MulkiError
from mulki_plugins.recipe import yaml as recipe_yaml
from mulki_plugins.recipe.resolve import Changes, resolve
from mulki_plugins.recipe.yaml import parse_yaml
from mulki_plugins.report.result import Result

MINE = (
    "name: mine\nstream: mtil-mini\nmodel: mulki-tiny\nstrategy: mulki\ntrain: {iterations: 5, optimizer: {lr: 1e-4}}\n"
)
STRATEGY = "name: small\nplugins: [teachers]\n"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(MINE)
    (tmp_path / "small.yaml").write_text(STRATEGY)
    return tmp_path


def mulki(*words):
    return CliRunner().invoke(main, words)


CALLS = {
    "rum": "did you mean 'run'?",
    "mtil --seed 1": "type: mulki run mtil --seed 1",
    "mine.yaml": "type: mulki run mine.yaml",
    "finetune": "type: mulki run mtil --strategy finetune",
    "train mtil": "type: mulki run mtil",
    "version": "type: mulki --version",
    "strategies": "type: mulki list strategies",
    "--foo": "no option --foo",
    "run": "type: mulki run mtil",
    "resume": "type: mulki resume runs/mtil/mulki-plus/seed-0",
    "run mtil --epochs 3": "type --set train.epochs=3",
    "run mtil --epochs=3": "type --set train.epochs=3",
    "run mtil -epochs 3": "type --set train.epochs=3",
    "run --epochs 3": "type --set train.epochs=3",
    "validate mtil --iterations 5": "type --set train.iterations=5",
    "show mtil --lr 1e-4": "type --set train.optimizer.lr=1e-4",
    "run mtil --learning-rate 1e-4": "type --set train.optimizer.lr=1e-4",
    "run mtil --batch-size 32": "type --set train.batch_size=32",
    "run mtil --train.iterations 5": "type --set train.iterations=5",
    "run mtil --temperature 3": "type --set strategy.adding.temperature=3",
    "run mtil --tasks digits": "type --set 'stream.tasks=[digits]'",
    "run mtil --plugin avalanche.ewc": "type --with avalanche.ewc",
    "run mtil --dryrun": "did you mean --dry-run?",
    "data check mtil --epochs 3": "type --set train.epochs=3",
    "data chek mtil": "did you mean 'check'?",
    "study statsu mini": "no command 'statsu'; did you mean 'status'?",
    "study mini extra": "'extra' is one word too many",
    "run mtil -q -v": "-q and -v: expected one of them",
    "run mtil --force": "--force needs --resume",
    "results runs --watch --json": "--watch prints text only",
    "run mtil --seed 0,1": "type --seed 0 --seed 1",
    "run mtil --seed 0-2": "type --seed 0 --seed 1 --seed 2",
    "run mtil --seed=-1": "expected a whole number, 0 or more, got '-1'",
    "run mtil --seed 0 1": "--seed 1",
    "run mtil --set": "type --set train.iterations=50",
    "run mtil --set train.iterations 5": "type --set train.iterations=5",
    "run mtil --set train.iterations = 5": "type --set train.iterations=5",
    "run mtil --set train.iterations= 5": "type --set train.iterations=5",
    "run mtil train.iterations=5": "type --set train.iterations=5",
    "run mtil --set stream.tasks=[digits, scans]": "type --set 'stream.tasks=[digits, scans]'",
    "run --set stream.tasks=[digits, scans] mtil": "type --set 'stream.tasks=[digits, scans]'",
    "run mtil --set=stream.tasks=[digits, scans]": "type --set 'stream.tasks=[digits, scans]'",
    "run mtil --set strategy.adding.relations={image_to_text: 2}": "'strategy.adding.relations={image_to_text: 2}'",
    "run mtil finetune": "type --strategy finetune",
    "run mtil avalanche.ewc": "type --with avalanche.ewc",
    "run mtil mtil": "one recipe",
    "run mtil \u2014set a=b": "begins with an em dash (U+2014); type --set",
    "list stages": "did you mean 'plugins'?",
    "list models ViT-B-61": "did you mean 'ViT-B-16'?",
    "results mine.yaml": "not the result.json of a run; give the folder of a run",
    "resume nowhere": "no such folder",
}


@pytest.mark.parametrize("call", CALLS)
def test_a_wrong_call(call):
    done = mulki(*call.split())
    assert done.exit_code == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert CALLS[call] in line, line


SETTINGS = {
    "stream.tasks=digits,scans": "type --set 'stream.tasks=[digits,scans]'",
    "stream.tasks=digits scans": "type --set 'stream.tasks=[digits,scans]'",
    "stream.tasks=(digits, scans)": "type --set 'stream.tasks=[digits,scans]'",
    "stream.tasks=digits": "type --set 'stream.tasks=[digits]'",
    "stream.tasks=[digits,": "--set 'stream.tasks=[a, b]'",
    "stream.order=food,flags": "type --set 'stream.order=[food,flags]'",
    "loggers=csv": "type --set 'loggers=[csv]'",
    "seeds=1": "type --set 'seeds=[1]' or --seed 1",
    "seeds=1,2": "type --set 'seeds=[1,2]' or --seed 1 --seed 2",
    "seeds=0..2": "type --set 'seeds=[0,1,2]' or --seed 0 --seed 1 --seed 2",
    "train.lr=1e-3": "did you mean 'train.optimizer.lr'?",
    "lr=1e-3": "did you mean 'train.optimizer.lr'?",
    "optimizer.lr=1": "did you mean 'train.optimizer.lr'?",
    "learning_rate=1": "did you mean 'train.optimizer.lr'?",
    "train.warmup=3": "did you mean 'train.schedule.warmup'?",
    "weight=3": "did you mean 'strategy.eliciting.weight' or",
    "Train.iterations=5": "did you mean 'train.iterations'?",
    "train/iterations=5": "did you mean 'train.iterations'?",
    "train.iterations=1e3": "type --set train.iterations=1000",
    "train.batch_size=64.0": "type --set train.batch_size=64",
    "train.batch_size=1_000": "type --set train.batch_size=1000",
    "train.iterations==5": "type --set train.iterations=5",
    "train.iterations: 5": "type --set train.iterations=5",
    "train.iterations=": "expected a value after the =",
    "train.iterations=5\u00a0": "a no-break space (U+00A0)",
    "train.iterations=\u201c5\u201d": "a left double quotation mark (U+201C)",
    "train.optimizer.lr=1e\u22124": "type --set train.optimizer.lr=1e-4",
    "train.optimizer.betas=0.9,0.98": "type --set 'train.optimizer.betas=[0.9,0.98]'",
    "strategy.connecting.importance=yes": "type --set strategy.connecting.importance=true",
    "summary=5": "type --set 'summary=\"5\"'",
    "summary=true": "type --set 'summary=\"true\"'",
    "evaluate=seen": "its keys are classes",
    "strategy=avalanche.ewc": "type `--with avalanche.ewc`",
    "strategy=smal.yaml": "did you mean 'small.yaml'?",
    "strategy=mtil": "'mtil' is a recipe",
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_wrong_setting(setting):
    with pytest.raises(MulkiError) as caught:
        resolve("mtil", Changes(settings=(setting,)))
    [line] = caught.value.lines()
    assert SETTINGS[setting] in line, line


@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        ({"strategy": "gone/x.yaml"}, "there is no folder 'gone' here"),
        ({"with_plugins": ("ewc",)}, "type --strategy ewc, or --with avalanche.ewc for the plugin"),
        ({"with_plugins": ("finetune",)}, "type --strategy finetune"),
        ({"with_plugins": ("l2,lwf",)}, "type --with l2 --with lwf"),
        ({"without_plugins": ("adding,eliciting",)}, "type --without adding --without eliciting"),
    ],
)
def test_a_wrong_change(changes, answer):
    with pytest.raises(MulkiError) as caught:
        resolve("mtil", Changes(**changes))
    assert answer in str(caught.value)


RECIPES = {
    "mine.yml": "did you mean 'mine.yaml'?",
    "mine": "did you mean 'mine.yaml'?",
    "Mine.yaml": "did you mean 'mine.yaml'?",
    "mnie.yaml": "did you mean 'mine.yaml'?",
    "small.yaml": "this is a strategy, not a recipe",
    "finetune": "type `mtil --strategy finetune`",
    "strategies/finetune.yaml": "type `mtil --strategy finetune`",
    "avalanche.ewc": "type `mtil --with avalanche.ewc`",
    "mtil-mini": "'mtil-mini' is a stream",
    "csv": "'csv' is a logger",
    "mtil\u00a0": "a no-break space (U+00A0)",
    ".": "this is a folder, expected a YAML file, such as mine.yaml, small.yaml",
    "run": "a run's recipe is run/recipe.yaml",
    "images": "`mulki new recipe` makes a recipe",
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_wrong_recipe(name, folder):
    (folder / "images" / "birds").mkdir(parents=True)
    (folder / "run").mkdir()
    (folder / "run" / "recipe.yaml").write_text(MINE)
    with pytest.raises(MulkiError) as caught:
        resolve(name)
    [line] = caught.value.lines()
    assert RECIPES[name] in line, line


def test_a_file_beside_is_meant_rather_than_a_recipe_of_ours(folder):
    (folder / "mtil.yaml").write_text(MINE)
    with pytest.raises(MulkiError, match=r"did you mean 'mtil\.yaml'\?"):
        resolve("mtil.yml")


def test_keys_in_a_file_are_answered_too(folder):
    (folder / "mine.yaml").write_text(MINE.replace("iterations: 5,", "iterations: 5, lr: 1, seeds: 1,"))
    with pytest.raises(MulkiError) as caught:
        resolve("mine.yaml")
    assert caught.value.lines() == [
        "mine.yaml:5: $.train.lr: unknown option (did you mean 'train.optimizer.lr'?)",
        "mine.yaml:5: $.train.seeds: unknown option (did you mean 'seeds'?)",
    ]
    (folder / "mine.yaml").write_text(MINE + "seeds: 1\nevaluate: {metrics: last}\n")
    with pytest.raises(MulkiError) as caught:
        resolve("mine.yaml")
    first, second = caught.value.lines()
    assert first.endswith("got 1; write [1]")
    assert second.endswith("got 'last'; write [last]")


ENCODINGS = {
    "UTF-8 with a mark": codecs.BOM_UTF8 + MINE.encode(),
    "UTF-16, as PowerShell writes it": codecs.BOM_UTF16_LE + MINE.replace("\n", "\r\n").encode("utf-16-le"),
    "UTF-16, the other way round": codecs.BOM_UTF16_BE + MINE.encode("utf-16-be"),
    "UTF-16 without a mark": MINE.encode("utf-16-le"),
    "UTF-16 without a mark, the other way round": MINE.encode("utf-16-be"),
    "UTF-32": codecs.BOM_UTF32_LE + MINE.encode("utf-32-le"),
}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_files_of_other_encodings(encoding, folder):
    (folder / "other.yaml").write_bytes(ENCODINGS[encoding])
    assert resolve("other.yaml").recipe == resolve("mine.yaml").recipe


def test_a_file_that_is_no_unicode_says_how_to_save_it(folder):
    (folder / "latin.yaml").write_bytes((MINE + "summary: caf\u00e9\n").encode("latin-1"))
    with pytest.raises(MulkiError, match=r"latin\.yaml:6: \$: this is no UTF-8 text.*save it again"):
        resolve("latin.yaml")


NOT_YAML = {
    "a: b\n\tc: d\n": (2, "tabs"),
    "train:\n  a: 1\n\tb: 2\n": (3, "tabs"),
    "a: {b: 1\nc: 2\n": (1, "{ on this line is not closed"),
    "a: [b, c\nd: 2\n": (1, "[ on this line is not closed"),
    "a: [b,\n": (1, "[ on this line is not closed"),
    'a: "b\nc: d\n': (1, 'the quote " on this line is not closed'),
    "a: 'b\n": (1, "the quote ' on this line is not closed"),
    "a:\n  b: 1\n   c: 2\n": (3, "indented deeper than line 2"),
    "a:\n   b: 1\n  c: 2\n": (3, "indentation"),
    "a:b\nc: d\n": (1, "a space is missing after the colon"),
    "name:\u00a0mine\nb: c\n": (1, "a no-break space (U+00A0)"),
    "name\uff1amine\nb: c\n": (1, "a fullwidth colon (U+FF1A)"),
    "a: b: c\n": (1, "the value contains a colon; put it in quotes"),
    "a: @b\n": (1, "cannot begin with @"),
    "a: %b\n": (1, "cannot begin with %"),
    "a: *\n": (1, "begins with * must be in quotes"),
    "a: |b\n c\n": (1, "begins on the next line"),
    "a: ]\n": (1, "this ] has no matching"),
    'a: "C:\\data"\n': (1, "single quotes"),
    'a: "b" c\n': (1, "follows the closing quote"),
    "a: - b\n": (1, "a list cannot start on the line of its key"),
    "a: b\n- c\n": (2, "a list entry among the keys"),
    "- a\nb: c\n": (2, "a key among the entries"),
    "a: go\x07od\n": (1, "U+0007"),
    "a: \ud800\n": (1, "U+D800"),
    "a: b\n...\nc: d\n": (3, "ends the file"),
    "<<<<<<< HEAD\na: 1\n=======\na: 2\n>>>>>>> x\n": (1, "merge conflict"),
    "<!DOCTYPE html>\n<p class='a: b'>\n<a: b>\n": (1, "web page"),
    "a: " + "[" * 5000 + "]" * 5000: (1, "nested more than"),
    "- " * 5000 + "x": (1, "nested more than"),
}


@pytest.mark.parametrize("loader", ["CSafeLoader", "SafeLoader"])
@pytest.mark.parametrize("text", NOT_YAML, ids=lambda text: repr(text[:20]))
def test_what_is_not_yaml_is_explained_in_words_of_our_own(text, loader, monkeypatch):
    if not hasattr(yaml, loader):
        pytest.skip("PyYAML was built without it")
    monkeypatch.setattr(recipe_yaml, "_Loader", type("Loader", (recipe_yaml.CoreTags, getattr(yaml, loader)), {}))
    line, reason = NOT_YAML[text]
    with pytest.raises(MulkiError) as caught:
        parse_yaml(text, "x.yaml")
    last = caught.value.lines()[-1]
    assert last.startswith(f"x.yaml:{line}: $")
    assert reason in last, last


@pytest.mark.parametrize("kind", ["scanner.ScannerError", "parser.ParserError", "composer.ComposerError", "YAMLError"])
def test_no_word_of_the_library_is_passed_on(kind, monkeypatch):
    module, _, name = kind.rpartition(".")
    error = getattr(getattr(yaml, module) if module else yaml, name)

    def fail(*args, **kwargs):
        mark = yaml.Mark("f", 0, 1, 0, "", 0)
        raise error("words of theirs", mark, "more words", mark) if module else error("words of theirs")

    monkeypatch.setattr(yaml, "compose", fail)
    with pytest.raises(MulkiError, match=r"this is not YAML: ") as caught:
        parse_yaml("a: b\n c\n", "x.yaml")
    assert "words" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["\u00a0\u00a0a: 1\n", "a\u200b: 1\n", "a: \u201cb\u201d\n", "a: b\u00a0\n", "a: [\u00abb\u00bb]\n"]
)
def test_characters_that_are_mistaken_for_others_are_named(text):
    with pytest.raises(MulkiError, match=r"\(U\+[0-9A-F]{4}\) (is at an end of|surround)|and an? .* surround"):
        parse_yaml(text, "x.yaml")


def test_such_characters_may_stand_within_a_text_or_in_quotes():
    text = "a: b\u00a0c\nd: \u201ce\u201d f\ng: '\u201ch\u201d'\ni: k \u2013 l\n"
    assert parse_yaml(text, "x").value == {
        "a": "b\u00a0c",
        "d": "\u201ce\u201d f",
        "g": "\u201ch\u201d",
        "i": "k \u2013 l",
    }


def test_lists_in_the_singular_and_of_what_has_a_text_in_its_name():
    assert mulki("list", "recipe").stdout == mulki("list", "recipes").stdout
    assert mulki("list", "strategy").stdout == mulki("list", "strategies").stdout
    models = json.loads(mulki("list", "models", "vit-b-16", "--json").stdout)["models"]
    assert {"ViT-B-16", "ViT-B-16-plus"} <= {entry["name"] for entry in models}
    assert "openai" in next(entry for entry in models if entry["name"] == "ViT-B-16")["pretrained"]
    lines = mulki("list", "models").stdout.splitlines()
    assert lines[1].split()[0] == "mulki-tiny"
    assert any(line.split()[:2] == ["RN50", "pretrained:"] for line in lines if line.strip())


def run_at(folder, status="stopped"):
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(MINE)
    Result(recipe="mine", strategy="mulki", seed=0, status=status, tasks=["a"], matrix=[[50.0]]).write(folder)


@pytest.fixture
def resumed(monkeypatch):
    """What `mulki resume` goes on with, without going on."""
    from mulki_plugins.report.result import read_result
    from mulki_plugins.training import resume

    folders = []

    def resume_experiment(recipe, seed, folder, **options):
        folders.append(str(folder))
        return read_result(folder / "result.json")

    monkeypatch.setattr(resume, "resume_experiment", resume_experiment)
    return folders


def test_resume_finds_the_one_run_that_is_meant(folder, resumed):
    run_at(folder / "runs/mine/mulki/seed-0")
    run_at(folder / "runs/mine/mulki/seed-0.before-1")
    (folder / "runs/mine/mulki/seed-0/checkpoints").mkdir()
    for name in ("runs", "runs/mine/mulki", "runs/mine/mulki/seed-0/recipe.yaml", "runs/mine/mulki/seed-0/checkpoints"):
        done = mulki("resume", name)
        assert done.exit_code == 0, done.output
    assert resumed == ["runs/mine/mulki/seed-0"] * 4
    run_at(folder / "runs/mine/mulki/seed-1", "complete")
    assert "the only unfinished run below it" in mulki("resume", "runs").stderr
    run_at(folder / "runs/mine/mulki/seed-2")
    done = mulki("resume", "runs")
    assert done.exit_code == 2
    assert "2 unfinished runs are below it" in done.stderr
    assert "mulki resume runs/mine/mulki/seed-0" in done.stderr
    assert "mulki resume runs/mine/mulki/seed-2" in done.stderr
    assert len(resumed) == 5
    (folder / "empty").mkdir()
    assert "no run here" in mulki("resume", "empty").stderr


def test_results_of_a_file_of_a_run_are_those_of_the_run(folder):
    run_at(folder / "runs/seed-0", "complete")
    assert mulki("results", "runs/seed-0/recipe.yaml").stdout == mulki("results", "runs/seed-0").stdout


def test_python_m_mulki_is_the_command():
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-m", "mulki", "--version"], cwd=root, capture_output=True, text=True)
    assert done.stdout == mulki("--version").stdout
