"""What the README says works as it stands: its recipe, its Python, its plugin, its commands."""

import json
import re
import shlex
import sys
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from mulki_plugins.cli import main
from mulki_plugins.recipe.resolve import resolve
from mulki_plugins.registry.discovery import catalog
from tests.environments import wheel_of

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.S | re.M)


def test_the_two_commands_are_there():
    makefile = (ROOT / "Makefile").read_text()
    for target in ("mtil", "test"):
        assert f"make {target}" in README
        assert re.search(rf"^{target}:", makefile, re.M)


def test_the_recipe_is_valid(tmp_path):
    [recipe] = [block for block in blocks("yaml") if "name: mine" in block]
    (tmp_path / "mine.yaml").write_text(recipe)
    recipe = resolve(str(tmp_path / "mine.yaml")).recipe
    assert recipe.strategy.name == "my-stack"
    assert recipe.model.name == "ViT-B-32-quickgelu"


def test_the_stream_of_folders_is_valid(tmp_path, monkeypatch):
    [stream] = [block for block in blocks("yaml") if "name: folders" in block]
    [recipe] = [block for block in blocks("yaml") if "name: mine" in block]
    for place in (
        "birds/a",
        "birds/b",
        *(f"mushrooms/{part}/00{c}" for part in ("train", "test") for c in ("1.x", "2.Fly_agaric")),
    ):
        (tmp_path / "data" / place).mkdir(parents=True)
        for i in range(2):
            (tmp_path / "data" / place / f"{i}.jpg").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    lines = [line for line in recipe.splitlines() if not line.startswith(("stream:", "  per_task:"))]
    (tmp_path / "mine.yaml").write_text(stream + "\n".join(lines))
    assert [task["name"] for task in resolve("mine.yaml").recipe.stream.options["tasks"]] == ["birds", "mushrooms"]


def test_the_python_runs(capsys):
    [code] = [block for block in blocks("python") if "Naive(" in block]
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    assert "Top1_Acc_Stream" in capsys.readouterr().out


@pytest.fixture
def with_the_package(tmp_path, monkeypatch):
    """The README's plugin as an installed package: its wheel, unpacked into a folder on the path."""
    package = tmp_path / "source" / "my_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    for block in blocks("python"):
        if match := re.match(r"# my_package/(\w+\.py)\n", block):
            (package / match[1]).write_text(block)
    [toml] = blocks("toml")
    (package.parent / "pyproject.toml").write_text(toml)
    zipfile.ZipFile(wheel_of(package.parent, tmp_path)).extractall(tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    catalog.cache_clear()
    yield
    catalog.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "my_package"]:
        del sys.modules[name]


def mulki(*arguments):
    return CliRunner().invoke(main, list(arguments))


def test_the_plugin_works_by_name(with_the_package):
    listed = json.loads(mulki("list", "plugins", "--json").stdout)["plugins"]
    [mine] = [entry for entry in listed if entry["name"] == "shrink"]
    assert (mine["distribution"], mine["version"]) == ("my-package", "0.1")
    wrong = mulki("validate", "mtil", "--with", "shrink", "--set", "strategy.shrink.weight=-1")
    assert wrong.exit_code == 2
    assert "shrink.weight: expected a number, at least 0, got -1" in wrong.stderr
    few = ["--set", "stream.tasks=[scans,digits]", "--set", "train.iterations=2", "--set", "train.schedule.warmup=0"]
    done = mulki("run", "mtil", "--with", "shrink", *few)
    assert done.exit_code == 0, done.stderr
    [curves] = Path().glob("runs/mtil/mulki-with-shrink+*/seed-0/metrics.csv")
    assert "train/loss/shrink" in curves.read_text()


def test_every_command_of_the_readme_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^mulki .*?(?=\s+#|$)", README, re.M)
    assert len(commands) >= 5
    for command in commands:
        assert not re.search(r"[\[{*?]", re.sub(r"'[^']*'", "", command)), "some shells expand it outside quotes"
        words = shlex.split(command)[1:]
        if words[0] in ("results", "resume", "new"):  # these need runs, or folders
            words = [*words[: 2 if words[0] == "new" else 1], "--help"]
        if words[-1] == "mine.yaml":
            continue
        if words[0] == "run":
            words.append("--dry-run")
        if words[0] == "data":  # it would look for data, or download it
            words = [*words[:2], "--help"]
        done = mulki(*words)
        assert done.exit_code == 0, (command, done.output)


def test_every_link_to_a_file_leads_to_one():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
