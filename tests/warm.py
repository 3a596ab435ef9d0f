"""Python processes that have the libraries: forks that do what `python ARGUMENTS` does, without seconds of imports.

`run_fork` and `start_fork` fork the test process. `Server` forks a process of another environment, and `Server.write_command`
writes a command that runs there, for scripts. This file is also what the server and the commands run.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

Files = tuple[int, int, int]
"""The descriptors that become a process's input, output and errors."""
LIBRARIES = "from mulki_plugins.libraries import import_libraries; import_libraries()"
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_python(arguments: Sequence[str]) -> None:
    """Do what `python ARGUMENTS` does, for `-c CODE`, `-m MODULE` and a script."""
    import runpy
    import types

    kind, *rest = arguments
    if kind == "-c":
        sys.path.insert(0, "")
        sys.argv = ["-c", *rest[1:]]
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    elif kind == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv = ["-m", *rest[1:]]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(kind).resolve().parent))
        sys.argv = [kind, *rest]
        runpy.run_path(kind, run_name="__main__")


def fork(arguments: Sequence[str], cwd: str | None, env: Mapping[str, str], files: Files) -> int:
    """Start a fork of this process that does what `python ARGUMENTS` does; returns its process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return process
    status = 1
    try:

        def run() -> None:
            _forget_the_parent(cwd, env, files)
            run_python(arguments)

        status = _status_of(run)
        _end()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
        with contextlib.suppress(BaseException):
            sys.stderr.flush()
        os._exit(status)


def _forget_the_parent(cwd: str | None, env: Mapping[str, str], files: Files) -> None:
    """Take over files, folder, environment and Python's settings as a new process has them."""
    import atexit
    import importlib
    import logging
    import site
    import warnings
    import weakref

    atexit._clear()  # the parent's files are not this process's to remove
    weakref.finalize._registry.clear()  # type: ignore[attr-defined]
    weakref.finalize._registered_with_atexit = False  # type: ignore[attr-defined]

    for number in FORWARDED:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    files = tuple(os.dup(each) for each in files)  # type: ignore[assignment]  # before one of them is replaced
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False, errors="backslashreplace")
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr  # type: ignore[misc]
    if cwd is not None:
        os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:0] = [each for each in env.get("PYTHONPATH", "").split(os.pathsep) if each and each not in sys.path]
    logging.getLogger().handlers.clear()
    warnings.resetwarnings()
    for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", category)
    sys.meta_path[:] = [each for each in sys.meta_path if not type(each).__module__.startswith("_pytest.")]
    importlib.invalidate_caches()
    if discovery := sys.modules.get("mulki_plugins.registry.discovery"):
        discovery.catalog.cache_clear()  # with the parts of a test
    for folder in [each for each in sys.path if each.endswith("site-packages")]:  # what was installed meanwhile
        site.addsitedir(folder)


def _status_of(run: Callable[[], None]) -> int:
    import traceback

    try:
        run()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 0xFF
        sys.stderr.write(f"{end.code}\n")
        return 1
    except KeyboardInterrupt:
        traceback.print_exc()
        sys.stderr.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _end() -> None:
    """What Python does at its end: wait for threads, then call what is registered."""
    import atexit
    import threading

    with contextlib.suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()


class Process:
    """A started fork, as `subprocess.Popen` has it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)


def start_fork(*arguments: object, files: Files, cwd: object = None, env: Mapping[str, str] | None = None) -> Process:
    """Start what `python ARGUMENTS` does in a fork of this process."""
    folder = None if cwd is None else str(cwd)
    return Process(fork([str(each) for each in arguments], folder, os.environ if env is None else env, files))


class Done:
    """The end of a process, as `subprocess.CompletedProcess` has it."""

    def __init__(self, returncode: int, stdout: str, stderr: str) -> None:
        self.returncode, self.stdout, self.stderr = returncode, stdout, stderr


def captured(run: Callable[[Files], int]) -> Done:
    """Call it with files for a process's output; it returns the status."""
    import tempfile

    with open(os.devnull) as nothing, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        status = run((nothing.fileno(), out.fileno(), err.fileno()))
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
        return Done(status, *texts)


def run_fork(*arguments: object, cwd: object = None, env: Mapping[str, str] | None = None) -> Done:
    """Run what `python ARGUMENTS` does in a fork of this process, and capture its output."""
    return captured(lambda files: start_fork(*arguments, files=files, cwd=cwd, env=env).wait())


class Server:
    """A process of another Python that has run some code, an import of the libraries, whose forks run commands. Close it."""

    def __init__(self, python: Path, env: Mapping[str, str], code: str = LIBRARIES) -> None:
        import subprocess
        import tempfile

        self._folder = tempfile.TemporaryDirectory()  # a short path: an address has at most a hundred characters
        self.address = str(Path(self._folder.name) / "address")
        self._process = subprocess.Popen(
            [str(python), __file__, "serve", self.address, code],
            env=dict(env),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n", "the server has run the code"

    def run(self, *arguments: str, cwd: Path, env: Mapping[str, str]) -> Done:
        """Run what `python ARGUMENTS` does there, and capture its output."""
        return captured(lambda files: ask(self.address, arguments, str(cwd), env, files))

    def write_command(self, path: Path, *arguments: object) -> None:
        """Write an executable that runs `python ARGUMENTS ...` there."""
        words = [sys.executable, "-ISE", __file__, "ask", self.address, *map(str, arguments)]
        path.write_text(f'#!/bin/sh\nexec {" ".join(words)} "$@"\n')
        path.chmod(0o755)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._folder.cleanup()


def ask(
    address: str, arguments: Sequence[str], cwd: str, env: Mapping[str, str], files: Files, forward: bool = False
) -> int:
    """Run a command at the server; returns its status, −n if signal n ended it. forward: it gets this process's signals."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        request = json.dumps({"arguments": list(arguments), "cwd": cwd, "env": dict(env)}).encode() + b"\n"
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))]
        connection.sendmsg([b"."], rights)
        connection.sendall(request)
        with connection.makefile() as answers:
            pid = int(answers.readline())
            if forward:
                for number in FORWARDED:
                    signal.signal(number, lambda number, frame: os.kill(pid, number))
            return int(answers.readline())


def serve(address: str, code: str) -> None:
    """Run the code, then fork for each request until the input ends, with the process that holds its other end."""
    import gc
    import select

    exec(code, {})
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _answer(connection)
        connection.close()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:  # those that have answered
                pass
    with contextlib.suppress(ChildProcessError):
        while os.wait():
            pass


def _answer(connection: socket.socket) -> None:
    """Run the command of one request and tell its process id and its status."""
    status = 1
    try:
        files = array.array("i")
        _, control, *_ = connection.recvmsg(1, socket.CMSG_LEN(3 * files.itemsize))
        for _, _, data in control:
            files.frombytes(data)
        with connection.makefile() as lines:
            request = json.loads(lines.readline())
        pid = fork(request["arguments"], request["cwd"], request["env"], (files[0], files[1], files[2]))
        connection.sendall(f"{pid}\n".encode())
        ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        connection.sendall(f"{ended}\n".encode())
        status = 0
    finally:
        os._exit(status)


def main() -> None:
    """`serve ADDRESS CODE`, or `ask ADDRESS ARGUMENTS`: what the server and the commands run."""
    what, address, *arguments = sys.argv[1:]
    if what == "serve":
        sys.path.pop(0)  # the tests' folder
        serve(address, arguments[0])
        return
    status = ask(address, arguments, os.getcwd(), os.environ, (0, 1, 2), forward=True)
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


if __name__ == "__main__":
    main()
