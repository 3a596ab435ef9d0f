"""The wheel: it holds what it should, and works from an empty folder."""

import json
import zipfile

from tests.environments import ROOT


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel):
    inside = {n for n in zipfile.ZipFile(wheel).namelist() if not n.split("/")[0].endswith(".dist-info")}
    expected = {
        str(p.relative_to(ROOT))
        for p in (ROOT / "mulki_plugins").rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    for kind in ("recipes", "strategies", "studies"):
        expected |= {
            f"mulki_plugins/{kind}/{p.name}" for p in (ROOT / kind).iterdir() if p.suffix in (".yaml", ".json")
        }
    assert inside == expected | {"mulki.py"}, "`python -m mulki` runs too"
    assert wheel.stat().st_size < 8 * 2**20


def test_it_works_from_an_empty_folder(environment, tmp_path):
    def mulki(*arguments):
        return environment.run_anew("-m", "mulki_plugins", *arguments, cwd=tmp_path)

    listed = mulki("list", "--json")
    assert listed.returncode == 0, listed.stderr
    assert {e["name"] for e in json.loads(listed.stdout)["recipes"]} >= {"mtil"}
    assert mulki("validate", "recipes/mtil.yaml").returncode == 0
    few = (
        "stream.tasks=[scans,digits]",
        "stream.evaluate_on=validation",
        "stream.shots=2",
        "train.iterations=2",
        "train.schedule.warmup=0",
    )
    done = mulki("run", "mtil", *(word for setting in few for word in ("--set", setting)))
    assert done.returncode == 0, done.stderr
    assert "using the recipe 'mtil' of mulki" in done.stderr
    assert "Transfer" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr, "no colour without a terminal"
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]
    assert list((tmp_path / "runs" / "mtil").glob("mulki-plus+*/seed-0/result.json"))
