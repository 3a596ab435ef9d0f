"""Forks that stand in for `python ARGUMENTS`: they begin, print, end and are stopped as a new process would be."""

import os
import signal
import subprocess
import sys

import pytest

from tests.environments import ROOT
from tests.warm import Server, run_fork, start_fork


@pytest.fixture(scope="module")
def server():
    server = Server(sys.executable, os.environ, code="pass")
    yield server
    server.close()


@pytest.fixture(params=["a new process", "a fork of this one", "a fork of the server", "a command"])
def run(request, server, tmp_path):
    """Run `python ARGUMENTS` in some way: the status, and what it printed."""
    cwd, env = tmp_path / "work", {**os.environ, "TOLD": "this", "PYTHONPATH": str(ROOT)}
    cwd.mkdir()

    def run(*arguments):
        if request.param == "a fork of this one":
            return run_fork(*arguments, cwd=cwd, env=env)
        if request.param == "a fork of the server":
            return server.run(*arguments, cwd=cwd, env=env)
        words = [sys.executable]
        if request.param == "a command":
            server.write_command(tmp_path / "python")
            words = [tmp_path / "python"]
        return subprocess.run([*words, *arguments], cwd=cwd, env=env, capture_output=True, text=True)

    return run


def test_it_has_its_arguments_folder_environment_and_output(run, tmp_path):
    code = "import os, sys; print(sys.argv, os.getcwd(), os.environ['TOLD'], __name__); print('odd', file=sys.stderr)"
    done = run("-c", code, "a b", "--c")
    assert done.stdout == f"['-c', 'a b', '--c'] {tmp_path / 'work'} this __main__\n"
    assert done.stderr == "odd\n"
    assert done.returncode == 0


def test_modules_and_scripts_are_found_where_python_looks(run, tmp_path):
    (tmp_path / "work" / "near.py").write_text("import sys; print(__name__, sys.argv[1:])\n")
    assert run("-m", "near", "x").stdout == "__main__ ['x']\n"
    (tmp_path / "beside.py").write_text("name = 'beside'\n")
    (tmp_path / "script.py").write_text("import beside, sys; print(beside.name, __name__, sys.argv)\n")
    assert run(str(tmp_path / "script.py"), "y").stdout == f"beside __main__ ['{tmp_path / 'script.py'}', 'y']\n"
    done = run("-m", "mulki_plugins", "validate", "nothing")
    assert done.returncode == 2
    assert done.stderr.startswith("error: nothing: ")


@pytest.mark.parametrize(
    ("code", "status", "last"),
    [
        ("raise SystemExit(3)", 3, ""), ("import sys; sys.exit('wrong')", 1, "wrong"), ("1 / 0", 1, "ZeroDivisionError"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM, ""),
        ("raise KeyboardInterrupt", -signal.SIGINT, "KeyboardInterrupt"),
    ],
)  # fmt: skip
def test_it_ends_as_python_does(run, code, status, last):
    done = run("-c", code)
    assert done.returncode == status
    assert done.stderr.strip().rpartition("\n")[2].startswith(last)


def test_threads_end_and_what_is_registered_is_called(run):
    code = (
        "import atexit, threading, time; atexit.register(print, 'end');"
        "threading.Thread(target=lambda: (time.sleep(0.1), print('thread'))).start()"
    )
    assert run("-c", code).stdout == "thread\nend\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("way", ["fork", "command"])
def test_a_signal_reaches_it(server, tmp_path, number, way):
    read, write = os.pipe()
    waits = ("-c", "import time; print('here', flush=True); time.sleep(60)")
    with open(read) as output, open(os.devnull, "r+") as nothing:
        if way == "fork":
            process = start_fork(*waits, files=(nothing.fileno(), write, nothing.fileno()))
        else:
            server.write_command(tmp_path / "python")
            process = subprocess.Popen([tmp_path / "python", *waits], stdout=write, stderr=nothing)
        os.close(write)
        assert output.readline() == "here\n"
        process.send_signal(number)
        assert process.wait() == -number
