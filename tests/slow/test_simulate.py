"""The largest federation there may be, in one process: exact, and within the time and memory that are promised."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


@pytest.mark.timeout(600)
def test_a_thousand_owners_with_dropouts_are_exact_in_five_minutes_and_eight_gib() -> None:
    """100,000 entries, a tenth of the owners lost: the command's own clock and memory count."""
    argv = ["simulate", "--owners", "1000", "--dim", "100000", "--dropout", "0.1", "--json"]
    done = subprocess.run([sys.executable, "-m", "fedllm", *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert report["exact"] is True
    assert report["complete"] is False
    (only,) = report["rounds"]
    assert only["survivors"] < 1000
    assert only["lost"] > 50
    assert report["seconds"] <= 300
    assert report["peak_gib"] <= 8
