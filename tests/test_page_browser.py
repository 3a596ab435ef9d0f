"""The report in a real browser: nothing overlaps, overflows, complains or asks for anything, and every number is right."""

import pytest
from click.testing import CliRunner

from mulki_plugins.cli import main
from mulki_plugins.report.result import find_results
from tests.browser import Browser, find_chromium
from tests.sample_runs import write_run
from tests.test_page import HOSTILE

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="no Chromium on the PATH")
WIDTHS = (1280, 390)
OVERFLOWING = """[...document.body.querySelectorAll('*')].filter(e => {
  const box = e.getBoundingClientRect();
  const scrolls = e.closest('.wide, .small-charts figcaption');  // these clip what is in them
  return box.width && !(scrolls && scrolls !== e) && (box.right > innerWidth + 1 || box.left < -1);
}).map(e => e.outerHTML.slice(0, 150))"""
OVERLAPPING = """[...document.querySelectorAll('svg.chart')].flatMap(svg => {
  const edge = svg.getBoundingClientRect();
  const texts = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]).filter(t => t[1].width);
  const outside = texts.filter(([, b]) => b.left < edge.left - 2 || b.right > edge.right + 2 || b.top < edge.top - 2);
  const pairs = texts.flatMap(([a, b], i) => texts.slice(i + 1).filter(([, c]) =>
    Math.min(b.right, c.right) - Math.max(b.left, c.left) > 1 && Math.min(b.bottom, c.bottom) - Math.max(b.top, c.top) > 4)
    .map(([c]) => `${a} | ${c}`));
  return pairs.concat(outside.map(([a]) => `outside: ${a}`)).map(t => `${svg.getAttribute('aria-label').slice(0, 40)}: ${t}`);
})"""
CUT = """[...document.querySelectorAll('td, th, button, p, li, h1, h2, h3')].filter(e =>
  e.clientWidth && e.scrollWidth > e.clientWidth + 2 && !e.closest('.small-charts')).map(e => e.outerHTML.slice(0, 150))"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    opened = Browser(find_chromium(), tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


def write_page(folder):
    out = folder / "page.html"
    done = CliRunner().invoke(main, ["report", str(folder / "runs"), "--out", str(out), "--resamples", "200"])
    assert done.exit_code == 0, done.output
    return out


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Five strategies with three seeds on eleven tasks, and a failed run."""
    folder = tmp_path_factory.mktemp("study")
    tasks = [
        "animals",
        "digits",
        "faces",
        "flags",
        "food",
        "letters",
        "objects",
        "scans",
        "shapes",
        "textures",
        "travel",
    ]
    for i, strategy in enumerate(("finetune", "lwf", "mulki", "weight-ensemble", "zscl")):
        for seed in range(3):
            write_run(folder, strategy, seed, tasks=tasks, skill=0.6 + 0.06 * i, noise=10 * i + seed)
    write_run(folder, "joint", tasks=tasks, rows=2, error="OSError: no space left on device")
    return folder, write_page(folder)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """Names that try to run something or to break the layout, in twelve strategies on five streams."""
    folder = tmp_path_factory.mktemp("hostile")
    for i, name in enumerate(HOSTILE):
        write_run(folder, name, tasks=HOSTILE, noise=i, recipe=HOSTILE[0], error=HOSTILE[0], settings=str(i))
    for k in range(5):
        for i, name in enumerate(HOSTILE[:4]):
            write_run(folder, name, noise=k + 7 * i, recipe=f"{HOSTILE[3]}{k}", settings=str(i), losses=False)
    return folder, write_page(folder)


def check_layout(browser):
    assert browser.problems == []
    assert len(browser.requests) == 1, browser.requests
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert browser.evaluate(OVERFLOWING) == []
    assert browser.evaluate(OVERLAPPING) == []
    assert browser.evaluate(CUT) == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_overlaps_or_overflows(browser, study, width, dark):
    browser.open(study[1], width, dark)
    check_layout(browser)
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(15, 21, 27)" if dark else "rgb(255, 255, 255)"), "the style sheet is applied"


@pytest.mark.parametrize("width", WIDTHS)
def test_hostile_names_run_nothing_and_break_nothing(browser, hostile, width):
    browser.open(hostile[1], width)
    check_layout(browser)
    assert browser.evaluate("document.scripts.length") == 1
    assert browser.evaluate("document.querySelectorAll('img, iframe, form, a:not([href^=\"#\"])').length") == 0


def test_paper_gets_light_colours_and_all_matrices(browser, study):
    browser.open(study[1], 760, dark=True, media="print")
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.evaluate(
        "[...document.querySelectorAll('.run')].every(run => run.getBoundingClientRect().height > 50)"
    )
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth + 1")


@pytest.mark.parametrize("width", WIDTHS)
def test_every_number_is_that_of_the_result(browser, study, width):
    """What the reader sees, run by run, as the menu chooses them."""
    folder, page = study
    browser.open(page, width)
    runs = {(run.strategy, run.seed): run for run in find_results([folder / "runs"])[0] if run.status == "complete"}
    names = browser.evaluate("[...document.querySelector('.matrices select').options].map(o => o.text)")
    assert len(names) == len(runs) == 15
    for i, name in enumerate(names):
        shown = browser.evaluate(
            f"""(() => {{ const box = document.querySelector('.matrices'), select = box.querySelector('select');
            select.selectedIndex = {i}; select.dispatchEvent(new Event('change'));
            const [run] = [...box.querySelectorAll('.run')].filter(r => r.getBoundingClientRect().height);
            return [run.querySelector('figcaption').innerText, [...run.querySelectorAll('tbody tr')].map(row =>
              [...row.querySelectorAll('td')].map(cell => cell.innerText.trim()))] }})()"""
        )
        strategy, _, seed = name.replace("\u2068", "").replace("\u2069", "").partition(", seed ")
        run = runs[strategy, int(seed)]
        rows = [run.zero_shot, *run.matrix]
        assert shown[1] == [[f"{v:.1f}" for v in (*row, sum(row) / len(row))] for row in rows]
        for metric, value in run.metrics.items():
            assert f"{metric.capitalize()} {value:.2f}" in shown[0]


def test_a_cell_is_read_off_by_pointer_and_keys(browser, study):
    folder, page = study
    browser.open(page, 1280)
    runs = find_results([folder / "runs"])[0]
    run = next(run for run in runs if (run.strategy, run.seed) == ("finetune", 0))
    read = "document.querySelector('.run:not([hidden]) .readout').innerText"
    browser.evaluate("document.querySelector('.run:not([hidden]) tbody tr:nth-child(3) td:nth-of-type(2)').click()")
    assert browser.evaluate(read).startswith(f"after digits, on digits: {run.matrix[1][1]:.1f} %; 95 % interval ")
    assert browser.evaluate(read).endswith("; 40 test images")
    press = (
        "document.querySelector('.run:not([hidden]) .heat').dispatchEvent(new KeyboardEvent('keydown', {key: '%s'}))"
    )
    browser.evaluate(press % "ArrowRight")
    browser.evaluate(press % "ArrowUp")
    assert browser.evaluate(read).startswith(f"after animals, on faces: {run.matrix[0][2]:.1f} %")
    for _ in range(20):
        browser.evaluate(press % "ArrowUp")
    assert browser.evaluate(read).startswith(f"zero-shot, on faces: {run.zero_shot[2]:.1f} %")


def test_the_views_show_intervals_and_changes(browser, study):
    browser.open(study[1], 390)
    cell = "document.querySelector('.run:not([hidden]) tbody tr:nth-child(3) td:nth-of-type(1)')"
    texts = []
    for view in ("accuracy", "interval", "change"):
        browser.evaluate(f"document.querySelector('[data-view={view}]').click()")
        browser.evaluate(f"document.querySelector('.views [data-view={view}]').click()")
        texts.append(browser.evaluate(f"{cell}.innerText.trim()"))
        check_layout(browser)
    assert float(texts[0]) > 0
    assert "–" in texts[1]
    assert texts[2][0] in "+\u2212"


def test_a_table_is_sorted_by_its_numbers(browser, study):
    browser.open(study[1], 1280)
    column = "[...document.querySelectorAll('.metrics tbody tr')].map(row => +row.cells[4].dataset.value)"
    before = browser.evaluate(column)
    browser.evaluate("document.querySelector('.metrics thead th:nth-child(5)').click()")
    assert browser.evaluate(column) == sorted(before)
    browser.evaluate("document.querySelector('.metrics thead th:nth-child(5)').click()")
    assert browser.evaluate(column) == sorted(before, reverse=True)


def test_a_strategy_is_brought_out(browser, study):
    browser.open(study[1], 1280)
    browser.evaluate("document.querySelectorAll('.legend li')[2].dispatchEvent(new Event('pointerenter'))")
    lines = "[...document.querySelector('.small-charts svg').querySelectorAll('[data-series]')]"
    assert browser.evaluate(f"{lines}.map(line => getComputedStyle(line).opacity)") == [
        "0.12",
        "0.12",
        "1",
        "0.12",
        "0.12",
    ]
