"""Output that cannot be written, is not read or cannot be encoded: no command dies of it, and the status is honest."""

import errno
import io
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from mulki_plugins.cli import main
from mulki_plugins.cli.lazy import Commands
from mulki_plugins.cli.output import protect, protected_output
from mulki_plugins.errors import MulkiError


class Failing(io.RawIOBase):
    """A descriptor whose writes fail."""

    def __init__(self, number, terminal=False):
        self.number, self.terminal = number, terminal

    def writable(self):
        return True

    def isatty(self):
        return self.terminal

    def write(self, data):
        raise OSError(self.number, os.strerror(self.number))


def text(raw, encoding="utf-8"):
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding=encoding)


def put(monkeypatch, name, stream):
    monkeypatch.setattr(sys, name, stream)
    monkeypatch.setattr(sys, f"__{name}__", stream)


def command(code):
    with protected_output():
        sys.stdout.write("花" * 20000)
        sys.stderr.write("lost")
        sys.exit(code)


def ended(code=0):
    """The status of a command that prints and then ends with this one."""
    with pytest.raises(SystemExit) as caught:
        command(code)
    return caught.value.code


@pytest.mark.parametrize(
    ("number", "terminal", "status"),
    [
        (errno.EPIPE, False, 0),
        (errno.EBADF, False, 0),
        (errno.EIO, True, 0),  # the terminal was closed
        (errno.EIO, False, 2),
        (errno.ENOSPC, False, 2),
    ],
)
def test_stdout_decides_only_where_somebody_reads_it(monkeypatch, number, terminal, status):
    put(monkeypatch, "stdout", text(Failing(number, terminal)))
    assert ended() == status
    assert ended(1) == 1


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO, errno.ENOSPC, errno.EBADF])
def test_stderr_decides_nothing(monkeypatch, number):
    put(monkeypatch, "stderr", text(Failing(number)))
    put(monkeypatch, "stdout", text(io.FileIO(os.open(os.devnull, os.O_WRONLY), "w")))
    assert ended() == 0


def test_streams_of_a_caller_are_left_as_they_are(monkeypatch):
    mine = io.StringIO()
    monkeypatch.setattr(sys, "stdout", mine)
    assert protect(mine, sys.__stdout__, 1) is mine


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_characters_that_cannot_be_written_are_escaped(tmp_path, encoding):
    raw = io.FileIO(tmp_path / "out", "w")
    own = text(raw, encoding)
    stream = protect(own, own, 1)
    stream.write("花 \ud800")
    stream.flush()
    assert (tmp_path / "out").read_bytes() == b"\\u82b1 \\ud800"


def bash(command, **environment):
    return subprocess.run(
        ["bash", "-c", command, "bash", sys.executable, "-m", "mulki_plugins"],
        env={**os.environ, **environment}, capture_output=True, text=True, errors="replace", check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ('"$@" list | head -1 >/dev/null; exit ${PIPESTATUS[0]}', 0),
        ('"$@" list >&-', 0),
        ('"$@" list 2>&- >&- <&-', 0),
        ('"$@" validate nothing 2>&-', 2),
        ('"$@" list >/dev/full', 2),
    ],
)
def test_the_command_with_streams_that_are_closed_or_full(command, status):
    done = bash(command)
    assert done.returncode == status
    assert "Traceback" not in done.stderr


def test_no_file_takes_the_place_of_a_closed_descriptor(tmp_path):
    code = "from mulki_plugins.cli.output import open_descriptors as o; o(); open('y', 'w').write(str(open('x').fileno() > 2))"
    (tmp_path / "x").touch()
    subprocess.run(["bash", "-c", '"$0" -c "$1" 2>&- <&-', sys.executable, code], cwd=tmp_path, check=True)
    assert (tmp_path / "y").read_text() == "True"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_recipe_that_is_shown_into_a_file_can_be_read_again(tmp_path, encoding):
    shown = tmp_path / "mine.yaml"
    done = bash(f'"$@" show mtil --set summary=花é >{shown}', PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert "summary: 花é" in shown.read_text("utf-8")
    assert CliRunner().invoke(main, ["validate", str(shown)]).exit_code == 0


def failing(error):
    group = Commands("group")

    @group.command("fail")
    def fail():
        raise error

    return CliRunner().invoke(group, ["fail"])


def test_an_error_that_nobody_foresaw_is_one_line_and_its_traceback_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    done = failing(KeyError("Error(s):\n\tmissing: a"))
    assert done.exit_code == 1
    [line] = done.stderr.splitlines()
    [file] = tmp_path.iterdir()
    assert "KeyError: " in line
    assert "missing: a" in line
    assert str(file) in line
    assert "Traceback" in file.read_text()


def test_a_known_failure_of_a_command_is_a_line_with_what_to_do():
    done = failing(RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of ..."))
    assert done.exit_code == 2
    assert done.stderr.startswith("error: out of memory: another 20.00 GiB were needed; ")
    assert "train.batch_size" in done.stderr


@pytest.mark.parametrize("error", [MulkiError("wrong", "do this"), BrokenPipeError(errno.EPIPE, "Broken pipe")])
def test_no_error_of_a_command_ends_with_status_0(error):
    assert failing(error).exit_code != 0
