"""The scale signal: known answers, up at once and down slowly, and a bursty day against a fixed fleet."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedllm.clock import FakeClock
from fedllm.serving.autoscale import (
    DRAIN_S,
    HOLD_S,
    UTILISATION,
    Autoscaler,
    Bounds,
    Demand,
    DemandMeter,
    autoscale_body,
    needed,
)
from fedllm.serving.records import RequestRecord

RATE = 1000.0
IDLE = Demand(0, 0, RATE, 2, None)
RECORD = RequestRecord("", "acme", "", "other", "base", None, 200, 40, 60, 0, 0.0, 0.2, 1.0)


@pytest.mark.parametrize(
    ("demand", "replicas", "reason"),
    [
        (IDLE, 0.0, "idle"),
        (replace(IDLE, arrival_tokens_per_s=1500), 2.0, "arrivals"),
        (replace(IDLE, arrival_tokens_per_s=1500, backlog_tokens=4000), 2.0, "arrivals"),
        (replace(IDLE, arrival_tokens_per_s=1500, backlog_tokens=4000 + 60_000), 3.5, "backlog"),
        (replace(IDLE, arrival_tokens_per_s=750, backlog_tokens=10, ttft_p90_s=5.0), 3.0, "ttft"),
        (replace(IDLE, arrival_tokens_per_s=750, ttft_p90_s=5.0), 1.0, "arrivals"),
        (replace(IDLE, arrival_tokens_per_s=750, service_tokens_per_s_per_replica=0), 2.0, "unmeasured"),
        (replace(IDLE, service_tokens_per_s_per_replica=0), 0.0, "idle"),
    ],
)
def test_what_a_moment_needs(demand: Demand, replicas: float, reason: str) -> None:
    """By hand: arrivals at 75 % of the rate, or what is late beyond two seconds of work, gone within thirty."""
    assert (UTILISATION, DRAIN_S) == (0.75, 30.0)
    assert needed(demand, 2.0) == (pytest.approx(replicas), reason)


DEMANDS = st.builds(
    Demand,
    st.floats(0, 1e6),
    st.floats(0, 1e5),
    st.sampled_from([0.0, 0.5, 100.0, 2e4]),
    st.integers(1, 9),
    st.none() | st.floats(0, 99),
)


@given(DEMANDS, st.floats(1.0, 10.0))
def test_more_to_do_never_needs_less(demand: Demand, factor: float) -> None:
    """Needed replicas do not fall when backlog and arrivals grow together."""
    more = replace(
        demand,
        backlog_tokens=demand.backlog_tokens * factor,
        arrival_tokens_per_s=demand.arrival_tokens_per_s * factor,
    )
    # The late first token's extra one replica is a step up from a fleet that seemed large enough.
    calm, busier = (replace(d, ttft_p90_s=None) for d in (demand, more))
    assert needed(busier, 1.0)[0] >= needed(calm, 1.0)[0] * (1 - 1e-12)


@given(st.lists(st.tuples(st.floats(0, 200), DEMANDS), min_size=1, max_size=60))
def test_it_never_flaps(steps: list[tuple[float, Demand]]) -> None:
    """Whatever comes: never out of bounds, never below the moment's need, and what went up stays for `HOLD_S`."""
    clock, bounds = FakeClock(0.0), Bounds(1, 6)
    scaler = Autoscaler(clock, bounds, objective_s=1.0)
    at, last, seen = 0.0, 0, []
    for pause, demand in steps:
        clock.advance(pause)
        now, wanted = clock.monotonic(), scaler.wanted(demand)
        seen.append((now, bounds.clamp(needed(demand, 1.0)[0])))
        assert wanted.replicas == max(count for when, count in seen if now - when < HOLD_S)  # the naive twin
        assert bounds.least <= wanted.replicas <= bounds.most
        assert wanted.replicas >= seen[-1][1]
        if wanted.replicas < last:
            assert now - at >= HOLD_S
        if wanted.replicas > last:
            at = now
        last = wanted.replicas


def test_noise_about_a_load_changes_nothing() -> None:
    """An hour of arrivals that swing by a fifth: one move up within the first minutes, none after."""
    clock, draw = FakeClock(), np.random.default_rng(3)
    scaler = Autoscaler(clock, Bounds(1, 8), objective_s=1.0)
    seen = []
    for _ in range(240):
        clock.advance(15)
        arriving = 2250 * (1 + 0.2 * float(draw.uniform(-1, 1)))
        seen.append(scaler.wanted(replace(IDLE, arrival_tokens_per_s=arriving, replicas=3)).replicas)
    assert set(seen[20:]) == {4}


def test_it_falls_when_the_demand_is_forgotten() -> None:
    """Up with the first sight of a burst; held, with that reason, until `HOLD_S` after its last; then down."""
    clock = FakeClock()
    scaler = Autoscaler(clock, Bounds(1, 8), objective_s=1.0)
    assert scaler.wanted(replace(IDLE, arrival_tokens_per_s=3000)).replicas == 4
    clock.advance(HOLD_S - 1)
    assert (scaler.wanted(IDLE).replicas, scaler.wanted(IDLE).reason) == (4, "hold")
    clock.advance(1)
    assert (scaler.wanted(IDLE).replicas, scaler.wanted(IDLE).reason) == (1, "idle")


def test_the_body_is_what_a_scaler_reads() -> None:
    """Plain JSON with the wanted number at the top."""
    scaler = Autoscaler(FakeClock(), Bounds(1, 8), objective_s=0.5)
    body = autoscale_body(scaler, replace(IDLE, arrival_tokens_per_s=1500, backlog_tokens=12.4))
    assert body == {
        "wanted_replicas": 2,
        "replicas": 2,
        "backlog_tokens": 12,
        "objective_s": 0.5,
        "reason": "arrivals",
    }


# --- the meter


def metered(seconds: int, per_s: int, waiting: int, replicas: int = 2) -> Demand:
    """Return the demand after some time of so many ended requests a second, of 100 tokens each."""
    clock = FakeClock()
    meter = DemandMeter(clock, lambda: waiting, lambda: replicas)
    for _ in range(seconds):
        clock.advance(1)
        for _ in range(per_s):
            meter.observe(RECORD)
    return meter.demand()


def test_a_busy_fleet_is_measured() -> None:
    """With a queue all the time: 2,000 tokens a second over two replicas, the queue at the mean request's tokens."""
    found = metered(120, per_s=20, waiting=7)
    assert found.service_tokens_per_s_per_replica == pytest.approx(1000, rel=0.01)
    assert found.arrival_tokens_per_s == pytest.approx(2000, rel=0.1)
    assert found.backlog_tokens == 700
    assert found.ttft_p90_s == 0.2
    assert found.replicas == 2


def test_a_fleet_with_nothing_to_do_is_not_measured() -> None:
    """Without a queue the rate says how much was asked, not what could be done: it stays unknown."""
    found = metered(120, per_s=3, waiting=0)
    assert found.service_tokens_per_s_per_replica == 0
    assert found.arrival_tokens_per_s == pytest.approx(300, rel=0.1)
    assert needed(found, 1.0) == (2.0, "unmeasured")


@pytest.mark.parametrize(
    "looks",
    [
        [(6, 0), (3600, 9)],  # a period began with nothing to do, and ended an hour later with others waiting
        [(6, 9), (2, 0), (4, 9)],  # the queue ran empty in between
        [(1, 0), (4, 9)],  # it was empty at first
    ],
)
def test_a_queue_that_was_empty_for_a_while_says_nothing(looks: list[tuple[float, int]]) -> None:
    """A period counts only if something waited at every look, from its beginning to its end."""
    clock, queue = FakeClock(), [0]
    meter = DemandMeter(clock, lambda: queue[0])
    for pause, waiting in looks:
        clock.advance(pause)
        queue[0] = waiting
        meter.observe(RECORD)
    assert meter.demand().service_tokens_per_s_per_replica == 0
    clock.advance(10)
    for _ in range(50):
        meter.observe(RECORD)
    # The period that began with a full queue does count.
    assert meter.demand().service_tokens_per_s_per_replica == pytest.approx(100 / 10)


def test_a_growing_queue_is_arrivals() -> None:
    """What arrives and is not yet computed counts: 600 tokens a second done, and 100 more a second waiting."""
    clock, queue = FakeClock(), [0]
    meter = DemandMeter(clock, lambda: queue[0])
    for _ in range(60):
        clock.advance(1)
        queue[0] += 1
        for _ in range(6):
            meter.observe(RECORD)
        found = meter.demand()
    assert found.arrival_tokens_per_s == pytest.approx(700, rel=0.1)


def test_cached_tokens_are_no_work_and_a_minute_is_forgotten() -> None:
    """The prefix cache's tokens were not computed; what ended long ago asks for nothing now."""
    clock = FakeClock()
    meter = DemandMeter(clock, lambda: 0)
    clock.advance(10)
    meter.observe(replace(RECORD, cached_tokens=40))
    assert meter.demand().arrival_tokens_per_s == pytest.approx(60 / 10)
    clock.advance(3600)
    assert meter.demand().arrival_tokens_per_s == 0
    clock.advance(3600)
    assert meter.demand() == Demand(0.0, 0.0, 0.0, 1, None)


# --- a bursty day


GAMMA_SHAPE, ZIPF, LONGEST = 0.5, 1.1, 1024
"""Defaults of BurstGPT's own generator of synthetic load (arXiv 2401.17644, repository HPMLL/BurstGPT): inter-arrival
times from a Gamma distribution of shape 0.5, lengths of prompts and answers from Zipf's law of 1.1 cut off at 1,024."""
DAY_S, SPELL_S, PER_S, START_S, OBJECTIVE_S = 86_400, 600, 10.0, 30, 2.0


def bursty_day(seed: int) -> NDArray[np.float64]:
    """Return tokens that arrive in each second of a synthetic day.

    Gamma inter-arrivals with BurstGPT's shape, scaled to `PER_S` requests a second in the mean. Ours, not BurstGPT's:
    the rate follows a daily wave, and spells of ten minutes whose level is drawn from a Gamma distribution too.
    """
    draw = np.random.default_rng(seed)
    seconds = np.arange(DAY_S)
    wave = 1 + 0.8 * np.sin(2 * np.pi * (seconds / DAY_S - 0.3))
    spells = np.repeat(draw.gamma(GAMMA_SHAPE, 1 / GAMMA_SHAPE, DAY_S // SPELL_S), SPELL_S)
    rate = wave * spells
    passed = np.concatenate([[0.0], np.cumsum(rate * PER_S / rate.mean())])
    gaps = draw.gamma(GAMMA_SHAPE, 1 / GAMMA_SHAPE, int(passed[-1] * 1.1))
    beats = np.cumsum(gaps)
    arrivals = np.interp(beats[beats < passed[-1]], passed, np.arange(DAY_S + 1)).astype(np.int64)
    ranks = np.arange(1, LONGEST, dtype=np.float64)
    share = ranks**-ZIPF / (ranks**-ZIPF).sum()
    tokens = draw.choice(ranks, (2, len(arrivals)), p=share).sum(0)
    return np.bincount(arrivals, tokens, DAY_S)[:DAY_S]


@dataclass
class Replay:
    """What a simulated fleet did with a day: seconds' delay before a new request's turn, replicas, what was wanted."""

    delays: NDArray[np.float64]
    replicas: NDArray[np.int64]
    wanted: NDArray[np.int64]

    @property
    def late(self) -> float:
        """Share of the day in which a request that came had to wait longer than the objective."""
        return float((self.delays > OBJECTIVE_S).mean())

    @property
    def turns(self) -> int:
        """How often the wanted number came down again after it had gone up."""
        moves = np.sign(np.diff(self.wanted))
        moves = moves[moves != 0]
        return int(((moves[:-1] > 0) & (moves[1:] < 0)).sum())


def play(arriving: NDArray[np.float64], fixed: int | None = None) -> Replay:
    """Run a day in one queue; replicas compute `RATE` tokens a second and start in `START_S`."""
    clock = FakeClock(0.0)
    scaler = Autoscaler(clock, Bounds(1, 16), objective_s=OBJECTIVE_S)
    minute = np.concatenate([[0.0], np.cumsum(arriving)])
    replicas = wanted = fixed or 1
    starting: list[tuple[int, int]] = []
    backlog, rows = 0.0, []
    for second in range(DAY_S):
        if fixed is None and second % 15 == 0:
            lately = (minute[second] - minute[max(0, second - 60)]) / min(60, max(1, second))
            wanted = scaler.wanted(Demand(backlog, lately, RATE, replicas, backlog / (replicas * RATE))).replicas
            replicas = min(replicas, wanted)
            starting = [(when, number) for when, number in starting if number <= wanted]
            coming = replicas + len(starting)
            starting += [(second + START_S, number) for number in range(coming + 1, wanted + 1)]
        replicas += sum(when <= second for when, _ in starting)
        starting = [(when, number) for when, number in starting if when > second]
        backlog = max(0.0, backlog + arriving[second] - replicas * RATE)
        clock.advance(1)
        rows.append((backlog / (replicas * RATE), replicas, wanted))
    columns = np.array(rows).T
    return Replay(columns[0], columns[1].astype(np.int64), columns[2].astype(np.int64))


def table(arriving: NDArray[np.float64], scaled: Replay, fixed: Replay) -> str:
    """Return what each hour needed, what was wanted, and how much of it either fleet was late."""
    need = arriving.reshape(-1, 60).mean(1) / (RATE * UTILISATION)
    lines = ["hour   needed: mean   max   wanted: mean   max    late   late if fixed"]
    for hour in range(24):
        seconds, minutes = slice(hour * 3600, hour * 3600 + 3600), slice(hour * 60, hour * 60 + 60)
        wanted = scaled.wanted[seconds]
        late, stuck = ((replay.delays[seconds] > OBJECTIVE_S).mean() for replay in (scaled, fixed))
        lines.append(
            f"{hour:4} {need[minutes].mean():14.1f} {need[minutes].max():5.1f} {wanted.mean():14.1f} {wanted.max():5}"
            f" {late:7.1%} {stuck:15.1%}"
        )
    mean, size = scaled.replicas.mean(), fixed.replicas[0]
    lines.append(f"late {scaled.late:.1%} with {mean:.2f} replicas in the mean, {fixed.late:.1%} with {size} fixed")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("seed", [1, 2])
def test_a_bursty_day_is_followed(seed: int) -> None:
    """A synthetic day: late a third as long as a fixed fleet of its mean size, rounded up (-rP shows the table)."""
    arriving = bursty_day(seed)
    scaled = play(arriving)
    fixed = play(arriving, fixed=math.ceil(scaled.replicas.mean()))
    shown = table(arriving, scaled, fixed)
    sys.stdout.write(shown)
    assert scaled.late < fixed.late / 3, shown
    assert scaled.late < 0.1, shown
    assert 0 < scaled.turns <= DAY_S / HOLD_S
