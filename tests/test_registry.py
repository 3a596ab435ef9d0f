"""Registration, provenance, and signatures that are read without importing."""

import sys
import types
from importlib.metadata import EntryPoint
from typing import Literal

import pytest

from mulki_plugins import hookimpl
from mulki_plugins.errors import MulkiError
from mulki_plugins.registry import discovery
from mulki_plugins.registry.catalog import Catalog, Part, Provenance, signature_of
from mulki_plugins.registry.register import Register
from mulki_plugins.registry.static import REQUIRED, UNKNOWN, inspect_signature
from mulki_plugins.types import Weight

MINE = Provenance(distribution="mine", version="1.0")


def part(target, **more):
    return Part(kind="plugin", name="p", target=target, summary="", provenance=MINE, **more)


PARTS = [part for part in discovery.catalog().parts.values() if part.kind != "command"]


def test_mulkis_commands_are_registered_so_that_nobody_takes_their_names():
    from mulki_plugins.cli import main

    registered = {p.name: p.load() for p in discovery.catalog().of_kind("command")}
    assert registered == main.commands


@pytest.mark.parametrize("built_in", PARTS, ids=lambda p: f"{p.kind}-{p.name}")
def test_built_in_parts_load_and_their_signature_is_read_as_python_sees_it(built_in):
    loaded = built_in.load()
    read = signature_of(built_in)
    assert built_in.summary
    inspected = inspect_signature(loaded)
    given = {"reference"} if built_in.needs_reference else set()
    if built_in.kind == "optimizer":  # what the recipe and the model give to each
        given = {
            next(iter(inspected.options)),
            *({"lr", "weight_decay", "fused", "name_of"} & inspected.options.keys()),
        }
    assert given <= inspected.options.keys(), "what the recipe declares once is a keyword argument"
    assert read.options.keys() == inspected.options.keys() - given
    assert read.open == inspected.open
    for name, option in read.options.items():
        expected = inspected.options[name]
        if option.default is not UNKNOWN:
            assert option.default == expected.default, name
        if built_in.provenance.distribution == "mulki" and not built_in.name.startswith("avalanche."):
            assert option.kind == expected.kind or built_in.kind in ("metric", "logger"), name


def test_nothing_is_registered_twice_and_everything_that_is_named_exists():
    plugins = {p.name for p in discovery.catalog().of_kind("plugin")}
    for p in discovery.catalog().of_kind("plugin"):
        assert {*p.requires, *p.conflicts, *p.after} <= plugins
    assert discovery.catalog().problems == []


def test_signatures_are_read_without_importing(tmp_path, monkeypatch):
    package = tmp_path / "never_imported"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (package / "kinds.py").write_text("from typing import Literal\nMode = Literal['a', 'b']\n")
    (package / "stage.py").write_text(
        "from typing import Optional\nfrom .kinds import Mode\nfrom .base import Base\n"
        "class Stage(Base):\n"
        "    def __init__(self, must: int, mode: Mode = 'a', *, weight: 'float | None' = None, other: object = print, **more):\n"
        "        pass\n"
        "class Child(Base):\n    pass\n"
        "def make(sizes: list[int] = (1, 2), named: dict[str, float] | None = None, old: Optional[str] = None): ...\n"
    )
    (package / "base.py").write_text("class Base:\n    def __init__(self, depth: int = 3):\n        pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    stage = signature_of(part("never_imported.stage:Stage"))
    assert stage.open
    assert {n: o.kind for n, o in stage.options.items()} | {"other": 0} == {
        "must": int, "mode": Literal["a", "b"], "weight": float | None, "other": 0,
    }  # fmt: skip
    assert stage.options["must"].default is REQUIRED
    assert stage.options["other"].default is UNKNOWN
    assert list(signature_of(part("never_imported.stage:Child")).options) == ["depth"]
    made = signature_of(part("never_imported.stage:make"))
    assert {n: o.kind for n, o in made.options.items()} == {
        "sizes": list[int], "named": dict[str, float] | None, "old": str | None,
    }  # fmt: skip
    assert "never_imported" not in sys.modules
    for target, why in (
        ("never_imported.stage:Gone", "defines no 'Gone'"),
        ("never_imported.gone:X", "no source file"),
        ("not_there_at_all:X", "is not installed"),
    ):
        with pytest.raises(MulkiError, match=why):
            signature_of(part(target))


def test_an_object_is_inspected():
    def factory(*, weight: Weight = 2.0, name):
        return None

    signature = signature_of(part(factory))
    assert signature.options["weight"].kind == Weight
    assert signature.options["name"].default is REQUIRED


def test_a_name_taken_twice_names_both_distributions():
    catalog = Catalog()
    Register(catalog, MINE).plugin("x", "a:b", summary="one")
    with pytest.raises(MulkiError, match=r"the plugin 'x' of yours 2 is already there, from mine 1.0"):
        Register(catalog, Provenance(distribution="yours", version="2")).plugin("x", "a:b", summary="two")


def test_find_says_what_may_have_been_meant():
    with pytest.raises(MulkiError, match=r"no plugin is named 'tacher' \(did you mean 'teachers'\?\)"):
        discovery.catalog().find("plugin", "tacher")


def test_a_part_that_cannot_be_imported_names_its_distribution():
    with pytest.raises(
        MulkiError, match=r"the plugin 'p' of mine 1.0 cannot be loaded from no_such_module:X: ModuleNotFoundError"
    ):
        part("no_such_module:X").load()


@pytest.fixture
def packages(monkeypatch):
    """Entry points of packages that are not installed: name -> what the module does."""

    def install(**modules):
        entries = []
        for name, module in modules.items():
            if module is not None:
                monkeypatch.setitem(sys.modules, f"pkg_{name}", module)
            entries.append(EntryPoint(name=name, value=f"pkg_{name}", group="mulki"))
        monkeypatch.setattr(discovery, "entry_points", lambda group: entries)
        discovery.catalog.cache_clear()
        return discovery.catalog()

    yield install
    discovery.catalog.cache_clear()


def module(**members):
    return types.SimpleNamespace(__name__="pkg", **members)


def test_a_third_party_registers_like_the_built_in(packages, tmp_path):
    (tmp_path / "theirs.yaml").write_text("name: theirs\nplugins: []\n")

    @hookimpl
    def mulki_register(register):
        register.plugin("theirs", "pkg:X", summary="a stage", requires=["teachers"])
        register.folder("strategies", tmp_path)

    catalog = packages(good=module(mulki_register=mulki_register))
    assert catalog.problems == []
    assert catalog.find("plugin", "theirs").requires == ("teachers",)
    from mulki_plugins.recipe.files import list_registered

    assert "theirs" in list_registered("strategies")


def test_broken_packages_are_reported_and_harm_nobody(packages):
    @hookimpl
    def taken(register):
        register.plugin("fresh", "pkg:X", summary="new")
        register.plugin("adding", "pkg:X", summary="taken")

    @hookimpl(specname="mulki_register")
    def raises(register):
        raise OSError("no disk")

    @hookimpl(specname="mulki_register")
    def wrong(register, nonsense):
        pass

    @hookimpl
    def misspelt(register):
        pass

    catalog = packages(
        missing=None,
        taken=module(mulki_register=taken),
        raises=module(mulki_register=raises),
        wrong=module(mulki_register=wrong),
        misspelt=module(mulki_registr=misspelt),
    )
    report = "\n".join(catalog.problems)
    for expected in (
        "missing is left out: ModuleNotFoundError",
        "taken is left out: the plugin 'adding' of taken is already there, from mulki",
        "raises is left out: OSError: no disk",
        "wrong is left out: the hook mulki_register takes nonsense, which MulKI does not give",
        "misspelt is left out: there is no hook 'mulki_registr' (did you mean 'mulki_register'?)",
    ):
        assert expected in report, report
    assert ("plugin", "fresh") not in catalog.parts, "of a package that fails nothing stays"
    assert catalog.find("plugin", "adding").provenance.distribution == "mulki"


def test_annotations_that_cannot_be_evaluated_are_not_checked_and_the_others_are(tmp_path, monkeypatch):
    (tmp_path / "late_names.py").write_text(
        "from __future__ import annotations\n"
        "from typing import TYPE_CHECKING\n"
        "from mulki_plugins.types import Weight, checked\n"
        "if TYPE_CHECKING:\n"
        "    from nowhere import Tensor\n"
        "class Other: ...\n"
        "class Part:\n"
        "    @checked\n"
        "    def __init__(self, *, start: Tensor | None = None, many: list[Tensor] = (), other: Other = Other(),\n"
        "                 weight: Weight = 1.0, name: str = '') -> None:\n"
        "        self.weight = weight\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    from late_names import Other
    from late_names import Part as Late

    assert Late(start=5, many=[1], other=Other(), weight=2).weight == 2
    with pytest.raises(
        ValueError, match=r"^Part: other: expected a Other, got 5; weight: expected a number, at least 0, got -1$"
    ):
        Late(start=object(), other=5, weight=-1)
    with pytest.raises(ValueError, match="name: expected a text, got 5"):
        Late(name=5)
    options = signature_of(part(Late)).options
    assert options["weight"].kind == Weight
    assert options["name"].kind is str
