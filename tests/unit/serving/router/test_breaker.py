"""The circuit of a replica: when it opens, how long, and what closes it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fedllm.clock import FakeClock
from fedllm.rng import SeededRng
from fedllm.serving.router.breaker import Breaker


def _breaker(seed: int = 0) -> tuple[Breaker, FakeClock]:
    clock = FakeClock()
    return Breaker(clock, SeededRng(seed), threshold=3, first_pause_s=1.0, longest_pause_s=8.0), clock


def _open(breaker: Breaker) -> float:
    for _ in range(3):
        breaker.failure()
    assert breaker.state == "open"
    return breaker.pause_left_s


def test_only_failures_in_a_row_open_it() -> None:
    """Two failures, a success and two failures leave it closed; a third one opens it."""
    breaker, _ = _breaker()
    for happened in (breaker.failure, breaker.failure, breaker.success, breaker.failure, breaker.failure):
        happened()
        assert breaker.state == "closed"
        assert breaker.passes
    breaker.failure()
    assert breaker.state == "open"
    assert not breaker.passes


def test_half_open_lets_one_pass() -> None:
    """After the pause one request is the trial; nobody else passes until it has ended."""
    breaker, clock = _breaker()
    clock.advance(_open(breaker))
    assert breaker.state == "half-open"
    assert breaker.begin()
    assert not breaker.passes
    breaker.success()
    assert breaker.state == "closed"
    assert not breaker.begin()


def test_a_trial_that_says_nothing_makes_way() -> None:
    """If the trial's client leaves, the next request is the trial."""
    breaker, clock = _breaker()
    clock.advance(_open(breaker))
    trial = breaker.begin()
    breaker.abandon(trial=trial)
    assert breaker.state == "half-open"
    assert breaker.passes


@given(st.integers(0, 1000))
def test_pauses_double_up_to_the_longest(seed: int) -> None:
    """The k-th pause lies between half of 2^k and 2^k seconds, never above the longest; a success starts over."""
    breaker, clock = _breaker(seed)
    pause = _open(breaker)
    for whole in (1.0, 2.0, 4.0, 8.0, 8.0, 8.0):
        assert whole / 2 <= pause <= whole
        clock.advance(pause)
        breaker.begin()
        breaker.failure()
        pause = breaker.pause_left_s
    clock.advance(pause)
    breaker.begin()
    breaker.success()
    assert 0.5 <= _open(breaker) <= 1.0


def test_pauses_are_jittered() -> None:
    """Routers that saw the same failures do not come back in the same moment."""
    assert len({_open(_breaker(seed)[0]) for seed in range(20)}) == 20


def test_late_failures_do_not_prolong_a_pause() -> None:
    """What was in flight when it opened fails, too, and tells nothing new."""
    breaker, clock = _breaker()
    pause = _open(breaker)
    clock.advance(pause / 2)
    for _ in range(10):
        breaker.failure()
    assert breaker.pause_left_s <= pause / 2


def test_a_mixed_answer_opens_it_at_once() -> None:
    """One answer by the wrong version is enough."""
    breaker, _ = _breaker()
    breaker.trip()
    assert breaker.state == "open"


@given(st.lists(st.sampled_from(["failure", "success", "begin", "wait", "abandon"]), max_size=200))
def test_it_always_passes_again(steps: list[str]) -> None:
    """Whatever happened, once the pause is over and no trial is out, a request passes."""
    breaker, clock = _breaker()
    trial = False
    for step in steps:
        if step == "wait":
            clock.advance(0.7)
        elif step == "begin":
            if breaker.passes:
                trial = breaker.begin()
        elif step == "abandon":
            breaker.abandon(trial=trial)
            trial = False
        else:
            getattr(breaker, step)()
    breaker.abandon(trial=True)
    clock.advance(breaker.pause_left_s)
    assert breaker.passes
