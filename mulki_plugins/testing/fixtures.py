"""Fixtures for pytest, which finds this module by itself where MulKI is installed. It imports no torch until one is used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mulki_plugins.testing.names import PLUGIN_CHECKS, STREAM_CHECKS


@pytest.fixture(params=list(PLUGIN_CHECKS))
def mulki_plugin_check(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Runs a test once for each check of a plugin: `def test_mine(mulki_plugin_check): mulki_plugin_check(MyStage, weight=2)`."""
    return _one("plugin", request.param)


@pytest.fixture(params=list(STREAM_CHECKS))
def mulki_stream_check(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Runs a test once for each check of a stream: `def test_mine(mulki_stream_check): mulki_stream_check(my_stream)`."""
    return _one("stream", request.param)


def _one(kind: str, name: str) -> Callable[..., None]:
    def check(factory: Any, **options: Any) -> None:
        from mulki_plugins.testing.kit import check_one

        check_one(kind, name, factory, options)

    return check
