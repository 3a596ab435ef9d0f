"""Pytest fixtures that run a test once for each check. Pytest finds them by itself; torch is imported on first use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest

from mulki_plugins.testing import HEAD_CHECKS, PLUGIN_CHECKS, STREAM_CHECKS


@pytest.fixture(params=list(PLUGIN_CHECKS))
def mulki_plugin_check(request: pytest.FixtureRequest) -> Callable[..., None]:
    """One check of a plugin: `def test_mine(mulki_plugin_check): mulki_plugin_check(MyStage, weight=2)`."""
    return _single_check("plugin", request.param)


@pytest.fixture(params=list(HEAD_CHECKS))
def mulki_head_check(request: pytest.FixtureRequest) -> Callable[..., None]:
    """One check of a head: `def test_mine(mulki_head_check): mulki_head_check(MyHead, width=2)`."""
    return _single_check("head", request.param)


@pytest.fixture(params=list(STREAM_CHECKS))
def mulki_stream_check(request: pytest.FixtureRequest) -> Callable[..., None]:
    """One check of a stream: `def test_mine(mulki_stream_check): mulki_stream_check(my_stream)`."""
    return _single_check("stream", request.param)


def _single_check(kind: Literal["plugin", "head", "stream"], name: str) -> Callable[..., None]:
    def check(factory: Any, **options: Any) -> None:
        from mulki_plugins.testing.kit import check_one

        check_one(kind, name, factory, options)

    return check
