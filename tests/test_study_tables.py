"""The tables of a study: their order, the tests between neighbouring rows, and what each strategy costs."""

import csv
import itertools
import json
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
from attrs import evolve
from matplotlib.transforms import Bbox
from scipy import stats

from mulki_plugins.errors import MulkiError
from mulki_plugins.recipe.resolve import Changes, resolve
from mulki_plugins.recipe.schema import Recipe, TaskBudget
from mulki_plugins.report.result import Result
from mulki_plugins.study import launch
from mulki_plugins.study.choose import check_metrics, winners
from mulki_plugins.study.costs import CostLine, cost_line, costs_beside, summarize, trained_text, with_earlier
from mulki_plugins.study.figure import draw
from mulki_plugins.study.plan import cost_jobs, plan_run
from mulki_plugins.study.read import read_study
from mulki_plugins.study.schema import Beside, Block, Choice, Cost, Part, Study
from mulki_plugins.study.state import State
from mulki_plugins.study.table import Line, line_of, read_lines, read_rows, write_lines, write_rows
from mulki_plugins.study.tables import _zero_shot, cost_table, results_text
from tests.test_study import in_forks, mulki, small_study, written  # noqa: F401  # fixtures

ROOT = Path(__file__).parent.parent
MEANS = {  # Transfer, Average and Last are a little below, at, and a little above these
    "worst": {0: 55.0, 1: 57.6, 2: 53.8},
    "best": {0: 61.0, 1: 62.5, 2: 61.7},
    "second": {0: 60.5, 1: 61.9, 2: 61.3},
    "other seeds": {0: 58.0, 3: 60.5, 4: 57.5, 5: 59.0},
}


def line(label, seed, mean, **more):
    numbers = {"transfer": mean - 2, "average": mean, "last": mean + 2, "forgetting": 3.0, "just_learned": mean + 5}
    facts = {"part": "study", "order": "", "fingerprint": "f", "device": "cpu", "code": "c", "zero_shot": 40.0}
    return Line(**facts | numbers | {"label": label, "seed": seed} | more)


def text_of(lines, costs=(), part="study", **study):
    """The tables of these lines, as `collect` prints them."""
    return results_text([*map(state, lines)], Study(name="x", recipes=["mtil"], **study), costs)


def state(each):
    job = SimpleNamespace(
        part=each.part, order=each.order, label=each.label, seed=each.seed, in_tables=True, recipe="mtil"
    )
    return State(run=SimpleNamespace(job=job), status="done", line=each)


def table_of(text):
    """The first table as a mapping: for each row's label the cells by their columns."""
    rows = [[cell.strip() for cell in row[1:-1].split("|")] for row in text.splitlines() if row.startswith("|")]
    head, _, *cells = rows[: next((i for i, row in enumerate(rows[2:], 2) if row == rows[0]), len(rows))]
    return {row[0]: dict(zip(head, row, strict=True)) for row in cells}


def cost(label, turn, step=10.0, **more):
    facts = {"fingerprint": "f", "device": "cpu", "machine": "a processor", "threads": 1, "code": "c", "memory": 500.0}
    numbers = {"seconds": (step or 0) * 0.05, "step": step, "trained": 1000, "weights": 4000, "kept": 2_000_000}
    return CostLine(**facts | numbers | {"label": label, "round": turn} | more)


# neighbours


def shown(p):
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def test_each_row_is_tested_against_the_one_below():
    rows = table_of(text_of([line(label, seed, mean) for label, of in MEANS.items() for seed, mean in of.items()]))
    assert list(rows) == ["best", "second", "other seeds", "worst"], "by the mean of the three"
    best, second, others, worst = (list(MEANS[label].values()) for label in rows)
    paired = stats.ttest_rel(best, second).pvalue
    assert rows["best"]["p"] == shown(paired)
    assert rows["best"]["p"] != shown(stats.ttest_ind(best, second, equal_var=False).pvalue)
    welch = [
        stats.ttest_ind(second, others, equal_var=False).pvalue,
        stats.ttest_ind(others, worst, equal_var=False).pvalue,
    ]
    assert [rows["second"]["p"], rows["other seeds"]["p"]] == [shown(p) for p in welch]
    assert all(0.001 < p < 0.999 for p in (paired, *welch)), "numbers that say something"
    assert rows["worst"]["p"] == "–", "no row is below it"


def test_a_small_p_value_is_a_bound_and_a_single_seed_has_none():
    lines = [line("best", seed, 70 + 0.1 * seed) for seed in range(3)]
    lines += [line("second", seed, 50 + 0.11 * seed) for seed in range(3)]
    rows = table_of(text_of([*lines, line("alone", 0, 40.0)]))
    assert rows["best"]["p"] == "< 0.001"
    assert rows["second"]["p"] == "–"
    text = text_of([line("one", 0, 50.0), line("two", 0, 40.0)])
    assert "p" not in table_of(text)["one"], "a column that knows nothing is left out"
    assert "t test" not in text


def test_a_row_without_the_mean_stands_last_and_has_no_test():
    """Joint training has no Transfer."""
    lines = [line(label, seed, mean) for label in ("best", "worst") for seed, mean in MEANS[label].items()]
    lines += [line("joint", seed, 90.0 + seed, transfer=None, average=None) for seed in range(3)]
    rows = table_of(text_of(lines))
    assert list(rows) == ["best", "worst", "joint"]
    assert (rows["worst"]["p"], rows["joint"]["p"]) == ("–", "–")
    assert rows["joint"]["Last"] == "93.0 ± 1.0"


def test_rows_of_another_part_are_sorted_among_the_others():
    parts = {
        "study": Part(runs=[Block()]),
        "ablation": Part(runs=[Block()], beside=Beside(part="study", label="second")),
    }
    lines = [line("second", seed, mean) for seed, mean in MEANS["second"].items()]
    lines += [line(label, s, mean, part="ablation") for label in ("best", "worst") for s, mean in MEANS[label].items()]
    table = text_of(lines, parts=parts).split("### ablation")[1]
    assert list(table_of(table)) == ["best", "second", "worst"]


# costs


@pytest.mark.figures
def test_names_in_the_figure_lie_beside_one_another():
    lines = read_lines(ROOT / "docs" / "study.csv")
    measured = [each for each in lines if each.part == "study" and each.transfer is not None]
    seen = draw([*map(state, measured)], read_study("mini").study)
    assert len(seen.axes) == 3
    for axes in seen.axes:
        boxes = {text.get_text(): text.get_window_extent() for text in axes.texts}
        assert set(boxes) == {each.label for each in measured if f"order {each.order}" == axes.get_title()}
        for a, b in itertools.combinations(boxes, 2):
            shared = Bbox.intersection(boxes[a], boxes[b])
            smaller = min(box.width * box.height for box in (boxes[a], boxes[b]))
            assert shared is None or shared.width * shared.height < 0.2 * smaller, (a, b)


@pytest.mark.figures
@pytest.mark.parametrize("known", [[], [{"transfer": None}], [{"transfer": None}, {}], [{"zero_shot_later": None}]])
def test_a_figure_needs_no_points(known):
    lines = [line("only", seed, 50.0, **{"zero_shot_later": 40.0} | more) for seed, more in enumerate(known)]
    seen = draw([*map(state, lines)], Study(name="x", recipes=["mtil"]))
    assert [text.get_text() for axes in seen.axes for text in axes.texts] == ["only"] * any(
        "transfer" not in x for x in known
    )


def test_costs_are_compared_within_a_round():
    steps = {"finetune": (10.0, 20.0, 12.0), "lwf": (14.0, 30.0, 15.0)}
    lines = [cost(label, i, step) for i in range(3) for label, step in ((k, v[i]) for k, v in steps.items())]
    rows = table_of(cost_table(lines, "finetune"))
    ratios = [b / a for a, b in zip(*steps.values(), strict=True)]
    assert rows["lwf"] == {
        "": "lwf",
        "ms per step": f"{statistics.fmean(steps['lwf']):.1f} ± {statistics.stdev(steps['lwf']):.1f}",
        "time over finetune": f"{statistics.fmean(ratios):.2f} ± {statistics.stdev(ratios):.2f}",
        "peak memory (MiB)": "500 ± 0", "memory over finetune": "1.00 ± 0.00", "trained weights": "1 k (25 %)",
        "model on disk (MB)": "2.0",
    }  # fmt: skip
    assert rows["finetune"]["time over finetune"] == "1.00 ± 0.00"


def test_another_machine_is_not_compared():
    lines = [cost("finetune", 0), cost("lwf", 0, 20.0, machine="another one"), cost("l2", 0, 20.0, threads=2)]
    found = summarize(lines, "finetune")
    assert {found[name].relative for name in ("lwf", "l2")} == {"–"}
    assert found["finetune"].relative == "1.00"


def test_without_steps_the_whole_tasks_are_compared():
    found = summarize([cost("finetune", 0, seconds=2.0), cost("rail", 0, None, seconds=3.0, trained=0)], "finetune")
    assert (found["rail"].step, found["rail"].relative, found["rail"].trained) == ("–", "1.50", "0 k (0 %)")
    assert (
        summarize([cost("finetune", 0), cost("zero-shot", 0, None, seconds=0.0)], "finetune")["zero-shot"].relative
        == "–"
    )


def test_trained_weights_are_thousands_and_a_share():
    assert trained_text(67_432, 2_834_000) == "67 k (2.4 %)"
    assert trained_text(2_802_720, 2_802_721) == "2803 k (100 %)"
    assert trained_text(None, None) == "–"


def test_the_steps_of_a_line(tmp_path):
    plain = resolve("mtil", Changes(strategy="finetune")).recipe

    def run(iterations=20, epochs=None, base="naive", **per_task):
        train = evolve(plain.train, iterations=iterations, epochs=epochs, per_task=per_task)
        job = SimpleNamespace(label="x", seed=1)
        recipe = evolve(plain, train=train, strategy=evolve(plain.strategy, base=base))
        return SimpleNamespace(job=job, recipe=recipe, fingerprint="f", folder=tmp_path)

    result = Result(
        recipe="r", strategy="s", seed=1, tasks=["a", "b"], seconds={"train": [1.0, 3.0]}, parameters={"trained": 5, "all": 9},
        device={"peak_memory_mib": 12.5, "threads": 2, "name": "m", "type": "cpu"},
    )  # fmt: skip
    assert (cost_line(run(), result).step, cost_line(run(), result).seconds) == (150.0, 3.0)
    assert cost_line(run(a=TaskBudget(iterations=60)), result).step == 150.0, "that of the last task counts"
    assert cost_line(run(b=TaskBudget(iterations=60)), result).step == 50.0
    assert cost_line(run(b=TaskBudget(epochs=1)), result).step is None
    joint = evolve(result, base="joint", seconds={"train": [8.0]})
    assert cost_line(run(base="joint"), joint).step == 200.0, "it trains in the steps of both tasks at once"
    assert cost_line(run(None, 2), result).step is None
    assert cost_line(run(), evolve(result, parameters={"trained": 0, "all": 9})).step is None
    assert cost_line(run(base="none"), evolve(result, seconds={}, base="none")).seconds == 0


def test_the_study_shows_costs_beside_its_numbers():
    lines = [line(label, seed, mean) for label in ("best", "worst") for seed, mean in MEANS[label].items()]
    costs = [cost("worst", 0, memory=500.4), cost("best", 0, 15.0, memory=600.4, trained=4000)]
    text = text_of(lines, costs, cost=Cost(strategies=["worst", "best"], base="worst"))
    rows = table_of(text)
    assert {k: rows["best"][k] for k in ("trained weights", "step", "peak memory")} == {
        "trained weights": "4 k (100 %)", "step": "1.50", "peak memory": "600",
    }  # fmt: skip
    assert "relative to worst" in text
    newer = [
        evolve(each, trained=1000 * (4 + each.seed), weights=10_000) if each.label == "best" else each for each in lines
    ]
    assert table_of(text_of(newer, costs))["best"]["trained weights"] == "5 k (50 %)", (
        "the mean of the runs' own numbers counts first"
    )
    assert not {"step", "trained weights"} & set(table_of(text_of(lines))["best"])
    one = table_of(text_of(lines, costs[:1]))["worst"]
    assert "step" not in one, "one row compares nothing"


def test_tables_of_earlier_versions_have_no_trained_weights(tmp_path):
    write_lines(tmp_path / "new.csv", [line("a", 0, 50.0, trained=7, weights=9), line("b", 0, 50.0)])
    assert [(x.trained, x.weights) for x in read_lines(tmp_path / "new.csv")] == [(7, 9), (None, None)]
    rows = list(csv.DictReader((tmp_path / "new.csv").read_text().splitlines()))
    assert list(rows[0])[-2:] == ["trained", "weights"]
    earlier = [",".join(row.split(",")[:-2]) for row in (tmp_path / "new.csv").read_text().splitlines()]
    (tmp_path / "old.csv").write_text("\n".join(earlier) + "\n")
    assert read_lines(tmp_path / "old.csv") == [line("a", 0, 50.0), line("b", 0, 50.0)]
    assert len(read_lines(ROOT / "docs" / "study.csv")) > 200


def test_costs_are_read_as_they_were_written(tmp_path):
    lines = [cost("a, b", 0), cost("zero-shot", 1, None, trained=None, weights=None)]
    write_rows(tmp_path / "c.csv", CostLine, lines)
    assert read_rows(tmp_path / "c.csv", CostLine) == lines
    assert costs_beside(Path("docs/study.csv")) == Path("docs/study-cost.csv")


def test_the_shipped_study_measures_every_strategy():
    study = read_study("mini").study
    assert sorted(study.cost.strategies) == sorted(path.stem for path in (ROOT / "strategies").glob("*.yaml"))
    assert study.cost.rounds == 5
    jobs = list(cost_jobs(study))
    assert len(jobs) == 5 * len(study.cost.strategies)
    recipes: list[Recipe] = [plan_run(job, Path()).recipe for job in jobs[: len(study.cost.strategies)]]
    assert {recipe.train.checkpoint.keep for recipe in recipes} == {1}, "its own settings prevail over the study's"
    assert {tuple(recipe.loggers) for recipe in recipes} == {()}, "the study's other settings hold"


def test_costs_are_measured_one_after_another_and_collected(small_study, in_forks):  # noqa: F811
    small_study["cost"] = {
        "strategies": ["finetune", "lora", "zero-shot"],
        "rounds": 2,
        "settings": ["train.checkpoint.keep=1"],
    }
    small_study["parts"] = {
        "study": {"runs": [{"strategies": ["finetune", "lora", "lwf"], "orders": ["I"], "seeds": [0, 1]}]}
    }
    name, file = written(small_study), Path("runs/studies/tried/study-cost.csv")
    first = table_of(mulki("cost", name, "--rounds", "1").stdout)
    assert [words[words.index("--strategy") + 1] for words, _ in in_forks] == ["finetune", "lora", "zero-shot"]
    assert list(first) == ["finetune", "lora", "zero-shot"]
    lines = json.loads(mulki("cost", name, "--json").stdout)
    assert len(in_forks) == 6, "what is measured is not measured again"
    assert [(x["label"], x["round"]) for x in lines] == [
        (s, i) for i in (0, 1) for s in ("finetune", "lora", "zero-shot")
    ]
    mulki("cost", name, "--rounds", "1")
    assert len(read_rows(file, CostLine)) == 6, "a quick look loses no round"
    assert not Path("runs/studies/tried/study.csv").exists(), "the study's table is of accuracies"
    by_label = {x["label"]: x for x in lines}
    for label in ("finetune", "lora"):
        folder = Path(f"runs/studies/tried/cost/small/{label}/seed-1")
        result = json.loads((folder / "result.json").read_text())
        assert by_label[label]["trained"] == result["parameters"]["trained"] > 0
        assert by_label[label]["step"] == pytest.approx(1000 * result["seconds"]["train"][-1] / 2, abs=0.01)
        [kept] = [path for path in (folder / "weights").iterdir() if path.name.startswith("task-02")]
        assert by_label[label]["kept"] == sum(each.stat().st_size for each in kept.iterdir())
    assert by_label["lora"]["kept"] < by_label["finetune"]["kept"]
    assert (by_label["zero-shot"]["step"], by_label["zero-shot"]["trained"]) == (None, 0)
    mulki(name)
    Path("page.md").write_text("<!-- study: begin -->\n<!-- study: end -->\n<!-- cost: begin -->\n<!-- cost: end -->\n")
    printed = mulki("collect", name, "--into", "page.md").stdout
    rows = table_of(printed)
    assert rows["lora"]["trained weights"] == trained_text(by_label["lora"]["trained"], by_label["lora"]["weights"])
    assert rows["finetune"]["step"] == "1.00 ± 0.00"
    assert rows["lwf"]["step"] == "–", "it was not measured"
    page = Path("page.md").read_text()
    assert cost_table(read_rows(file, CostLine), "finetune") in page
    small_study["cost"]["settings"].append("train.accumulate=2")
    changed = written(small_study)
    assert "step" not in table_of(mulki("collect", changed).stdout)["lora"], "measured with other settings"
    small_study["cost"]["settings"].pop()
    assert table_of(mulki("collect", written(small_study)).stdout)["finetune"]["step"] == "1.00 ± 0.00"
    file.unlink()
    assert "step" not in table_of(mulki("collect", name).stdout)["lora"]


def test_a_run_that_fails_leaves_the_costs_of_the_others(small_study, in_forks, monkeypatch):  # noqa: F811
    start = launch.start_process

    def failing(words, *rest):
        return start([word if word != "lwf" else "nothing" for word in words], *rest)

    monkeypatch.setattr(launch, "start_process", failing)
    small_study["cost"] = {"strategies": ["lwf", "finetune"], "rounds": 1}
    failed = mulki("cost", written(small_study), status=1)
    assert "cost lwf seed 0: failed: " in failed.stderr
    assert [x.label for x in read_rows(Path("runs/studies/tried/study-cost.csv"), CostLine)] == ["finetune"]


def test_zero_shot_is_told_of_each_recipe():
    def state(recipe, zero_shot, later):
        line = SimpleNamespace(part="study", order="", zero_shot=zero_shot, zero_shot_later=later)
        return SimpleNamespace(line=line, run=SimpleNamespace(job=SimpleNamespace(recipe=recipe)))

    found = [state("mtil", 50.0, 55.0), state("recipes/other.yaml", 70.0, None)]
    assert _zero_shot(found[:1], "study") == "Zero-shot: 50.0 in the mean of all tasks; of all but the first 55.0."
    assert _zero_shot(found, "study").split("\n\n") == [
        "Zero-shot, mtil: 50.0 in the mean of all tasks; of all but the first 55.0.",
        "Zero-shot, other: 70.0 in the mean of all tasks.",
    ]


def test_rows_with_different_tasks_have_no_common_zero_shot():
    found = [line("one", 0, 50.0, zero_shot_later=41.0), line("other", 0, 60.0, zero_shot=80.0, zero_shot_later=81.0)]
    said = _zero_shot([*map(state, found)], "study")
    assert said == "Zero-shot: 40.0 to 80.0 in the mean of all tasks, for the runs differ in tasks or model."


def test_one_task_has_no_zero_shot_of_the_later_ones():
    job = SimpleNamespace(part="study", order="", label="only", seed=0)
    result = Result(recipe="r", strategy="s", seed=0, tasks=["a"], zero_shot=[40.0], matrix=[[60.0]])
    one = line_of(SimpleNamespace(job=job, fingerprint="f"), result)
    assert one.zero_shot_later is None
    for each in (one, evolve(one, zero_shot_later=0.0)):  # as earlier versions wrote it
        assert _zero_shot([state(each)], "study") == "Zero-shot: 40.0 in the mean of all tasks."


def test_candidates_without_a_metric_of_the_rule_cannot_win():
    line = SimpleNamespace(transfer=None, average=None, last=60.0)
    job = SimpleNamespace(recipe="mtil", changes=SimpleNamespace(strategy="lwf"), candidate=("a=1",))
    found = [SimpleNamespace(line=line, run=SimpleNamespace(job=job))]
    rule = Choice(seed=5, settings={"lwf": [["a=1"]]})
    with pytest.raises(MulkiError, match="the candidates of lwf have no transfer and no average") as caught:
        check_metrics(found, rule)
    assert winners(found, rule) == {}, "nor does it stop those of others"
    assert caught.value.hint == "name metrics that the stream has, such as `by: [last]`"
    assert winners(found, evolve(rule, by=["last"])) == {("mtil", "lwf"): ("a=1",)}


def test_new_costs_replace_their_own_lines_alone():
    def line(label, round, machine="one", seconds=1.0, code="c"):
        return CostLine(
            label=label, round=round, fingerprint="f", device="cpu", machine=machine, threads=1, code=code, seconds=seconds,
            step=None, memory=1.0, trained=None, weights=None, kept=0,
        )  # fmt: skip

    earlier = [line("a", 0), line("b", 0), line("a", 1, "two"), line("b", 1, "two")]
    again = line("a", 0, seconds=2.0)
    assert with_earlier([again], earlier) == [*earlier[1:], again]
    elsewhere = line("a", 1, seconds=2.0)
    assert with_earlier([elsewhere], earlier) == [*earlier[:2], elsewhere], "a round is of one machine"
    changed = line("a", 0, code="d")
    assert with_earlier([changed], earlier) == [*earlier[2:], changed], "and of one state of the code"


def test_costs_beside_an_earlier_table_are_shown(small_study):  # noqa: F811
    small_study |= {"measured": "before.csv", "cost": {"strategies": ["finetune", "mulki"], "rounds": 1}}
    write_lines(Path("before.csv"), [])
    name = written(small_study)
    finetune, mulki_ = (plan_run(job, Path()).fingerprint for job in cost_jobs(read_study(str(name)).study))
    lines = [cost("finetune", 0, fingerprint=finetune), cost("mulki", 0, 20.0, fingerprint=mulki_)]
    write_rows(Path("before-cost.csv"), CostLine, lines)
    Path("page.md").write_text("<!-- cost: begin -->\n<!-- cost: end -->\n")
    mulki("collect", name, "--into", "page.md")
    assert "| mulki | 20.0 | 2.00 | 500 | 1.00 |" in Path("page.md").read_text()
