"""Errors of libraries in MulKI's words."""

import errno

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from mulki_plugins.errors import describe_error
from mulki_plugins.failures import explain_failure


class Bad(Dataset):
    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 4

    def __getitem__(self, index):
        raise self.error


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("too small:\n  (3, 4)"), "ValueError: too small: (3, 4)"),
        (KeyError("a"), "KeyError: 'a'"),
        (RuntimeError(), "RuntimeError"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), "UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_a_workers_error_is_the_one_it_had(error, line):
    with pytest.raises(Exception) as caught:  # noqa: PT011 (torch chooses the type)
        next(iter(DataLoader(Bad(error), num_workers=1)))
    assert describe_error(caught.value).startswith(line)
    assert "Traceback" not in describe_error(caught.value)


def test_a_text_of_several_lines_is_not_cut():
    assert describe_error(RuntimeError("Error(s) in x:\n\tMissing: a\n\tUnexpected: b")) == (
        "RuntimeError: Error(s) in x: Missing: a Unexpected: b"
    )


def misfit():
    with pytest.raises(RuntimeError) as caught:
        torch.nn.Linear(2, 3).load_state_dict({"weight": torch.zeros(3, 4), "other": torch.zeros(1)})
    return caught.value


def unpickled(tmp_path):
    torch.save(Bad(None), tmp_path / "code.pt")
    with pytest.raises(Exception) as caught:  # noqa: PT011
        torch.load(tmp_path / "code.pt", weights_only=True)
    return caught.value


def damaged(tmp_path):
    torch.save({"a": torch.zeros(1000)}, tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:700])
    with pytest.raises(Exception) as caught:  # noqa: PT011
        torch.load(tmp_path / "cut.pt", weights_only=True)
    return caught.value


def test_weights_that_do_not_fit_are_named():
    what, _ = explain_failure(misfit())
    for words in ("'bias'", "'other'", "'weight'"):
        assert words in what
    assert "\n" not in what


def test_files_of_weights_that_are_none(tmp_path):
    assert "more than tensors" in explain_failure(unpickled(tmp_path))[0]
    assert "weights_only" not in " ".join(explain_failure(unpickled(tmp_path)))
    assert "damaged" in explain_failure(damaged(tmp_path))[0]


@pytest.mark.parametrize(
    ("error", "what", "hint"),
    [
        (MemoryError(), "out of memory", "train.batch_size"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory", "train.batch_size"),
        (OSError(errno.EMFILE, "Too many open files"), "too many files", "ulimit -n"),
        (RuntimeError("can't start new thread"), "no further process", "train.workers"),
        (OSError(errno.ENOSPC, "x", "runs/a"), "runs/a: no room", "disk space"),
        (RuntimeError("DataLoader worker (pid 3) is killed by signal: Bus error. It is"), "/dev/shm", "--shm-size"),
        (RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed. "), "signal Killed", "train.workers"),
        (RuntimeError("CUDA error: device-side assert triggered\nCUDA kernel errors"), "out of range", "device=cpu"),
        (RuntimeError("CUDA error: an illegal memory access was encountered\nx"), "illegal memory access", "resume"),
        (RuntimeError("CUDA error: no kernel image is available for execution"), "not built for this GPU", "device"),
        (RuntimeError('"addmm_impl" not implemented for \'Half\''), "Half", "train.precision=fp32"),
        (ModuleNotFoundError("No module named 'timm'", name="timm"), "'timm' is not installed", "install"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), "server cannot be reached", "local file"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a.png"), "a.png: No such file", "must be there"),
    ],
)  # fmt: skip
def test_known_failures(error, what, hint):
    found = explain_failure(error)
    assert what in found[0]
    assert hint in found[1]


@pytest.mark.parametrize("error", [ValueError("timed out"), KeyError("x"), RuntimeError("mat1 and mat2"), Exception()])
def test_what_is_not_known_is_not_guessed(error):
    assert explain_failure(error) is None
