"""What several tests of the relay share."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from patience import NEVER_S, PATIENCE_S

from fedllm.relay import dial, direct, proxy


@pytest.fixture
def root() -> Iterator[Path]:
    """Return a folder with a path short enough for sockets."""
    folder = Path(tempfile.mkdtemp(prefix="fd", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give both ends of the direct transport time to stand still for a while; a test shortens what it is about."""
    for module, names in ((direct, ("PATIENCE_S", "HELLO_S", "PART_S")), (dial, ("WELCOME_S", "_DAEMON_GONE_S"))):
        for name in names:
            monkeypatch.setattr(module, name, PATIENCE_S)


@pytest.fixture
def unhurried_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have nothing end by itself while a machine stands still; a test shortens what it is about."""
    for name in ("HOLD_S", "AGAIN_S", "IDLE_S"):
        monkeypatch.setattr(proxy, name, NEVER_S)
