"""The packages in `examples/`, and one that `mulki new plugin` writes: built, installed and tested outside the checkout."""

import json

import pytest
from click.testing import CliRunner

from mulki_plugins.cli import main
from mulki_plugins.errors import MulkiError
from mulki_plugins.recipe.resolve import resolve
from tests.environments import ROOT, copied, wheel_of

EXAMPLES = sorted(path.parent for path in (ROOT / "examples").glob("*/pyproject.toml"))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """What `mulki new plugin` writes."""
    folder = tmp_path_factory.mktemp("written")
    done = CliRunner().invoke(main, ["new", "plugin", "warm-texts", "--into", str(folder)])
    assert done.exit_code == 0, done.output
    return folder / "warm-texts"


@pytest.mark.parametrize("which", [*(path.name for path in EXAMPLES), "as generated"])
def test_it_works_from_its_wheel(which, environment, written, tmp_path):
    source = copied(written if which == "as generated" else ROOT / "examples" / which, tmp_path / "source")
    environment.install(wheel_of(source, tmp_path))
    found = json.loads(environment.run("-m", "mulki_plugins", "plugins", "--json").stdout)
    mine = [row for row in found if row["distribution"] == ("warm-texts" if which == "as generated" else which)]
    assert {row["state"] for row in mine} == {"ok"}, mine
    assert len(mine) >= 3, "the package and its parts"
    tests = copied(source / "tests", tmp_path / "elsewhere")  # so that what is tested is what is installed
    done = environment.run("-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests), cwd=tests)
    assert done.returncode == 0, done.stdout + done.stderr


def test_there_is_an_example_of_a_stage_a_stream_and_loggers():
    assert {path.name for path in EXAMPLES} == {"mulki-jigsaw", "mulki-instruments", "mulki-trackers"}


def test_what_is_written_is_complete(written):
    files = {str(path.relative_to(written)) for path in written.rglob("*") if path.is_file()}
    assert files == {
        "pyproject.toml", "README.md", ".gitignore", ".github/workflows/test.yml", "warm_texts/__init__.py",
        "warm_texts/hooks.py", "warm_texts/stage.py", "warm_texts/strategies/warm-texts.yaml", "tests/test_stage.py",
    }  # fmt: skip
    text = "".join(path.read_text() for path in written.rglob("*") if path.is_file())
    assert "$module" not in text
    assert "${{ matrix.python }}" in text
    assert "$name" not in text


BAD_NAMES = {
    "My Stage": "such as 'my-stage'", "../up": "such as 'up'", "été": "expected lower-case", "": "expected lower-case",
    "a--b": "such as 'a-b'", "9lives": "such as 'lives'", "class": "has a meaning in Python", "json": "in Python",
    "null": "has a meaning in YAML", "torch": "already installed", "adding": "already installed", "x" * 61: "expected lower-case",
    "mulki": "already installed", "-x": "expected lower-case", "a_b": "such as 'a-b'",
}  # fmt: skip


@pytest.mark.parametrize(("name", "said"), BAD_NAMES.items())
def test_bad_names_are_refused(name, said, tmp_path):
    done = CliRunner().invoke(main, ["new", "plugin", "--into", str(tmp_path), "--", name])
    assert done.exit_code == 2
    assert said in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_exists_is_not_touched(tmp_path):
    (tmp_path / "mine").mkdir()
    done = CliRunner().invoke(main, ["new", "plugin", "mine", "--into", str(tmp_path)])
    assert done.exit_code == 2
    assert "already exists" in done.stderr
    assert list((tmp_path / "mine").iterdir()) == []
    done = CliRunner().invoke(main, ["new", "plugin", "mine", "--into", str(tmp_path / "nowhere")])
    assert done.exit_code == 2
    assert "no such folder" in done.stderr


def test_a_recipe_of_an_example_needs_its_package():
    with pytest.raises(MulkiError, match="no stream is named 'instruments'"):
        resolve(str(ROOT / "examples/mulki-instruments/mulki_instruments/recipes/instruments.yaml"))
