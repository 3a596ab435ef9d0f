"""What a shell offers after Tab, and the lines that switch it on."""

import os
import shutil
import subprocess
import sys

import pytest
from click.shell_completion import BashComplete, get_completion_class
from click.testing import CliRunner

from mulki_plugins.cli import main
from mulki_plugins.cli.complete import settable_keys


def offered(*words, incomplete=""):
    complete = BashComplete(main, {}, "mulki", "_MULKI_COMPLETE")
    return [item.value for item in complete.get_completions(list(words), incomplete) if item.type == "plain"]


def test_commands_recipes_strategies_and_plugins():
    assert offered(incomplete="be") == ["bench"]
    assert offered("run", incomplete="mtil-v") == ["mtil-vitb16", "mtil-vitb16-5shot", "mtil-vitb16-order2"]
    assert offered("run", "mtil", "--strategy", incomplete="lw") == ["lwf", "lwf-vr"]
    assert offered("bench", "mtil", "--with", incomplete="recall") == ["recalling"]


def test_a_recipe_may_also_be_a_file():
    complete = BashComplete(main, {}, "mulki", "_MULKI_COMPLETE")
    assert "file" in [item.type for item in complete.get_completions(["run"], "mine")]


def test_keys_of_every_recipe_and_of_this_one():
    assert offered("run", "mtil", "--set", incomplete="train.checkpoint.k") == ["train.checkpoint.keep="]
    assert "train.epochs=" in offered("run", "mtil", "--set", incomplete="train.")
    assert offered("run", "mtil", "--set", incomplete="stream.ev") == ["stream.evaluate_on="]
    assert offered("run", "mtil-vitb16", "--set", incomplete="stream.sh") == ["stream.shots="]
    assert "strategy.adding.temperature=" in offered("run", "mtil", "--set", incomplete="strategy.adding.")
    of_lwf = offered("run", "--strategy", "lwf", "mtil", "--set", incomplete="strategy.l")
    assert of_lwf
    assert all(key.startswith("strategy.lwf.") for key in of_lwf)


def test_each_key_that_is_offered_can_be_set():
    from mulki_plugins.recipe.resolve import resolve

    keys = settable_keys("mtil")
    assert {"name", "seeds", "device", "train.optimizer.lr", "evaluate.classes"} <= keys.keys()
    tree = resolve("mtil").tree.value
    for key in ("train.batch_size", "evaluate.batch_size", "train.schedule.warmup"):
        value = tree
        for name in key.split("."):
            value = value[name]
        assert key in keys


def test_values_of_a_key_that_has_a_few():
    assert offered("run", "mtil", "--set", incomplete="evaluate.classes=") == [
        f"evaluate.classes={each}" for each in ("task", "seen", "all")
    ]
    assert "train.precision=bf16" in offered("run", "mtil", "--set", incomplete="train.precision=b")
    assert "stream=mtil-mini" in offered("run", "mtil", "--set", incomplete="stream=m")
    assert offered("run", "mtil", "--set", incomplete="train.batch_size=") == []


@pytest.mark.parametrize(
    "words", [("run", "no-such-recipe", "--set"), ("run", "--strategy", "no-such", "mtil", "--set")]
)
def test_a_wrong_command_line_still_gets_the_keys_of_every_recipe(words):
    assert offered(*words, incomplete="train.gra") == ["train.gradient_clip="]


def test_a_failure_offers_nothing(monkeypatch):
    from mulki_plugins.registry import discovery

    def fails():
        raise RuntimeError("a broken package")

    monkeypatch.setattr(discovery, "catalog", fails)
    assert offered("run", "mtil", "--with", incomplete="re") == []


@pytest.mark.parametrize(
    ("pieces", "values"),
    [(["evaluate.classes", "="], ["task", "seen", "all"]), (["evaluate.classes", "=", "s"], ["seen"]),
     (["evaluate.classes=s"], ["evaluate.classes=seen"]), (["train.checkpoint.k"], ["train.checkpoint.keep="]),
     (["device", "=", "cpu", "--set", "evaluate.classes", "=", "a"], ["all"])],
)  # fmt: skip
def test_bash_splits_words_at_the_equals_sign_and_replaces_only_the_value(monkeypatch, pieces, values):
    words = ["mulki", "run", "mtil", "--set", *pieces]
    monkeypatch.setenv("COMP_WORDS", " ".join(words))
    monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
    complete = get_completion_class("bash")(main, {}, "mulki", "_MULKI_COMPLETE")
    assert complete.complete().splitlines() == [f"plain,{value}" for value in values]


def test_in_bash_the_word_after_an_option_with_a_value_is_a_new_one(monkeypatch):
    monkeypatch.setenv("COMP_WORDS", "mulki run --seed = 1 ")
    monkeypatch.setenv("COMP_CWORD", "5")
    complete = get_completion_class("bash")(main, {}, "mulki", "_MULKI_COMPLETE")
    assert "plain,mtil" in complete.complete().splitlines()


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_itself_completes_a_value(tmp_path):
    """The function that `mulki completion bash` switches on, called as bash calls it, with its default word breaks."""
    script = get_completion_class("bash")(main, {}, "mulki", "_MULKI_COMPLETE").source()
    code = "from mulki_plugins.cli import main; main(prog_name='mulki')"
    (tmp_path / "mulki").write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}" "$@"\n')
    (tmp_path / "mulki").chmod(0o755)
    called = "COMP_WORDS=(mulki run mtil --set evaluate.classes = s); COMP_CWORD=6; _mulki_completion mulki mulki"
    code = f'{script.replace("_mulki_completion_setup;", "")}\n{called}; echo "<${{COMPREPLY[*]}}>"'
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(["bash", "-c", code], env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert done.stdout == "<seen>\n", done.stderr
    assert "compopt -o nospace" in script


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_line_to_add_is_one_that_the_shell_accepts(shell):
    done = CliRunner().invoke(main, ["completion", shell])
    assert done.exit_code == 0
    assert f"_MULKI_COMPLETE={shell}_source mulki" in done.stdout
    assert done.stdout.count("\n") == 1
    assert CliRunner().invoke(main, ["completion", "tcsh"]).exit_code == 2


def test_completion_imports_no_torch():
    code = (
        "import sys; from mulki_plugins.cli.complete import settable_keys, values_of;"
        "settable_keys('mtil'); values_of('train.precision');"
        "sys.exit(any(name in sys.modules for name in ('torch', 'avalanche', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
