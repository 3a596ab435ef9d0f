"""Summaries, options and facts of a part, read from its class without importing it."""

import sys

import pytest

from mulki_plugins.errors import MulkiError
from mulki_plugins.registry.catalog import Catalog, Provenance
from mulki_plugins.registry.register import Register

MODULE = '''
raise RuntimeError("imported")
class Base:
    """A base of stages.

    Args:
        weight: Factor of the loss.
        depth (int): How deep,
            in layers.

    Returns:
        nothing: at all.
    """
    requires = ("teachers",)
    paper: str = "arXiv 1234.56789"
class Stage(Base):
    """Distils everything. In two sentences.

    More text.
    """
    keeps_images = True
    def __init__(self, weight=1.0, depth=2, *, extra=None):
        """Remember the factor.

        Args:
            weight: Its own factor.
        """
class EWC(Base):
    """EWC for everyone."""
class Silent(Base):
    pass
class Wrong:
    """Wrong facts."""
    requires = "teachers"
def make(weight=1.0):
    """Makes a stage.

    Args:
        weight: Factor.
    """
'''


@pytest.fixture
def register(tmp_path, monkeypatch):
    (tmp_path / "never_imported_facts.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return Register(Catalog(), Provenance(distribution="mine", version="1"))


def part(register, name, **facts):
    register.plugin(name.lower(), f"never_imported_facts:{name}", **facts)
    return register.catalog.find("plugin", name.lower())


def test_a_class_describes_itself_without_being_imported(register):
    stage = part(register, "Stage")
    assert stage.summary == "distils everything. In two sentences"
    assert stage.options == {"weight": "Its own factor.", "depth": "How deep, in layers."}
    assert (stage.requires, stage.source, stage.keeps_images) == (("teachers",), "arXiv 1234.56789", True)
    assert part(register, "EWC").summary == "EWC for everyone"
    assert part(register, "make").options == {"weight": "Factor."}
    assert "never_imported_facts" not in sys.modules


def test_arguments_override_what_the_class_says(register):
    stage = part(
        register, "Stage", summary="mine", options={"extra": "More."}, requires=[], source="page", keeps_images=False
    )
    assert (stage.summary, stage.requires, stage.source, stage.keeps_images) == ("mine", (), "page", False)
    assert stage.options == {"weight": "Its own factor.", "depth": "How deep, in layers.", "extra": "More."}


def test_wrong_facts_and_missing_summaries_are_errors(register):
    with pytest.raises(MulkiError, match="'wrong' of mine 1: requires: expected a list of names, got 'teachers'"):
        part(register, "Wrong")
    with pytest.raises(MulkiError, match="'silent' of mine 1: expected a summary of one line, or a docstring"):
        part(register, "Silent")
    assert part(register, "Silent", summary="quiet").requires == ("teachers",)
    assert part(register, "Gone", summary="not there").summary == "not there"


def test_an_object_describes_itself_too(register):
    class Stage:
        """Does nothing.

        Args:
            weight: Factor.
        """

        after = ("teachers",)

        def __init__(self, weight=1.0):
            pass

    register.plugin("stage", Stage)
    stage = register.catalog.find("plugin", "stage")
    assert (stage.summary, stage.options, stage.after) == ("does nothing", {"weight": "Factor."}, ("teachers",))


def test_the_former_name_of_the_option_types_still_works():
    from mulki_plugins import options, types

    assert all(getattr(options, name) is getattr(types, name) for name in options.__all__)
