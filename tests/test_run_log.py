"""log.txt in a run's folder."""

import os
import re

import pytest

from mulki_plugins.report.run_log import RunLog


def test_lines_have_a_time_and_are_appended(tmp_path):
    RunLog(tmp_path).line("first")
    assert RunLog(tmp_path).line("second\nthird")
    lines = (tmp_path / "log.txt").read_text("utf-8").splitlines()
    assert [re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", "", line) for line in lines] == ["first", "second", "third"]


def test_the_whole_traceback_with_its_cause_is_kept(tmp_path):
    def fails():
        try:
            raise OSError("the cause")
        except OSError as error:
            raise KeyError("花 \ud800 \x1b[31m") from error

    log = RunLog(tmp_path)
    with pytest.raises(KeyError) as caught:
        fails()
    assert log.traceback(caught.value)
    text = log.path.read_text("utf-8")
    assert "OSError: the cause" in text
    assert "KeyError: " in text
    assert "花" in text
    assert __file__ in text
    assert "\x1b" not in text


def test_an_error_whose_text_fails_is_logged_all_the_same(tmp_path):
    class Broken(Exception):
        def __str__(self):
            raise RuntimeError

    log = RunLog(tmp_path)
    assert log.traceback(Broken())
    assert "Broken" in log.path.read_text("utf-8")


def test_a_log_that_cannot_be_written_is_no_error(tmp_path):
    assert not RunLog(tmp_path / "nowhere").line("lost")
    (tmp_path / "log.txt").mkdir()
    assert not RunLog(tmp_path).line("lost")


def test_the_log_follows_no_link(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("kept")
    folder = tmp_path / "run"
    folder.mkdir()
    os.symlink(outside, folder / "log.txt")
    assert not RunLog(folder).line("lost")
    assert outside.read_text() == "kept"
