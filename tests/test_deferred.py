"""Heavy modules that nobody uses are not imported, and whoever uses them gets them all the same."""

import importlib.util
import subprocess
import sys
import types

import pytest

from mulki_plugins import libraries
from mulki_plugins.deferred import StandIn, deferring

MODULE = """
import imported
imported.names.append(__name__)
__version__ = "3"
def accuracy(x):
    return 10 * x
class Thing:
    pass
"""


@pytest.fixture
def imports(tmp_path, monkeypatch):
    """The packages heavy and heavy.functional; returns what has been imported of them."""
    (tmp_path / "heavy").mkdir()
    for name in ("__init__", "functional", "other"):
        (tmp_path / "heavy" / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    record = types.ModuleType("imported")
    record.names = []
    monkeypatch.setitem(sys.modules, "imported", record)
    yield record.names
    for name in [name for name in sys.modules if name.partition(".")[0] == "heavy"]:
        del sys.modules[name]


TABLE = {"heavy": frozenset(), "heavy.functional": frozenset({"accuracy"}), "not_installed_here": frozenset()}


def test_it_is_imported_when_it_is_used(imports):
    with deferring(TABLE):
        import heavy as package
        from heavy.functional import accuracy
    assert imports == []
    assert "heavy" not in sys.modules
    assert accuracy(4) == 40
    assert imports == ["heavy", "heavy.functional"]
    assert package.__version__ == "3"
    assert not isinstance(sys.modules["heavy"], StandIn)
    assert package.Thing is sys.modules["heavy"].Thing


def test_others_import_the_module_itself_afterwards(imports):
    with deferring(TABLE):
        import heavy.functional
    import heavy as again

    assert not isinstance(again, StandIn)
    assert imports == ["heavy"]


def test_a_use_that_is_not_foreseen_imports_it_at_once(imports):
    with deferring(TABLE):
        import heavy.other  # noqa: F401
        from heavy.functional import Thing
    assert isinstance(Thing, type)
    assert set(imports) == {"heavy", "heavy.functional", "heavy.other"}
    assert not any(isinstance(module, StandIn) for module in sys.modules.values())


def test_a_search_for_installed_packages_finds_it(imports):
    with deferring(TABLE):
        assert importlib.util.find_spec("heavy") is not None
        with pytest.raises(ModuleNotFoundError):
            import not_installed_here  # noqa: F401
    assert imports == []


def test_what_is_imported_already_stays(imports):
    import heavy as before

    with deferring(TABLE):
        import heavy as within

        assert within is before
    assert sys.modules["heavy"] is before


def test_avalanche_is_imported_without_them_and_its_metric_works():
    code = """
import sys
from mulki_plugins.libraries import import_libraries
import_libraries()
assert not [name for name in ("torchmetrics", "wandb", "gdown") if name in sys.modules]
import torch
from avalanche.evaluation.metrics import TopkAccuracy
metric = TopkAccuracy(top_k=1)
metric.update(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([1, 1]), 0)
assert metric.result() == {0: 0.5}
import torchmetrics
assert torchmetrics.__file__ and torchmetrics.functional.accuracy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("chosen", ["", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_threads_soon_sleep_while_they_wait_unless_the_user_decides(monkeypatch, chosen):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", *libraries._TORCH_LOGS):
        monkeypatch.delenv(name, raising=False)
    if chosen:
        monkeypatch.setenv(chosen, "77")
    seen = []

    def import_module(name):
        seen.append(libraries.os.environ.get("GOMP_SPINCOUNT"))

    monkeypatch.setattr(libraries, "importlib", types.SimpleNamespace(import_module=import_module))
    libraries._torch()
    assert seen == [{"": "1000", "OMP_WAIT_POLICY": None, "GOMP_SPINCOUNT": "77"}[chosen]]
    assert libraries.os.environ.get("GOMP_SPINCOUNT") == ("77" if chosen == "GOMP_SPINCOUNT" else None)
