"""Importing torch, matplotlib, open_clip and Avalanche whatever the environment holds."""

import errno
import json
import os
import subprocess
import sys
import types

import pytest

from mulki_plugins import libraries
from mulki_plugins.cli.doctor import check_library
from mulki_plugins.errors import MulkiError
from mulki_plugins.libraries import hint_for
from tests.sample_runs import write_run

CODE = """
import json, os, sys, warnings
before = dict(os.environ)
from mulki_plugins.libraries import import_libraries
import_libraries()
import avalanche.benchmarks.datasets.dataset_utils as settings, matplotlib, matplotlib.pyplot, torch
torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
changed = [k for k in {*before, *os.environ} if before.get(k) != os.environ.get(k) and not k.startswith(("KMP_", "TORCH_LOGS"))]
print(json.dumps([changed, settings.AVALANCHE_CONFIG["dataset_location"], matplotlib.rcParams["backend"], os.listdir(".")]))
"""


def imported(tmp_path, **environment):
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd(), **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_variables_and_settings_that_lead_nowhere(tmp_path):
    (tmp_path / "matplotlibrc").write_bytes(b"\xff\xfe\n")
    found, said = imported(
        tmp_path, HOME="/proc", MPLBACKEND="nonsense", MATPLOTLIBRC="/nowhere/rc", MPLCONFIGDIR="/dev/null",
        XDG_CACHE_HOME="/dev/null/x", XDG_CONFIG_HOME="/proc/x", TORCH_LOGS="nonsense", TORCH_LOGS_OUT="/nowhere/log",
        HF_HUB_ETAG_TIMEOUT="soon", TMPDIR="/nowhere", PYTHONWARNINGS="error::DeprecationWarning",
    )  # fmt: skip
    assert found[:2] == [[], "/proc/.avalanche/data"]
    assert found[3] == ["matplotlibrc"]
    assert said == ""


@pytest.mark.parametrize("command", [["report", "runs"], ["study", "collect", "mine.yaml", "--figure", "a.png"]])
def test_what_draws_imports_matplotlib_in_any_environment(tmp_path, command):
    write_run(tmp_path)
    (tmp_path / "mine.yaml").write_text(
        "name: mine\nrecipes: [mtil]\nstrategies: [finetune]\nparts: {study: {runs: [{seeds: [0]}]}}\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mulki_plugins", *command], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd(), "MPLBACKEND": "nonsense"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_settings_of_the_users_that_are_good_count(tmp_path):
    (tmp_path / ".avalanche").mkdir()
    (tmp_path / ".avalanche" / "config.json").write_text('{"dataset_location": "/big/disk"}')
    found, _ = imported(tmp_path, HOME=str(tmp_path), MPLBACKEND="svg")
    assert found[:3] == [[], "/big/disk", "svg"]


def test_a_user_without_a_name_and_a_home_gets_both_for_the_process(monkeypatch):
    def nobody(*args):
        raise RuntimeError

    for name in ("HOME", "LOGNAME"):
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    monkeypatch.setattr(libraries.Path, "home", nobody)
    monkeypatch.setattr(libraries.getpass, "getuser", nobody)
    libraries.provide_user()
    assert os.path.isdir(os.environ["HOME"])
    assert os.environ["LOGNAME"]


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (ModuleNotFoundError("No module named 'torch'", name="torch"), "pip install torch"),
        (ModuleNotFoundError("No module named 'sympy'", name="sympy"), "torch needs 'sympy'"),
        (PermissionError(errno.EACCES, "Permission denied", "/home/x/.config"), "use this file"),
        (OSError(errno.ENOSPC, "No space left on device", "/tmp/x"), "disk space"),
        (json.JSONDecodeError("Expecting value", "", 0), "damaged"),
        (MemoryError(), "memory"),
        (ImportError("numpy.core.multiarray failed to import"), "--upgrade numpy"),
        (ImportError("libc10.so: undefined symbol: x"), "--force-reinstall torch"),
    ],
)
def test_each_cause_has_its_own_hint(error, hint, monkeypatch):
    monkeypatch.setenv("OLDPWD", "/tmp")  # as after a shell's cd
    monkeypatch.setenv("PWD", "/home/x")
    assert hint in hint_for("torch", error)


def test_a_variable_that_the_error_names_is_named(monkeypatch):
    monkeypatch.setenv("SOME_LIBRARYS_NUMBER", "fourty-two")
    assert "SOME_LIBRARYS_NUMBER" in hint_for("torch", ValueError("invalid literal for int(): 'fourty-two'"))


def test_a_file_of_the_users_that_hides_a_module_is_named(tmp_path, monkeypatch):
    (tmp_path / "queue.py").write_text("raise AttributeError('x')\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AttributeError) as caught:
        exec(compile((tmp_path / "queue.py").read_text(), str(tmp_path / "queue.py"), "exec"), {})
    assert f"rename {tmp_path / 'queue.py'}" in hint_for("torch", caught.value)


def test_a_failed_import_is_one_line_also_in_doctor(monkeypatch):
    def fails(name):
        raise PermissionError(errno.EACCES, "Permission denied", "/home/x/.cache")

    monkeypatch.delitem(sys.modules, "open_clip", raising=False)
    monkeypatch.setattr(libraries, "importlib", types.SimpleNamespace(import_module=fails))
    with pytest.raises(MulkiError, match=r"open_clip cannot be imported: PermissionError: .*/home/x/\.cache"):
        libraries.import_library("open_clip")
    [check] = check_library("open_clip", "open_clip_torch")
    assert check["state"] == "error"
    assert "PermissionError" in check["found"]
    assert "must be able to use this file" in check["hint"]
