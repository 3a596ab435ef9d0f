"""What several ranks need of a recipe, checked before anything is imported or read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mulki_plugins.errors import Mistakes
from mulki_plugins.ranks.launch import launched
from mulki_plugins.recipe.resolve import Resolution
from mulki_plugins.recipe.schema import Recipe
from mulki_plugins.registry.catalog import Kind
from mulki_plugins.registry.discovery import catalog


def check_ranks(recipes: Sequence[Resolution]) -> None:
    """Mistakes if torchrun has started several ranks and one of the recipes cannot use them."""
    if (launch := launched()) is None:
        return
    if wrong := list(dict.fromkeys(line for each in recipes for line in problems(each.recipe, launch.world))):
        raise Mistakes(wrong)


def problems(recipe: Recipe, ranks: int) -> Iterator[str]:
    """What keeps a recipe from running on so many ranks."""
    size = recipe.train.batch_size
    if recipe.strategy.base != "none" and size % ranks:
        below, above = size // ranks * ranks, -(-size // ranks) * ranks
        fitting = " or ".join(str(each) for each in (below, above) if each)
        divisors = ", ".join(str(n) for n in range(2, size + 1) if size % n == 0)
        yield (
            f"$.train.batch_size: {ranks} ranks cannot share {size} images equally; "
            f"set it to {fitting}, or use one of {divisors} ranks"
        )
    for where, kind, name in _parts(recipe):
        part = catalog().parts.get((kind, name))
        if part is not None and part.one_process:
            yield f"{where}: the {part} works in one process only: {part.one_process}; start without torchrun"


def _parts(recipe: Recipe) -> Iterator[tuple[str, Kind, str]]:
    """The parts that may be made for one process only: the place in the recipe, the kind and the name of each."""
    for entry in recipe.strategy.plugins:
        yield "$.strategy.plugins", "plugin", entry.name
    for adapter in recipe.model.options.get("adapters", []):
        yield from (("$.model.adapters", "adapter", name) for name in adapter)
    yield from (("$.model.head", "head", name) for name in recipe.model.options.get("head", {}))
