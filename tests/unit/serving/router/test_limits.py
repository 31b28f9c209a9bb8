"""The limit of requests in flight: on a simulated replica whose latency grows with its load."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.serving.router.limits import AdaptiveLimit

OBJECTIVE_S = 0.5
MOST = 32


@dataclass
class Simulated:
    """What requests saw in the second half of a run."""

    ttfts: list[float] = field(default_factory=list)
    limits: list[int] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def p90(self) -> float:
        """The 90th percentile of times to first token."""
        return sorted(self.ttfts)[math.ceil(0.9 * len(self.ttfts)) - 1]

    @property
    def goodput(self) -> float:
        """Requests a second whose first token came within the objective."""
        return sum(t <= OBJECTIVE_S for t in self.ttfts) / self.seconds


def _run(
    fixed: int | None, *, slowness: float = 1.0, seconds: float = 400.0, limit: AdaptiveLimit | None = None
) -> Simulated:
    """Keep a replica as busy as the limit allows; its first token takes 0.1 s and more with those in flight."""
    draw = np.random.default_rng(7)
    limit = limit or AdaptiveLimit(OBJECTIVE_S, MOST)
    seen, now = Simulated(seconds=seconds / 2), 0.0
    events: list[tuple[float, int, float, float]] = []  # when, 0: first token or 1: end, began, ttft
    in_flight = 0
    while now < seconds:
        while in_flight < (fixed or limit.value):
            in_flight += 1
            limit.began(in_flight)
            ttft = slowness * (0.1 + 0.01 * in_flight**1.5) * draw.uniform(0.8, 1.2)
            heapq.heappush(events, (now + ttft, 0, now, ttft))
            heapq.heappush(events, (now + ttft + 1.0, 1, now, ttft))
        now, kind, began, ttft = heapq.heappop(events)
        if kind:
            in_flight -= 1
            continue
        limit.observe(ttft, began_s=began, now_s=now)
        if now > seconds / 2:
            seen.ttfts.append(ttft)
            seen.limits.append(fixed or limit.value)
    return seen


def test_it_converges_near_the_objective() -> None:
    """The 90th percentile settles between half of the objective and a quarter above it."""
    seen = _run(None)
    assert 0.5 * OBJECTIVE_S <= seen.p90 <= 1.25 * OBJECTIVE_S
    assert min(seen.limits) >= 4
    assert max(seen.limits) <= 14


def test_it_serves_more_in_time_than_fixed_limits_that_miss() -> None:
    """Timid and greedy fixed limits lose; the best fixed limit, which nobody knows, is not far ahead."""
    adaptive = _run(None).goodput
    fixed = {n: _run(n).goodput for n in (1, 2, 4, 8, 10, 12, 16, 24, 32)}
    assert adaptive > 1.5 * fixed[2]
    assert adaptive > 1.5 * fixed[24]
    assert fixed[32] == 0
    assert adaptive > 0.7 * max(fixed.values())


def test_it_follows_a_replica_that_slows_down() -> None:
    """What was right for a replica is wrong when it is twice as slow; the adaptive limit comes down, and back."""
    limit = AdaptiveLimit(OBJECTIVE_S, MOST)
    quick = _run(None, limit=limit).limits
    limit._changed_s = -math.inf  # a new run's clock begins at zero again
    slow = _run(None, slowness=2.0, limit=limit)
    assert np.mean(slow.limits) < 0.7 * np.mean(quick)
    assert slow.p90 <= 1.25 * OBJECTIVE_S
    assert _run(round(np.mean(quick)), slowness=2.0).goodput < 0.5 * slow.goodput
    limit._changed_s = -math.inf
    assert np.mean(_run(None, limit=limit).limits) == pytest.approx(np.mean(quick), rel=0.2)


@given(st.lists(st.tuples(st.floats(0, 10), st.booleans()), max_size=300), st.integers(1, 40))
def test_bounds(seen: list[tuple[float, bool]], most: int) -> None:
    """The limit is never below 1 nor above the most, and moves by one up or by half down."""
    limit = AdaptiveLimit(1.0, most, window=4)
    for now, (ttft, busy) in enumerate(seen):
        before = limit.value
        limit.began(before if busy else 0)
        limit.observe(ttft, began_s=now, now_s=now)
        assert 1 <= limit.value <= most
        assert limit.value in (before, before + 1, max(1, before // 2))


def test_an_idle_replica_earns_no_more() -> None:
    """Quick answers say nothing of a limit that was never reached."""
    limit = AdaptiveLimit(1.0, 32, window=4)
    for now in range(8):
        limit.observe(9.0, began_s=now, now_s=now)
    lowered = limit.value
    assert lowered == 8
    for now in range(8, 40):
        limit.began(lowered - 1)
        limit.observe(0.1, began_s=now, now_s=now)
    assert limit.value == lowered


def test_what_began_before_a_change_is_left_out() -> None:
    """Requests that were let in under the old limit end late, and do not halve the new one again."""
    limit = AdaptiveLimit(1.0, 32, window=4)
    for _ in range(4):
        limit.observe(5.0, began_s=0.0, now_s=10.0)
    assert limit.value == 16
    for _ in range(40):
        limit.observe(5.0, began_s=9.0, now_s=11.0)
    limit.refused(began_s=9.0, now_s=11.0)
    assert limit.value == 16
    limit.refused(began_s=10.5, now_s=11.0)
    assert limit.value == 8
