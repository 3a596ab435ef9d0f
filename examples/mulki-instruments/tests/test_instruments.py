import json

import numpy as np
import pytest
from click.testing import CliRunner
from mulki_instruments.stream import TASKS, instruments

from mulki_plugins.cli import main
from mulki_plugins.errors import MulkiError
from mulki_plugins.testing import check_stream


def test_the_stream_passes_all_checks():
    check_stream(instruments, each=4)


def test_a_hand_points_to_its_class():
    """The small hand of a clock is right of the middle at three and left of it at nine."""
    train = instruments(tasks=["clocks"], each=8).tasks[0].train
    dark = 255.0 - train.images.astype(float).mean(3)
    inner = dark[:, 16:32, 12:36]

    def right_of_middle(hour):
        pictures = inner[train.labels == hour - 1]
        return pictures[:, :, 13:].sum() - pictures[:, :, :11].sum()

    assert right_of_middle(3) > 0 > right_of_middle(9)


def test_another_seed_draws_other_pictures():
    one, other = (instruments(tasks=["dice"], each=2, seed=seed).tasks[0].train.images for seed in (0, 1))
    assert not np.array_equal(one, other)


def test_wrong_options_are_errors():
    with pytest.raises(MulkiError, match="did you mean 'clocks'"):
        instruments(tasks=["clock"])
    result = CliRunner().invoke(
        main, ["validate", "instruments", "--set", "stream.each=0", "--set", "train.per_task={clock: {lr: 1}}"]
    )
    assert result.exit_code == 2
    assert "$.stream.each: expected a whole number, at least 1, got 0" in result.stderr
    assert "no task 'clock' (did you mean 'clocks'?)" in result.stderr


def test_a_recipe_uses_it_by_name(tmp_path):
    few = ["stream.each=4", "train.iterations=2", "train.schedule.warmup=0", "train.batch_size=8", "strategy=finetune"]
    settings = [word for setting in few for word in ("--set", setting)]
    done = CliRunner().invoke(main, ["run", "instruments", *settings, "--out", str(tmp_path), "--json"])
    assert done.exit_code == 0, done.output
    [run] = json.loads(done.stdout)["runs"]
    assert run["tasks"] == list(TASKS)
    assert run["status"] == "complete"
