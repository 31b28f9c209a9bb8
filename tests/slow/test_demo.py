"""The demo itself, with the real base model and real data, held against what it promises: `make e2e`."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest


def demo(*flags: str) -> dict[str, Any]:
    """Run ``fedllm demo --json``; return its one document."""
    argv = [sys.executable, "-m", "fedllm", "demo", "--json", *flags]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def check_service(document: dict[str, Any]) -> None:
    """Check what holds with and without privacy: masks on, swaps under load, nothing failed, nothing mixed."""
    assert document["secagg"] is True
    assert document["owners"] >= 4
    assert document["rounds"] >= 3
    assert document["requests"] >= 20
    assert document["swaps"] >= 3
    assert document["failed"] == 0
    assert document["mixed_version"] == 0
    assert document["loop_s"] <= 600


def falls(document: dict[str, Any]) -> tuple[float, float]:
    """Return (fall of the mean over owners, smallest fall of an owner) of the held-out loss."""
    losses = document["heldout_loss"].values()
    mean = 1 - sum(row["federated"] for row in losses) / sum(row["base"] for row in losses)
    return mean, min(1 - row["federated"] / row["base"] for row in losses)


@pytest.mark.model
@pytest.mark.flower
@pytest.mark.timeout(1500)
def test_private_demo_keeps_its_promises() -> None:
    """ε <= 8 at δ = 1e-5 for the worst owner; the mean falls by 40 %, every owner by 30 %."""
    document = demo()
    check_service(document)
    assert document["privacy"]["unit"] == "record"
    assert document["privacy"]["epsilon"] <= 8
    assert document["privacy"]["delta"] == 1e-5
    mean, least = falls(document)
    assert mean >= 0.40
    assert least >= 0.30


@pytest.mark.model
@pytest.mark.flower
@pytest.mark.timeout(2400)
def test_demo_without_privacy_beats_the_owners_alone_on_everybodys_data() -> None:
    """Without DP: 45 % and 35 %, and on the mean over all held-out parts no owner's own adapters are better."""
    document = demo("--epsilon", "inf", "--compare")
    check_service(document)
    assert document["privacy"]["epsilon"] is None
    mean, least = falls(document)
    assert mean >= 0.45
    assert least >= 0.35
    losses = document["heldout_loss"].values()
    assert sum(row["federated"] for row in losses) <= sum(row["alone_everywhere"] for row in losses)
