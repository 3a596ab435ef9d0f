"""Leaves out parts that can never stand in a stack: what they require is missing, or requires them in turn."""

from __future__ import annotations

from mulki_plugins.registry.parts import Catalog, Part


def leave_out_unusable(catalog: Catalog) -> None:
    """Take such plugins out of the catalog, with the reason; again until nothing that is left needs one of them."""
    while found := _unusable(catalog):
        for name, cause in found.items():
            part = catalog.parts.pop(("plugin", name))
            catalog.left_out.append((part, cause))
            catalog.refused["plugin", name] = f"{part.provenance}: {cause}"


def _unusable(catalog: Catalog) -> dict[str, str]:
    plugins = {part.name: part for part in catalog.of_kind("plugin")}
    found = {}
    for name, part in plugins.items():
        missing = [other for other in part.requires if other not in plugins]
        against = [other for other in part.requires if other in part.conflicts]
        if missing:
            found[name] = f"it needs the plugin {missing[0]!r}, which is not there"
            if reason := catalog.refused.get(("plugin", missing[0])):
                found[name] += f" ({reason})"
        elif against:
            found[name] = f"it needs the plugin {against[0]!r} and says that it does not work with it"
        elif circle := _circle(name, plugins):
            found[name] = f"a circle: {' needs '.join(map(repr, circle))}; none of them can come first"
    return found


def _circle(name: str, plugins: dict[str, Part]) -> list[str]:
    """The shortest way from a plugin through what must come before each back to itself; empty where there is none."""
    ways, seen = [[name]], {name}
    while ways:
        way = ways.pop(0)
        part = plugins[way[-1]]
        for other in dict.fromkeys((*part.requires, *part.after)):
            if other == name:
                return [*way, name]
            if other in plugins and other not in seen:
                seen.add(other)
                ways.append([*way, other])
    return []
