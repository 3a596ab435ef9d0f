"""What the documentation says works as it stands, and what is generated is as the code would generate it now."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from mulki_plugins.recipe.yaml import read_yaml

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "write-a-plugin.md").read_text("utf-8")

PRELUDE = """\
set -euo pipefail
pip() { python -m pip "$1" --quiet --no-index --no-deps --no-build-isolation "${@:2}"; }
pytest() { python -m pytest -q -p no:cacheprovider "$@"; }
mulki() {
    if [[ "$1" == run ]]; then
        local few="--set train.iterations=2 --set train.schedule.warmup=0" page ours
        [[ "$*" == *stream=* ]] || few="$few --set stream.tasks=[scans,digits]"
        page=$(command mulki "$@" --dry-run | sed -n 's/^folder *//p')
        ours=$(command mulki "$@" $few --dry-run | sed -n 's/^folder *//p')
        command mulki "$@" $few
        mkdir -p "$(dirname "$page")"
        mv "$ours" "$page"
    else command mulki "$@"; fi
}
"""
"""The page's commands as they are, but offline, and with trainings of seconds."""


@pytest.mark.xdist_group("environment")
def test_every_block_of_write_a_plugin(environment, tmp_path):
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.S | re.M)
    assert {language for language, _ in blocks} == {"bash", "toml", "python", "yaml", "console"}
    for language, text in blocks:
        if language in ("bash", "console"):
            run_block(environment, language, text, tmp_path)
        else:
            path = re.match(r"# (\S+)\n", text)
            assert path, f"the block says which file it is: {text[:80]}"
            (tmp_path / path[1]).write_text(text)
    found = json.loads(environment.run("-m", "mulki_plugins", "plugins", "--json").stdout)
    mine = [row for row in found if row["distribution"] == "mulki-still"]
    assert {(row["kind"], row["state"]) for row in mine} == {
        (kind, "ok") for kind in ("package", "plugin", "strategy", "stream", "command")
    }
    jsonschema.Draft202012Validator.check_schema(json.loads((tmp_path / "recipe.schema.json").read_text()))


def run_block(environment, language, text, folder):
    """A script, or a dialogue: each command's output holds the lines below it."""
    if language == "bash":
        dialogue = [(text, [])]
    else:
        parts = re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", text, re.M)
        dialogue = [(command, said.splitlines()) for command, said in parts]
    for command, lines in dialogue:
        done = subprocess.run(
            ["bash", "-c", PRELUDE + command], cwd=folder, env=environment.variables(), capture_output=True, text=True
        )
        said = done.stdout + done.stderr
        assert done.returncode == 0 or (language == "console" and done.returncode == 2), f"{command}\n{said}"
        for line in lines:
            assert line in said, f"{command}\n{said}"


def test_the_reference_is_not_stale_and_everything_is_documented(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import reference

    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("MULKI_PLUGINS", "")
    monkeypatch.setattr(sys, "argv", ["reference.py", "--check"])
    with pytest.raises(SystemExit) as ended:
        reference.main()
    assert not ended.value.code, capsys.readouterr().out


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


def test_the_schema_admits_what_a_recipe_may_say():
    schema = json.loads((ROOT / "recipes" / "recipe.schema.json").read_text("utf-8"))
    validator = jsonschema.Draft202012Validator(schema)
    for text in re.findall(r"^```yaml\n(.*?)^```$", (ROOT / "README.md").read_text("utf-8"), re.S | re.M):
        from mulki_plugins.recipe.yaml import parse_yaml

        value = parse_yaml(text, "README").value
        wrong = [error.message for error in validator.iter_errors(value)]
        assert [
            message for message in wrong if not re.search("(name|model|strategy|train)' is a required", message)
        ] == []


def test_every_link_of_the_documentation_leads_somewhere():
    for page in (ROOT / "docs").glob("*.md"):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
