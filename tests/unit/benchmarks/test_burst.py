"""The burst benchmark's traces are as uneven as they say, its gate can fail, and a short run prints every field."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from benchmarks import burst
from benchmarks.burst_trace import BURSTY, LONGEST_ANSWER, LONGEST_PROMPT, POISSON, Shape, describe, make_trace
from benchmarks.document import GateFailed

PARTS = ("poisson", "bursty", "autoscaled")


@pytest.mark.parametrize("shape", [POISSON, BURSTY])
def test_the_mean_rate_is_the_one_asked_for(shape: Shape) -> None:
    """Whatever the shape, as many requests come in the mean, in order and within the time."""
    counts = [len(make_trace(shape, rate=20, seconds=40, adapters=9, seed=seed)) for seed in range(40)]
    assert np.mean(counts) == pytest.approx(800, rel=0.03)
    trace = make_trace(shape, rate=20, seconds=40, adapters=9, seed=1)
    times = [ask.at_s for ask in trace]
    assert times == sorted(times)
    assert 0 <= times[0] <= times[-1] <= 40
    assert all(1 <= ask.prompt <= LONGEST_PROMPT and 1 <= ask.answer <= LONGEST_ANSWER for ask in trace)
    assert {ask.adapter for ask in trace} == set(range(9))


def test_bursts_are_bursts() -> None:
    """By second, a Poisson process has a variance like its mean; the bursty trace many times that."""
    even, uneven = (
        [describe(make_trace(s, rate=20, seconds=80, adapters=3, seed=n), s)["variance_over_mean"] for n in range(20)]
        for s in (POISSON, BURSTY)
    )
    assert np.mean(even) == pytest.approx(1, abs=0.15)
    assert np.mean(uneven) > 5


def test_gaps_have_the_stated_variation() -> None:
    """Without spells, a Gamma process of shape 0.5 has gaps with a coefficient of variation of the root of two."""
    trace = make_trace(Shape(0.5, spells=False), rate=50, seconds=400, adapters=3, seed=4)
    gaps = np.diff([ask.at_s for ask in trace])
    assert gaps.std() / gaps.mean() == pytest.approx(2**0.5, rel=0.05)


def test_a_short_run_loses_nothing_and_prints_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    """Real engines, a second of each trace, aliases moving: nothing failed, nothing mixed, the signal was read."""
    assert burst.main(["--quick", "--seconds", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["gate"] is True
    assert found["swaps"] > 0
    for name in PARTS:
        part = found[name]
        assert (part["failed"], part["unanswered"], part["mixed_version"]) == (0, 0, 0)
        assert 0 < part["ttft_s_p50"] <= part["ttft_s_p99"]
        assert 0 <= part["goodput"] <= part["trace"]["requests"] / part["seconds"] * 1.002  # each has four digits
        assert 0 <= part["within_objectives"] <= 1
    assert found["poisson"]["trace"]["gamma"] == 1
    assert 1 <= found["autoscaled"]["signal"]["wanted_mean"] <= 3
    assert found["behind_the_router"].startswith("not measured: ")
    assert burst.table(found).row_count > 8


def clean() -> dict[str, Any]:
    """Return parts that pass."""
    return {name: {"failed": 0, "unanswered": 0, "mixed_version": 0, "reasons": ["Overloaded"]} for name in PARTS}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", ["failed", "unanswered", "mixed_version"])
def test_the_gate_names_what_failed(part: str, name: str) -> None:
    """One failed, lost or mixed answer in any part is enough."""
    burst.gate(clean())
    parts = clean()
    parts[part][name] = 1
    with pytest.raises(GateFailed, match=f"{part}: {name} is 1"):
        burst.gate(parts)
