"""`mulki report`: the page and the tables of a paper say what result.json says, for every kind of run and name."""

import csv
import io
import itertools
import json
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
from click.testing import CliRunner

from mulki_plugins.cli import main
from mulki_plugins.report.formats import escape_latex
from mulki_plugins.report.page.answers import accuracy_interval, count_test_images, read_answers
from mulki_plugins.report.page.experiment import experiments
from mulki_plugins.report.page.losses import POINTS, read_losses, smooth
from mulki_plugins.report.page.paper import CSV_HEAD
from mulki_plugins.report.page.svg import shorten, spread, ticks
from mulki_plugins.report.page.view import command_of, rankings
from mulki_plugins.report.result import Result, find_results, read_result
from tests.sample_runs import write_run

HOSTILE = [
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</title></style></script><script>alert(2)//", "x" * 300,
    "\x1b[2J\x07red", "\u202egnp.exe", "עברית", "{{ 7 * 7 }}{% raw %}", "$\\input{/etc/passwd}$ %_#&^~{", "=1+1", "a\nb\tc",
    "🦉 花",
]  # fmt: skip


class Page(HTMLParser):
    """The elements of a page, and the texts of its cells."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.scripts, self.cells, self.text = [], [], [], []
        self.stack = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "td":
            self.cells.append([dict(attributes), ""])
        self.stack.append(tag)

    def handle_endtag(self, tag):
        if tag in self.stack:
            while self.stack.pop() != tag:
                pass

    def handle_data(self, data):
        if "script" in self.stack:
            self.scripts.append(data)
        elif "style" not in self.stack:
            self.text.append(data)
            if "td" in self.stack and self.cells:
                self.cells[-1][1] += data

    def count(self, tag):
        return sum(name == tag for name, _ in self.elements)


def make_report(folder, *arguments, status=0):
    """Run the command on a folder's runs; returns the page's text."""
    out = folder / "page.html"
    done = CliRunner().invoke(
        main, ["report", str(folder / "runs"), "--out", str(out), "--resamples", "300", *arguments]
    )
    assert done.exit_code == status, done.output
    return out.read_text("utf-8") if status == 0 else done.stderr


@pytest.fixture
def study(tmp_path):
    """Two strategies with two seeds, and one that answers like the first."""
    for seed in (0, 1):
        write_run(tmp_path, "good", seed, skill=0.9, noise=seed)
        write_run(tmp_path, "bad", seed, skill=0.6, noise=2 + seed)
        write_run(tmp_path, "same", seed, skill=0.9, noise=seed)
    return tmp_path


def test_every_accuracy_and_metric_is_that_of_the_result(study):
    page = Page(make_report(study))
    runs = find_results([study / "runs"])[0]
    shown = Counter(float(about["data-value"]) for about, _ in page.cells if "data-value" in about)
    heat = [(about, text) for about, text in page.cells if re.search(r"\bq\d", about.get("class", ""))]
    expected = [v for run in runs for row in (run.zero_shot, *run.matrix) for v in row]
    assert Counter(float(about["data-value"]) for about, _ in heat) == Counter(expected)
    for about, text in heat:
        assert text.startswith(f"{float(about['data-value']):.1f}")
    for strategy in ("good", "bad"):
        for name in ("transfer", "average", "last", "forgetting"):
            mean = np.mean([run.metrics[name] for run in runs if run.strategy == strategy])
            assert any(value == pytest.approx(mean, abs=1e-12) for value in shown), (strategy, name)


def test_a_cell_says_its_interval_and_its_change(study):
    run = next(run for run in find_results([study / "runs"])[0] if run.strategy == "bad" and run.seed == 0)
    page = Page(make_report(study))
    value = run.matrix[1][0]
    low, high = accuracy_interval(value, 40)
    change = f"{value - run.zero_shot[0]:+.1f}".replace("-", "\u2212")
    texts = [text for about, text in page.cells if about.get("data-value") == repr(value)]
    assert f"{value:.1f}{low:.0f}–{high:.0f}{change}" in texts


def test_the_tests_find_what_is_there(study):
    [experiment] = experiments(find_results([study / "runs"])[0], 500)
    names = [strategy.name for strategy in experiment.strategies]
    good, bad, same = (names.index(name) for name in ("good", "bad", "same"))
    assert experiment.compared("last", good, same).test.p == 1, "they gave the same answers"
    clear = experiment.compared("last", good, bad)
    assert clear.significant
    assert clear.test.difference == pytest.approx(-experiment.compared("last", bad, good).test.difference)
    assert clear.corrected >= clear.test.p
    assert experiment.best("last") == sorted([good, same]), "tied within significance"
    assert clear.test.method == "bootstrap over images"
    assert experiments(find_results([study / "runs"])[0], 500)[0].tests == experiment.tests


def test_nothing_is_best_without_a_test(tmp_path):
    write_run(tmp_path, "good", skill=0.9)
    write_run(tmp_path, "bad", skill=0.4, noise=1)
    write_run(tmp_path, "other", predictions=False)
    [experiment] = experiments(find_results([tmp_path / "runs"])[0], 200)
    assert experiment.compared("last", 0, 1) is not None
    assert experiment.best("last") == []
    assert r"\textbf" not in read_tables(tmp_path)[0]


def test_without_predictions_seeds_are_tested_and_the_page_says_so(tmp_path):
    for seed in range(3):
        write_run(tmp_path, "good", seed, skill=0.9, noise=seed, predictions=False)
        write_run(tmp_path, "bad", seed, skill=0.4, noise=seed + 5, predictions=False)
    [experiment] = experiments(find_results([tmp_path / "runs"])[0], 200)
    assert experiment.tests["last"][0].test.method == "paired t test over seeds"
    assert experiment.strategies[0].estimates["last"].method == "seeds"
    assert "it kept no predictions" in make_report(tmp_path)


def test_an_interval_of_percentages_stays_within_them(tmp_path):
    for seed in range(2):
        write_run(tmp_path, "good", seed, skill=0.9 + 0.09 * seed, noise=seed)
        write_run(tmp_path, "bad", seed, skill=0.9 + 0.09 * seed, noise=seed, predictions=False)
    [experiment] = experiments(find_results([tmp_path / "runs"])[0], 200)
    intervals = [estimate.interval for strategy in experiment.strategies for estimate in strategy.estimates.values()]
    assert all(0 <= low <= high <= 100 for low, high in intervals)
    assert 0.0 in [low for low, _ in intervals], "else the test shows nothing"


def test_predictions_of_other_accuracies_are_not_used(tmp_path):
    run = write_run(tmp_path)
    file = tmp_path / "runs" / "0" / "result.json"
    data = json.loads(file.read_text())
    data["matrix"][0][0] = 1.0
    file.write_text(json.dumps(data))
    assert read_answers(read_result(file)) == (None, "its predictions do not give the accuracies of its result")
    assert read_answers(run)[1] == "it has no folder"


def test_other_test_images_are_not_compared(tmp_path):
    write_run(tmp_path, "good", skill=0.9)
    write_run(tmp_path, "other", images=60)
    [experiment] = experiments(find_results([tmp_path / "runs"])[0], 200)
    assert not experiment.tests
    assert any("other images" in note for note in experiment.notes)


def test_orders_recipes_and_protocols_are_kept_apart(tmp_path):
    write_run(tmp_path, "one", tasks=("a", "b", "c"))
    write_run(tmp_path, "one", tasks=("b", "a", "c"))
    write_run(tmp_path, "one", recipe="other")
    write_run(tmp_path, "one", protocol={"classes": "all"})
    page = Page(make_report(tmp_path))
    assert sum(about.get("class") == "experiment" for tag, about in page.elements if tag == "section") == 4
    assert "No critical-difference diagram" in "".join(page.text)


def test_many_streams_give_a_critical_difference_diagram(tmp_path):
    for i in range(5):
        for strategy, skill in (("good", 0.95), ("middle", 0.7), ("bad", 0.45)):
            write_run(tmp_path, strategy, skill=skill, noise=i, recipe=f"stream-{i}", losses=False)
    write_run(tmp_path, "good", recipe="alone")
    ranked = rankings(experiments(find_results([tmp_path / "runs"])[0], 100))
    assert ranked["last"].names == ["good", "middle", "bad"]
    assert ranked["last"].streams == 5
    text = make_report(tmp_path)
    assert "Mean ranks over 5 streams: good 1.00, middle 2.00, bad 3.00" in text


def test_unfinished_runs_are_shown_and_never_compared(tmp_path):
    write_run(tmp_path, "good")
    write_run(tmp_path, "broken", rows=1, error="OSError: no space left")
    write_run(tmp_path, "begun", rows=0)
    text = "".join(Page(make_report(tmp_path)).text)
    assert "1 of 3 tasks finished. OSError: no space left" in text
    [experiment] = experiments(find_results([tmp_path / "runs"])[0], 100)
    assert [strategy.name for strategy in experiment.strategies] == ["good"]


def test_only_unfinished_runs(tmp_path):
    write_run(tmp_path, "broken", rows=1)
    assert "None of these runs is complete" in make_report(tmp_path)


def test_a_single_task_and_an_old_result(tmp_path):
    write_run(tmp_path, "good", tasks=("alone",))
    write_run(tmp_path, "bad", tasks=("alone",), skill=0.2)
    old = tmp_path / "runs" / "old"
    old.mkdir()
    data = {
        "recipe": "old",
        "strategy": "mulki",
        "seed": 3,
        "status": "complete",
        "tasks": ["a", "b"],
        "matrix": [[50, 40], [45, 60]],
    }
    (old / "result.json").write_text(json.dumps(data))
    text = "".join(Page(make_report(tmp_path)).text)
    assert "A single task has no matrix" in text
    assert "none of these runs has a readable metrics.csv" in text
    assert count_test_images(read_result(old / "result.json")) == [None, None]


def test_joint_training_has_one_row(tmp_path):
    run = write_run(tmp_path, "joint", base="joint", predictions=False)
    file = tmp_path / "runs" / "0" / "result.json"
    data = json.loads(file.read_text())
    data["matrix"] = [run.matrix[-1]] * 3
    file.write_text(json.dumps(data))
    page = Page(make_report(tmp_path))
    assert sum(bool(re.search(r"\bq\d", about.get("class", ""))) for about, _ in page.cells) == 6
    assert not any("own" in about.get("class", "").split() for about, _ in page.cells)


def test_nothing_on_the_page_leads_outside(study):
    page = Page(make_report(study))
    for tag, about in page.elements:
        assert not set(about) & {"src", "srcset", "action", "data", "background", "style"}, (tag, about)
        assert about.get("href", "#").startswith("#")
        assert tag not in ("img", "link", "iframe", "object", "embed", "base", "form")
    assert page.count("script") == 1
    assert not re.search(r"url\(|@import|fetch\(|XMLHttp|innerHTML|eval\(", make_report(study))
    [policy] = [about["content"] for _, about in page.elements if about.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy


@pytest.mark.parametrize("place", ["tasks", "strategy", "recipe", "error", "versions", "metrics", "protocol", "device"])
def test_hostile_names_change_no_markup(tmp_path, place):
    """The page has the same elements as with plain names; only texts and attributes differ."""
    pages = []
    for kind, names in (("plain", [f"name {i:02}" for i in range(len(HOSTILE))]), ("hostile", HOSTILE)):
        folder = tmp_path / kind
        folder.mkdir()
        for i in range(2):
            changed = {
                "tasks": {"tasks": names}, "strategy": {"settings": "s"}, "recipe": {"recipe": names[i]},
                "error": {"error": names[0]}, "versions": {"versions": dict.fromkeys(names, names[0])},
                "metrics": {"metrics": dict.fromkeys(names, 1.0)}, "protocol": {"protocol": {name: name for name in names}},
                "device": {"device": {"name": names[2], "type": names[0], "platform": names[1]}},
            }[place]  # fmt: skip
            strategy = names[i + 1] if place == "strategy" else f"s{i}"
            write_run(
                folder,
                strategy,
                noise=i,
                predictions=place != "metrics",
                rows=1 if place == "error" else None,
                **changed,
            )
        pages.append(
            make_report(folder, "--latex", str(folder / "t.tex"), "--csv", str(folder / "t.csv"), "--title", names[1])
        )
    plain, hostile = map(Page, pages)
    kinds = [Counter(tag for tag, _ in page.elements if tag not in ("title", "g")) for page in (plain, hostile)]
    assert kinds[0] == kinds[1], "a cut name gets a title, which is no other difference"
    assert plain.scripts == hostile.scripts
    assert {key for _, about in hostile.elements for key in about} <= {
        key for _, about in plain.elements for key in about
    }
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", pages[1])

    check_latex((tmp_path / "hostile" / "t.tex").read_text("utf-8"))


def check_latex(text):
    """Braces are balanced, and each row has as many cells as its table has columns."""
    bare = re.sub(r"\\[{}$&#%_]", "", re.sub(r"^%.*", "", text, flags=re.M))
    assert bare.count("{") == bare.count("}")
    for table in re.findall(r"\\begin\{tabular\}\{(\w+)\}\n(.*?)\\end\{tabular\}", bare, re.S):
        rows = [row for row in table[1].split("\n") if row.endswith("\\\\")]
        assert len(rows) > 1
        assert {row.count("&") + 1 for row in rows} == {len(table[0])}


def read_tables(folder):
    latex, table = folder / "t.tex", folder / "t.csv"
    make_report(folder, "--latex", str(latex), "--csv", str(table))
    return latex.read_text("utf-8"), list(csv.DictReader(io.StringIO(table.read_text("utf-8"))))


def test_the_tables_of_a_paper(study):
    latex, rows = read_tables(study)
    runs = find_results([study / "runs"])[0]
    lasts = [run.metrics["last"] for run in runs if run.strategy == "good"]
    [row] = [row for row in rows if (row["table"], row["strategy"], row["metric"]) == ("metrics", "good", "last")]
    assert float(row["value"]) == pytest.approx(np.mean(lasts))
    assert float(row["std"]) == pytest.approx(np.std(lasts, ddof=1))
    assert row["best"] == "1"
    assert rf"\textbf{{{np.mean(lasts):.2f}}} $\pm$ {np.std(lasts, ddof=1):.2f}" in latex
    for command in (r"\toprule", r"\midrule", r"\bottomrule"):
        assert latex.count(command) == 2
    bad = next(line for line in latex.splitlines() if line.startswith("bad &"))
    assert r"\textbf" not in bad.split(" & ")[4], "it is significantly worse"
    [pair] = [
        r for r in rows if (r["table"], r["metric"], r["strategy"], r["against"]) == ("tests", "last", "good", "bad")
    ]
    assert float(pair["p_corrected"]) < 0.05
    accuracies = [row for row in rows if row["table"] == "accuracy" and row["strategy"] == "bad"]
    assert len(accuracies) == 4 * 3
    cell = next(row for row in accuracies if (row["against"], row["metric"]) == ("b", "c"))
    assert float(cell["value"]) == pytest.approx(np.mean([run.matrix[1][2] for run in runs if run.strategy == "bad"]))


def test_a_spreadsheet_computes_no_name(tmp_path):
    for i, name in enumerate(['=HYPERLINK("http://x")', "+1", "-1", "@SUM(A1)", " =1", "\t=1"]):
        write_run(tmp_path, name, settings=str(i), noise=i, skill=0.2 + 0.1 * i)
    _, rows = read_tables(tmp_path)
    for row in rows:
        assert set(row) == set(CSV_HEAD)
        for name in ("recipe", "strategy", "against", "metric"):
            assert not row[name].lstrip().startswith(("=", "+", "-", "@")), row
    assert any(float(row["value"]) < 0 for row in rows if row["table"] == "tests"), "a number keeps its sign"


@pytest.mark.parametrize("name", HOSTILE)
def test_latex_sets_a_name_as_it_is(name):
    text = escape_latex(name).replace(r"{\ttfamily\char34}", '"')
    bare = re.sub(r"\\(text\w+|ascii\w+)\{\}|\\[{}$&#%_]|\{[\[\]]\}|-\{\}-", "", text)
    assert not re.search(r"[\\{}$&#%_^~\x00-\x1f\u202e]", bare), text


def test_no_other_file_is_overwritten(study):
    make_report(study)
    make_report(study)
    notes = study / "notes.html"
    notes.write_text("<!doctype html>mine")
    message = make_report(study, "--out", str(notes), status=2)
    assert "exists and is no report of MulKI" in message
    assert notes.read_text() == "<!doctype html>mine"
    assert "is a directory" in make_report(study, "--csv", str(study / "runs"), status=2)
    assert "name the same file" in make_report(study, "--csv", str(study / "page.html"), status=2)
    assert "no such folder" in make_report(study, "--latex", str(study / "none" / "t.tex"), status=2)


def test_a_folder_without_results(tmp_path):
    (tmp_path / "runs").mkdir()
    assert "no result.json in it" in make_report(tmp_path, status=2)
    assert not (tmp_path / "page.html").exists()


def test_torch_is_not_imported(study):
    arguments = ["report", str(study / "runs"), "--out", str(study / "p.html"), "--resamples", "100"]
    script = (
        "import sys; from mulki_plugins.cli import main\n"
        f"main({arguments!r}, standalone_mode=False)\n"
        "assert not {'torch', 'avalanche', 'open_clip', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_losses_are_smoothed_and_keep_their_mean(tmp_path):
    write_run(tmp_path)
    losses = read_losses(tmp_path / "runs" / "0")
    assert losses.ends == [0, 10, 20]
    assert set(losses.terms) == {"total", "cross_entropy", "adding"}
    assert losses.terms["total"].points[0] == (0, 10)
    points = [(float(i), float(i % 7)) for i in range(10 * POINTS)]
    smoothed = smooth(points)
    assert len(smoothed) == POINTS
    assert np.mean(smoothed, axis=0) == pytest.approx(np.mean(points, axis=0))


def test_the_cost_shows_the_operations_of_the_training(tmp_path):
    write_run(tmp_path, "mulki", flops={"train": [1e15, 2e15], "total": 3_210_000_000_000_000})
    write_run(tmp_path, "ewc")
    shown = [text for about, text in Page(make_report(tmp_path)).cells if about.get("data-value") == "3210.0"]
    assert shown == ["3,210.000"]


def test_a_damaged_metrics_file_costs_only_its_curves(tmp_path):
    file = tmp_path / "metrics.csv"
    file.write_bytes(
        b"tag,step,value\ntrain/loss/total,1,nan\ntrain/loss/total,x,1\n\xff\xfe,,\n\ntrain/loss/total,2,3.5\n"
    )
    assert read_losses(tmp_path).terms["total"].points == [(2, 3.5)]
    file.unlink()
    assert not read_losses(tmp_path).terms


def test_the_command_can_be_pasted():
    run = Result(recipe="r", strategy="s", seed=4, tasks=["a"], folder="my runs/$(x)")
    assert command_of(run) == "mulki run 'my runs/$(x)/recipe.yaml' --seed 4"


def test_labels_that_are_too_close_are_spread():
    placed = spread([10, 11, 11, 50], 8, (0, 60))
    assert all(b - a >= 8 for a, b in itertools.pairwise(placed))
    assert placed[3] == 50
    assert max(spread([58, 59, 60], 8, (0, 60))) <= 60
    assert shorten("花" * 20, 9) == "花花花花…"
    assert ticks((0, 11), 11)[-1] <= 11


def test_accuracies_that_are_no_share_have_no_interval():
    assert accuracy_interval(50.0, 40) == pytest.approx((35.2, 64.8), abs=0.1)
    assert accuracy_interval(50.5, 40) is None, "some images were left out"
    assert accuracy_interval(50.0, None) is None
