"""What an installed distribution requires and does not find."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution, version


def unmet(package: str) -> list[tuple[str, str]]:
    """For each requirement that is not met: what is wrong, and the command that mends it.

    Read with `packaging`, which several of MulKI's dependencies bring; where it is missing nothing is checked.
    """
    try:
        from packaging.requirements import InvalidRequirement, Requirement
    except ImportError:
        return []
    try:
        required = distribution(package).requires or []
    except Exception:  # a checkout that was never installed, or metadata that cannot be read
        return []
    found = []
    for text in required:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        installed = _version(requirement.name)
        hint = f"pip install '{requirement}'"
        if not installed:
            found.append((f"{package} needs {requirement.name}, which is not installed", hint))
        elif not requirement.specifier.contains(installed, prereleases=True):
            found.append((f"{package} needs {requirement.name} {requirement.specifier}, found {installed}", hint))
    return found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
