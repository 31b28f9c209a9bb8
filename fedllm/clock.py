"""Time as a port: everything that waits or stamps takes a `Clock`."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    """What fedllm needs to know of time."""

    def now(self) -> float:
        """Return seconds since the Unix epoch."""

    def monotonic(self) -> float:
        """Return seconds on a clock that never goes back."""

    async def sleep(self, seconds: float) -> None:
        """Wait without blocking the event loop."""


class SystemClock:
    """The machine's clocks."""

    def now(self) -> float:
        """Return seconds since the Unix epoch."""
        return time.time()  # noqa: TID251 - the one place that asks the machine

    def monotonic(self) -> float:
        """Return seconds on the machine's monotonic clock."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """Wait `seconds` of real time."""
        await asyncio.sleep(seconds)


class FakeClock:
    """A clock that moves only when told, or when something sleeps on it.

    Parameters
    ----------
    start_s : float
        Initial time in seconds since the epoch.
    """

    def __init__(self, start_s: float = 1_700_000_000.0) -> None:
        self._now_s = start_s

    def now(self) -> float:
        """Return the fake time."""
        return self._now_s

    def monotonic(self) -> float:
        """Return the fake time."""
        return self._now_s

    def advance(self, seconds: float) -> None:
        """Move the clock forward."""
        self._now_s += seconds

    async def sleep(self, seconds: float) -> None:
        """Advance by `seconds` and let other tasks run."""
        self._now_s += seconds
        await asyncio.sleep(0)


def iso_utc(seconds: float) -> str:
    """Return seconds since the epoch as ``2026-01-31T12:00:00Z``."""
    return datetime.fromtimestamp(int(seconds), tz=UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
