"""Limits hold exactly, and a wait that was announced is the wait that is needed."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.clock import FakeClock
from fedllm.errors import QuotaExceeded, RequestInvalid
from fedllm.serving.quota import Limits, Quota, TokenBucket, until_next_month

TICK = 1 / (1 << 20)
MINUTE = 60.0
limits = st.integers(1, 10**7)
starts = st.one_of(st.just(1_700_000_000.0), st.floats(0, 1e6))
pauses = st.one_of(st.floats(0, 200), st.integers(0, 100).map(lambda ticks: ticks * TICK))


class NaiveBucket:
    """The same bucket in fractions, from the definition: full at first, limit / 60 a second, never above the limit."""

    def __init__(self, limit: int, now: float) -> None:
        self.limit, self.level, self.at = limit, Fraction(limit), self.floor(now)

    @staticmethod
    def floor(now: float) -> Fraction:
        """Return the time in whole ticks."""
        return Fraction(int(now * (1 << 20)), 1 << 20)

    def take(self, amount: int, now: float) -> bool:
        """Take, if it is there."""
        at = self.floor(now)
        self.level = min(Fraction(self.limit), self.level + (at - self.at) * self.limit / 60)
        self.at = at
        if amount > self.level:
            return False
        self.level -= amount
        return True


@given(limits, starts, st.lists(st.tuples(pauses, st.floats(0, 1)), max_size=30))
def test_the_bucket_agrees_with_its_definition(limit: int, start: float, asks: list[tuple[float, float]]) -> None:
    """Every take is decided as the naive twin in exact fractions decides it, and leaves the same in whole tokens."""
    clock = FakeClock(start)
    bucket, naive = TokenBucket(limit, clock), NaiveBucket(limit, start)
    for pause, share in asks:
        clock.advance(pause)
        amount = max(1, int(share * limit))
        assert (bucket.take(amount) == 0.0) == naive.take(amount, clock.now())
        assert bucket.remaining == int(naive.level)


@given(limits, starts, st.lists(st.tuples(pauses, st.floats(0, 1)), min_size=1, max_size=30))
def test_no_window_has_more_than_the_stated_bound(limit: int, start: float, asks: list[tuple[float, float]]) -> None:
    """In any window of w seconds at most limit * (1 + w / 60) pass, a minute's worth as burst: 2 * limit a minute."""
    clock, taken = FakeClock(start), []
    bucket = TokenBucket(limit, clock)
    for pause, share in asks:
        clock.advance(pause)
        amount = max(1, int(share * limit))
        if bucket.take(amount) == 0.0:
            taken.append((Fraction(clock.now()), amount))
    for first, (begin, _) in enumerate(taken):
        total = 0
        for at, amount in taken[first:]:
            total += amount
            assert total <= limit * (1 + (at - begin + Fraction(TICK)) / 60)
            if at - begin <= MINUTE:
                assert total <= 2 * limit + 1


@given(limits, starts, st.lists(st.floats(0, 1), max_size=10), st.floats(0, 1))
def test_after_exactly_the_announced_wait_it_passes(
    limit: int, start: float, before: list[float], share: float
) -> None:
    """One tick before it does not, on the machine's clock or a fake one at any time of the world."""
    clock = FakeClock(start)
    bucket = TokenBucket(limit, clock)
    for part in before:
        bucket.take(max(1, int(part * limit)))
    amount = max(1, int(share * limit))
    begun = clock.now()
    wait = bucket.take(amount)
    if wait == 0.0:
        return
    clock.advance(wait)
    assert bucket.take(amount) == 0.0
    early = FakeClock(begun)
    fresh = TokenBucket(limit, early)
    for part in before:
        fresh.take(max(1, int(part * limit)))
    early.advance(wait - 2 * TICK if wait > 2 * TICK else 0.0)
    assert fresh.take(amount) > 0.0


@given(limits, st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 30)), max_size=20))
def test_giving_back_never_lets_more_through(limit: int, asks: list[tuple[float, float, float]]) -> None:
    """Reserving much and giving back late leaves at most what reserving only what was used would have left."""
    clock = FakeClock(0.0)
    careful, exact = TokenBucket(limit, clock), TokenBucket(limit, clock)
    for share, used_share, seconds in asks:
        reserved = max(1, int(share * limit))
        used = int(used_share * reserved)
        if careful.take(reserved) == 0.0:
            assert exact.take(used) == 0.0
            clock.advance(seconds)
            careful.give_back(reserved - used)
        assert careful.remaining <= exact.remaining <= limit


def test_a_wait_is_the_least_number_of_ticks() -> None:
    """Seven a minute: one comes after 60 / 7 s, which is no whole number of ticks, so at the tick after; not before."""
    clock = FakeClock(0.0)
    bucket = TokenBucket(7, clock)
    bucket.take(7)
    wait = bucket.take(1)
    assert wait == (60 * (1 << 20) // 7 + 1) * TICK
    clock.advance(wait - TICK)
    assert bucket.take(1) == TICK
    clock.advance(TICK)
    assert bucket.take(1) == 0.0


def test_what_is_above_the_limit_never_passes() -> None:
    """The wait is infinite, and nothing is taken."""
    bucket = TokenBucket(10, FakeClock())
    assert bucket.take(11) == float("inf")
    assert bucket.remaining == 10


def test_a_changed_limit_keeps_what_was_used() -> None:
    """Raising a limit fills nothing at once, lowering it cuts what is there."""
    clock = FakeClock()
    bucket = TokenBucket(60, clock)
    bucket.take(60)
    bucket.resize(600)
    assert bucket.remaining == 0
    clock.advance(1)
    assert bucket.remaining == 10
    clock.advance(600)
    bucket.resize(5)
    assert bucket.remaining == 5


def refusal(act: Callable[[], object]) -> QuotaExceeded:
    """Return how an act is refused."""
    with pytest.raises(QuotaExceeded) as caught:
        act()
    return caught.value


def test_each_limit_refuses_by_name_and_number() -> None:
    """The message has the limit's name and what is allowed, the error what to wait; a refusal uses nothing up."""
    clock = FakeClock()
    quota = Quota(Limits(requests_per_minute=2, tokens_per_minute=100, concurrent=1, tokens_per_month=120), clock)
    quota.admit()
    error = refusal(quota.admit)
    assert (error.limit, error.retry_after_s) == ("concurrent", 1.0)
    assert "1 allowed" in error.message
    quota.reserve(100, 0)
    quota.leave(100, 100)
    quota.admit()
    error = refusal(lambda: quota.reserve(10, 100))
    assert (error.limit, error.retry_after_s) == ("tokens_per_minute", 6.0)
    error = refusal(lambda: quota.reserve(30, 100))
    assert error.limit == "tokens_per_month"
    assert "120 allowed" in error.message
    quota.leave(0, 0)
    error = refusal(quota.admit)
    assert (error.limit, error.retry_after_s) == ("requests_per_minute", 30.0)
    clock.advance(30.0)
    quota.admit()


@pytest.mark.parametrize("name", ["tokens_per_minute", "tokens_per_month"])
def test_a_request_that_never_fits_is_not_asked_to_wait(name: str) -> None:
    """It is the sender's error, with both numbers."""
    quota = Quota(Limits(**{name: 50}), FakeClock())
    with pytest.raises(RequestInvalid, match=f"{name}: the request may take 51 tokens, 50 are allowed"):
        quota.reserve(51, 0)


def test_the_month_is_over_when_it_is_said_to_be() -> None:
    """Retry-After leads to the first second of the next month, UTC, when the budget is whole again."""
    start = datetime(2026, 12, 31, 23, 59, 58, tzinfo=UTC).timestamp()
    clock = FakeClock(start)
    quota = Quota(Limits(tokens_per_month=100), clock)
    quota.admit()
    quota.reserve(90, quota.used_this_month)
    quota.leave(90, 90)
    assert quota.used_this_month == 90
    error = refusal(lambda: quota.reserve(20, quota.used_this_month))
    assert error.retry_after_s == 2.0
    clock.advance(2.0)
    quota.reserve(20, quota.used_this_month)
    assert quota.used_this_month == 0


def test_what_running_requests_hold_counts_in_the_month() -> None:
    """Two requests that fit singly and not together: the second is asked to come back soon, not next month."""
    quota = Quota(Limits(tokens_per_month=100), FakeClock())
    quota.reserve(60, 0)
    assert refusal(lambda: quota.reserve(60, 0)).retry_after_s == 1.0
    quota.leave(60, 10)
    quota.reserve(60, 10)


@given(st.integers(0, 4_000_000_000))
def test_next_month_begins_on_a_first_at_midnight(now: int) -> None:
    """For every second until 2096: a first, midnight, and the month after this one."""
    then = datetime.fromtimestamp(now + until_next_month(now), tz=UTC)
    assert (then.day, then.hour, then.minute, then.second) == (1, 0, 0, 0)
    today = datetime.fromtimestamp(now, tz=UTC)
    assert (then.year * 12 + then.month) - (today.year * 12 + today.month) == 1


def test_headers_are_openais() -> None:
    """Limit, remaining and reset of both rates; nothing of what is not limited."""
    quota = Quota(Limits(requests_per_minute=60, tokens_per_minute=600), FakeClock())
    quota.admit()
    quota.reserve(15, 0)
    assert quota.headers() == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1.000s",
        "x-ratelimit-limit-tokens": "600",
        "x-ratelimit-remaining-tokens": "585",
        "x-ratelimit-reset-tokens": "1.500s",
    }
    assert Quota(Limits(concurrent=1), FakeClock()).headers() == {}


def test_a_request_counts_in_the_month_in_which_it_began() -> None:
    """As in the usage store; and a clock set back over the month's end does not make the budget whole again."""
    start = datetime(2026, 12, 31, 23, 59, 58, tzinfo=UTC).timestamp()
    clock = FakeClock(start)
    quota = Quota(Limits(tokens_per_month=100), clock)
    quota.reserve(90, 0)
    clock.advance(4.0)
    quota.leave(90, 80, start)
    assert quota.used_this_month == 0
    quota.leave(0, 5, clock.now())
    assert quota.used_this_month == 5
    clock.advance(-4.0)
    assert quota.used_this_month == 80
