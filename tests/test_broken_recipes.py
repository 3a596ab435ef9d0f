"""Broken recipes: each gives located errors, all at once, with status 2 and no traceback."""

import os
import re

import pytest
from click.testing import CliRunner

from mulki_plugins.cli import main
from mulki_plugins.errors import Mistakes
from mulki_plugins.recipe.resolve import Changes, resolve
from mulki_plugins.recipe.yaml import MAX_BYTES
from tests.warm import run_fork

GOOD = """\
name: good
stream: {name: mtil-mini, order: I}
model: {name: mulki-tiny, train: all}
strategy: mulki
train:
  iterations: 100
  batch_size: 64
  optimizer: {name: adamw, lr: 1.0e-4}
  schedule: {name: cosine, warmup: 10}
"""


def changed(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new)


BROKEN = {
    "empty": ("", r":1: \$: the file is empty"),
    "only a comment": ("# nothing\n", r":1: \$: the file is empty"),
    "a list": ("- a\n- b\n", r":1: \$: expected a mapping, got a list"),
    "a word": ("recipe\n", r":1: \$: expected a mapping, got a str"),
    "a tab": (changed("  iterations", "\titerations"), r":6: \$: this is not YAML: .*tabs"),
    "unclosed brace": (changed("order: I}", "order: I"), r": \$: this is not YAML"),
    "unclosed quote": (changed("name: good", 'name: "good'), r": \$: this is not YAML"),
    "bad indentation": (changed("  batch_size", "   batch_size"), r":7: \$: this is not YAML"),
    "control character": (changed("good", "go\x07od"), r"\$: this is not YAML"),
    "two documents": (GOOD + "---\n" + GOOD, r":\d+: \$: a second document"),
    "duplicate key": (GOOD + "name: again\n", r":10: \$\.name: written twice, first on line 1"),
    "nested duplicate key": (changed("  batch_size: 64", "  iterations: 5"), r":7: \$\.train\.iterations: written twice"),
    "cyclic anchor": (GOOD + "summary: &a [*a]\n", r":10: \$\.summary\[0\]: the alias \*a refers to itself"),
    "unknown alias": (GOOD + "summary: *nobody\n", r":10: \$.*nobody"),
    "aliases within aliases": (
        "a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"{c}: &{c} [{','.join([f'*{p}'] * 9)}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)),
        r"more than \d+ values",
    ),
    "deep nesting": ("a: " + "[" * 5000 + "]" * 5000, r":1: \$: nested more than \d+ deep"),
    "merge key": (GOOD + "x: &x {a: 1}\ny: {<<: *x}\n", r":11: \$\.y: merge keys"),
    "python tag": (changed("name: good", "name: !!python/object/apply:os.system ['true']"), r":1: \$\.name: the tag .* not allowed"),
    "own tag": (changed("iterations: 100", "iterations: !env ITER"), r":6: \$\.train\.iterations: the tag '!env'"),
    "number as key": (changed("  iterations", "  5: 3\n  iterations"), r":6: \$\.train: expected a text as key, got 5"),
    "list as key": (GOOD + "? [a, b]\n: c\n", r":10: \$: expected a text as key"),
    "unknown key": (GOOD + "sumary: x\n", r":10: \$\.sumary: unknown option \(did you mean 'summary'\?\)"),
    "unknown train key": (changed("batch_size", "batchsize"), r":7: \$\.train\.batchsize: unknown option .*'batch_size'"),
    "no name": (changed("name: good\n", ""), r":1: \$\.name: missing"),
    "no stream": (changed("stream: {name: mtil-mini, order: I}\n", ""), r"\$\.stream: missing"),
    "no model": (changed("model: {name: mulki-tiny, train: all}\n", ""), r"\$\.model: missing"),
    "no strategy": (changed("strategy: mulki\n", ""), r"\$\.strategy: missing"),
    "no train": (GOOD[: GOOD.index("\ntrain:") + 1], r"\$\.train: missing"),
    "no optimizer": (changed("  optimizer: {name: adamw, lr: 1.0e-4}\n", ""), r"\$\.train\.optimizer: missing"),
    "no learning rate": (changed(", lr: 1.0e-4", ""), r":8: \$\.train\.optimizer\.lr: missing"),
    "no budget": (changed("  iterations: 100\n", ""), r"\$\.train: neither iterations nor epochs"),
    "two budgets": (changed("iterations: 100", "iterations: 100\n  epochs: 2"), r":7: \$\.train\.epochs: both iterations and epochs"),
    "negative budget": (changed("iterations: 100", "iterations: -100"), r":6: \$\.train\.iterations: expected .* at least 1, got -100"),
    "zero budget": (changed("iterations: 100", "iterations: 0"), r":6: \$\.train\.iterations: expected .* at least 1, got 0"),
    "fractional budget": (changed("iterations: 100", "iterations: 1.5"), r":6: \$\.train\.iterations: expected a whole number"),
    "text as number": (changed("iterations: 100", "iterations: many"), r":6: \$\.train\.iterations: expected .*, got 'many'"),
    "truth as number": (changed("iterations: 100", "iterations: true"), r":6: \$\.train\.iterations: expected .*, got true"),
    "nothing as number": (changed("batch_size: 64", "batch_size:"), r":7: \$\.train\.batch_size: expected .*, got nothing"),
    "infinite rate": (changed("1.0e-4", ".inf"), r":8: \$\.train\.optimizer\.lr: expected a number"),
    "rate not a number": (changed("1.0e-4", ".nan"), r":8: \$\.train\.optimizer\.lr: expected a number"),
    "negative rate": (changed("1.0e-4", "-1e-4"), r":8: \$\.train\.optimizer\.lr: expected a number, at least 0"),
    "unknown optimizer": (changed("adamw", "admaw"), r":8: \$\.train\.optimizer\.name: no optimizer is named .*did you mean 'adamw'"),
    "momentum for adam": (changed("lr: 1.0e-4", "lr: 1.0e-4, momentum: 0.9"), r":8: \$\.train\.optimizer\.momentum: .*has no option .momentum.; muon, sgd have it"),
    "one beta": (changed("lr: 1.0e-4", "lr: 1.0e-4, betas: [0.9]"), r":8: \$\.train\.optimizer\.betas: expected a list of 2"),
    "list for mapping": (changed("{name: cosine, warmup: 10}", "[cosine]"), r":9: \$\.train\.schedule: expected a mapping"),
    "text for mapping": (GOOD[: GOOD.index("\ntrain:") + 1] + "train: much\n", r":5: \$\.train: expected a mapping, got 'much'"),
    "full smoothing": (GOOD + "  label_smoothing: 1.0\n", r":10: \$\.train\.label_smoothing: expected"),
    "unknown precision": (GOOD + "  precision: fp64\n", r":10: \$\.train\.precision: expected 'fp32' or 'tf32' or 'bf16' or 'fp16'"),
    "unknown stream": (changed("mtil-mini", "mtil-mni"), r":2: \$\.stream\.name: no stream .*did you mean 'mtil-mini'"),
    "unknown key of a task": (
        GOOD.replace("{name: mtil-mini, order: I}", "{name: folders, tasks: [{name: x, imags: y}]}"),
        r":2: \$\.stream\.tasks\[0\]\.imags: unknown option \(did you mean 'images'\?\)",
    ),
    "unknown stream option": (changed("order: I", "oder: I"), r":2: \$\.stream\.oder: unknown option .*'order'"),
    "unknown order": (changed("order: I}", "order: III}"), r":2: \$\.stream\.order: expected"),
    "unknown model": (changed("mulki-tiny", "mulki-tny"), r":3: \$\.model\.name: no model .*did you mean 'mulki-tiny'"),
    "unknown tower": (changed("train: all", "train: both"), r":3: \$\.model\.train: expected 'all' or 'image' or 'text'"),
    "unknown strategy": (changed("strategy: mulki", "strategy: mulky"), r":4: \$\.strategy: no strategy .*did you mean 'mulki'"),
    "strategy as number": (changed("strategy: mulki", "strategy: 5"), r":4: \$\.strategy: expected a strategy's name or a mapping, got 5"),
    "unknown plugin": (changed("strategy: mulki", "strategy: {plugins: [teacher]}"), r":4: \$\.strategy\.plugins\[0\]\.teacher: no plugin"),
    "unknown plugin option": (
        changed("strategy: mulki", "strategy:\n  plugins:\n    - teachers\n    - adding: {temprature: 2}"),
        r":7: \$\.strategy\.plugins\[1\]\.adding\.temprature: unknown option \(did you mean 'temperature'\?\)",
    ),
    "plugin option of wrong type": (
        changed("strategy: mulki", "strategy: {plugins: [teachers, adding: {weight: heavy}]}"),
        r":4: \$\.strategy\.plugins\[1\]\.adding\.weight: expected a number",
    ),
    "two plugins in one entry": (
        changed("strategy: mulki", "strategy: {plugins: [{teachers: {}, adding: {}}]}"),
        r":4: \$\.strategy\.plugins\[0\]: expected a plugin as",
    ),
    "requirement missing": (changed("strategy: mulki", "strategy: {plugins: [adding]}"), r":4: .*adding: needs the plugin 'teachers'"),
    "wrong order": (changed("strategy: mulki", "strategy: {plugins: [adding, teachers]}"), r":4: .*adding: must come after 'teachers'"),
    "plugin twice": (changed("strategy: mulki", "strategy: {plugins: [teachers, teachers]}"), r":4: .*teachers: is in the stack twice"),
    "unknown metric": (GOOD + "evaluate: {metrics: [transfr]}\n", r":10: \$\.evaluate\.metrics\[0\]: no metric"),
    "unknown scope": (GOOD + "evaluate: {classes: some}\n", r":10: \$\.evaluate\.classes: expected 'task' or 'seen' or 'all'"),
    "unknown logger": (GOOD + "loggers: [tensorbord]\n", r":10: \$\.loggers\[0\]: no logger .*'tensorboard'"),
    "unknown task": (GOOD + "  per_task: {flag: {lr: 1e-5}}\n", r":10: \$\.train\.per_task\.flag: .*no task 'flag' .*'flags'"),
    "unknown task in the stream": (
        changed("order: I}", "tasks: [flags, scns]}"), r":2: \$\.stream\.tasks\[1\]: .*no task 'scns' \(did you mean 'scans'",
    ),
    "unknown task in the order": (changed("order: I}", "order: [foods]}"), r":2: \$\.stream\.order\[0\]: .*no task 'foods'"),
    "task twice in the order": (changed("order: I}", "order: [food, food]}"), r":2: \$\.stream\.order\[1\]: the task 'food' is named twice"),
    "no task": (changed("order: I}", "tasks: []}"), r":2: \$\.stream\.tasks: expected at least one task"),
    "two budgets for a task": (
        GOOD + "  per_task: {flags: {iterations: 20, epochs: 3}}\n", r":10: \$\.train\.per_task\.flags\.epochs: both iterations and epochs",
    ),
    "a strategy's name that no file can have": (changed("strategy: mulki", f"strategy: {'x' * 400}"), r":4: \$\.strategy: no strategy is named"),
    "a device with leading zeros": (GOOD + "device: cuda:007\n", r":10: \$\.device: expected auto"),
    "a beta of one": (changed("lr: 1.0e-4", "lr: 1.0e-4, betas: [0.9, 1.0]"), r":8: \$\.train\.optimizer\.betas\[1\]: expected .* below 1"),
    "tasks that are not in the order": (
        changed("order: I}", "order: [food], tasks: [flags]}"), r":2: \$\.stream\.tasks: none of these tasks is in `order`",
    ),
    "a foreign plugin's option": (
        changed("strategy: mulki", "strategy: {plugins: [avalanche.replay: {mem_size: -5}]}"), r":4: .*mem_size: expected a whole number, at least 1",
    ),
    "a foreign plugin's word": (
        changed("strategy: mulki", "strategy: {plugins: [avalanche.ewc: {mode: foo}]}"), r":4: .*mode: expected 'separate' or 'online'",
    ),
    "empty entries of a stack": (changed("strategy: mulki", "strategy: {plugins: [null, {}, 5]}"), r":4: \$\.strategy\.plugins\[1\]: expected a plugin"),
    "the strategy is a folder": (changed("strategy: mulki", "strategy: ."), r":4: \$\.strategy: no strategy is named '\.'"),
    "a tag like that of a mapping": (changed("{name: mtil-mini, order: I}", "!!mapfoo {name: mtil-mini}"), r":2: \$\.stream: the tag"),
    "no seeds": (GOOD + "seeds: []\n", r":10: \$\.seeds: expected at least one"),
    "negative seed": (GOOD + "seeds: [-1]\n", r":10: \$\.seeds\[0\]: expected .* at least 0"),
    "seed twice": (GOOD + "seeds: [1, 1]\n", r":10: \$\.seeds\[1\]: the seed 1 is given twice"),
    "a path as name": (changed("name: good", "name: ../../etc"), r":1: \$\.name: .*names a folder"),
    "unknown device": (GOOD + "device: gpu\n", r":10: \$\.device: expected auto"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN, ids=str)
def test_broken(case, tmp_path):
    text, expected = BROKEN[case]
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(Mistakes) as caught:
        resolve(str(path))
    lines = caught.value.lines()
    assert any(line.startswith(str(path)) and re.search(expected, line) for line in lines), lines
    for line in lines:
        assert re.match(r".+:\d+: \$", line), line


def test_the_recipe_that_is_broken_is_good(tmp_path):
    path = tmp_path / "good.yaml"
    path.write_text(GOOD)
    assert resolve(str(path)).recipe.train.iterations == 100


def test_binary_junk_and_large_files(tmp_path):
    junk = tmp_path / "junk.yaml"
    junk.write_bytes(bytes(range(256)) * 10)
    with pytest.raises(Mistakes, match=r"junk.yaml:2: \$: this is no UTF-8 text"):
        resolve(str(junk))
    large = tmp_path / "large.yaml"
    large.write_text(GOOD + "# long\n" * (10 * 2**20 // 7))
    with pytest.raises(Mistakes, match=rf"large.yaml: the file is larger than {MAX_BYTES // 1024} KB"):
        resolve(str(large))


def test_a_pipe_is_no_recipe(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(Mistakes, match="this is no regular file"):
        resolve(str(tmp_path / "pipe.yaml"))


@pytest.mark.parametrize("sort", ["unknown keys", "plugins", "metrics"])
def test_thousands_of_mistakes(sort, tmp_path):
    many = {
        "unknown keys": GOOD + "".join(f"key{i}: 1\n" for i in range(5_000)),
        "plugins": changed("strategy: mulki", f"strategy: {{plugins: [teachers{', adding' * 5_000}]}}"),
        "metrics": GOOD + f"evaluate: {{metrics: [{', '.join(f'm{i}' for i in range(5_000))}]}}\n",
    }
    path = tmp_path / "many.yaml"
    path.write_text(many[sort])
    done = CliRunner().invoke(main, ["validate", str(path)])
    assert done.exit_code == 2
    lines = done.stderr.splitlines()
    assert len(lines) == 101
    assert lines[-1].startswith("error: and ")


def test_names_cannot_steer_the_terminal(tmp_path):
    path = tmp_path / "evil.yaml"
    path.write_text(GOOD + 'summary: "\\e[31mred\\n"\n"\\e]0;title\\a\\nerror: forged": 1\n')
    done = CliRunner().invoke(main, ["validate", str(path)])
    assert done.exit_code == 2
    assert "\x1b" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
    path.write_text(GOOD + 'summary: "\\e[31mred\\n"\n')
    assert "\x1b" not in CliRunner().invoke(main, ["run", str(path), "--dry-run"]).stdout


def test_a_name_that_no_file_can_have():
    done = CliRunner().invoke(main, ["validate", "x" * 400])
    assert done.exit_code == 2
    assert done.stderr.startswith("error: xxx")
    with pytest.raises(Mistakes, match="no such file, and no recipe of that name"):
        resolve("x" * 400)


def test_a_missing_file_a_folder_and_an_unreadable_one(tmp_path):
    with pytest.raises(Mistakes, match=r"nowhere.yaml: no such file"):
        resolve(str(tmp_path / "nowhere.yaml"))
    with pytest.raises(Mistakes, match=f"{tmp_path.name}: this is a folder"):
        resolve(str(tmp_path))
    with pytest.raises(Mistakes, match=r"mtill: no such file, and no recipe of that name \(did you mean 'mtil'"):
        resolve("mtill")


def test_all_mistakes_at_once(tmp_path):
    path = tmp_path / "many.yaml"
    path.write_text(
        changed("mulki-tiny", "tiny").replace("iterations: 100", "iterations: -1").replace("cosine", "cosin")
        + "seeds: 3\n"
    )
    with pytest.raises(Mistakes) as caught:
        resolve(str(path), Changes(strategy="nobody", settings=("train.batch_size=0",)))
    text = "\n".join(caught.value.lines())
    for part in (
        "$.model.name",
        "$.train.iterations",
        "$.train.schedule.name",
        "$.seeds",
        "no strategy",
        "$.train.batch_size",
    ):
        assert part in text
    assert "--set train.batch_size=0" in text


@pytest.mark.parametrize("name", ["python tag", "unknown key", "a tab"])
@pytest.mark.parametrize("command", ["validate", "run", "show"])
def test_from_the_command_line(name, command, tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text(BROKEN[name][0])
    done = run_fork("-m", "mulki_plugins", command, path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.search(r"^error: .*broken.yaml:\d+: \$", done.stderr)
    assert "Traceback" not in done.stderr
