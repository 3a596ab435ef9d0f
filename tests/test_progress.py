"""What a run shows while it goes on: lines in a pipe, the time left, quiet and verbose, and `mulki results --watch`."""

import io
import os
import re
import sys
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from mulki_plugins.cli import main
from mulki_plugins.cli.watch import progress_of, watch_output
from mulki_plugins.errors import MulkiError
from mulki_plugins.files import locked
from mulki_plugins.recipe.resolve import Changes, resolve
from mulki_plugins.report.progress import ProgressLogger
from mulki_plugins.report.run_log import RunLog
from mulki_plugins.report.time_left import TimeLeft, in_words
from tests.conftest import small_world

SMALL = [
    "--set", "stream={name: small}", "--set", "model={name: small-clip}", "--set", "device=cpu",
    "--set", "train.iterations=2", "--set", "train.schedule.warmup=0", "--set", "train.batch_size=4",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def small_streams():
    with small_world():
        yield


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


# the time left


def test_the_time_left_is_that_of_all_kinds_of_work():
    clock = Clock()
    left = TimeLeft(steps=[10, 10], evaluations=3, clock=clock)
    assert left.seconds() is None
    left.evaluation_begins()
    clock.now = 8
    left.batch_ends(0.5)
    assert left.seconds() is None, "no step has been seen"
    clock.now = 16
    left.evaluation_ends()
    left.training_begins(0)
    clock.now = 20  # 4 s until the first step has ended
    left.step_ends(1)
    assert left.seconds() is None
    for done in range(2, 6):
        clock.now += 3
        left.step_ends(done)
    assert left.seconds() == pytest.approx(15 * 3 + 4 + 2 * 16)
    for done in range(6, 11):
        clock.now += 3
        left.step_ends(done)
    left.training_ends()
    assert left.seconds() == pytest.approx(10 * 3 + 4 + 2 * 16)
    left.evaluation_begins()
    left.batch_ends(0.25)
    assert left.seconds() == pytest.approx(10 * 3 + 4 + 1.75 * 16)
    clock.now += 20
    left.evaluation_ends()
    left.training_begins(1)
    clock.now += 6
    left.step_ends(1)
    clock.now += 5
    left.step_ends(2)
    clock.now += 5
    left.step_ends(3)
    clock.now += 5
    left.step_ends(4)
    assert left.seconds() == pytest.approx(6 * 5 + 20), "the second task's own pace"


def test_a_resumed_run_does_not_count_the_steps_before():
    clock = Clock()
    left = TimeLeft(steps=[10, 10], evaluations=3, clock=clock)
    left.training_begins(1)
    left.step_ends(6)
    for done in (7, 8, 9):
        clock.now += 2
        left.step_ends(done)
    assert left.step == 2
    left.evaluation = 30.0
    assert left.seconds() == pytest.approx(1 * 2 + 30), "the evaluations before were not seen, and are over"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, ""), (0.2, "1 s left"), (59, "59 s left"), (90, "2 min left"), (6300, "1 h 45 min left")],
)
def test_the_time_left_in_words(seconds, text):
    assert in_words(seconds) == text


# lines


class Training:
    """Calls a logger as Avalanche does, with a clock that the test sets."""

    def __init__(self, monkeypatch, tasks=2, steps=100, **options):
        self.stderr = io.StringIO()
        monkeypatch.setattr(sys, "stderr", self.stderr)
        self.clock = Clock()
        self.progress = ProgressLogger(0, clock=self.clock, **options)
        names = [f"task{i}" for i in range(tasks)]
        recipe = resolve("mtil", Changes(settings=(f"train.iterations={steps}",))).recipe
        self.progress.expect(recipe, dict.fromkeys(names, (800, 320)))
        self.strategy = SimpleNamespace(
            clock=SimpleNamespace(train_exp_counter=0, train_exp_iterations=0), steps=steps, budgets=1, is_training=True,
            mb_y=[0] * 64, experience=SimpleNamespace(task_name="task0"), between_batches=lambda: None,
        )  # fmt: skip

    def evaluate(self, seconds):
        self.progress.before_eval(self.strategy, [])
        for _ in range(10):
            self.clock.now += seconds / 10
            self.progress.after_eval_iteration(self.strategy, [])
        self.progress.after_eval(self.strategy, [])

    def train(self, steps, seconds):
        self.progress.task_begins(0, "task0")
        self.progress.before_training_exp(self.strategy, [])
        for i in range(steps):
            self.clock.now += seconds
            self.strategy.clock.train_exp_iterations = i
            self.progress.log_single_metric("train/loss/total", 1.25, i)
            self.progress.log_single_metric("train/accuracy", 50, i)
            self.progress.after_training_iteration(self.strategy, [])

    @property
    def lines(self):
        return self.stderr.getvalue().splitlines()


def test_a_pipe_gets_a_line_a_minute_with_step_loss_and_time_left(monkeypatch):
    training = Training(monkeypatch)
    training.evaluate(30)
    training.train(100, 2.0)
    lines = training.lines
    assert lines[0] == "[1/2] task0: training"
    assert [re.search(r"\d+ of 100", line)[0] for line in lines[1:]] == ["30 of 100", "60 of 100", "90 of 100"]
    # 70 + 100 steps of 2 s, one preparation of 2 s, and two evaluations of 30 s
    assert lines[1] == "[1/2] task0: training: 30 of 100, loss 1.250, accuracy 50 %, 7 min left"


def test_a_long_evaluation_and_long_preparations_show_too(monkeypatch):
    training = Training(monkeypatch)
    training.evaluate(300)
    assert training.lines[0].startswith("evaluating the pre-trained model: 128 of 640, task0")
    assert len(training.lines) == 5
    training.progress.follow(training.strategy)
    training.progress.task_begins(0, "task0")
    for _ in range(3):
        training.clock.now += 40
        training.strategy.between_batches()
    assert training.lines[-1].startswith("[1/2] task0: preparing: 2 batches of images read")


def test_quiet_prints_warnings_only_and_the_log_has_everything(monkeypatch, tmp_path):
    training = Training(monkeypatch, verbosity=-1)
    training.progress.log = RunLog(tmp_path)
    training.evaluate(100)
    training.train(50, 5.0)
    training.progress.say("warning: something is odd")
    assert training.lines == ["warning: something is odd"]
    log = (tmp_path / "log.txt").read_text()
    assert "[1/2] task0: training" in log
    assert "evaluated 640 images in 100.0 s" in log


def test_verbose_prints_how_long_each_part_took(monkeypatch):
    training = Training(monkeypatch, verbosity=1)
    training.evaluate(30)
    training.train(5, 2.0)
    text = "\n".join(training.lines)
    assert "    evaluated 640 images in 30.0 s" in text
    assert "    the first step ended after 2.0 s" in text
    assert "    [1/2] task0: preparing" in text
    assert text.count("[1/2] task0: training") == 1


def test_a_terminal_shows_one_line_with_the_time_left_of_the_run(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    training = Training(monkeypatch)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    training.evaluate(30)
    training.train(50, 2.0)
    training.progress._bar.refresh()
    training.progress.say("a line")
    training.progress.stop()
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", terminal.getvalue())
    assert "evaluating the pre-trained model" in plain
    assert re.search(r"\[1/2\] task0 .* 50/100 loss 1\.250, accuracy 50 % +6 min left", plain)
    assert "a line" in plain


def test_an_error_while_building_removes_the_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    progress = ProgressLogger(0)
    with progress.during("building"):
        pass
    assert progress._bar is not None
    with pytest.raises(KeyError), progress.during("building"):
        {}["no such part"]
    assert progress._bar is None


# the command line


def test_quiet_and_verbose_runs(tmp_path):
    def run(*words):
        return CliRunner().invoke(
            main, ["run", "mtil", "--strategy", "finetune", *SMALL, "--out", str(tmp_path), *words]
        )

    quiet = run("-q")
    assert quiet.exit_code == 0, quiet.stderr
    assert "Last" in quiet.stdout
    assert "training" not in quiet.stderr
    loud = run("-v")
    assert "evaluated" in loud.stderr
    assert "building the stream small and the model small-clip" in loud.stderr
    assert run("-q", "-v").exit_code == 2


# --watch


def test_watch_prints_again_only_what_has_changed(tmp_path, capsys):
    texts = iter(["one\n", "one\n", MulkiError("no runs yet"), "two\n"])

    def command():
        text = next(texts)
        if isinstance(text, MulkiError):
            raise text
        sys.stdout.write(text)

    slept = []

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 4:
            raise KeyboardInterrupt

    watch_output(command, [tmp_path], sleep=sleep)
    assert capsys.readouterr().out == "one\nno runs yet\ntwo\n"


@pytest.mark.skipif(os.name == "nt", reason="folders are not locked there")
def test_watch_shows_what_a_run_in_progress_said_last(tmp_path):
    folder = tmp_path / "mtil" / "mulki-plus" / "seed-0"
    folder.mkdir(parents=True)
    RunLog(folder).line("first")
    RunLog(folder).line("last \x1b[31m")
    assert list(progress_of([tmp_path, tmp_path / "nowhere"])) == []
    with locked(folder):
        [line] = progress_of([tmp_path])
    assert line.startswith(f"{folder}: ")
    assert "last" in line
    assert "\x1b" not in line
