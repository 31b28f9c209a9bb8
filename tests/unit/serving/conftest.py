"""Fixtures of the endpoint's tests; the model and adapters are in `tiny_llama`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from unit.serving.tiny_llama import make_tiny_model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the tiny base model."""
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny_model(folder)
    return folder


@pytest.fixture
def drive() -> Callable[..., object]:
    """Run a coroutine with a time limit, so that a deadlock fails instead of hanging."""

    def run(coroutine):
        async def limited():
            return await asyncio.wait_for(coroutine, 60)

        return asyncio.run(limited())

    return run
