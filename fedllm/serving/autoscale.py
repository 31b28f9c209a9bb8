"""How many replicas the load asks for: a number from tokens, not from requests or processors' load.

A scaler polls ``/autoscale``. KEDA's ``metrics-api`` scaler reads one JSON value by its path: ``valueLocation`` is
``wanted_replicas``, ``targetValue`` is 1 and ``metricType`` is ``AverageValue``, so that its horizontal autoscaler
computes ceil(wanted_replicas / 1); see ``deploy/keda/scaledobject.yml``. The hysteresis is here: leave the scaler's own
windows at zero, or the slower of both counts.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fedllm.clock import Clock
from fedllm.serving.records import RequestRecord

UTILISATION = 0.75
"""Share of the measured tokens a second that is planned with; queues grow without bound as it nears 1."""
HOLD_S = 300.0
"""Seconds for which a demand is remembered: the fleet shrinks to the largest of them."""
DRAIN_S = 30.0
"""Seconds within which a backlog that is too long is to be worked off; about what a replica takes to start."""
_WINDOW_S = 60.0
_PERIOD_S = 5.0
_TRUST = 0.3
_MOST_TTFTS = 4096


@dataclass(frozen=True)
class Demand:
    """What a fleet has to do, and how it does.

    Parameters
    ----------
    backlog_tokens : float
        Tokens of accepted requests that wait for a replica, prompt and answer.
    arrival_tokens_per_s : float
        Tokens a second that arriving requests bring.
    service_tokens_per_s_per_replica : float
        What one replica computes when it is never idle; 0 where no replica has been seen busy.
    replicas : int
        Replicas that there are.
    ttft_p90_s : float or None
        90th percentile of seconds to the first token; None where there was none lately.
    """

    backlog_tokens: float
    arrival_tokens_per_s: float
    service_tokens_per_s_per_replica: float
    replicas: int
    ttft_p90_s: float | None


@dataclass(frozen=True)
class Wanted:
    """How many replicas, and why in a word.

    Parameters
    ----------
    replicas : int
        Within the bounds.
    reason : str
        ``arrivals``, ``backlog``, ``ttft`` (first tokens are late), ``idle``, ``unmeasured`` (no replica has been seen
        busy) or ``hold`` (more was needed a short while ago).
    """

    replicas: int
    reason: str


MOST_REPLICAS = 64
"""What `/autoscale` asks for at most; a scaler has a limit of its own."""


@dataclass(frozen=True)
class Bounds:
    """Between how many replicas the signal stays; at least one."""

    least: int = 1
    most: int = 8

    def clamp(self, replicas: float) -> int:
        """Return the nearest number of replicas within the bounds, rounded up."""
        return math.ceil(min(max(replicas, self.least), self.most))


def needed(demand: Demand, objective_s: float) -> tuple[float, str]:
    """Return how many replicas the demand of this moment needs, as a fraction, and what decides it.

    A fleet is large enough if it computes what arrives with headroom, and if what its backlog holds beyond
    `objective_s` of its work is gone within `DRAIN_S`. If first tokens are late although both say so, the estimates are
    wrong: one more.
    """
    rate, arriving = demand.service_tokens_per_s_per_replica, demand.arrival_tokens_per_s
    if demand.backlog_tokens <= 0 and arriving <= 0:
        return 0.0, "idle"
    if rate <= 0:
        return float(demand.replicas), "unmeasured"
    late = max(0.0, demand.backlog_tokens - objective_s * rate * demand.replicas)
    steady, drain = arriving / (rate * UTILISATION), arriving / rate + late / (rate * DRAIN_S)
    wanted, reason = max((steady, "arrivals"), (drain, "backlog"))
    slow = demand.ttft_p90_s is not None and demand.ttft_p90_s > objective_s
    if slow and demand.backlog_tokens > 0 and wanted <= demand.replicas:
        return demand.replicas + 1.0, "ttft"
    return wanted, reason


class Autoscaler:
    """Follows demand: up at once, down only to the most that was needed within the last `hold_s`.

    A number that went up does not come down for `hold_s`: it cannot swing faster than that, whatever the demand does.

    Parameters
    ----------
    clock : Clock
        Its monotonic time.
    bounds : Bounds
        Between how many replicas.
    objective_s : float
        Seconds to the first token to plan for.
    hold_s : float
        For how long a demand is remembered.
    """

    def __init__(self, clock: Clock, bounds: Bounds, *, objective_s: float, hold_s: float = HOLD_S) -> None:
        self._clock = clock
        self._bounds = bounds
        self._hold_s = hold_s
        self._peaks: deque[tuple[float, int]] = deque()
        self.objective_s = objective_s

    def wanted(self, demand: Demand) -> Wanted:
        """Take one demand in and return how many replicas there should be now."""
        now = self._clock.monotonic()
        exact, reason = needed(demand, self.objective_s)
        count = self._bounds.clamp(exact)
        while self._peaks and now - self._peaks[0][0] >= self._hold_s:
            self._peaks.popleft()
        # Whatever is older and not larger can never be the largest again: the numbers fall from left to right.
        while self._peaks and self._peaks[-1][1] <= count:
            self._peaks.pop()
        self._peaks.append((now, count))
        peak = self._peaks[0][1]
        return Wanted(peak, reason if peak == count else "hold")


def autoscale_body(scaler: Autoscaler, demand: Demand) -> dict[str, Any]:
    """Take one demand in and return the JSON body of ``/autoscale``."""
    wanted = scaler.wanted(demand)
    return {
        "wanted_replicas": wanted.replicas,
        "replicas": demand.replicas,
        "backlog_tokens": round(demand.backlog_tokens),
        "objective_s": scaler.objective_s,
        "reason": wanted.reason,
    }


class DemandMeter:
    """Makes a `Demand` from ended requests and the length of the queue. A `RequestObserver`.

    A replica's tokens a second are measured only over periods in which requests waited all the time: a fleet with
    nothing to do is slow for want of work. Prompt and answer count alike; the rate belongs to the mix that it is
    measured on.

    Parameters
    ----------
    clock : Clock
        Its monotonic time.
    waiting : Callable
        Returns how many requests wait: ``EngineStats.waiting``, or a router's queue.
    replicas : Callable
        Returns how many replicas there are.
    """

    def __init__(self, clock: Clock, waiting: Callable[[], int], replicas: Callable[[], int] = lambda: 1) -> None:
        self._clock = clock
        self._waiting = waiting
        self._replicas = replicas
        self._rate = 0.0
        self._began = clock.monotonic()
        self._period = _Period(self._began, busy=waiting() > 0)
        self._over: deque[_Period] = deque(maxlen=round(_WINDOW_S / _PERIOD_S))
        self._backlogs: deque[tuple[float, float]] = deque()
        self._ttfts: deque[tuple[float, float]] = deque(maxlen=_MOST_TTFTS)

    def observe(self, record: RequestRecord) -> None:
        """Take one ended request in."""
        tokens = max(0, record.prompt_tokens - record.cached_tokens) + record.completion_tokens
        self._period.tokens += tokens
        self._period.requests += tokens > 0
        if record.ttft_s is not None:
            self._ttfts.append((self._clock.monotonic(), record.ttft_s))
        self._look()

    def demand(self, *, backlog_tokens: float | None = None) -> Demand:
        """Return what the last minute asks for.

        Parameters
        ----------
        backlog_tokens : float, optional
            Tokens of waiting requests, where the caller knows them; by default their number times the mean request.
        """
        self._look()
        now = self._clock.monotonic()
        since = max(self._began, now - _WINDOW_S)
        while self._over and self._over[0].began < since:
            self._over.popleft()
        periods = [*self._over, self._period]
        done, requests = sum(p.tokens for p in periods), sum(p.requests for p in periods)
        if backlog_tokens is None:
            backlog_tokens = self._waiting() * done / requests if requests else 0.0
        while self._backlogs and self._backlogs[0][0] < since:
            self._backlogs.popleft()
        self._backlogs.append((now, backlog_tokens))
        # What arrived has been computed, or has made the backlog longer.
        grown = backlog_tokens - self._backlogs[0][1]
        arriving = max(0.0, done + grown) / max(_PERIOD_S, now - periods[0].began)
        ttfts = sorted(seconds for at, seconds in self._ttfts if at >= since)
        p90 = ttfts[math.ceil(0.9 * len(ttfts)) - 1] if ttfts else None
        return Demand(backlog_tokens, arriving, self._rate, self._replicas(), p90)

    def _look(self) -> None:
        """Close the period in progress when it is over, and learn from it if there was always something to do."""
        now, waits, period = self._clock.monotonic(), self._waiting() > 0, self._period
        period.busy = period.busy and waits
        if now - period.began < _PERIOD_S:
            return
        if period.busy and period.tokens:
            seen = period.tokens / (now - period.began) / max(1, self._replicas())
            self._rate += (seen - self._rate) * (_TRUST if self._rate else 1.0)
        self._over.append(period)
        self._period = _Period(now, busy=waits)


@dataclass
class _Period:
    """A few seconds: what was computed in them, and whether something always waited."""

    began: float
    busy: bool
    tokens: int = 0
    requests: int = 0
