"""The wheel: built from the checkout, and used from an empty folder."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel's path; built from a copy, so that no build folder is left in the checkout."""
    source = tmp_path_factory.mktemp("source")
    tracked = [*ROOT.glob("*.toml"), *ROOT.glob("*.md"), ROOT / "LICENSE", ROOT / "mulki.py"]
    for path in (*tracked, *(p for f in ("mulki_plugins", "recipes", "strategies") for p in (ROOT / f).rglob("*"))):
        if path.is_file() and "__pycache__" not in path.parts:
            target = source / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel):
    inside = {n for n in zipfile.ZipFile(wheel).namelist() if not n.split("/")[0].endswith(".dist-info")}
    expected = {
        str(p.relative_to(ROOT))
        for p in (ROOT / "mulki_plugins").rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    for kind in ("recipes", "strategies"):
        expected |= {
            f"mulki_plugins/{kind}/{p.name}" for p in (ROOT / kind).iterdir() if p.suffix in (".yaml", ".json")
        }
    assert inside == expected | {"mulki.py"}, "`python -m mulki` runs too"
    assert wheel.stat().st_size < 8 * 2**20


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Runs `mulki` from the wheel's files alone, in an empty folder."""
    site = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(site)

    def run(*arguments, cwd):
        environment = {**os.environ, "PYTHONPATH": str(site)}
        command = [sys.executable, "-m", "mulki_plugins", *arguments]
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)

    where = subprocess.run(
        [sys.executable, "-c", "import mulki_plugins; print(mulki_plugins.__file__)"],
        cwd=site, env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True,
    )  # fmt: skip
    assert Path(where.stdout.strip()).is_relative_to(site), "the wheel's files are the ones that run"
    return run


def test_it_works_from_an_empty_folder(installed, tmp_path):
    listed = installed("list", "--json", cwd=tmp_path)
    assert listed.returncode == 0, listed.stderr
    assert {e["name"] for e in json.loads(listed.stdout)["recipes"]} >= {"mtil"}
    assert installed("validate", "recipes/mtil.yaml", cwd=tmp_path).returncode == 0
    few = ["--set", "stream.tasks=[scans,digits]", "--set", "train.iterations=2", "--set", "train.schedule.warmup=0"]
    done = installed("run", "mtil", *few, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "using the recipe 'mtil' of mulki" in done.stderr
    assert "Transfer" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr, "no colour where there is no terminal"
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]
    assert list((tmp_path / "runs" / "mtil").glob("mulki+*/seed-0/result.json"))
