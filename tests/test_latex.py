"""LaTeX itself sets the tables for a paper, whatever names are in them."""

import shutil
import subprocess

import pytest
from click.testing import CliRunner

from mulki_plugins.cli import main
from tests.sample_runs import write_run
from tests.test_page import HOSTILE

pytestmark = pytest.mark.skipif(shutil.which("pdflatex") is None, reason="there is no pdflatex")

LATIN = [name for name in HOSTILE if name.isascii()] + [
    "naïve",
    "±1",
    '"quoted" -- [b]',
    "100 %",
    "a'b`c",
    "?`!`",
    "\\\\[2cm]",
    "^^41",
]
DOCUMENT = r"""
\documentclass{article}
\usepackage{booktabs,graphicx}
\begin{document}
\input{report.tex}

\input{results.tex}
\end{document}
"""


def mulki(*arguments):
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What pdflatex says about the tables of a report and of results."""
    folder = tmp_path_factory.mktemp("latex")
    for seed in (0, 1):
        for noise, name in enumerate(LATIN):
            write_run(folder, name, seed, tasks=LATIN, recipe=LATIN[0], noise=noise, predictions=False, losses=False)
    runs = folder / "runs"
    mulki("report", runs, "--out", folder / "page.html", "--resamples", "100", "--latex", folder / "report.tex")
    (folder / "results.tex").write_text(mulki("results", runs, "--format", "latex"))
    (folder / "all.tex").write_text(DOCUMENT)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-draftmode", "-no-shell-escape", "all.tex"]
    done = subprocess.run(
        command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
    )
    return done, (folder / "all.log").read_text("utf-8", errors="replace")


def test_they_compile(compiled):
    done, log = compiled
    errors = [line for line in log.splitlines() if line.startswith("!")]
    assert errors == []
    assert done.returncode == 0


def test_no_name_is_a_command(compiled):
    _, log = compiled
    assert "/etc/passwd" not in log, "no file is read that a name names"
    assert "Missing character" not in log
