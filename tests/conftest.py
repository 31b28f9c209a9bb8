"""What several suites share: a tiny base model and owners' data, made once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import tiny
from httpx._config import DEFAULT_TIMEOUT_CONFIG
from hypothesis import settings
from patience import PATIENCE_S

# The same examples on every run, so that a red run is the change's own doing. `make explore` looks for new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

# httpx gives up after five seconds where nobody says otherwise; a shared machine stands still for longer.
for _part in ("connect", "read", "write", "pool"):
    setattr(DEFAULT_TIMEOUT_CONFIG, _part, PATIENCE_S)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny random Llama with tokenizer and chat template."""
    return tiny.make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def owners_data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return four owners' data folders."""
    root = tmp_path_factory.mktemp("data")
    return {owner: tiny.make_data(root / owner, owner) for owner in tiny.VERBS}
