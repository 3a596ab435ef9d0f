"""Whole runs through the command line: files, determinism, strategies, failures."""

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
import threading

import pytest
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mulki_plugins.cli import main
from mulki_plugins.metrics import average, last, transfer
from mulki_plugins.report.folder import holds_run
from mulki_plugins.stages import Eliciting
from tests.conftest import same, small_world

SMALL = [
    "--set", "stream={name: small}", "--set", "model={name: small-clip}", "--set", "device=cpu",
    "--set", "train.iterations=6", "--set", "train.schedule.warmup=1", "--set", "train.batch_size=8",
]  # fmt: skip
EVERY_TWO = ["--set", "strategy.connecting.every=2"]


@pytest.fixture(scope="module", autouse=True)
def small_streams():
    with small_world():
        yield


def mulki(*arguments, ok=True):
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    if ok:
        assert done.exit_code == 0, done.output + done.stderr
    return done


@pytest.fixture(scope="module")
def run(small_streams, tmp_path_factory):
    """One small run of MulKI: its folder, and what it printed."""
    out = tmp_path_factory.mktemp("runs")
    done = mulki("run", "mtil", *SMALL, *EVERY_TWO, "--out", out)
    return folder_of(out), done


def result(folder):
    return json.loads((folder / "result.json").read_text())


def folder_of(out, strategy="mulki-plus", seed=0):
    """The one run of that strategy with other settings than the recipe's."""
    [folder] = out.glob(f"mtil/{strategy}+*/seed-{seed}")
    return folder


def test_the_files_of_a_run(run):
    folder, _ = run
    found = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and "tfevents" not in p.name}
    assert found == {
        "recipe.yaml", "classes.json", "result.json", "matrix.csv", "matrix.txt", "matrix.png", "metrics.csv", "log.txt",
        "model.safetensors", "head.safetensors", "predictions/stream.json", "predictions/images.npz",
        *(f"predictions/row-0{i}.npz" for i in range(4)),
        *(f"checkpoints/{task}/{file}" for task in ("task-02-second", "task-03-third") for file in (
            "manifest.json", "state.pt", "weights.safetensors",
        )),
        *(f"weights/{task}/{file}" for task in ("task-01-first", "task-02-second", "task-03-third") for file in (
            "manifest.json", "state.pt", "weights.safetensors",
        )),
    }  # fmt: skip
    data = result(folder)
    assert data["status"] == "complete"
    assert data["tasks"] == ["first", "second", "third"]
    assert [len(row) for row in data["matrix"]] == [3, 3, 3]
    assert len(data["zero_shot"]) == 3
    for name, metric in (("transfer", transfer), ("average", average), ("last", last)):
        assert data["metrics"][name] == pytest.approx(metric(data["matrix"]))
    assert [p["name"] for p in data["plugins"]] == [
        "teachers",
        "eliciting",
        "adding",
        "distinguishing",
        "preserving",
        "connecting",
    ]
    assert {"torch", "avalanche-lib", "open_clip_torch", "python"} <= set(data["versions"])
    for row in [data["zero_shot"], *data["matrix"]]:
        correct = [v * images / 100 for v, images in zip(row, (8, 12, 8), strict=True)]
        assert correct == pytest.approx([round(c) for c in correct]), "percent of the test images"


def test_the_table_is_printed_and_printed_again(run):
    folder, done = run
    assert "zero-shot" in done.stdout
    assert "Transfer" in done.stdout
    assert (folder / "matrix.txt").read_text() in mulki("results", folder).stdout
    assert "training" in done.stderr
    assert "training" not in done.stdout
    data = json.loads(mulki("results", folder, "--json").stdout)
    assert data["runs"][0]["matrix"] == result(folder)["matrix"]


def test_the_curves_have_stable_tags(run):
    folder, _ = run
    events = EventAccumulator(str(folder))
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert scalars == {
        "train/loss/cross_entropy", "train/loss/eliciting", "train/loss/adding",
        "train/loss/preserving", "train/loss/total", "train/accuracy",
        "train/lr", "train/share/initial", "eval/accuracy/first",
        "eval/accuracy/second", "eval/accuracy/third", "metrics/transfer", "metrics/average", "metrics/last",
        "metrics/forgetting", "eval/mean", "eval/mean_learned", "eval/mean_future", "cost/train_seconds",
        "cost/evaluate_seconds", "cost/peak_memory_mib",
    }  # fmt: skip
    assert [tag for tag in events.Tags()["images"] if not tag.startswith("wrong/")] == ["matrix"]
    accuracy = events.Scalars("eval/accuracy/second")
    data = result(folder)
    assert [e.step for e in accuracy] == [0, 1, 2, 3]
    assert [e.value for e in accuracy] == pytest.approx([data["zero_shot"][1]] + [row[1] for row in data["matrix"]])
    assert [e.step for e in events.Scalars("train/loss/total")] == list(range(18))
    terms = [events.Scalars(f"train/loss/{t}") for t in ("cross_entropy", "eliciting", "adding", "preserving", "total")]
    for *parts, total in zip(*terms, strict=True):
        assert sum(part.value for part in parts) == pytest.approx(total.value, rel=1e-4)


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(run, tmp_path):
    folder, _ = run
    mulki("run", folder / "recipe.yaml", "--out", tmp_path)
    again = tmp_path / "mtil" / "mulki-plus" / "seed-0"
    assert result(again)["matrix"] == result(folder)["matrix"], "recipe.yaml runs again as it is"
    name = "checkpoints/task-03-third/weights.safetensors"
    weights = load_file(folder / name)
    assert same(load_file(again / name), weights), "the weights are the same to the last bit"
    mulki("run", "mtil", *SMALL, *EVERY_TWO, "--seed", 1, "--out", tmp_path)
    assert not same(load_file(folder_of(tmp_path, seed=1) / name), weights)


def test_the_weights_can_be_loaded_again(tmp_path):
    few = ["--set", "stream.tasks=[scans]", "--set", "train.iterations=2", "--set", "train.schedule.warmup=0"]
    few += ["--set", "train.batch_size=8", "--set", "loggers=[]"]
    mulki("run", "mtil", "--strategy", "finetune", *few, "--out", tmp_path)
    folder = folder_of(tmp_path, "finetune")
    weights = folder / "checkpoints" / "task-01-scans" / "weights.safetensors"
    assert load_file(weights)
    with safe_open(weights, "pt") as file:
        assert json.loads(file.metadata()["mulki"])["architecture"] == "mulki-tiny"
    done = mulki(
        "run", "mtil", "--strategy", "zero-shot", *few, "--set", f"model.pretrained={folder}", "--out", tmp_path
    )
    assert f"the weights are those of {folder / 'model.safetensors'}" in done.stderr
    assert result(folder_of(tmp_path, "zero-shot"))["zero_shot"] == result(folder)["matrix"][-1]


def test_zero_shot_trains_nothing(run, tmp_path):
    mulki("run", "mtil", "--strategy", "zero-shot", *SMALL, "--out", tmp_path)
    data = result(folder_of(tmp_path, "zero-shot"))
    assert data["matrix"] == [data["zero_shot"]] * 3
    assert data["zero_shot"] == result(run[0])["zero_shot"]
    assert data["metrics"]["forgetting"] == 0


def test_zero_shot_among_the_classes_seen_so_far(run, tmp_path):
    seen = ["--set", "evaluate.classes=seen"]
    mulki("run", "mtil", "--strategy", "zero-shot", *SMALL, *seen, "--out", tmp_path)
    data = result(folder_of(tmp_path, "zero-shot"))
    assert data["matrix"][0] == data["zero_shot"], "one task's classes are told apart among themselves"
    assert sum(data["matrix"][2]) < sum(data["zero_shot"]), "at the end, among those of all three"


def test_several_seeds_are_compared_and_an_earlier_run_is_kept(tmp_path):
    arguments = [
        "run",
        "mtil",
        "--strategy",
        "finetune",
        *SMALL,
        "--out",
        tmp_path,
    ]
    done = mulki(*arguments, "--seed", 0, "--seed", 1, "--json")
    data = json.loads(done.stdout)
    assert [r["seed"] for r in data["runs"]] == [0, 1]
    assert data["summary"][0]["metrics"]["last"]["std"] is not None
    first = result(folder_of(tmp_path, "finetune"))
    done = mulki(*arguments, "--seed", 0)
    assert "moved an earlier run to" in done.stderr
    assert result(folder_of(tmp_path, "finetune").with_name("seed-0.before-1"))["matrix"] == first["matrix"]
    done = mulki("results", tmp_path)
    assert "±" in done.stdout
    assert "before" not in done.stdout
    assert "seed-0.before-1" in done.stderr, "what is left out is named"


@pytest.mark.parametrize("plugin", ["ewc", "si", "mas", "lwf", "replay", "agem"])
def test_avalanches_plugins_join_the_stack(plugin, tmp_path):
    mulki("run", "mtil", *SMALL, "--set", "train.iterations=2", "--with", f"avalanche.{plugin}", "--out", tmp_path)
    folder = folder_of(tmp_path, f"mulki-plus-with-avalanche.{plugin}")
    data = result(folder)
    assert data["status"] == "complete"
    tags = {line.split(",")[0] for line in (folder / "metrics.csv").read_text().split()}
    term = {"ewc": "ewc", "si": "synapticintelligence", "mas": "mas", "lwf": "lwf"}.get(plugin)
    assert tags >= {f"train/loss/{term}"} if term else tags & {f"train/loss/{plugin}"} == set()


def test_a_run_that_fails_leaves_what_was_finished(tmp_path, monkeypatch):
    fine = Eliciting.before_training_exp

    def fails(self, strategy, **kwargs):
        if strategy.clock.train_exp_counter == 2:
            raise RuntimeError("the third task is too much")
        fine(self, strategy, **kwargs)

    monkeypatch.setattr(Eliciting, "before_training_exp", fails)
    done = mulki("run", "mtil", *SMALL, "--out", tmp_path, ok=False)
    assert done.exit_code != 0
    folder = folder_of(tmp_path)
    data = result(folder)
    assert data["status"] == "failed"
    assert "the third task is too much" in data["error"]
    assert len(data["matrix"]) == 2
    assert "2 of 3 tasks finished" in mulki("results", folder).stdout
    assert (folder / "checkpoints" / "task-02-second" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (["model.pretrained=gone.safetensors"], "gone.safetensors: no such file"),
        (["model.name=ViT-B-16", "model.pretrained=opena"], "open_clip has no weights 'opena'"),
        (["stream.tasks=[scns]"], "no task 'scns'"),
        (["device=cuda:99"], "cuda:99 is not on this machine"),
    ],
)
def test_what_shows_only_when_it_is_built_is_told_without_a_traceback(settings, why, tmp_path):
    arguments = [a for s in settings for a in ("--set", s)]
    done = mulki("run", "mtil", *arguments, "--out", tmp_path, ok=False)
    assert done.exit_code == 2
    assert why in done.stderr
    assert "Traceback" not in done.stderr
    assert not any(tmp_path.iterdir()), "nothing is left behind"


def test_a_bar_on_a_terminal(tmp_path, monkeypatch, capsys):
    ours, terminal = pty.openpty()
    chunks = []

    def read():
        with contextlib.suppress(OSError):  # a terminal that nobody writes to any more
            while chunk := os.read(ours, 4096):
                chunks.append(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(terminal, "w", encoding="utf-8") as stderr, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)
        main.main(["run", "mtil", *SMALL, "--set", "train.iterations=3", "--out", str(tmp_path)], standalone_mode=False)
    reader.join()
    os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", b"".join(chunks).decode())
    assert re.search(r"\[1/3\] first \S+ +[1-3]/3 loss \d\.\d+, accuracy \d+ % +\d+ s left", text)
    assert "evaluating" in text
    assert "building the stream small" in text
    stdout = capsys.readouterr().out
    assert "Transfer" in stdout
    assert "\x1b" not in stdout


def test_a_dry_run_says_what_would_be_done(tmp_path):
    done = mulki("run", "mtil", "--dry-run", "--seed", 3, "--seed", 4, "--out", tmp_path)
    assert "teachers, eliciting, adding, distinguishing, preserving, connecting" in done.stdout
    assert str(tmp_path / "mtil" / "mulki-plus" / "seed-4") in done.stdout
    assert not any(tmp_path.iterdir())
    assert json.loads(mulki("run", "mtil", "--dry-run", "--json").stdout)["recipe"]["name"] == "mtil"


@pytest.mark.parametrize(
    "command",
    [
        "--help",
        "run --help",
        "list",
        "list plugins --json",
        "validate mtil",
        "show mtil",
        "show mtil --json",
        "run mtil --dry-run",
    ],
)
def test_what_answers_at_once_imports_neither_torch_nor_avalanche(command):
    code = (
        "import sys\nfrom mulki_plugins.cli import main\n"
        f"try: main({command.split()!r})\nexcept SystemExit as e: assert not e.code, e.code\n"
        "heavy = {'torch', 'avalanche', 'open_clip', 'numpy', 'matplotlib', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_lists_say_who_brought_what():
    data = json.loads(mulki("list", "--json").stdout)
    assert set(data) == {
        "recipes", "strategies", "studies", "plugins", "adapters", "heads", "optimizers", "streams", "models", "metrics",
        "loggers",
    }  # fmt: skip
    assert {entry["name"] for entry in data["strategies"]} == {
        "finetune", "zero-shot", "joint", "lwf", "lwf-vr", "wise-ft", "l2", "weight-ensemble", "icarl", "zscl", "snd",
        "ewc", "replay", "si", "mas", "mulki", "mulki-plus", "lora", "lora-merge", "mulki-lora", "null-space",
        "moe-adapters", "diki", "rail", "magmax",
    }  # fmt: skip
    assert all(entry["distribution"] == "mulki" and entry["summary"] for entries in data.values() for entry in entries)
    text = mulki("list", "models").stdout
    assert "mulki-tiny" in text
    assert "architectures of open_clip" in text


def test_of_each_strategy_the_list_says_its_paper_and_what_it_keeps_and_needs():
    entries = {entry["name"]: entry for entry in json.loads(mulki("list", "strategies", "--json").stdout)["strategies"]}
    assert {name for name, entry in entries.items() if entry["keeps_images"]} == {"icarl", "replay", "joint"}
    assert {name for name, entry in entries.items() if entry["needs_reference"]} == {"zscl", "snd"}
    assert {name for name, entry in entries.items() if not entry["source"]} == {"finetune", "joint"}
    lines = {line.split()[0]: line for line in mulki("list", "strategies").stdout.splitlines()[2:] if line.strip()}
    assert lines["icarl"].split()[1:3] == ["yes", "no"]
    assert lines["zscl"].split()[1:3] == ["no", "yes"]
    assert "[arXiv 2303.06628]" in lines["zscl"]
    assert lines["mulki"].split()[1:3] == ["no", "no"]


def test_validate_as_json(tmp_path):
    assert json.loads(mulki("validate", "mtil", "--json").stdout) == {"valid": True, "errors": []}
    (tmp_path / "bad.yaml").write_text("name: x\n")
    done = mulki("validate", tmp_path / "bad.yaml", "--json", ok=False)
    assert done.exit_code == 2
    assert len(json.loads(done.stdout)["errors"]) == 4


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ((), True),
        (("recipe.yaml", "log.txt", "classes.json", "events.out.tfevents.1", "a-plugins-file"), True),  # killed early
        (("recipe.yaml", "weights", "predictions"), True),  # an extension that was killed early
        (("result.json", "recipe.yaml", "anything"), True),
        (("recipe.yaml", "classes.json", "open_clip_config.json"), False),  # an export
        (("recipe.yaml", "photos"), False),
        (("weights",), False),
    ],
)
def test_what_is_the_folder_of_a_run(tmp_path, names, expected):
    for name in names:
        (tmp_path / name).touch()
    assert holds_run(tmp_path) is expected
    assert not holds_run(tmp_path / "nothing")
