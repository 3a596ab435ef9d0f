# ruff: noqa: E501
"""What parts of other packages do wrong in a run: one line that names them, and as little harm as can be."""

import json
import os
import signal
import sys

import pytest
import torch

from mulki_plugins.errors import Mistakes, MulkiError
from mulki_plugins.recipe.resolve import Changes, resolve
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.registry.guard import guarded_call, try_call
from mulki_plugins.report.compare import comparison_data
from mulki_plugins.report.result import read_result
from mulki_plugins.report.tables import comparison_text
from mulki_plugins.training.resume import resume_experiment
from mulki_plugins.training.run import run_experiment
from tests.test_packages import HOOKS, STAGE, install, mulki, plugin, row, site  # noqa: F401

SMALL = (
    "stream={name: small}", "model={name: small-clip}", "train.iterations=2", "train.schedule.warmup=0",
    "train.batch_size=4", "train.workers=0", "device=cpu", "loggers=[csv]",
)  # fmt: skip


@pytest.fixture(autouse=True)
def small(site):  # noqa: F811
    """The catalog is emptied by `site` before and after each test."""
    torch.set_num_threads(1)


def run(tmp_path, *settings, with_plugins=(), strategy="finetune"):
    from tests.conftest import small_model, small_stream

    register_small(small_stream, small_model)
    recipe = resolve(
        "recipes/mtil.yaml", Changes(strategy=strategy, settings=(*SMALL, *settings), with_plugins=with_plugins)
    )
    return run_experiment(recipe, 0, tmp_path / "runs")


def register_small(stream, model):
    from mulki_plugins.registry.catalog import Catalog, Provenance
    from mulki_plugins.registry.register import Register

    mine = Catalog()
    register = Register(mine, Provenance(distribution="mulki", version=""))
    register.stream("small", stream, summary="three tasks of colours")
    register.model("small-clip", model, summary="a few thousand weights")
    catalog().parts.update(mine.parts)


def folder_of(tmp_path):
    [found] = (tmp_path / "runs").rglob("result.json")
    return found.parent


def failure(tmp_path, *settings, **more):
    with pytest.raises(MulkiError) as caught:
        run(tmp_path, *settings, **more)
    lines = caught.value.lines()
    assert not any("\n" in line for line in lines)
    return lines[0]


METRICS = {
    "writes": ("for row in matrix:\n        row[:] = [100.0] * len(row)\n    matrix.clear()\n    return 7", 7.0, ""),
    "numpy scalar": ("import numpy\n    return numpy.float32(2.5)", 2.5, ""),
    "tensor scalar": ("import torch\n    return torch.tensor(2.5)", 2.5, ""),
    "integer": ("return 3", 3.0, ""),
    "raises": ("return matrix['x']", None, "TypeError: list indices must be"),
    "exits": ("raise SystemExit(0)", None, "it ends the program: sys.exit(0)"),
    "interrupts": ("raise KeyboardInterrupt", None, "KeyboardInterrupt"),
    "base exception": ("raise type('Odd', (BaseException,), {})('x')", None, "Odd: x"),
    "nan": ("return float('nan')", None, "expected a finite number, got nan"),
    "infinite": ("return float('-inf')", None, "expected a finite number, got -inf"),
    "too large": ("return 10**400", None, "OverflowError"),
    "text": ("return '81.2'", None, "expected a number, got '81.2'"),
    "none": ("return None", None, "expected a number, got None"),
    "boolean": ("return True", None, "expected a number, got True"),
    "complex": ("return 1j", None, "expected a number, got 1j"),
    "array": ("import numpy\n    return numpy.ones(2)", None, "expected a number, got array([1., 1.])"),
    "tensor": ("import torch\n    return torch.ones(2)", None, "expected a number, got tensor([1., 1.])"),
    "tensor nan": ("import torch\n    return torch.tensor(float('nan'))", None, "expected a finite number, got nan"),
    "dictionary": ("return {'a': 1.0}", None, "expected a number, got {'a': 1.0}"),
}


@pytest.fixture
def metrics(install):  # noqa: F811
    body = "".join(f"def m{i}(matrix):\n    {text}\n\n" for i, (text, _, _) in enumerate(METRICS.values()))
    hooks = HOOKS + "".join(
        f"    register.metric('m{i}', 'pkg_good.metrics:m{i}', summary='x')\n" for i in range(len(METRICS))
    ) + "    register.metric('gone', 'pkg_good.nowhere:x', summary='x')\n"  # fmt: skip
    install("good", hooks, metrics__py=body)
    return [f"m{i}" for i in range(len(METRICS))]


def test_a_metric_costs_a_run_nothing_but_its_value(metrics, tmp_path, capsys):
    plain = run(tmp_path / "plain")
    capsys.readouterr()
    chosen = ["average", *metrics, "gone", "last"]
    result = run(tmp_path, f"evaluate.metrics=[{', '.join(chosen)}]")
    said = capsys.readouterr().err
    assert result.status == "complete"
    assert result.matrix == plain.matrix
    assert (result.metrics["average"], result.metrics["last"]) == (plain.metrics["average"], plain.metrics["last"])
    for name, (kind, (_, value, cause)) in zip(metrics, METRICS.items(), strict=True):
        assert result.metrics[name] == value, kind
        lines = [line for line in said.splitlines() if f"the metric '{name}' of good 1.2" in line]
        assert len(lines) == (value is None), kind
        if value is None:
            assert lines[0].startswith("warning: "), kind
            assert cause in lines[0], kind
    assert "the metric 'm4' of good 1.2 failed and is left out of the result: TypeError" in said
    assert "(pkg_good/metrics.py:" in next(line for line in said.splitlines() if "'m4'" in line)
    assert "the metric 'gone' of good 1.2 failed" in said
    folder = folder_of(tmp_path)
    read = read_result(folder / "result.json")
    assert (read.status, read.metrics["m4"]) == ("complete", None)
    assert "m4 -" in (folder / "matrix.txt").read_text().lower()
    assert "metrics.py" in (folder / "log.txt").read_text()
    comparison_text([read, read])
    json.dumps(comparison_data([read]), allow_nan=False)


LOGGERS = {
    "cannot be imported": ("", "pkg_good.nowhere:x", "ModuleNotFoundError"),
    "raises when made": ("def make(folder):\n    raise OSError('no server')\n", "", "failed when it was made and is not called again; the run goes on: OSError: no server (pkg_good/logger.py:"),
    "exits when made": ("def make(folder):\n    raise SystemExit(0)\n", "", "it ends the program: sys.exit(0)"),
    "is none": ("def make(folder):\n    pass\n", "", "expected a BaseLogger of Avalanche, got a NoneType"),
    "takes no folder": ("def make():\n    pass\n", "", "TypeError"),
    "raises when it logs": ("class make(Base):\n    def log_single_metric(self, *a):\n        raise ValueError('full')\n", "", "failed in its log_metrics and is not called again; the run goes on: ValueError: full"),
    "exits when it logs": ("class make(Base):\n    def log_single_metric(self, *a):\n        raise SystemExit(0)\n", "", "sys.exit(0)"),
    "interrupts when it logs": ("class make(Base):\n    def log_single_metric(self, *a):\n        raise KeyboardInterrupt\n", "", "KeyboardInterrupt"),
    "raises in a callback": ("class make(Base):\n    def after_training_exp(self, *a, **k):\n        raise KeyError('x')\n", "", "failed in its after_training_exp"),
    "callback takes nothing": ("class make(Base):\n    def before_eval(self):\n        pass\n", "", "failed in its before_eval"),
    "raises when closed": ("class make(Base):\n    def close(self):\n        raise ConnectionError('gone')\n", "", "failed when it was closed"),
    "exits when closed": ("class make(Base):\n    def close(self):\n        raise SystemExit(0)\n", "", "failed when it was closed"),
    "state raises": ("class make(Base):\n    def state_dict(self):\n        raise KeyError('x')\n", "", "failed in its state_dict"),
    "state is no JSON": ("class make(Base):\n    def state_dict(self):\n        return {'x': object()}\n", "", "failed in its state_dict"),
    "spoils the values": ("class make(Base):\n    def log_metrics(self, values):\n        for v in values:\n            if hasattr(v.value, 'zero_'):\n                v.value.zero_()\n        values.clear()\n", "", ""),
}  # fmt: skip


@pytest.mark.parametrize(("body", "target", "said"), LOGGERS.values(), ids=LOGGERS)
def test_a_logger_costs_a_run_nothing_but_its_curves(install, tmp_path, capsys, body, target, said):  # noqa: F811
    base = "from avalanche.logging import BaseLogger\n\nclass Base(BaseLogger):\n    def __init__(self, folder):\n        super().__init__()\n\n"
    base += body
    hooks = HOOKS + f"    register.logger('bad', '{target or 'pkg_good.logger:make'}', summary='x')\n"
    install("good", hooks, logger__py=base)
    plain = run(tmp_path / "plain")
    capsys.readouterr()
    result = run(tmp_path, "loggers=[bad, csv]")
    err = capsys.readouterr().err
    assert (result.status, result.matrix) == ("complete", plain.matrix)
    assert read_result(folder_of(tmp_path) / "result.json").status == "complete"
    lines = [line for line in err.splitlines() if "the logger 'bad' of good 1.2" in line]
    assert len(lines) == bool(said), "once"
    assert not said or said in lines[0]
    [before] = (tmp_path / "plain").rglob("metrics.csv")
    [after] = (tmp_path / "runs").rglob("metrics.csv")
    assert after.read_text() == before.read_text()


@pytest.mark.parametrize(
    "error", ["SystemExit(0)", "KeyboardInterrupt()", "KeyError('x')", "type('Odd', (BaseException,), {})('y')"]
)
@pytest.mark.parametrize("callback", ["before_training_exp", "after_forward", "before_eval", "state_dict"])
def test_a_plugin_that_raises_is_one_line_with_its_package_and_place(install, tmp_path, callback, error):  # noqa: F811
    arguments = "self" if callback == "state_dict" else "self, strategy, **kwargs"
    stage = (
        STAGE
        + f"    def {callback}({arguments}):\n        return self.helper()\n    def helper(self):\n        raise {error}\n"
    )
    install("good", HOOKS + plugin(), **{"stage.py": stage})
    line = failure(tmp_path, with_plugins=("stage",))
    assert f"the plugin 'stage' of good 1.2 in its {callback} failed: " in line
    assert f"(pkg_good/stage.py:{stage.count(chr(10))})" in line
    log = (folder_of(tmp_path) / "log.txt").read_text()
    assert "Traceback" in log
    assert "helper" in log
    assert read_result(folder_of(tmp_path) / "result.json").status == "failed"


STATES = {
    "an object": ("return {'a': {'lock': object()}}", "", "a/lock: a object cannot be kept"),
    "an array": ("import numpy\n        return {'n': numpy.ones(2)}", "", "a ndarray cannot be kept"),
    "a sparse tensor": ("import torch\n        return {'t': torch.eye(2).to_sparse()}", "", "a tensor of this kind cannot be kept"),
    "no dictionary": ("return [1]", "", "expected a dict, got a list"),
    "nothing": ("pass", "", "expected a dict, got a NoneType"),
    "itself": ("d = {}\n        d['d'] = d\n        return d", "", "it contains itself"),
}  # fmt: skip


@pytest.mark.parametrize(("body", "_", "said"), STATES.values(), ids=STATES)
def test_a_state_that_cannot_be_written_names_the_plugin(install, tmp_path, body, _, said):  # noqa: F811
    stage = STAGE + f"    def state_dict(self):\n        {body}\n    def load_state_dict(self, state):\n        pass\n"
    install("good", HOOKS + plugin(), **{"stage.py": stage})
    line = failure(tmp_path, with_plugins=("stage",))
    assert "the plugin 'stage' of good 1.2 in its state_dict: " in line
    assert said in line


STREAM = """
from tests.conftest import small_stream
from mulki_plugins.streams import Task, TaskStream

class Images:
    def __init__(self, images):
        self.images = images
    def __len__(self):
        return len(self.images)
    @property
    def targets(self):
        return self.images.targets
    def __getitem__(self, index):
        return self.images[index]

class Bad(Images):
    BODY

def stream():
    tasks = small_stream().tasks
    return TaskStream(name="theirs", tasks=tuple(
        Task(name=t.name, class_names=t.class_names, templates=t.templates, train=Bad(t.train), test=Images(t.test))
        for t in tasks))
"""


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("error", ["SystemExit(0)", "KeyError('x')", "KeyboardInterrupt()"])
def test_images_that_raise_name_stream_and_place(install, tmp_path, error, workers):  # noqa: F811
    body = f"def __getitem__(self, index):\n        raise {error}"
    install(
        "good",
        HOOKS + "    register.stream('theirs', 'pkg_good.data:stream', summary='x')\n",
        data__py=STREAM.replace("BODY", body),
    )
    line = failure(tmp_path, "stream={name: theirs}", f"train.workers={workers}")
    assert "the stream 'theirs' of good 1.2" in line
    assert "pkg_good/data.py:" in line


@pytest.mark.parametrize(
    "error", ["SystemExit(0)", "KeyError('x')", "KeyboardInterrupt()", "ValueError('two\\nlines')"]
)
@pytest.mark.parametrize("where", ["stream", "targets", "model", "tokenizer", "forward", "plugin"])
def test_parts_that_raise_when_they_are_made_or_used(install, tmp_path, where, error):  # noqa: F811
    data = STREAM.replace(
        "BODY", f"@property\n    def targets(self):\n        raise {error}" if where == "targets" else "pass"
    )
    data = data.replace("def stream():", f"def stream():\n    raise {error}") if where == "stream" else data
    model = (
        "from attrs import evolve\nfrom tests.conftest import small_model\n\ndef fail(*a, **k):\n"
        f"    raise {error}\n\ndef model():\n    loaded = small_model()\n    HERE\n    return loaded\n"
    ).replace(
        "HERE",
        {
            "model": "fail()",
            "tokenizer": "return evolve(loaded, tokenizer=fail)",
            "forward": "loaded.clip.encode_image = fail",
        }.get(where, "pass"),
    )
    stage = STAGE.replace("super().__init__()", f"raise {error}") if where == "plugin" else STAGE
    hooks = HOOKS + plugin() + (
        "    register.stream('theirs', 'pkg_good.data:stream', summary='x')\n    register.model('m', 'pkg_good.model:model', summary='x')\n"
    )  # fmt: skip
    install("good", hooks, data__py=data, model__py=model, **{"stage.py": stage})
    line = failure(tmp_path, "stream={name: theirs}", "model={name: m}", with_plugins=("stage",))
    kind, file = {
        "stream": ("stream 'theirs'", "data"),
        "targets": ("stream 'theirs'", "data"),
        "plugin": ("plugin 'stage'", "stage"),
    }.get(where, ("model 'm'", "model"))
    assert f"the {kind} of good 1.2" in line
    assert f"(pkg_good/{file}.py:" in line


def test_a_plugin_changes_only_its_own_copy_of_its_options(install, tmp_path):  # noqa: F811
    stage = STAGE.replace("weight: float = 1.0", "names: list[str] = ['a']").replace(
        "super()", "names.append('b'); super()"
    )
    install("good", HOOKS + plugin(), **{"stage.py": stage})
    result = run(tmp_path, "strategy={name: x, plugins: [stage: {names: [c]}]}")
    assert result.plugins[0]["options"] == {"names": ["c"]}


def test_the_packages_of_all_parts_stand_in_the_result(install, tmp_path, capsys):  # noqa: F811
    hooks = HOOKS + plugin() + (
        "    register.stream('theirs', 'pkg_good.data:stream', summary='x')\n"
        "    register.metric('m', 'pkg_good.data:m', summary='x')\n"
        "    register.logger('l', 'pkg_good.data:l', summary='x')\n"
        "    register.model('c', 'pkg_good.data:c', summary='x')\n"
        "    register.strategy(__import__('pathlib').Path(__file__).parent / 'theirs.yaml')\n\n"
        "@hookimpl\ndef mulki_run_started(run):\n    pass\n"
    )  # fmt: skip
    data = STREAM.replace("BODY", "pass") + (
        "\ndef m(matrix):\n    return 1\n\ndef l(folder):\n    from avalanche.logging import BaseLogger\n    return BaseLogger()\n"
        "\ndef c():\n    from tests.conftest import small_model\n    return small_model()\n"
    )
    install(
        "good",
        hooks,
        data__py=data,
        theirs__yaml="name: theirs\nplugins: [stage]\n",
        requires="Requires-Dist: not-there-at-all\n",
    )
    changes = ("stream={name: theirs}", "model={name: c}", "evaluate.metrics=[m]", "loggers=[l]")
    result = run(tmp_path, *changes, strategy="theirs")
    found = {
        (part["kind"], part["name"])
        for part in result.parts
        if (part["distribution"], part["version"]) == ("good", "1.2")
    }
    expected = [("stream", "theirs"), ("model", "c"), ("plugin", "stage"), ("metric", "m"), ("logger", "l"), ("strategy", "theirs"), ("hook", "mulki_run_started")]  # fmt: skip
    assert found == set(expected)
    assert read_result(folder_of(tmp_path) / "result.json").parts == result.parts
    warned = "warning: good needs not-there-at-all, which is not installed; pip install 'not-there-at-all'"
    assert warned in capsys.readouterr().err
    assert any("not-there-at-all" in note for note in row("good")["notes"])


COMMANDS = {
    "raises": ("raise KeyError('x')", 2, "error: the command 'theirs' of good 1.2 failed: KeyError: 'x' (pkg_good/command.py:5)"),
    "raises another": ("raise type('Odd', (BaseException,), {})('y')", 2, "failed: Odd: y (pkg_good/command.py:5)"),
    "fails to write": ("open('/proc/none', 'w')", 2, "failed: FileNotFoundError"),
    "ends": ("raise SystemExit(3)", 3, ""),
    "ends well": ("click.get_current_context().exit(0)", 0, ""),
    "is used wrongly": ("raise click.UsageError('no such thing')", 2, "no such thing"),
    "reports": ("from mulki_plugins.errors import MulkiError; raise MulkiError('its own words')", 2, "error: its own words"),
}  # fmt: skip


@pytest.mark.parametrize(("body", "status", "said"), COMMANDS.values(), ids=COMMANDS)
def test_a_command_that_raises_is_one_line(install, body, status, said):  # noqa: F811
    command = f"import click\n\n@click.command()\ndef theirs():\n    {body}\n"
    install(
        "good", HOOKS + "    register.command('theirs', 'pkg_good.command:theirs', summary='x')\n", command__py=command
    )
    done = mulki("theirs")
    assert done.exit_code == status
    assert said in done.stderr
    assert "Traceback" not in done.output


def test_a_check_of_options_that_raises_is_a_mistake_of_its_package(install):  # noqa: F811
    hooks = HOOKS + "".join(
        f"    register.stream('{name}', 'pkg_good.data:stream', summary='x', check='pkg_good.data:{name}')\n"
        for name in ("exits", "odd")
    )
    data = (
        STREAM.replace("BODY", "pass")
        + "\ndef exits(options):\n    raise SystemExit(0)\n\ndef odd(options):\n    return 'x'\n"
    )
    install("good", hooks, data__py=data)
    for name, said in {
        "exits": "failed: it ends the program: sys.exit(0) (pkg_good/data.py:",
        "odd": "expected a list of OptionError, got str",
    }.items():
        done = mulki("validate", "mtil", "--set", f"stream={name}")
        assert done.exit_code == 2
        assert f"the check of the stream '{name}' of good 1.2" in done.stderr
        assert said in done.stderr


def test_a_package_may_raise_keyboard_interrupt_and_ctrl_c_still_counts(install):  # noqa: F811
    install("angry", "raise KeyboardInterrupt\n")
    install("hooked", HOOKS + "    raise KeyboardInterrupt('enough')\n")
    install(
        "lazy",
        HOOKS + "    register.plugin('late', 'pkg_lazy.late:Stage', summary='x')\n",
        late__py="raise KeyboardInterrupt\n",
    )
    assert row("angry")["cause"] == "KeyboardInterrupt (pkg_angry/hooks.py:1)"
    assert row("hooked")["cause"].startswith("KeyboardInterrupt: enough")
    with pytest.raises(MulkiError, match=r"late\.py:1"):
        catalog().find("plugin", "late").load()

    def press():
        signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    for call in (try_call, lambda function: guarded_call("it fails", function)):
        with pytest.raises(KeyboardInterrupt):
            call(press)
        assert signal.getsignal(signal.SIGINT) is before
    try_call(lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    assert signal.getsignal(signal.SIGINT) is before


def test_a_slow_package_is_named_at_every_command(install, monkeypatch):  # noqa: F811
    from mulki_plugins.registry import discovery

    install("slow", "import time\ntime.sleep(0.3)\n" + HOOKS + plugin())
    install("quick", HOOKS + plugin("other"))
    monkeypatch.setattr(discovery, "SLOW", 0.25)
    for command in (("list",), ("validate", "mtil"), ("--help",)):
        sys.modules.pop("pkg_slow.hooks", None)
        catalog.cache_clear()
        said = [line for line in mulki(*command).stderr.splitlines() if "to load" in line]
        assert len(said) == 1, said
        assert "warning: slow 1.2 takes 0." in said[0]
        assert "mulki --no-plugin slow" in said[0]
    assert any("to load" in note for note in row("slow")["notes"])
    assert "to load" not in mulki("--no-plugin", "slow", "list").stderr


def test_no_other_file_takes_a_registered_strategys_name(install, tmp_path, monkeypatch):  # noqa: F811
    hooks = (
        HOOKS
        + plugin()
        + "    register.folder('strategies', __import__('pathlib').Path(__file__).parent / 'strategies')\n"
    )
    files = {
        "theirs": "name: theirs\nplugins: [stage]\n",
        "sly": "name: mulki\nplugins: [stage]\n",
        "other": "name: others\nplugins: [stage]\n",
    }
    install("good", hooks, **{f"strategies__{name}__yaml": text for name, text in files.items()})
    for name in ("mulki", "Mulki", "theirs", "finetune"):
        path = tmp_path / "mine.yaml"
        path.write_text(f"name: {name}\nplugins: []\n")
        with pytest.raises(Mistakes, match=r"mine.yaml:1: \$.name: the strategy '\w+' of .* has this name"):
            resolve("mtil", Changes(strategy=str(path)))
    for name in ("sly", "other"):
        with pytest.raises(Mistakes, match=f"expected '{name}', under which the file is registered"):
            resolve("mtil", Changes(strategy=name))
        assert row(name, "strategy")["state"] == "broken"
    assert resolve("mtil", Changes(strategy="theirs")).recipe.strategy.name == "theirs"
    copied = tmp_path / "copied.yaml"
    copied.write_bytes(catalog().files["strategies"]["finetune"][0].read_bytes())
    assert resolve("mtil", Changes(strategy=str(copied))).recipe.strategy.name == "finetune"
    inline = resolve("mtil", Changes(settings=("strategy={name: mulki, plugins: [teachers]}",)))
    assert "this stack differs from the strategy 'mulki'" in "".join(inline.notices)
    assert not resolve("mtil").notices[1:]


def test_no_package_registers_a_recipe_under_another_ones_name(install):  # noqa: F811
    text = catalog().files["recipes"]["mtil"][0].read_text()
    install(
        "good",
        HOOKS + "    register.recipe(__import__('pathlib').Path(__file__).parent / 'fine.yaml')\n",
        fine__yaml=text,
    )
    with pytest.raises(Mistakes, match=r"\$.name: the recipe 'mtil' of mulki .* has this name"):
        resolve("fine")
    assert row("fine", "recipe")["state"] == "broken"


def test_a_run_goes_on_with_a_logger_that_failed(install, tmp_path, capsys):  # noqa: F811
    body = "def make(folder):\n    raise OSError('no server')\n"
    install("good", HOOKS + "    register.logger('bad', 'pkg_good.logger:make', summary='x')\n" + plugin(), logger__py=body,
            **{"stage.py": STAGE + "    def after_training_exp(self, strategy, **kwargs):\n        import os\n        if strategy.clock.train_exp_counter == 1 and not os.environ.get('GO_ON'):\n            raise OSError('once')\n"})  # fmt: skip
    failure(tmp_path, "loggers=[bad, csv]", with_plugins=("stage",))
    folder = folder_of(tmp_path)
    os.environ["GO_ON"] = "1"
    try:
        assert resume_experiment(resolve(str(folder / "recipe.yaml")), 0, folder).status == "complete"
    finally:
        del os.environ["GO_ON"]
    assert capsys.readouterr().err.count("the logger 'bad' of good 1.2") == 2
