"""The plan past one machine: its formulas against independent counts, and the tables of the documentation."""

import importlib

import pytest
from attrs import evolve
from click.testing import CliRunner

from tests.environments import ROOT

pytestmark = pytest.mark.flops


@pytest.fixture
def scale(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("scale")


@pytest.fixture
def checks(scale):
    return importlib.import_module("scale_checks")


@pytest.mark.parametrize(("model", "name"), [("VIT_B_16", "ViT-B-16"), ("VIT_L_14", "ViT-L-14")])
def test_operations_are_those_that_torch_counts(scale, checks, model, name):
    assert getattr(scale, model).image.flops == pytest.approx(checks.counted_flops(name), rel=0.02)


def test_a_ring_sends_each_part_around_twice(scale):
    """Counted message by message: n − 1 for the sums, n − 1 to hand them out."""
    ranks, size, bandwidth, latency = 5, 1000.0, 50.0, 0.25
    seconds = sum(latency + size / ranks / bandwidth for _ in range(ranks - 1) for _ in ("sums", "results"))
    assert scale.all_reduce_seconds(size, ranks, bandwidth, latency) == pytest.approx(seconds)
    assert scale.all_reduce_seconds(size, 1, bandwidth, latency) == 0.0


def test_a_fit_finds_latency_and_bandwidth_again(scale, checks):
    times = {size: scale.all_reduce_seconds(size * 2**20, 2, 3e9, 4e-5) for size in (1, 16, 256)}
    latency, bandwidth = checks.fit_ring(times)
    assert latency == pytest.approx(4e-5)
    assert bandwidth == pytest.approx(3e9)


def test_one_gpu_takes_what_was_measured(scale):
    alone = scale.Machine(gpus=1, cores=64)
    assert scale.step_seconds(scale.VIT_B_16, alone) == alone.host
    with_graphs = evolve(alone, graphs=True)
    assert scale.step_seconds(scale.VIT_B_16, with_graphs) == pytest.approx(alone.step)
    assert scale.gradient_seconds(scale.VIT_B_16, alone) == scale.statistics_seconds(scale.VIT_B_16, alone) == 0.0


def test_few_cores_make_a_step_wait_for_images(scale):
    machine = scale.Machine(gpus=1, cores=5, graphs=True)
    assert scale.limit(scale.VIT_B_16, machine) == "loading"
    assert scale.step_seconds(scale.VIT_B_16, machine) == pytest.approx(64 / (4 * 90))


def test_a_slow_network_is_what_a_step_waits_for(scale):
    machine = scale.Machine(nodes=4, network=10e9, graphs=True)
    assert scale.limit(scale.VIT_L_14, machine) == "reductions"
    between = 2 * 3 * (4 * 427.6e6 / 4 / 10e9)
    assert scale.gradient_seconds(scale.VIT_L_14, machine) == pytest.approx(
        between + 2 * 7 * (4 * 427.6e6 / 8 / 350e9), rel=1e-2
    )
    assert scale.step_seconds(scale.VIT_L_14, machine) > scale.step_seconds(scale.VIT_L_14, scale.Machine(nodes=1))


def test_every_test_image_is_evaluated_once(scale):
    for ranks in (1, 4, 8, 32):
        largest = scale.shard(scale.TEST_IMAGES, ranks)
        assert largest * ranks >= scale.TEST_IMAGES > (largest - 1) * ranks
    one, eight = (scale.Machine(gpus=gpus) for gpus in (1, 8))
    first = [scale.evaluation_seconds(scale.VIT_B_16, each, cached=False) for each in (one, eight)]
    assert first[0] / first[1] == pytest.approx(8, rel=1e-3)


def test_a_run_waits_for_a_checkpoint_only_if_the_disk_is_slow(scale):
    machine = scale.Machine(disk=1e9)
    size = 16 * 149.6e6
    assert scale.checkpoint_wait(scale.VIT_B_16, machine, 60.0) == 0.0
    assert scale.checkpoint_wait(scale.VIT_B_16, machine, 1.0) == pytest.approx(size / 1e9 - 1.0)


def test_the_documentation_has_the_tables_of_the_script(scale):
    printed = CliRunner().invoke(scale.main, ["table"])
    assert printed.exit_code == 0
    document = (ROOT / "docs" / "scale.md").read_text("utf-8")
    tables = [part for part in printed.stdout.split("\n\n") if part.startswith("|")]
    assert len(tables) == 2
    for each in tables:
        assert each.strip() in document


def test_the_plan_takes_the_numbers_of_a_benchmark(scale, tmp_path):
    (tmp_path / "bench.json").write_text(
        '{"tasks": [{"step_seconds": 1.0}, {"step_seconds": 0.5}], "evaluations": [{"images": 100, "encoding_seconds": 2.0}]}'
    )
    machine = scale.from_bench(tmp_path / "bench.json")
    assert machine.encoding == 50.0
    assert scale.step_seconds(scale.VIT_B_16, evolve(machine, gpus=1)) == pytest.approx(0.5)
