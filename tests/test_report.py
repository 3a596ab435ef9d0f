"""Result files, tables, pictures and comparisons."""

import errno
import fcntl
import json
import os
import threading
import warnings

import matplotlib
import numpy as np
import pytest
from click.testing import CliRunner

from mulki_plugins.cli import main
from mulki_plugins.errors import MulkiError
from mulki_plugins.files import in_place_of, is_locked, link_or_copy, locked, umask, write_bytes, write_text
from mulki_plugins.recipe.resolve import resolve
from mulki_plugins.report.compare import comparison_data, groups
from mulki_plugins.report.folder import prepare_folder, run_folder
from mulki_plugins.report.plots import matrix_figure, png
from mulki_plugins.report.result import Result, find_results, read_result
from mulki_plugins.report.tables import comparison_text, matrix_table
from mulki_plugins.report.tensorboard import TensorBoardLogger

pytestmark = pytest.mark.figures


def result(strategy="mulki", seed=0, shift=0.0, **more):
    matrix = [[80.0 + shift, 50.0, 40.0], [75.0, 85.0 + shift, 42.0], [70.0, 80.0, 90.0]]
    return Result(
        recipe="mtil", strategy=strategy, seed=seed, tasks=["a", "b", "c"], zero_shot=[55.0, 51.0, 41.0], matrix=matrix,
        metrics={"transfer": 45.5 + shift, "last": 80.0}, protocol={"classes": "task"}, **{"status": "complete", **more},
    )  # fmt: skip


def test_written_and_read_again(tmp_path):
    result().write(tmp_path)
    again = read_result(tmp_path / "result.json")
    assert again.folder == str(tmp_path)
    again.folder = ""
    assert again == result()
    data = json.loads((tmp_path / "result.json").read_text())
    assert data["tasks"] == ["a", "b", "c"]
    assert "folder" not in data


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[:50],
        lambda text: "[]",
        lambda text: text.replace("50.0", "NaN"),
        lambda text: text.replace("50.0", "1e9"),
        lambda text: text.replace('"50.0"', '"x"').replace("50.0", '"x"'),
        lambda text: text.replace('"tasks"', '"tusks"'),
        lambda text: text.replace('"c"\n', '"c", "d"\n'),
        lambda text: text.replace('"a"', "7"),
    ],
)
def test_a_spoilt_file_is_told_and_never_a_wrong_number(tmp_path, spoil):
    result().write(tmp_path)
    path = tmp_path / "result.json"
    text = spoil(path.read_text())
    assert text != path.read_text()
    path.write_text(text)
    with pytest.raises(MulkiError, match=r"result.json: not the result of a run"):
        read_result(path)


def test_the_table_shows_every_number():
    text = matrix_table(result())
    lines = text.splitlines()
    assert lines[0].split() == ["after", "a", "b", "c", "mean"]
    assert lines[2].split() == ["zero-shot", "55.0", "51.0", "41.0", "49.0"]
    assert lines[4].split() == ["b", "75.0", "85.0", "42.0", "67.3"]
    assert lines[-1] == "Transfer 45.50   Last 80.00"


def test_the_table_of_a_run_that_failed():
    failed = result(status="failed", error="OSError: gone")
    failed.matrix, failed.metrics = failed.matrix[:1], {}
    assert matrix_table(failed).splitlines()[-1] == "failed: 1 of 3 tasks finished; OSError: gone"


def test_names_cannot_steer_the_terminal():
    evil = result()
    evil.tasks[0] = "\x1b[31mred"
    assert "\x1b" not in matrix_table(evil)


def test_runs_are_compared_over_seeds():
    runs = [result(seed=0, shift=0.0), result(seed=1, shift=2.0), result(strategy="finetune", seed=0)]
    first, second = groups(runs)
    assert first.seeds == [0, 1]
    assert first.metrics["transfer"] == pytest.approx((46.5, np.std([45.5, 47.5], ddof=1)))
    assert second.metrics["transfer"] == (45.5, None)
    text = comparison_text(runs)
    assert "46.50 ± 1.41" in text
    assert json.loads(json.dumps(comparison_data(runs)))["summary"][0]["metrics"]["transfer"]["mean"] == 46.5


def test_only_repetitions_of_one_experiment_are_averaged():
    longer = result(seed=1, shift=2.0)
    longer.settings = "other"
    assert [group.seeds for group in groups([result(), longer])] == [[0], [1]]
    assert "differ in their settings" in comparison_text([result(), longer])
    later = result(seed=0, shift=2.0)
    later.started = "2030-01-01T00:00:00+00:00"
    [group] = groups([later, result()])
    assert group.seeds == [0], "a repetition is no second sample"
    assert group.metrics["transfer"] == (47.5, None)


@pytest.mark.parametrize(
    "wrong",
    [
        {"recipe": 5}, {"strategy": None}, {"seed": "0"}, {"error": 3}, {"tasks": []}, {"tasks": 3}, {"matrix": [[1]]},
        {"matrix": "no"}, {"metrics": {"last": float("nan")}}, {"metrics": []}, {"protocol": 1}, {"zero_shot": [101, 1, 1]},
    ],
)  # fmt: skip
def test_a_file_that_is_no_result(wrong, tmp_path):
    result().write(tmp_path)
    data = json.loads((tmp_path / "result.json").read_text())
    (tmp_path / "result.json").write_text(json.dumps({**data, **wrong}))
    with pytest.raises(MulkiError, match="not the result of a run"):
        find_results([tmp_path])


@pytest.mark.parametrize("name", ["$1_$5", "a$\\frac{", "^_{}\\", "花 🦉", "a\nb\x1b", "\ud800", "x" * 5000, "%#&~"])
def test_a_name_in_a_picture_is_no_formula(tmp_path, name):
    odd = result(strategy=name)
    odd.recipe, odd.tasks, odd.metrics = name, [name, "b", "c"], {name: 1.0}
    logger = TensorBoardLogger(tmp_path)
    with warnings.catch_warnings(), matplotlib.rc_context({"text.usetex": True, "font.family": "no-such-font"}):
        warnings.simplefilter("error")
        assert png(matrix_figure(odd)).startswith(b"\x89PNG")
        logger.log_single_metric("matrix", matrix_figure(odd), 1)
    logger.close()


def test_many_tasks_make_a_picture_of_bounded_size():
    tasks = [f"task {i}" for i in range(200)]
    figure = matrix_figure(Result(recipe="r", strategy="s", seed=0, tasks=tasks, matrix=[[50.0] * 200] * 200))
    assert max(figure.get_size_inches()) <= 30
    assert len(figure.axes[0].texts) + len(figure.axes[0].get_xticks()) < 2600


def test_a_run_whose_process_is_gone_is_not_running(tmp_path):
    result(status="running").write(tmp_path)
    with locked(tmp_path):
        assert read_result(tmp_path / "result.json").status == "running"
    found = read_result(tmp_path / "result.json")
    assert found.status == "stopped"
    assert "ended before the run was complete" in found.error
    assert "stopped" in comparison_text([found])


def test_looking_whether_a_run_is_going_on_stops_none_from_beginning(tmp_path):
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)  # as a reader has it for a moment
    threading.Timer(0.1, os.close, [descriptor]).start()
    with locked(tmp_path):
        assert is_locked(tmp_path)
    assert is_locked(tmp_path) is False


def test_a_shared_lock_counts_where_asked(tmp_path):
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    assert (is_locked(tmp_path), is_locked(tmp_path, even_shared=True)) == (False, True)
    os.close(descriptor)
    assert is_locked(tmp_path, even_shared=True) is False


def test_a_file_gets_a_second_name_or_takes_a_place(tmp_path, monkeypatch):
    first, second, third = (tmp_path / name for name in "abc")
    first.write_text("one")
    link_or_copy(first, second)
    assert second.samefile(first)
    for _ in range(2):  # the second time both are names of one file
        with in_place_of(third) as temporary:
            temporary.unlink()
            link_or_copy(first, temporary)
    assert third.samefile(first)
    with in_place_of(third, if_absent=True) as temporary:
        temporary.write_text("late")
    assert third.read_text() == "one"
    (tmp_path / "link").symlink_to(first)
    with pytest.raises(MulkiError, match="is a link"):
        link_or_copy(tmp_path / "link", tmp_path / "d")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "link"]

    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)  # as on a file system without hard links
    link_or_copy(first, tmp_path / "d")
    with in_place_of(tmp_path / "e", if_absent=True) as temporary:
        temporary.write_text("new")
    assert not (tmp_path / "d").samefile(first)
    assert [(tmp_path / name).read_text() for name in "de"] == ["one", "new"]
    assert (tmp_path / "e").stat().st_mode & 0o777 == 0o666 & ~umask()


def test_what_cannot_be_compared_is_said():
    other = result(strategy="b")
    other.protocol = {"classes": "all"}
    assert "different protocols" in comparison_text([result(), other])
    swapped = result(strategy="b")
    swapped.tasks = ["c", "b", "a"]
    assert "different tasks" in comparison_text([result(), swapped])
    assert "left out: mtil / b / seed 0" in comparison_text(
        [result(), result(), result(strategy="b", status="running")]
    )


def test_found_below_a_folder_each_once(tmp_path):
    for strategy, seed in (("mulki", 0), ("mulki", 1), ("finetune", 0)):
        folder = tmp_path / "mtil" / strategy / f"seed-{seed}"
        folder.mkdir(parents=True)
        result(strategy, seed).write(folder)
    aside = tmp_path / "mtil" / "mulki" / "seed-0.before-1"
    aside.mkdir()
    result("mulki", 0).write(aside)
    assert len(find_results([tmp_path])[0]) == 3
    assert len(find_results([tmp_path, tmp_path / "mtil" / "mulki"])[0]) == 3
    assert len(find_results([aside])[0]) == 1
    for bad in (tmp_path / "nowhere", tmp_path / "mtil" / "mulki" / "seed-0" / ".."):
        if not bad.exists():
            with pytest.raises(MulkiError, match="no such folder"):
                find_results([bad])
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(MulkiError, match=r"no result.json in it or below it"):
        find_results([empty])


def test_one_damaged_file_does_not_hide_the_others(tmp_path):
    for seed, text in ((0, ""), (1, "{"), (2, "[" * 5000)):
        folder = tmp_path / f"seed-{seed}"
        folder.mkdir()
        result(seed=seed).write(folder)
        if text:
            (folder / "result.json").write_text(text)
    found, wrong = find_results([tmp_path])
    assert [run.seed for run in found] == [0]
    assert len(wrong) == 2
    done = CliRunner().invoke(main, ["results", str(tmp_path)])
    assert done.exit_code == 0
    assert done.stderr.count("warning: left out: ") == 2


def test_an_earlier_run_is_moved_aside(tmp_path):
    folder = run_folder(tmp_path, resolve("mtil").recipe, 3)
    assert folder == tmp_path / "mtil" / "mulki-plus" / "seed-3"
    assert prepare_folder(folder) is None
    assert prepare_folder(folder) is None, "an empty folder is used"
    for number in (1, 2):
        (folder / "result.json").write_text(f"{number}")
        assert prepare_folder(folder).name == f"seed-3.before-{number}"
        assert list(folder.iterdir()) == []
    assert (folder.with_name("seed-3.before-2") / "result.json").read_text() == "2"


def test_two_processes_cannot_write_one_run(tmp_path):
    folder = tmp_path / "seed-0"
    prepare_folder(folder)
    (folder / "result.json").write_text("1")
    with locked(folder):
        for attempt in (prepare_folder, lambda path: locked(path).__enter__()):
            with pytest.raises(MulkiError, match="another process is writing this run"):
                attempt(folder)
    assert prepare_folder(folder).name == "seed-0.before-1"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_made(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(MulkiError, match="cannot be made"):
        prepare_folder(tmp_path / "x" / "y")


def test_out_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MulkiError, match="cannot be made"):
        prepare_folder(tmp_path / "file" / "y")


def test_files_are_written_whole(tmp_path):
    path = tmp_path / "x.txt"
    write_text(path, "one")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    with pytest.raises(TypeError):
        write_bytes(path, "no bytes")
    assert path.read_text() == "one"
    assert [p.name for p in tmp_path.iterdir()] == ["x.txt"], "nothing temporary stays"


def test_the_picture_has_every_cell(tmp_path):
    figure = matrix_figure(result())
    texts = [t.get_text() for t in figure.axes[0].texts]
    assert texts[:3] == ["55", "51", "41"]
    assert len(texts) == 12
    figure.savefig(tmp_path / "m.png")
    assert (tmp_path / "m.png").stat().st_size > 5000


WIDE = ["\u82b1", "cafe\u0301", "\U0001f426 birds", "digits", "\u041c\u0438\u0440"]


def test_columns_of_wide_characters_stand_below_each_other():
    from rich.cells import cell_len

    run = Result(recipe="r", strategy="s", seed=0, tasks=WIDE, matrix=[[50.0] * 5] * 5, status="complete")
    lines = matrix_table(run).splitlines()
    assert len({cell_len(line) for line in lines if line}) == 1, lines


def test_pictures_have_no_boxes_and_warn_of_nothing(tmp_path):
    from mulki_plugins.report.plots import drawable, families_for

    run = Result(recipe="r", strategy="s", seed=0, tasks=WIDE, matrix=[[50.0] * 5] * 5, status="complete")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = matrix_figure(run)
        figure.savefig(tmp_path / "matrix.png")
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert labels[3:] == ["digits", "\u041c\u0438\u0440"]
    assert len(set(labels)) == 5
    unknown = "\U000f0000"  # for private use: no font has it
    assert drawable(f"a{unknown}b", families_for([unknown])) == "a[U+F0000]b"
    assert drawable("\uff21\uff22", families_for([])) == "AB", "in another form, where a font has that"
