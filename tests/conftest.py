"""What several suites share: a tiny base model and owners' data, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny random Llama with tokenizer and chat template."""
    return tiny.make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def owners_data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return four owners' data folders."""
    root = tmp_path_factory.mktemp("data")
    return {owner: tiny.make_data(root / owner, owner) for owner in tiny.VERBS}
