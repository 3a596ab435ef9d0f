"""Pytest fixtures that run a test once for each check. Pytest finds them by itself; torch is imported on first use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest

from mulki_plugins.testing import ADAPTER_CHECKS, HEAD_CHECKS, OPTIMIZER_CHECKS, PLUGIN_CHECKS, STREAM_CHECKS


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


@pytest.fixture(params=list(ADAPTER_CHECKS))
def mulki_adapter_check(request: pytest.FixtureRequest) -> Callable[..., None]:
    """One check of an adapter: `def test_mine(mulki_adapter_check): mulki_adapter_check(MyAdapter, rank=2)`."""
    return _single_check("adapter", request.param)


@pytest.fixture(params=list(OPTIMIZER_CHECKS))
def mulki_optimizer_check(request: pytest.FixtureRequest) -> Callable[..., None]:
    """One check of an optimizer: `def test_mine(mulki_optimizer_check): mulki_optimizer_check(MyOptimizer)`."""
    return _single_check("optimizer", request.param)


def _single_check(kind: Literal["plugin", "adapter", "head", "optimizer", "stream"], name: str) -> Callable[..., None]:
    def check(factory: Any, **options: Any) -> None:
        from mulki_plugins.testing.kit import check_one

        check_one(kind, name, factory, options)

    return check
