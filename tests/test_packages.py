"""Packages of other people: good ones are used by name, broken ones are named precisely and hurt nothing else."""

import ast
import functools
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from click.testing import CliRunner

from mulki_plugins.cli import main
from mulki_plugins.registry import discovery, static
from mulki_plugins.registry.discovery import catalog

HOOKS = "from mulki_plugins import hookimpl\n\n@hookimpl\ndef mulki_register(register):\n"
STAGE = (
    "from avalanche.training.plugins import SupervisedPlugin\n\n"
    "class Stage(SupervisedPlugin):\n"
    "    def __init__(self, *, weight: float = 1.0):\n        super().__init__()\n"
    "    def after_forward(self, strategy, **kwargs):\n        pass\n"
)


PARSING = types.SimpleNamespace(**vars(ast) | {"parse": functools.cache(ast.parse)})
"""The module `ast`, which parses what it has parsed before no second time, whatever `forget` forgets."""


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on the path in which packages are installed, as far as Python can tell; `install` adds one."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.setattr(discovery, "_off", ())
    monkeypatch.setattr(static, "ast", PARSING)
    forget()
    yield folder
    for name in [n for n in sys.modules if n.startswith("pkg_")]:
        del sys.modules[name]
    forget()


def forget():
    """What a process reads only once."""
    for kept in (catalog, static.parse_module, static.read_imports, static.find_source, static._read_signature):
        kept.cache_clear()


@pytest.fixture
def install(site):
    def install(name, hooks=None, *, requires="", entry=None, version="1.2", **files):
        module = f"pkg_{name.replace('-', '_')}"
        (site / module).mkdir()
        hooks = hooks and hooks.replace("pkg_good", module)
        for path, text in {"__init__.py": "", "hooks.py": hooks, "stage.py": STAGE, **files}.items():
            if text is not None:
                written = (
                    path if "." in path else path.replace("__yaml", ".yaml").replace("__py", ".py").replace("__", "/")
                )
                target = site / module / written
                target.parent.mkdir(exist_ok=True)
                target.write_text(text)
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: the package {name}\n{requires}"
        (info / "METADATA").write_text(metadata)
        (info / "entry_points.txt").write_text(entry or f"[mulki]\n{name} = {module}.hooks\n")
        catalog.cache_clear()
        return module

    return install


def plugin(name="stage", module="pkg_good", more=""):
    return f"    register.plugin({name!r}, '{module}.stage:Stage', summary='a stage'{more})\n"


def mulki(*arguments):
    done = CliRunner().invoke(main, list(arguments))
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def rows(*before):
    done = mulki(*before, "plugins", "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def row(name, kind="package", *before):
    [found] = [r for r in rows(*before) if (r["name"], r["kind"]) == (name, kind)]
    return found


def test_a_part_whose_module_is_missing_is_broken_whatever_its_kind(install):
    kinds = ("optimizer", "metric", "logger", "command")
    parts = "".join(f"    register.{kind}('lost-{kind}', 'pkg_good.nowhere:x', summary='y')\n" for kind in kinds)
    install("good", HOOKS + parts)
    for kind in kinds:
        found = row(f"lost-{kind}", kind)
        assert found["state"] == "broken", kind
        assert "pkg_good.nowhere" in found["cause"]


def test_a_part_or_file_that_fails_unexpectedly_does_not_hide_the_others(install, monkeypatch):
    def fail(file):
        raise LookupError("odd")

    hooks = (
        "    register.optimizer('biggest', max, summary='has no signature')\n"
        "    register.strategy(__import__('pathlib').Path(__file__).parent / 'theirs.yaml')\n"
    )
    install("good", HOOKS + plugin("fine") + hooks, theirs__yaml="name: theirs\nsummary: one\nplugins: []\n")
    monkeypatch.setattr(sys.modules["mulki_plugins.cli.plugins"], "check_strategy", fail)
    biggest, theirs = row("biggest", "optimizer"), row("theirs", "strategy")
    assert biggest["state"] == theirs["state"] == "broken"
    assert biggest["cause"].startswith("ValueError: no signature found")
    assert (theirs["summary"], theirs["cause"].partition(" (")[0]) == ("one", "LookupError: odd")
    assert row("fine", "plugin")["state"] == "ok"


def test_a_good_package_is_used_by_name(install):
    hooks = HOOKS + plugin(more=", requires=['teachers'], source='arXiv 1', options={'weight': 'factor'}") + (
        "    register.folder('strategies', __import__('pathlib').Path(__file__).parent / 'strategies')\n"
        "    register.command('greet', 'pkg_good.command:greet', summary='says hello')\n"
    )  # fmt: skip
    command = "import click\n\n@click.command()\ndef greet():\n    click.echo('hello')\n"
    strategy = "name: theirs\nplugins: [teachers, stage: {weight: 2}]\n"
    install("good", hooks, command__py=command, strategies__theirs__yaml=strategy)
    assert row("good") == {
        "name": "good", "kind": "package", "distribution": "good", "version": "1.2", "summary": "the package good",
        "state": "ok", "cause": "", "notes": [],
    }  # fmt: skip
    assert (
        row("stage", "plugin")["state"]
        == row("theirs", "strategy")["state"]
        == row("greet", "command")["state"]
        == "ok"
    )
    assert mulki("validate", "mtil", "--strategy", "theirs").exit_code == 0
    wrong = mulki("validate", "mtil", "--with", "stage", "--set", "strategy.stage.wieght=2")
    assert wrong.exit_code == 2
    assert "unknown option (did you mean 'weight'?)" in wrong.stderr
    assert mulki("greet").stdout == "hello\n"
    assert "says hello" in mulki("--help").stdout
    schema = json.loads(mulki("schema").stdout)
    assert schema["$defs"]["stage"]["properties"]["weight"]["description"] == "factor"
    assert "pkg_good.stage" not in sys.modules, "nothing of it is imported before it is used"
    assert "pkg_good.command" in sys.modules


BROKEN = {
    "import error": ({"hooks": "import no_such_module_at_all\n"}, r"ModuleNotFoundError: No module named 'no_such_module_at_all' \(pkg_bad/hooks.py:1\)"),
    "no module": ({"hooks": None}, r"ModuleNotFoundError: No module named 'pkg_bad.hooks'"),
    "syntax error": ({"hooks": "def broken(:\n"}, r"SyntaxError: .*hooks.py, line 1"),
    "exits": ({"hooks": "import sys\nsys.exit(3)\n"}, r"it ends the program: sys.exit\(3\) \(pkg_bad/hooks.py:2\)"),
    "a base exception": ({"hooks": "class Odd(BaseException): pass\nraise Odd('x')\n"}, r"Odd: x \(pkg_bad/hooks.py:2\)"),
    "an error without text": ({"hooks": "class Odd(Exception):\n    def __str__(self): raise ValueError\nraise Odd\n"}, r"Odd \("),
    "no hook": ({"hooks": "x = 1\n"}, r"it has no hook; expected a function `mulki_register\(register\)`"),
    "not marked": ({"hooks": "def mulki_register(register): pass\n"}, r"mulki_register is not marked; write `@mulki_plugins.hookimpl`"),
    "misspelt hook": ({"hooks": HOOKS.replace("mulki_register", "mulki_registre") + "    pass\n"}, r"no hook 'mulki_registre' \(did you mean 'mulki_register'\?\)"),
    "wrong signature": ({"hooks": HOOKS.replace("(register)", "(register, more)") + "    pass\n"}, r"the hook mulki_register takes more, which MulKI does not give; write `def mulki_register\(register\)`"),
    "a generator": ({"hooks": HOOKS + "    yield 1\n"}, r"the hook mulki_register is a coroutine or generator"),
    "hook raises": ({"hooks": HOOKS + "    raise OSError('no disk')\n"}, r"OSError: no disk \(pkg_bad/hooks.py:5\)"),
    "hook exits": ({"hooks": HOOKS + "    exit()\n"}, r"it ends the program"),
    "name taken": ({"hooks": HOOKS + plugin("adding")}, r"the plugin 'adding' of bad 1.2 is already there, from mulki \d"),
    "twice its own name": ({"hooks": HOOKS + plugin("x") * 2}, r"the plugin 'x' of bad 1.2 is already there, from bad 1.2"),
    "command taken": ({"hooks": HOOKS + "    register.command('run', 'a:b', summary='mine')\n"}, r"the command 'run' of bad 1.2 is already there, from mulki"),
    "strategy taken": ({"hooks": HOOKS + "    register.folder('strategies', __import__('pathlib').Path(__file__).parent)\n", "mulki__yaml": "name: mulki\n"}, r"the strategy 'mulki' of bad 1.2 is already there, from mulki"),
    "no folder": ({"hooks": HOOKS + "    register.folder('recipes', '/not/there')\n"}, r"there is no folder /not/there"),
    "unknown argument": ({"hooks": HOOKS + "    register.plugin('x', 'a:b', sumary='s')\n"}, r"TypeError: .*sumary"),
    "a bad name": ({"hooks": HOOKS + plugin("my stage")}, r"'my stage' of bad 1.2: expected letters"),
    "a bad target": ({"hooks": HOOKS + "    register.plugin('x', 'a.b.C', summary='s')\n"}, r"expected a target `package.module:attribute`, got 'a.b.C'"),
    "a text for a list": ({"hooks": HOOKS + plugin("x", more=", requires='teachers'")}, r"requires: expected a list of names, got 'teachers'"),
    "a list for a mapping": ({"hooks": HOOKS + "    register.optimizer('x', 'torch.optim:RAdam', summary='r', kinds=['betas'])\n"}, r"kinds: expected a mapping with names of options as keys, got \['betas'\]"),
    "a mapping by numbers": ({"hooks": HOOKS + plugin("x", more=", defaults={1: 2}")}, r"defaults: expected a mapping with names .*, got \{1: 2\}"),
    "options without texts": ({"hooks": HOOKS + plugin("x", more=", options=['weight']")}, r"options: expected a mapping with names .*, got \['weight'\]"),
    "no summary": ({"hooks": HOOKS + "    register.plugin('x', 'a:b', summary='')\n"}, r"expected a summary of one line"),
    "too new": ({"hooks": HOOKS + plugin(), "requires": "Requires-Dist: mulki>=99\n"}, r"it needs mulki >=99, this is mulki \d"),
    "another Python": ({"hooks": HOOKS + plugin(), "requires": "Requires-Python: >=4\n"}, r"it needs Python >=4, this is Python 3"),
    "no requirement": ({"hooks": HOOKS + plugin(), "requires": "Requires-Dist: mulki >>= what\n"}, r"its metadata cannot be read"),
    "a bad entry point": ({"hooks": HOOKS + plugin(), "entry": "[mulki]\nbad = not a module\n"}, r"its entry point is 'not a module', expected"),
}  # fmt: skip


@pytest.mark.parametrize(("package", "cause"), BROKEN.values(), ids=BROKEN)
def test_a_broken_package_is_named_and_hurts_nothing(install, package, cause):
    import re

    install("bad", **package)
    install("good", HOOKS + plugin("fine"))
    found = row("bad")
    assert found["state"] == "left out"
    assert (found["distribution"], found["version"]) == ("bad", "1.2")
    assert re.search(cause, found["cause"]), found["cause"]
    assert "\n" not in found["cause"]
    assert row("fine", "plugin")["state"] == "ok"
    assert mulki("validate", "mtil", "--with", "fine").exit_code == 0
    listed = mulki("list", "--json")
    assert listed.exit_code == 0
    json.loads(listed.stdout)
    assert f"warning: bad 1.2 is left out: {found['cause']}" in mulki("list").stderr


def test_of_two_packages_with_one_name_the_second_is_left_out(install):
    install("one", HOOKS + plugin("same"))
    install("two", HOOKS + plugin("other") + plugin("same"))
    assert row("two")["cause"] == "the plugin 'same' of two 1.2 is already there, from one 1.2"
    assert row("one")["state"] == "ok"
    wrong = mulki("validate", "mtil", "--with", "other")
    assert wrong.exit_code == 2
    assert "the plugin 'other' cannot be used: its package two 1.2 is left out: the plugin 'same'" in wrong.stderr


@pytest.mark.parametrize(
    ("said", "printed"),
    [
        ("print('hello')", "hello"),
        ("import os; os.write(1, b'raw')", "raw"),
        ("import sys; sys.__stdout__.write('under')", "under"),
        ("import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(7 * 191)'])", "1337"),
        ("import threading, time; threading.Thread(target=lambda: [print('tick') or time.sleep(0.02) for _ in range(60)]).start()", "tick"),
        ("import atexit; atexit.register(print, 'at the end')", "at the end"),
    ],
)  # fmt: skip
def test_what_a_package_prints_is_no_result(install, said, printed):
    install("loud", f"{said}\n{HOOKS}    {said}\n" + plugin())
    done = subprocess.run(
        [sys.executable, "-m", "mulki_plugins", "plugins", "--json"], capture_output=True, text=True, check=True
    )
    [package] = [r for r in json.loads(done.stdout) if r["name"] == "loud"]
    assert package["state"] == "ok"
    assert printed in "".join(package["notes"]) + done.stderr


def test_a_distribution_with_an_unreadable_list_of_entry_points_hurts_nothing(install, site):
    install("good", HOOKS + plugin("fine"))
    install("garbled", HOOKS, entry="[mulki]\nthis line says nothing\n")
    assert row("fine", "plugin")["state"] == "ok"
    assert row("garbled")["cause"].startswith("its entry_points.txt cannot be read")


def test_packages_are_switched_off(install, monkeypatch):
    install("first-one", HOOKS + plugin("a"))
    install("second", HOOKS + plugin("b"))
    assert row("first-one", "package", "--no-plugin", "First_One")["state"] == "switched off"
    assert "pkg_first_one.hooks" not in sys.modules
    assert mulki("--no-plugin", "second", "validate", "mtil", "--with", "a").exit_code == 0
    refused = mulki("--no-plugin", "second", "validate", "mtil", "--with", "b")
    assert refused.exit_code == 2
    assert "without second 1.2 (see `mulki plugins`)" in refused.stderr
    assert mulki("validate", "mtil", "--with", "b").exit_code == 0, "only for that command"
    typo = mulki("--no-plugin", "secnd", "list")
    assert typo.exit_code == 2
    assert "--no-plugin names 'secnd'" in typo.stderr
    assert "did you mean 'second'?" in typo.stderr
    for value, expected in {"": [], "second": ["b"], " first_one , second": ["a", "b"], "nobody": []}.items():
        monkeypatch.setenv("MULKI_PLUGINS", value)
        catalog.cache_clear()
        assert sorted(r["name"] for r in rows() if r["kind"] == "plugin" and r["distribution"] != "mulki") == expected
        states = {r["name"]: r["state"] for r in rows() if r["kind"] == "package"}
        assert set(states.values()) <= {"ok", "switched off"}
    assert "MULKI_PLUGINS names 'nobody'" in mulki("plugins").stderr


def test_the_runs_of_a_study_leave_out_the_same_packages(install, tmp_path):
    install("first-one", HOOKS + plugin("a"))
    (tmp_path / "own.yaml").write_text("name: own\nrecipes: [mtil]\n")
    planned = mulki(
        "--no-plugin", "first-one", "study", str(tmp_path / "own.yaml"), "--dry-run", "--out", str(tmp_path)
    )
    assert planned.stdout.startswith("mulki --no-plugin first-one run mtil --seed 0 ")


def test_what_is_switched_off_is_not_imported(install):
    install("off", "raise SystemExit('imported')\n")
    assert row("off", "package", "--no-plugin", "off")["state"] == "switched off"
    assert "pkg_off" not in sys.modules


def test_circles_and_missing_requirements(install):
    install("circle", HOOKS + plugin("a", more=", requires=['b']") + plugin("b", more=", after=['a']") + plugin("free"))
    install(
        "other", HOOKS + plugin("needy", more=", requires=['gone']") + plugin("needier", more=", requires=['needy']")
    )
    install("against", HOOKS + plugin("both", more=", requires=['teachers'], conflicts=['teachers']"))
    states = {r["name"]: r for r in rows() if r["kind"] == "plugin"}
    assert states["a"]["cause"] == "a circle: 'a' needs 'b' needs 'a'; none of them can come first"
    assert states["b"]["state"] == "left out"
    assert states["free"]["state"] == "ok"
    assert states["needy"]["cause"] == "it needs the plugin 'gone', which is not there"
    assert "it needs the plugin 'needy', which is not there (other 1.2: it needs" in states["needier"]["cause"]
    assert "requires the plugin 'teachers' and conflicts with it" in states["both"]["cause"]
    done = mulki("validate", "mtil", "--with", "a")
    assert "the plugin 'a' cannot be used: circle 1.2: a circle" in done.stderr


def test_a_strategy_with_mistakes_is_reported_with_its_lines(install):
    hooks = (
        HOOKS + "    register.strategy(__import__('pathlib').Path(__file__).parent / 'wrong.yaml')\n" + plugin("fine")
    )
    install("yaml", hooks, wrong__yaml="name: wrong\nplugins:\n  - teachers: {hlf: auto}\n  - nothing\n")
    found = row("wrong", "strategy")
    assert found["state"] == "broken"
    assert "strategies/wrong.yaml:3: $.plugins[0].teachers.hlf: unknown option (did you mean 'half'?)" in found["cause"]
    assert "strategies/wrong.yaml:4: $.plugins[1].nothing: no plugin is named 'nothing'" in found["cause"]
    assert row("yaml")["state"] == row("fine", "plugin")["state"] == "ok"
    assert mulki("validate", "mtil").exit_code == 0
    assert mulki("validate", "mtil", "--strategy", "wrong").exit_code == 2


CALLBACKS = {
    "unknown name": ("    def before_trainin_exp(self, strategy, **kwargs): ...\n", "'before_trainin_exp' is no callback of Avalanche, which would never call it (did you mean 'before_training_exp'?)"),
    "no kwargs": ("    def after_forward(self, strategy): ...\n", "'after_forward' takes no **kwargs, which Avalanche passes; write `def after_forward(self, strategy, **kwargs)`"),
    "no strategy": ("    def after_forward(self, **kwargs): ...\n", "'after_forward' is called with the strategy and nothing else"),
    "too many": ("    def after_update(self, strategy, loss, **kwargs): ...\n", "'after_update' is called with the strategy and nothing else"),
    "a coroutine": ("    async def after_update(self, strategy, **kwargs): ...\n", "'after_update' is a coroutine"),
}  # fmt: skip


@pytest.mark.parametrize(("method", "expected"), CALLBACKS.values(), ids=CALLBACKS)
@pytest.mark.parametrize("how", ["itself", "inherited", "returned"])
def test_callbacks_are_checked_before_anything_is_imported(install, method, expected, how):
    stage = STAGE + method
    if how == "inherited":
        stage = STAGE.replace("class Stage", "class Base") + method + "\nclass Stage(Base):\n    pass\n"
    if how == "returned":
        stage = (
            STAGE.replace("class Stage", "class Made")
            + method
            + "\ndef Stage(*, weight: float = 1.0):\n    return Made()\n"
        )
    install("good", HOOKS + plugin(), **{"stage.py": stage})
    done = mulki("validate", "mtil", "--with", "stage")
    assert done.exit_code == 2
    assert (
        f"$.strategy.plugins[6].stage: the plugin of good 1.2: pkg_good/stage.py:{stage[: stage.index(method)].count(chr(10)) + 1}: {expected}"
        in done.stderr
    )
    assert row("stage", "plugin")["state"] == "broken"
    assert "pkg_good.stage" not in sys.modules


def test_names_that_are_no_callbacks_are_left_alone(install):
    more = (
        "    def _before_anything(self): ...\n    def afterwards(self): ...\n"
        "    @staticmethod\n    def before_all(x): ...\n    def before_eval(self, *args, **kwargs): ...\n"
    )
    install("good", HOOKS + plugin(), **{"stage.py": STAGE + more})
    assert row("stage", "plugin")["state"] == "ok"


def test_what_avalanche_cannot_do_is_refused_under_another_name_too(install):
    install(
        "early",
        HOOKS + "    register.plugin('early', 'avalanche.training.plugins:EarlyStoppingPlugin', summary='stops')\n",
    )
    assert "early stopping looks up a metric" in row("early", "plugin")["cause"]


def test_the_names_of_callbacks_are_avalanches():
    from avalanche.training.plugins import SupervisedPlugin

    from mulki_plugins.registry.callbacks import CALLBACKS as known

    assert known == {name for name in dir(SupervisedPlugin) if name.startswith(("before_", "after_"))}


def test_commands_that_cannot_be_loaded(install):
    hooks = HOOKS + (
        "    register.command('gone', 'pkg_cmd.nowhere:x', summary='not there')\n"
        "    register.command('odd', 'pkg_cmd.hooks:hookimpl', summary='no command')\n"
    )
    install("cmd", hooks)
    assert "not there" in mulki("--help").stdout
    gone = mulki("gone", "--help")
    assert gone.exit_code == 2
    assert (
        "error: the command 'gone' of cmd 1.2 cannot be loaded from pkg_cmd.nowhere:x: ModuleNotFoundError"
        in gone.stderr
    )
    assert "expected a click.Command" in mulki("odd").stderr
    assert mulki("list").exit_code == 0


def test_targets_are_found_through_imports_and_fields(install):
    stage = (
        "import dataclasses\nfrom typing import TYPE_CHECKING\nfrom mulki_plugins.stages import Adding\n"
        "from .base import Base as Renamed\nfrom . import base\n\nclass Child(Adding):\n    pass\n\nclass Other(Renamed):\n    pass\n\n"
        "class Third(base.Base):\n    pass\n\n@dataclasses.dataclass\nclass Stage(Renamed):\n    weight: float = 1.0\n    must: int = dataclasses.field()\n"
    )
    targets = "".join(
        f"    register.plugin('{n.lower()}', 'pkg_deep.stage:{n}', summary='x')\n"
        for n in ("Child", "Other", "Third", "Stage")
    )
    base = "from avalanche.training.plugins import SupervisedPlugin\nclass Base(SupervisedPlugin):\n    def __init__(self, depth: int = 3): ...\n"
    install("deep", HOOKS + targets, **{"stage.py": stage}, base__py=base)
    from mulki_plugins.registry.catalog import signature_of

    options = {n: list(signature_of(catalog().find("plugin", n)).options) for n in ("child", "other", "third", "stage")}
    assert options["child"] == ["weight", "temperature", "relations", "features", "classes", "targets"]
    assert options["other"] == options["third"] == ["depth"]
    assert options["stage"] == ["weight", "must"]


def test_doctor_names_what_is_wrong(install, monkeypatch, tmp_path):
    install("bad", "import no_such_module_at_all\n")
    install("hungry", HOOKS + plugin("x"), requires="Requires-Dist: not-there-at-all\nRequires-Dist: torch>=999\n")
    monkeypatch.setenv("MULKI_CACHE", str(tmp_path / "cache"))
    done = mulki("doctor", "--json")
    assert done.exit_code == 1
    report = json.loads(done.stdout)
    assert report["ok"] is False
    assert {c["name"] for c in report["checks"] if c["state"] == "ok"} >= {"python", "avalanche", "open_clip"}
    said = " | ".join(f"{c['found']}; {c['hint']}" for c in report["checks"])
    assert "bad 1.2: package 'bad' is left out: ModuleNotFoundError" in said
    assert "hungry needs not-there-at-all, which is not installed" in said
    assert "hungry needs torch >=999, found" in said
    assert str(tmp_path / "cache") in said


def test_doctor_goes_on_where_torch_is_broken(tmp_path, monkeypatch):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("print('noise')\nraise ImportError('libc10.so: not found')\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])}
    command = [sys.executable, "-m", "mulki_plugins", "doctor", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    checks = {c["name"]: c for c in json.loads(done.stdout)["checks"]}
    assert checks["torch"]["state"] == "error"
    assert "libc10.so: not found" in checks["torch"]["found"]
    assert checks["python"]["state"] == "ok"
    assert {"devices", "avalanche", "open_clip", "plugins", "data", "disk"} <= checks.keys()


def test_many_packages_do_not_make_the_list_import_more_than_their_hooks(install):
    for i in range(20):
        install(f"many-{i}", HOOKS + plugin(f"many-{i}"))
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom mulki_plugins.cli import main\n"
        "assert CliRunner().invoke(main, ['list']).exit_code == 0\n"
        "print(sorted(m for m in sys.modules if m in ('torch', 'numpy', 'avalanche') or m.endswith('.stage')))\n"
        "print(sum(m.startswith('pkg_many') and m.endswith('.hooks') for m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n20\n"


FEW = ("stream.tasks=[digits,scans]", "stream.evaluate_on=validation", "train.iterations=2", "train.schedule.warmup=0", "train.batch_size=8", "loggers=[]", "train.checkpoint.keep=0")  # fmt: skip


def run(out, *settings):
    words = [word for setting in (*FEW, *settings) for word in ("--set", setting)]
    return mulki("run", "mtil", "--strategy", "finetune", *words, "--out", str(out), "--json")


def test_packages_are_told_of_runs_and_change_nothing(install, tmp_path):
    before = json.loads(run(tmp_path / "before").stdout)["runs"][0]
    hooks = (
        "import json, os, random\nimport torch\nfrom mulki_plugins import hookimpl\n\n"
        "@hookimpl\ndef mulki_run_started(run):\n"
        "    assert run.result is None and (run.folder / 'recipe.yaml').is_file() and run.seed == 0\n"
        "    torch.manual_seed(7); random.random(); os.chdir('/')\n"
        "    run.recipe['train']['iterations'] = 99\n    print('begun')\n\n"
        "@hookimpl\ndef mulki_run_finished(run):\n"
        "    (run.folder / 'told.json').write_text(json.dumps([run.result['status'], len(run.result['matrix']), run.recipe['name']]))\n"
    )
    install("listener", hooks)
    install(
        "angry",
        "from mulki_plugins import hookimpl\n\n@hookimpl\ndef mulki_run_started():\n    raise SystemExit('no')\n",
    )
    here = os.getcwd()
    done = run(tmp_path / "after")
    assert done.exit_code == 0, done.stderr
    assert os.getcwd() == here
    after = json.loads(done.stdout)["runs"][0]
    assert after["matrix"] == before["matrix"]
    assert after["zero_shot"] == before["zero_shot"]
    assert "the hook mulki_run_started of angry 1.2 failed" in done.stderr
    assert "sys.exit('no') (pkg_angry/hooks.py:5)" in done.stderr
    assert "the hook mulki_run_started of listener 1.2 printed: begun" in done.stderr
    assert json.loads(next(tmp_path.rglob("told.json")).read_text()) == ["complete", 2, "mtil"]


def test_a_run_that_fails_is_told_too_and_what_a_plugin_prints_is_no_result(install, tmp_path):
    stage = STAGE.replace("        pass\n", "        print('noise')\n")
    hooks = HOOKS + plugin() + (
        "    register.plugin('fails', 'pkg_good.stage:fails', summary='cannot be made')\n"
        "    register.plugin('odd', 'pkg_good.stage:odd', summary='makes something else')\n"
        "    register.stream('notes', 'pkg_good.stage:odd', summary='no stream')\n\n"
        "@hookimpl\ndef mulki_run_finished(run):\n    (run.folder / 'told').write_text(run.result['status'])\n"
    )  # fmt: skip
    stage += "\ndef fails():\n    raise RuntimeError('no licence')\n\ndef odd():\n    return 'something'\n"
    install("good", hooks, **{"stage.py": stage})
    done = run(tmp_path / "loud", "strategy={name: loud, plugins: [stage]}")
    assert done.exit_code == 0, done.stderr
    json.loads(done.stdout)
    assert "noise" in done.stderr
    assert next((tmp_path / "loud").rglob("told")).read_text() == "complete"
    for name, said in {
        "fails": "error: the plugin 'fails' of good 1.2 cannot be made: RuntimeError: no licence (pkg_good/stage.py:",
        "odd": "error: the plugin 'odd' of good 1.2 cannot be used: returned a str, expected a BasePlugin",
    }.items():
        done = run(tmp_path / name, f"strategy={{name: x, plugins: [{name}]}}")
        assert done.exit_code == 2
        assert said in done.stderr
    refused = mulki("run", "mtil", "--strategy", "finetune", "--set", "stream=notes", "--out", str(tmp_path / "notes"))
    assert refused.exit_code == 2
    assert "the stream 'notes' of good 1.2 cannot be used: returned a str, expected a TaskStream" in refused.stderr
