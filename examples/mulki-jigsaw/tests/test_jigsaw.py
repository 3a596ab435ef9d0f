import json

import pytest
import torch
from click.testing import CliRunner
from mulki_jigsaw.stage import Jigsaw, shuffle_tiles

from mulki_plugins.cli import main
from mulki_plugins.testing import check_plugin

FEW = [
    "stream={name: mtil-mini, tasks: [scans, digits], shots: 4, evaluate_on: validation}",
    "train.iterations=2",
    "train.schedule.warmup=0",
    "train.batch_size=8",
]


def test_the_stage_passes_all_checks():
    check_plugin(Jigsaw, weight=2.0)


def test_shuffling_keeps_every_pixel_and_moves_whole_tiles():
    torch.manual_seed(0)
    x = torch.arange(2 * 3 * 8 * 8.0).reshape(2, 3, 8, 8)
    y = shuffle_tiles(x, 2)
    assert not torch.equal(x, y)
    assert torch.equal(x.flatten().sort().values, y.flatten().sort().values)
    corners = {tuple(x[0, 0, i : i + 4, j : j + 4].flatten().tolist()) for i in (0, 4) for j in (0, 4)}
    assert {tuple(y[0, 0, i : i + 4, j : j + 4].flatten().tolist()) for i in (0, 4) for j in (0, 4)} == corners
    assert torch.equal(shuffle_tiles(x, 1), x)


@pytest.mark.parametrize("words", [["--with", "jigsaw"], ["--strategy", "jigsaw"]])
def test_a_recipe_uses_it_by_name(words, tmp_path):
    settings = [word for setting in FEW for word in ("--set", setting)]
    done = CliRunner().invoke(main, ["run", "mtil", *words, *settings, "--out", str(tmp_path), "--json"])
    assert done.exit_code == 0, done.output
    [run] = json.loads(done.stdout)["runs"]
    assert {"name": "jigsaw", "distribution": "mulki-jigsaw", "version": "1.0.0"}.items() <= run["plugins"][-1].items()
    assert "train/loss/jigsaw" in next(tmp_path.rglob("metrics.csv")).read_text()


def test_tiles_that_do_not_fit_are_an_error(tmp_path):
    settings = [word for setting in [*FEW, "strategy.jigsaw.tiles=5"] for word in ("--set", setting)]
    done = CliRunner().invoke(main, ["run", "mtil", "--strategy", "jigsaw", *settings, "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert "error: jigsaw: 5 tiles do not divide images of 48 x 48 pixels" in done.stderr
