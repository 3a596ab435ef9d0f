"""The folder of prepared test images: its limit, full disks, `mulki cache`; and whole runs with and without it."""

import errno
import json
import os
import shutil
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
from attrs import evolve
from click.testing import CliRunner

from mulki_plugins.cli import main
from mulki_plugins.streams import cache_folder
from mulki_plugins.streams.cache import PixelCache
from mulki_plugins.streams.pixel_file import Layout

Usage = namedtuple("Usage", "total used free")
ROW = 3 * 4 * 4


def layout(name, count=10):
    return Layout(key=name * 32, what=f"{name}: {count} test images", count=count, shape=(3, 4, 4))


def fill(cache, name, count=10):
    rows = cache.file(name, layout(name, count))
    rows.prepare()
    for row in range(count):
        rows.write(row, 7, bytes([row]) * ROW)
    return rows


def names(folder):
    return {path.name[0] for path in folder.glob("*.pixels")}


def age(folder, name, days):
    [path] = folder.glob(f"{name}*.pixels")
    os.utime(path, (time.time() - days * 86400,) * 2)


def test_other_files_in_the_folder_are_left_alone(tmp_path, monkeypatch):
    size = layout("a").size
    fill(PixelCache(tmp_path), "a")
    (tmp_path / "mine.pixels").write_text("precious")
    (tmp_path / f"folder-{'0' * 16}.pixels").mkdir()
    monkeypatch.setenv("MULKI_CACHE_LIMIT", f"{size}B")
    fill(PixelCache(tmp_path), "b")
    assert [file.what for file in cache_folder.list_cache(tmp_path)] == ["b: 10 test images"]
    assert [file.path.name[0] for file in cache_folder.clear_cache(tmp_path)] == ["b"]
    assert (tmp_path / "mine.pixels").read_text() == "precious"


def test_a_task_of_another_name_uses_the_same_pixels(tmp_path):
    fill(PixelCache(tmp_path), "a")
    cache = PixelCache(tmp_path)
    renamed = cache.file("a", evolve(layout("a"), what="A (2019)"))
    renamed.prepare()
    assert renamed.read(3, 7) == bytes([3]) * ROW
    assert cache.problems() == []


# the limit


def test_the_files_used_longest_ago_make_room(tmp_path, monkeypatch):
    size = layout("a").size
    monkeypatch.setenv("MULKI_CACHE_LIMIT", f"{2 * size}B")
    for name, days in (("a", 2), ("b", 3)):
        fill(PixelCache(tmp_path), name)
        age(tmp_path, name, days)
    last = PixelCache(tmp_path)
    assert fill(last, "c").read(3, 7) == bytes([3]) * ROW
    assert names(tmp_path) == {"a", "c"}
    fill(last, "d")
    assert names(tmp_path) == {"c", "d"}  # its own stay
    assert fill(last, "e").read(3, 7) == "empty"
    assert names(tmp_path) == {"c", "d"}
    [problem] = last.problems()
    assert problem.startswith("e: 10 test images: not cached")
    assert "MULKI_CACHE_LIMIT" in problem
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 2 * size


def test_files_of_a_running_run_stay(tmp_path, monkeypatch):
    monkeypatch.setenv("MULKI_CACHE_LIMIT", str(2 * layout("a").size))
    running = PixelCache(tmp_path)
    fill(running, "a")
    age(tmp_path, "a", 9)
    fill(PixelCache(tmp_path), "b")
    fill(PixelCache(tmp_path), "c")
    assert names(tmp_path) == {"a", "c"}
    del running
    age(tmp_path, "a", 9)
    fill(PixelCache(tmp_path), "d")
    assert names(tmp_path) == {"c", "d"}


def test_nothing_is_removed_in_vain(tmp_path, monkeypatch):
    fill(PixelCache(tmp_path), "a")
    monkeypatch.setenv("MULKI_CACHE_LIMIT", "0.5K")
    cache = PixelCache(tmp_path)
    assert fill(cache, "b", 100).read(3, 7) == "empty"
    assert names(tmp_path) == {"a"}
    assert "more than the limit of 512 B" in cache.problems()[0]


@pytest.mark.parametrize(
    ("text", "size"), [("", 64 * 2**30), ("20GB", 20 * 2**30), ("1.5 kib", 1536), ("0", 0), ("7", 7)]
)
def test_sizes_as_people_write_them(monkeypatch, text, size):
    monkeypatch.setenv("MULKI_CACHE_LIMIT", text)
    assert cache_folder.size_limit() == size


# the disk


def test_a_disk_is_not_filled(tmp_path, monkeypatch):
    size = layout("a").size
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(20 * 2**10, 0, 2**10 + size - 1))
    cache = PixelCache(tmp_path)
    assert fill(cache, "a").read(3, 7) == "empty"
    assert names(tmp_path) == set()
    assert "too little free space" in cache.problems()[0]
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(20 * 2**10, 0, 2**10 + size))
    assert fill(PixelCache(tmp_path), "a").read(3, 7) == bytes([3]) * ROW


@pytest.mark.parametrize("way", ["others fill it", "quota", "broken"])
def test_a_disk_that_fills_meanwhile_only_warns(tmp_path, monkeypatch, way):
    cache = PixelCache(tmp_path)
    rows = fill(cache, "a", 3)
    assert cache.problems() == []
    if way == "others fill it":
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(2**30, 0, 2**20))
    else:
        code = errno.EDQUOT if way == "quota" else errno.EIO

        def fail(*arguments):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "pwrite", fail)
    rows.write(0, 8, bytes(ROW))
    rows.write(1, 8, bytes(ROW))
    assert rows.read(0, 8) == "empty"
    assert rows.read(2, 7) == bytes([2]) * ROW
    [problem] = cache.problems()
    assert "no more test images are cached" in problem
    assert cache.problems() == []


def test_a_row_cut_short_by_a_full_disk_does_not_count(tmp_path, monkeypatch):
    rows, whole = fill(PixelCache(tmp_path), "a", 3), os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: whole(fd, data[: len(data) // 2], at))
    rows.write(1, 8, bytes(ROW))
    monkeypatch.undo()
    assert rows.read(1, 8) == "empty"
    assert rows.read(1, 7) == "damaged"


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    cache = PixelCache(tmp_path / "file" / "cache")
    assert fill(cache, "a").read(0, 7) == "empty"
    assert "test images are not cached: Not a directory" in cache.problems()[0]


def test_it_is_cleared_while_a_run_uses_it(tmp_path):
    cache = PixelCache(tmp_path)
    rows = fill(cache, "a")
    cache_folder.clear_cache(tmp_path)
    rows.prepare()  # the next evaluation
    assert rows.read(3, 7) == "empty"
    rows.write(3, 7, bytes(ROW))
    assert rows.read(3, 7) == bytes(ROW)
    assert cache.problems() == []


# mulki cache


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MULKI_CACHE", str(tmp_path / "own"))
    return tmp_path / "own" / "pixels"


def mulki(*arguments, status=0):
    done = CliRunner().invoke(main, list(map(str, arguments)))
    assert done.exit_code == status, done.output + done.stderr
    return done.stdout if status == 0 else done.stderr


def test_mulki_cache_lists_and_clears(own_cache):
    assert "0 files, 0 B" in mulki("cache")
    fill(PixelCache(), "a")
    fill(PixelCache(), "b", 3).cache.file("c", layout("c")).prepare()
    (own_cache.parent / "mtil-mini-digits-test-0123456789ab.npz").write_bytes(b"drawn")
    (own_cache.parent / "mtil-mini-my-results.npz").write_bytes(b"mine")
    (own_cache.parent / "notes.txt").write_text("mine")
    (own_cache / f"d-{'0' * 16}.pixels").write_bytes(b"no header")
    age(own_cache, "a", 40)
    listed = json.loads(mulki("cache", "--json"))
    files = {file["what"]: file for file in listed["files"]}
    assert set(files) == {
        "a: 10 test images", "b: 3 test images", "c: 10 test images", "mtil-mini-digits-test: drawn pictures", "damaged"
    }  # fmt: skip
    assert (files["a: 10 test images"]["images"], files["a: 10 test images"]["stored"]) == (10, 10)
    assert listed["folder"] == str(own_cache.parent)
    assert listed["size"] == sum(file["size"] for file in listed["files"])
    table = mulki("cache")
    assert "c: 10 test images (0 of them so far)" in table
    assert "1 file, " in mulki("cache", "--clear", "--older-than", "30")
    assert names(own_cache) == {"b", "c", "d"}
    assert len(json.loads(mulki("cache", "--clear", "--json"))["removed"]) == 4
    left = sorted(path.name for path in own_cache.parent.rglob("*") if path.is_file())
    assert left == ["mtil-mini-my-results.npz", "notes.txt"]


def test_mulki_cache_of_another_folder_and_mistakes(tmp_path):
    fill(PixelCache(tmp_path / "other"), "a")
    assert "a: 10 test images" in mulki("cache", "--folder", tmp_path / "other")
    assert "no such folder" in mulki("cache", "--folder", tmp_path / "nowhere", status=2)
    assert "--older-than needs --clear" in mulki("cache", "--older-than", "3", status=2)
    copy = tmp_path / "other" / "mtil-mini-digits-test-0123456789ab.npz"
    copy.write_bytes(b"a copy of mine")
    mulki("cache", "--clear", "--folder", tmp_path / "other")
    assert [path.name for path in (tmp_path / "other").iterdir()] == [copy.name]


def test_the_cache_folder_in_the_home_folder(monkeypatch):
    monkeypatch.setenv("MULKI_CACHE", "~/mine")
    assert cache_folder.cache_folder() == Path.home() / "mine"


def test_hostile_names_reach_neither_path_nor_terminal(own_cache):
    rows = PixelCache().file(
        "../../x/\x1b[31m", Layout(key="k" * 64, what="\x1b[31m\ud800" * 99, count=1, shape=(3, 4, 4))
    )
    rows.prepare()
    rows.write(0, 7, bytes(ROW))
    assert rows.read(0, 7) == bytes(ROW)
    assert [path.parent for path in own_cache.parent.rglob("*.pixels")] == [own_cache]
    assert "\x1b" not in mulki("cache")


def test_the_command_imports_no_torch(own_cache, monkeypatch):
    for module in ("torch", "avalanche", "open_clip", "torchvision"):
        monkeypatch.setitem(sys.modules, module, None)
    for name in [n for n in sys.modules if n.startswith("mulki_plugins.streams")]:
        monkeypatch.delitem(sys.modules, name)
    assert "0 files" in mulki("cache")
