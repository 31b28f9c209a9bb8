"""A tenant's limits: token buckets with exact arithmetic, requests in flight, and a budget for the month.

Time is counted in ticks of 2^-20 s and a bucket's level in 1 / (60 * 2^20) of a token: integers, so that a wait that
was announced is never a rounding error too short.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta

from fedllm.clock import Clock
from fedllm.errors import QuotaExceeded, RequestInvalid

_TICKS = 1 << 20
_PER_TOKEN = 60 * _TICKS
_SOON_S = 1.0


@dataclass(frozen=True)
class Limits:
    """What a tenant may ask at most; None: no limit.

    Parameters
    ----------
    requests_per_minute, tokens_per_minute : int or None
        Rates. A tenant that was silent for a minute may ask for a whole minute's worth at once: in any `w` seconds
        at most ``limit * (1 + w / 60)`` pass.
    concurrent : int or None
        Requests in flight.
    tokens_per_month : int or None
        Tokens of prompts and answers in a calendar month, UTC.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent: int | None = None
    tokens_per_month: int | None = None


LIMITS = tuple(field.name for field in fields(Limits))
"""Names of the limits, as the tenants file and refusals have them."""


class TokenBucket:
    """A rate per minute with a burst of one minute's worth; full at first.

    Parameters
    ----------
    limit : int
        What a minute brings and what the bucket holds.
    clock : Clock
    """

    def __init__(self, limit: int, clock: Clock) -> None:
        self._clock = clock
        self._limit = limit
        self._level = limit * _PER_TOKEN
        self._at = self._now()

    @property
    def limit(self) -> int:
        """What a minute brings."""
        return self._limit

    @property
    def remaining(self) -> int:
        """What could be taken now."""
        self._fill()
        return max(0, self._level // _PER_TOKEN)

    @property
    def reset_s(self) -> float:
        """Seconds until it is full."""
        self._fill()
        return self._wait_s(self._limit)

    def take(self, amount: int) -> float:
        """Take `amount` and return 0.0; or take nothing and return the seconds after which it can be taken.

        An amount above the limit can never be taken: the wait is infinite.
        """
        if amount > self._limit:
            return float("inf")
        self._fill()
        wait = self._wait_s(amount)
        if not wait:
            self._level -= amount * _PER_TOKEN
        return wait

    def give_back(self, amount: int) -> None:
        """Put back what was taken and not used; a negative amount was used without having been taken."""
        self._fill()
        self._level += amount * _PER_TOKEN

    def resize(self, limit: int) -> None:
        """Change the rate; what is in the bucket stays, as far as it fits."""
        self._fill()
        self._limit = limit

    def _wait_s(self, amount: int) -> float:
        missing = amount * _PER_TOKEN - self._level
        return max(0, -(-missing // self._limit)) / _TICKS

    def _fill(self) -> None:
        """Bring the level up to now; what does not fit is lost. Comes before every reading."""
        now = self._now()
        self._level = min(self._limit * _PER_TOKEN, self._level + (now - self._at) * self._limit)
        self._at = now

    def _now(self) -> int:
        # Rounded down, and a wait is a whole number of ticks: time plus wait is never a tick short in floats either.
        return int(self._clock.monotonic() * _TICKS)


class Quota:
    """What one tenant has used of its limits.

    Parameters
    ----------
    limits : Limits
    clock : Clock
    """

    def __init__(self, limits: Limits, clock: Clock) -> None:
        self._clock = clock
        self._limits = limits
        self._requests = _bucket(None, limits.requests_per_minute, clock)
        self._tokens = _bucket(None, limits.tokens_per_minute, clock)
        self._running = 0
        self._reserved = 0
        self._used: Counter[tuple[int, int]] = Counter()

    def update(self, limits: Limits) -> None:
        """Take over limits that were changed in the file; what was used stays used."""
        if limits == self._limits:
            return
        self._limits = limits
        self._requests = _bucket(self._requests, limits.requests_per_minute, self._clock)
        self._tokens = _bucket(self._tokens, limits.tokens_per_minute, self._clock)

    @property
    def used_this_month(self) -> int:
        """Tokens of requests that began in the current month and that this process saw end."""
        return self._used[month_of(self._clock.now())]

    def admit(self) -> None:
        """Count one request in, or raise `QuotaExceeded`; a request that is refused uses nothing up."""
        limit = self._limits.concurrent
        if limit is not None and self._running >= limit:
            message = f"concurrent: {self._running} requests are in flight, {limit} allowed"
            raise QuotaExceeded(message, limit="concurrent", retry_after_s=_SOON_S)
        if self._requests is not None and (wait := self._requests.take(1)):
            message = f"requests_per_minute: {self._requests.limit} allowed and used"
            raise QuotaExceeded(message, limit="requests_per_minute", retry_after_s=wait)
        self._running += 1

    def reserve(self, tokens: int, spent: int) -> None:
        """Take what a request may use at most.

        Parameters
        ----------
        tokens : int
            Prompt and the most that may be generated.
        spent : int
            Tokens of requests that ended this month.

        Raises
        ------
        QuotaExceeded
            If it does not fit now.
        RequestInvalid
            If it never fits: no wait would help.
        """
        month = self._limits.tokens_per_month
        if month is not None and spent + self._reserved + tokens > month:
            _check_fits("tokens_per_month", tokens, month)
            # What runs gives back what it does not use; what has ended stays used until the month is over.
            full = spent + tokens > month
            message = f"tokens_per_month: {month} allowed, {spent} used, {self._reserved} held, {tokens} asked for"
            wait = until_next_month(self._clock.now()) if full else _SOON_S
            raise QuotaExceeded(message, limit="tokens_per_month", retry_after_s=wait)
        if self._tokens is not None:
            _check_fits("tokens_per_minute", tokens, self._tokens.limit)
            if wait := self._tokens.take(tokens):
                message = (
                    f"tokens_per_minute: {self._tokens.limit} allowed, {self._tokens.remaining} left, "
                    f"{tokens} asked for (prompt and max_tokens)"
                )
                raise QuotaExceeded(message, limit="tokens_per_minute", retry_after_s=wait)
        self._reserved += tokens

    def leave(self, reserved: int, used: int, began: float | None = None) -> None:
        """End one request that had reserved so much and used so much.

        Parameters
        ----------
        reserved, used : int
            Tokens.
        began : float, optional
            Seconds since the Unix epoch; the month in which it began is charged, as in the usage store. Now by default.
        """
        self._running -= 1
        self._reserved -= reserved
        self._used[month_of(self._clock.now() if began is None else began)] += used
        if self._tokens is not None:
            self._tokens.give_back(reserved - used)

    def headers(self) -> dict[str, str]:
        """Return OpenAI's headers on the two rates, as far as they are limited."""
        made = {}
        for kind, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket is not None:
                made[f"x-ratelimit-limit-{kind}"] = str(bucket.limit)
                made[f"x-ratelimit-remaining-{kind}"] = str(bucket.remaining)
                made[f"x-ratelimit-reset-{kind}"] = f"{bucket.reset_s:.3f}s"
        return made


def month_of(now: float) -> tuple[int, int]:
    """Return year and month, UTC, of seconds since the Unix epoch."""
    day = datetime.fromtimestamp(now, tz=UTC)
    return day.year, day.month


def until_next_month(now: float) -> float:
    """Return the seconds until the next calendar month begins, UTC."""
    first = datetime.fromtimestamp(now, tz=UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    return (first + timedelta(days=32)).replace(day=1).timestamp() - now


def _check_fits(name: str, tokens: int, limit: int) -> None:
    if tokens > limit:
        raise RequestInvalid(
            f"{name}: the request may take {tokens} tokens, {limit} are allowed in all",
            hint="shorten the prompt or lower max_tokens",
        )


def _bucket(old: TokenBucket | None, limit: int | None, clock: Clock) -> TokenBucket | None:
    if limit is None:
        return None
    if old is None:
        return TokenBucket(limit, clock)
    old.resize(limit)
    return old
