"""Runs of several strategies and settings: where each goes, what it is called, and what `mulki results` says of it."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mulki_plugins.errors import MulkiError
from mulki_plugins.models import tiny
from mulki_plugins.recipe.emit import dump_yaml
from mulki_plugins.recipe.resolve import Changes, resolve
from mulki_plugins.recipe.schema import Schedule, as_data
from mulki_plugins.recipe.settings import MAX_LABEL, variant
from mulki_plugins.report.compare import comparison_data
from mulki_plugins.report.folder import choose_folder
from mulki_plugins.report.tables import comparison_text
from mulki_plugins.streams import mtil_mini
from mulki_plugins.streams.mini import stream
from mulki_plugins.training.run import run_experiment
from mulki_plugins.training.schedule import factor
from tests.test_report import result
from tests.test_run import mulki

SMALL = (
    "stream={name: small}", "model={name: small-clip}", "train.iterations=3", "train.schedule.warmup=1",
    "train.batch_size=4", "device=cpu", "loggers=[csv]",
)  # fmt: skip


def words(settings):
    return [word for setting in settings for word in ("--set", setting)]


def named(*settings, **more):
    changes = Changes(settings=settings, **more)
    return variant("mtil", changes, resolve("mtil", changes).recipe)


def test_every_strategy_runs_with_every_seed(small_parts, tmp_path):
    torch.set_num_threads(1)
    arguments = [
        "run",
        "mtil",
        "--strategy",
        "finetune",
        "--strategy",
        "zero-shot",
        "--seed",
        0,
        "--seed",
        1,
        *words(SMALL),
    ]
    done = mulki(*arguments, "--out", tmp_path)
    found = {
        str(path.relative_to(tmp_path / "mtil")).replace("+", "/").split("/")[0] for path in tmp_path.glob("mtil/*/*")
    }
    assert found == {"finetune", "zero-shot"}
    assert len(list(tmp_path.glob("mtil/*/seed-[01]/result.json"))) == 4
    table = done.stdout[done.stdout.rindex("recipe ") :].splitlines()
    assert [line.split()[:3] for line in table[2:4]] == [["mtil", "finetune", "2"], ["mtil", "zero-shot", "2"]]


def test_what_several_strategies_would_do_is_said_for_each():
    said = json.loads(mulki("run", "mtil", "--strategy", "finetune", "--strategy", "lwf", "--dry-run", "--json").stdout)
    assert [run["folders"] for run in said["runs"]] == [["runs/mtil/finetune/seed-0"], ["runs/mtil/lwf/seed-0"]]
    text = mulki("run", "mtil", "--strategy", "finetune", "--strategy", "lwf", "--dry-run").stdout
    assert text.count("strategy  ") == 2
    assert (
        "strategy finetune, strategy lwf ("
        in mulki("validate", "mtil", "--strategy", "finetune", "--strategy", "lwf").stdout
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "mtil", "--strategy", "lwf", "--strategy", "lwf"], "--strategy: 'lwf' is given twice"),
        (
            ["run", "mtil", "--strategy", "lwf", "--strategy", "ewc", "--set", "strategy=si"],
            "would run in runs/mtil/si/seed-0",
        ),
        (["run", "mtil", "--strategy", "lwf", "--strategy", "ewc", "--name", "x"], "would run in runs/mtil/x/seed-0"),
        (["run", "mtil", "--name", "../x"], "--name: '../x' names a folder"),
        (["show", "mtil", "--strategy", "lwf", "--strategy", "ewc"], "--strategy: this command takes one"),
    ],
)
def test_strategies_that_do_not_go_together(arguments, said):
    done = mulki(*arguments, ok=False)
    assert done.exit_code == 2
    assert said in done.stderr


def test_the_mistakes_of_all_strategies_are_reported():
    done = mulki("run", "mtil", "--strategy", "nope", "--strategy", "finetune", "--strategy", "nada", ok=False)
    assert "'nope'" in done.stderr
    assert "'nada'" in done.stderr


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ((), ""),
        (("train.iterations=100",), "iterations=100"),
        (("train.epochs=3",), "epochs=3"),
        (("train.optimizer.lr=1e-3", "train.iterations=7"), "iterations=7+lr=0.001"),
        (("train.iterations=7", "train.optimizer.lr=0.001"), "iterations=7+lr=0.001"),
        (("strategy.adding.weight=2",), "adding.weight=2"),
        (("stream.tasks=[digits, scans]",), "tasks=digits,scans"),
        (("stream.tasks=[scans, digits]",), "tasks=scans,digits"),
        (("stream={name: mtil, split: coop}",), "stream=mtil+split=coop"),
        (("train.batch_size=8", "evaluate.batch_size=16"), "train.batch_size=8+evaluate.batch_size=16"),
        (("train.iterations=50", "train.optimizer.lr=5e-4"), ""),
        (("device=cpu", "train.workers=2", "train.checkpoint.every=7", "loggers=[]", "seeds=[3]", "summary=x"), ""),
        (("strategy=finetune", "train.iterations=7"), "iterations=7"),
    ],
)
def test_a_folder_is_named_by_what_changes_the_numbers(settings, expected):
    assert named(*settings) == expected


def test_a_name_of_many_settings_is_bounded_safe_and_stable(tmp_path):
    bundled = Path(tiny.__file__).with_name("mulki-tiny.safetensors")
    spaced, colon = tmp_path / "a b.safetensors", tmp_path / "a:b.safetensors"
    for path in (spaced, colon):
        path.symlink_to(bundled)
    many = ("train.per_task={flags: {lr: 0.1}, food: {lr: 0.2}, digits: {iterations: 3}}", f"model.pretrained={spaced}")
    one, again = named(*many), named(*many[::-1])
    other = named(many[0], f"model.pretrained={colon}")
    assert one == again != other
    assert len(one) <= MAX_LABEL
    assert not set(one) & set("/ :")


def written(folder, recipe):
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(dump_yaml(as_data(recipe)))
    return folder


def test_an_edited_recipe_has_a_folder_of_its_own(tmp_path):
    before, edited = (resolve("mtil", Changes(settings=s)).recipe for s in ((), ("train.iterations=9",)))
    first = choose_folder(tmp_path, before, 0)
    assert first == tmp_path / "mtil" / "mulki-plus" / "seed-0"
    written(first, before)
    assert choose_folder(tmp_path, before, 0) == first, "the same settings go where they went"
    assert choose_folder(tmp_path, before, 1) == first.with_name("seed-1")
    own = choose_folder(tmp_path, edited, 0)
    assert own == tmp_path / "mtil" / "mulki-plus+iterations=9" / "seed-0"
    assert choose_folder(tmp_path, edited, 1) == own.with_name("seed-1"), (
        "no two experiments share a folder by their seeds"
    )
    assert choose_folder(tmp_path, edited, 0, resuming=True) == first, "where the change can be told"
    written(own, edited)
    assert choose_folder(tmp_path, edited, 0, resuming=True) == own
    assert choose_folder(tmp_path, edited, 0, name="mine") == tmp_path / "mtil" / "mine" / "seed-0"


def test_settings_whose_names_are_the_same_do_not_share_a_folder(tmp_path):
    one, other = (resolve("mtil", Changes(settings=(f"train.optimizer.lr={lr}",))).recipe for lr in ("0.1", "0.2"))
    written(choose_folder(tmp_path, one, 0, variant="x"), one)
    assert choose_folder(tmp_path, other, 0, variant="x").parent.name == "mulki-plus+x+lr=0.2"


def test_runs_of_other_settings_stand_beside_each_other_in_the_results(small_parts, tmp_path):
    torch.set_num_threads(1)
    for setting in ("train.optimizer.lr=0.001", "train.optimizer.lr=0.002"):
        mulki("run", "mtil", "--strategy", "finetune", *words((*SMALL, setting)), "--out", tmp_path)
    assert not list(tmp_path.rglob("*.before-*"))
    done = mulki("results", tmp_path)
    assert "finetune lr=0.001" in done.stdout
    assert "finetune lr=0.002" in done.stdout
    data = json.loads(mulki("results", tmp_path, "--json").stdout)
    assert [row["settings"] for row in data["summary"]] == [
        {"train.optimizer.lr": 0.001},
        {"train.optimizer.lr": 0.002},
    ]
    [folder] = tmp_path.glob("mtil/*lr=0.002*/seed-0")
    folder.rename(folder.with_name("seed-0.before-1"))
    assert f"left out: {folder}.before-1: " in mulki("results", tmp_path).stderr


def test_a_named_run(small_parts, tmp_path):
    torch.set_num_threads(1)
    mulki("run", "mtil", "--strategy", "finetune", "--name", "first-try", *words(SMALL), "--out", tmp_path)
    assert (tmp_path / "mtil" / "first-try" / "seed-0" / "result.json").is_file()


def test_resume_finds_the_run_of_other_settings(small_parts, tmp_path):
    torch.set_num_threads(1)
    mulki("run", "mtil", "--strategy", "finetune", *words(SMALL), "--out", tmp_path)
    plain = tmp_path / "mtil" / "finetune" / "seed-0"
    done = mulki("resume", plain)
    assert "continuing the one beside it" in done.stderr
    assert "already complete" in done.stderr
    mulki("run", "mtil", "--strategy", "finetune", *words((*SMALL, "train.optimizer.lr=0.1")), "--out", tmp_path)
    done = mulki("resume", plain, ok=False)
    assert done.exit_code == 2
    assert done.stderr.count("finetune+") == 2


def test_runs_of_other_threads_and_versions_are_told_apart():
    one = result(seed=0, versions={"torch": "2.0", "numpy": "1.9"}, device={"type": "cpu", "threads": 1})
    same = result(seed=1, versions={"torch": "2.0", "numpy": "1.9"}, device={"type": "cpu", "threads": 1})
    other = result(seed=1, versions={"torch": "2.1", "numpy": "1.9"}, device={"type": "cpu", "threads": 2})
    old = result(seed=1)
    assert "differ in" not in comparison_text([one, same])
    assert "differ in" not in comparison_text([one, old]), "what was not recorded is no difference"
    text = comparison_text([one, other])
    assert "torch (2.0, 2.1), threads (1, 2)" in text
    assert len(comparison_data([one, other])["notes"]) == 1


def test_a_result_records_threads_versions_and_platform(small_parts, tmp_path):
    torch.set_num_threads(1)
    found = run_experiment(resolve("mtil", Changes(strategy="zero-shot", settings=SMALL)), 0, tmp_path)
    assert {"python", "torch", "torchvision", "numpy", "pillow", "avalanche-lib", "open_clip_torch"} <= set(
        found.versions
    )
    assert found.device["threads"] == 1
    assert {"platform", "omp_num_threads"} <= set(found.device)


@pytest.fixture
def undrawn(monkeypatch):
    """Tasks of mtil-mini without their pictures."""
    monkeypatch.setattr(stream, "_task", lambda name, *_: SimpleNamespace(name=name))


def names_of(*settings):
    resolved = resolve("mtil", Changes(settings=settings))
    return [task.name for task in mtil_mini(**resolved.recipe.stream.options).tasks], resolved.notices


def test_tasks_are_learned_as_they_are_written(undrawn):
    assert [task.name for task in mtil_mini(tasks=["digits", "scans", "flags"]).tasks] == ["digits", "scans", "flags"]
    found, notices = names_of("stream.tasks=[digits,scans,flags]")
    assert found == ["digits", "scans", "flags"]
    assert any("not in the recipe's order 'I'" in notice for notice in notices)
    found, notices = names_of("stream.tasks=[digits,scans]")
    assert found == ["digits", "scans"]
    assert not any("the recipe's order" in notice for notice in notices), "nothing is contradicted"
    assert names_of("stream={name: mtil-mini, tasks: [scans, digits]}")[0] == ["scans", "digits"]


def test_an_order_that_is_written_with_the_tasks_applies_and_is_told(undrawn):
    found = mtil_mini(order="II", tasks=["flags", "food", "digits"])
    assert [task.name for task in found.tasks] == ["food", "digits", "flags"]
    assert "food, digits, flags" in found.notices[0]
    assert mtil_mini(order="II", tasks=["food", "flags"]).notices == ()
    assert names_of("stream.tasks=[flags,food]", "stream.order=II")[0] == ["food", "flags"]


@pytest.mark.parametrize(("steps", "warmup"), [(5, 0), (10, 1), (100, 10), (101, 100)])
def test_a_warm_up_that_fills_the_task_is_shortened(steps, warmup):
    schedule = Schedule(name="cosine", warmup=100)
    assert schedule.warmup_within(steps) == warmup
    assert factor(schedule, warmup, steps) == 1
    assert bool(schedule.shortened(steps)) == (warmup != 100)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            ("train.iterations=5",),
            "$.train: the warm-up of 5 steps (train.schedule.warmup) would take all 5 steps; it is left out",
        ),
        (("train.iterations=20", "train.schedule.warmup=30"), "it is shortened to 2, a tenth of them"),
        (("train.per_task={flags: {iterations: 3}}",), "$.train.per_task.flags: the warm-up of 5 steps"),
    ],
)
def test_a_shortened_warm_up_is_told(settings, said):
    done = mulki("validate", "mtil", *words(settings))
    assert said in done.stderr


@pytest.mark.parametrize("settings", [("train.iterations=6",), ("train.iterations=5", "strategy=zero-shot")])
def test_nothing_is_told_where_nothing_is_shortened(settings):
    assert "warm-up" not in mulki("validate", "mtil", *words(settings)).stderr


def test_with_epochs_the_run_tells_it(small_parts, tmp_path, capsys):
    torch.set_num_threads(1)
    settings = (*SMALL, "train.iterations=null", "train.epochs=1", "train.schedule.warmup=100")
    run_experiment(resolve("mtil", Changes(strategy="finetune", settings=settings)), 0, tmp_path)
    said = capsys.readouterr().err
    assert "task first: the warm-up of 100 steps (train.schedule.warmup) would take all 4 steps; it is left out" in said
    curves = (tmp_path / "mtil" / "finetune" / "seed-0" / "metrics.csv").read_text()
    assert "train/lr,0,0.0005\n" in curves.replace("\r", "")


def test_a_folder_that_cannot_be_chosen_apart_is_no_traceback(tmp_path):
    recipe = resolve("mtil").recipe
    place = tmp_path / "mtil" / "mulki-plus" / "seed-0"
    place.mkdir(parents=True)
    (place / "recipe.yaml").write_text("{")
    assert choose_folder(tmp_path, recipe, 0) == place
    with pytest.raises(MulkiError):
        resolve(str(place / "recipe.yaml"))
