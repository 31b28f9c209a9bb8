"""Nobody cuts the power in these tests."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the hundreds of daemons of this folder write without waiting until it is durable."""
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)
