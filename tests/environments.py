"""Wheels, and virtual environments that hold them above the packages of this Python."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from tests.warm import LIBRARIES, Done, Server

ROOT = Path(__file__).parents[1]
WITHOUT_SLOW_OUTPUT = f"""
{LIBRARIES}
import os
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from mulki_plugins.heads.rail import Rail
from mulki_plugins.training import records
from mulki_plugins.training.flops import FlopCount
def draw_blank(canvas):
    canvas.renderer = canvas.get_renderer()
    canvas.renderer.clear()
def begin_narrow(head, width, begin=Rail.begin):
    head.width = min(head.width, 32)
    begin(head, width)
FigureCanvasAgg.draw, records.matrix_figure = draw_blank, lambda result: Figure(figsize=(1, 1))
os.fsync, Rail.begin = (lambda descriptor: None), begin_narrow
FlopCount.__enter__, FlopCount.__exit__ = (lambda self: self), (lambda self, *error: None)
"""
"""Imports the libraries and leaves out what `conftest.py` leaves out of most tests."""
OFFLINE = ["--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]


def copied(source: Path, target: Path) -> Path:
    """A copy of a folder's sources, so that a build leaves nothing in the checkout."""
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "runs", ".venv", ".git", ".*_cache")
    return Path(shutil.copytree(source, target, ignore=ignored))


def wheel_of(source: Path, out: Path) -> Path:
    """Build the wheel of a folder with a pyproject.toml, offline."""
    before = set(out.glob("*.whl"))
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"  # PEP 517's hook
    done = subprocess.run([sys.executable, "-c", build, str(out)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [wheel] = set(out.glob("*.whl")) - before
    return wheel


class Environment:
    """A virtual environment that also sees the packages of this one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        venv.create(folder, with_pip=False, symlinks=True)
        self.bin = folder / ("Scripts" if os.name == "nt" else "bin")
        self.python = self.bin / "python"
        [site] = [p for p in folder.rglob("site-packages") if p.is_dir()]
        own = {sysconfig.get_paths()["purelib"], *(p for p in sys.path if p.endswith("site-packages"))}
        (site / "others.pth").write_text("\n".join(sorted(own)) + "\n")
        self.server: Server | None = None

    def install(self, wheel: Path) -> None:
        done = self.run("-m", "pip", "install", *OFFLINE, "--ignore-installed", str(wheel))
        assert done.returncode == 0, done.stdout + done.stderr

    def start_server(self) -> None:
        """Let `run` and the commands `python` and `mulki` fork a process that has imported the libraries. Close it at the end."""
        self.server = Server(self.python, self.variables(), WITHOUT_SLOW_OUTPUT)
        commands = self.folder / "warm"
        commands.mkdir()
        self.server.write_command(commands / "python")
        self.server.write_command(commands / "mulki", self.bin / "mulki")

    def run(self, *arguments: str, cwd: Path | None = None) -> Done:
        """What `python ARGUMENTS` does in this environment."""
        if self.server:
            return self.server.run(*arguments, cwd=cwd or self.folder, env=self.variables())
        return self.run_anew(*arguments, cwd=cwd)

    def run_anew(self, *arguments: str, cwd: Path | None = None) -> Done:
        """The same in a new process, which imports the libraries itself."""
        done = subprocess.run(
            [str(self.python), *arguments], cwd=cwd or self.folder, env=self.variables(), capture_output=True, text=True
        )
        return Done(done.returncode, done.stdout, done.stderr)

    def variables(self) -> dict[str, str]:
        """Environment variables that leave the checkout off the path."""
        kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "MULKI_PLUGINS")}
        path = [self.folder / "warm"] if self.server else []
        path = os.pathsep.join(map(str, [*path, self.bin, kept.get("PATH", "")]))
        return kept | {"PATH": path, "VIRTUAL_ENV": str(self.folder)}
