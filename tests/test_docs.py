"""The documentation works as it stands: every recipe, script and command. Generated files are up to date."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import jsonschema
import pytest
from click.testing import CliRunner
from PIL import Image

from mulki_plugins.cli import main
from mulki_plugins.recipe.resolve import resolve
from mulki_plugins.recipe.yaml import parse_yaml, read_yaml
from tests.warm import run_fork

ROOT = Path(__file__).parents[1]
TUTORIALS = [ROOT / "docs/write-a-plugin.md", ROOT / "docs/write-a-head.md"]
GENERATED = [ROOT / "docs/reference.md", ROOT / "docs/authors.md"]
PAGES = [
    ROOT / "README.md",
    *(path for path in sorted((ROOT / "docs").glob("*.md")) if path not in (*TUTORIALS, *GENERATED)),
    *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
    *sorted((ROOT / "examples").glob("*/README.md")),
]
"""Every page but the tutorials, which are executed as a whole, and the generated reference."""
TEXTS = {path: path.read_text("utf-8") for path in [*PAGES, *TUTORIALS, *GENERATED]}


def blocks_of(path):
    """A page's code blocks: language, text."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", TEXTS[path], re.S | re.M)


def blocks_in(language):
    return [text for path in PAGES for name, text in blocks_of(path) if name == language]


def by_page(path):
    return str(path.relative_to(ROOT))


def test_the_readme_fits_on_two_screens_and_names_the_two_commands():
    readme = TEXTS[ROOT / "README.md"]
    assert len(readme.splitlines()) <= 100
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in ("mtil", "test"):
        assert re.search(rf"^make {target}\b", readme, re.M)
        assert re.search(rf"^{target}:", makefile, re.M)


def test_the_recipe_is_valid(tmp_path):
    [recipe] = [block for block in blocks_in("yaml") if "name: mine" in block]
    (tmp_path / "mine.yaml").write_text(recipe)
    recipe = resolve(str(tmp_path / "mine.yaml")).recipe
    assert recipe.strategy.name == "my-stack"
    assert recipe.model.name == "ViT-B-32-quickgelu"


@pytest.fixture
def own_images(tmp_path, monkeypatch):
    """A working folder with the images that the pages mention."""
    mushrooms = [f"mushrooms/{part}/00{name}" for part in ("train", "test") for name in ("1.Morel", "2.Fly_agaric")]
    for i, folder in enumerate(["birds/jay", "birds/owl", *mushrooms]):
        (tmp_path / "data" / folder).mkdir(parents=True)
        for j in range(5):
            Image.new("RGB", (8, 8), (40 * i, 50 * j, 0)).save(tmp_path / "data" / folder / f"{j}.png")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("own_images")
def test_the_stream_of_folders_is_valid():
    [stream] = [block for block in blocks_in("yaml") if "name: folders" in block]
    [recipe] = [block for block in blocks_in("yaml") if "name: mine" in block]
    lines = [line for line in recipe.splitlines() if not line.startswith(("stream:", "  per_task:"))]
    Path("mine.yaml").write_text(stream + "\n".join(lines))
    assert [task["name"] for task in resolve("mine.yaml").recipe.stream.options["tasks"]] == ["birds", "mushrooms"]


def test_every_yaml_block_fits_the_schema():
    recipe, study = (
        jsonschema.Draft202012Validator(json.loads((ROOT / name).read_text("utf-8")))
        for name in ("recipes/recipe.schema.json", "studies/study.schema.json")
    )
    blocks = blocks_in("yaml")
    assert len(blocks) >= 2
    for text in blocks:
        validator = study if "recipes:" in text else recipe
        errors = [error.message for error in validator.iter_errors(parse_yaml(text, "page").value)]
        missing = "(name|model|strategy|train)' is a required"
        assert [message for message in errors if not re.search(missing, message)] == [], text


def test_every_script_runs():
    scripts = blocks_in("python")
    assert any("Naive(" in script for script in scripts)
    for script in scripts:
        done = run_fork("-c", script.replace("mtil_mini(", "mtil_mini(shots=4, "))
        assert done.returncode == 0, done.stderr
        assert ("Naive(" in script) == ("Top1_Acc_Stream" in done.stdout)


@pytest.mark.usefixtures("own_images", "second_model")
@pytest.mark.parametrize(
    "page", [page for page in PAGES if "mulki " in TEXTS[page] and "examples" not in page.parts], ids=by_page
)
def test_every_command_works(page):
    """The commands of a page in its order; those that train, measure, download or need results are only checked."""
    commands = [
        command for language, text in blocks_of(page) if not language
        for command in re.findall(r"^mulki .*?(?=\s+#|$)", text, re.M)
    ]  # fmt: skip
    if not any("new recipe" in command for command in commands):
        [recipe] = [block for block in blocks_in("yaml") if "name: mine" in block]
        Path("mine.yaml").write_text(recipe)
    for text in (text for language, text in blocks_of(page) if language == "yaml" and "recipes:" in text):
        Path(f"{parse_yaml(text, 'page').value['name']}.yaml").write_text(text)
    for command in commands:
        assert not re.search(r"[\[{*?]", re.sub(r"'[^']*'", "", command)), "some shells expand it without quotes"
        words = shlex.split(command)[1:]
        after_a_run = (
            "results",
            "report",
            "resume",
            "doctor",
            "export",
            "predict",
            "evaluate",
            "bench",
            "clean",
            "extend",
        )
        if words[0] in after_a_run or (words[0] == "data" and "mine.yaml" not in words):
            words = check_options(words)
        if words[0] == "run" or (words[0] == "study" and words[1] not in main.commands["study"].commands):
            words.append("--dry-run")
        done = CliRunner().invoke(main, words)
        assert done.exit_code == 0, (command, done.output)
    for words in re.findall(r"`mulki ([^`]+)`", TEXTS[page]):
        names = [word for word in words.split() if word in main.commands]
        assert names or words.startswith("--"), f"no such command: mulki {words}"
        options = set(re.findall(r"--[a-z-]+", words))
        assert options <= {
            "--help",
            *options_of(main),
            *(o for name in names[:1] for o in options_of(main.commands[name])),
        }


def check_options(words):
    """The words that print the help of a command, once its options and their values have been parsed."""
    command, depth = main.commands[words[0]], 1
    while hasattr(command, "commands") and words[depth : depth + 1] and words[depth] in command.commands:
        command, depth = command.commands[words[depth]], depth + 1
    values, _, _ = command.make_parser(click.Context(command)).parse_args(list(words[depth:]))
    for parameter in command.params:
        if parameter.name in values and isinstance(parameter.type, click.Choice | click.IntRange):
            parameter.type_cast_value(click.Context(command), values[parameter.name])
    return [*words[:depth], "--help"]


def options_of(command):
    """The options of a command and its subcommands."""
    below = [
        option
        for each in getattr(command, "commands", {}).values()
        if command is not main
        for option in options_of(each)
    ]
    return [option for parameter in command.params for option in parameter.opts] + below


@pytest.mark.parametrize("page", TEXTS, ids=by_page)
def test_every_link_leads_to_a_file(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", TEXTS[page]):
        assert (page.parent / target).exists(), target


def test_the_site_builds_without_a_warning(tmp_path):
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    home, api = ((tmp_path / "site" / name).read_text("utf-8") for name in ("index.html", "api/index.html"))
    assert "Two commands" in home
    assert "class ClipClassifier" in re.sub(r"<[^>]+>", "", api) or "ClipClassifier(" in re.sub(r"<[^>]+>", "", api)
    pages = [path.read_text("utf-8") for path in (tmp_path / "site").rglob("*.html")]
    assert not any(re.search(r'(<script[^>]*src|<link[^>]*href)="(https?:)?//', page) for page in pages), (
        "works offline"
    )


PRELUDE = """\
set -euo pipefail
pip() { python -m pip "$1" --quiet --no-index --no-deps --no-build-isolation "${@:2}"; }
pytest() { python -m pytest -q -p no:cacheprovider "$@"; }
mulki() {
    if [[ "$1" == run ]]; then
        local few="--set train.iterations=2 --set train.schedule.warmup=0" page
        if [[ "$*" != *stream=* ]]; then
            few="$few --set stream.tasks=[scans,digits] --set stream.shots=4 --set stream.evaluate_on=validation"
        fi
        page=$(command mulki "$@" --dry-run | sed -n 's/^folder *//p')
        command mulki "$@" $few --out few
        mkdir -p "$(dirname "$page")"
        mv few/*/*/seed-* "$page"
        rm -r few
    else command mulki "$@"; fi
}
"""
"""Runs the tutorial's commands as they are, but offline and with a few training steps."""


@pytest.mark.parametrize("page", TUTORIALS, ids=by_page)
def test_every_block_of_a_tutorial(environment, tmp_path, page):
    blocks = blocks_of(page)
    assert {language for language, _ in blocks} == {"bash", "toml", "python", "yaml", "console"}
    for language, text in blocks:
        if language in ("bash", "console"):
            run_block(environment, language, text, tmp_path)
        else:
            path = re.match(r"# (\S+)\n", text)
            assert path, f"the block says which file it is: {text[:80]}"
            (tmp_path / path[1]).write_text(text)
    if page.stem != "write-a-plugin":
        return
    parts = json.loads(environment.run("-m", "mulki_plugins", "plugins", "--json").stdout)
    rows = [row for row in parts if row["distribution"] == "mulki-still"]
    assert {(row["kind"], row["state"]) for row in rows} == {
        (kind, "ok") for kind in ("package", "plugin", "adapter", "strategy", "stream", "command")
    }
    jsonschema.Draft202012Validator.check_schema(json.loads((tmp_path / "recipe.schema.json").read_text()))


def run_block(environment, language, text, folder):
    """Run a script, or a dialogue in which each command's output contains the lines below it."""
    if language == "bash":
        dialogue = [(text, [])]
    else:
        parts = re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", text, re.M)
        dialogue = [(command, lines.splitlines()) for command, lines in parts]
    for command, lines in dialogue:
        done = subprocess.run(
            ["bash", "-c", PRELUDE + command], cwd=folder, env=environment.variables(), capture_output=True, text=True
        )
        output = done.stdout + done.stderr
        assert done.returncode == 0 or (language == "console" and done.returncode == 2), f"{command}\n{output}"
        for line in lines:
            assert line in output, f"{command}\n{output}"


def test_the_reference_is_not_stale_and_everything_is_documented():
    environment = {**os.environ, "MULKI_PLUGINS": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "tools" / "reference.py", "--check"]  # a fork would have the parts of other tests
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_not_documented_is_found(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import reference

    monkeypatch.setattr(reference.Register, "plugin", lambda self, colour: None)
    monkeypatch.setattr(reference.builtin, "mulki_register", lambda register: None)
    wrong = reference.undocumented()
    assert "register.plugin: the argument colour is not documented" in wrong
    assert "register.plugin has no docstring" in wrong


SHIPPED = [*(ROOT / "recipes").glob("*.yaml"), *(ROOT / "strategies").glob("*.yaml")]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_shipped_yaml_names_its_schema_and_validates_against_it(path):
    named = re.match(r"# yaml-language-server: \$schema=(\S+)\n", path.read_text("utf-8"))
    assert named, "its first line is `# yaml-language-server: $schema=recipe.schema.json`, or strategy.schema.json"
    schema = json.loads((path.parent / named[1]).read_text("utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    assert [error.message for error in validator.iter_errors(read_yaml(path).value)] == []


WRONG = {
    "unknown key": ("sumary", "x"), "no stream": ("stream", None), "unknown stream": ("stream", "mtil-maxi"),
    "unknown option of a stream": ("stream", {"name": "mtil-mini", "ordr": "I"}),
    "a text for a number": ("train", {"iterations": "many"}),
    "too small": ("train", {"batch_size": 0}), "unknown plugin": ("strategy", {"name": "x", "plugins": ["adding", "nothing"]}),
    "unknown option of a plugin": ("strategy", {"plugins": [{"adding": {"wieght": 1}}]}),
    "a bad option of a plugin": ("strategy", {"plugins": [{"adding": {"weight": -1}}]}),
    "two plugins in one": ("strategy", {"plugins": [{"adding": {}, "teachers": {}}]}),
    "unknown metric": ("evaluate", {"metrics": ["speed"]}), "unknown schedule": ("train", {"schedule": "square"}),
}  # fmt: skip


@pytest.mark.parametrize(("key", "value"), WRONG.values(), ids=WRONG)
def test_the_schema_refuses(key, value):
    schema = json.loads((ROOT / "recipes" / "recipe.schema.json").read_text("utf-8"))
    recipe = read_yaml(ROOT / "recipes" / "mtil.yaml").value
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid(recipe)
    del recipe["stream" if value is None else "summary"]
    if value is not None:
        recipe[key] = value
    assert not validator.is_valid(recipe)
