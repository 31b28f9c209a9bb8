"""What the tests of usage share: records, stores opened and closed, and patience."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from patience import PATIENCE_S

from fedllm.clock import FakeClock, SystemClock
from fedllm.errors import ConfigError, NotFound, NotReady
from fedllm.ids import sha256
from fedllm.serving.records import RequestRecord
from fedllm.serving.usage import UsageStore, open_usage

NOVEMBER = datetime(2026, 11, 1, tzinfo=UTC).timestamp()
DECEMBER = datetime(2026, 12, 1, tzinfo=UTC).timestamp()
NOW = datetime(2026, 11, 21, 12, tzinfo=UTC).timestamp()


def record(**changed: object) -> RequestRecord:
    """Return a record with some fields changed."""
    fields = {
        "id": "cmpl-1", "tenant": "acme", "key": "key-1", "route": "/v1/completions", "alias": "acme/tools",
        "version": sha256(b"one"), "status": 200, "prompt_tokens": 10, "completion_tokens": 5, "cached_tokens": 2,
        "started": NOW, "ttft_s": 0.5, "seconds": 1.5, "replica": "r1", "retries": 1, "trace": "0" * 32,
    }  # fmt: skip
    return RequestRecord(**{**fields, **changed})


@contextmanager
def opened(path: Path | str, clock: FakeClock | None = None) -> Iterator[UsageStore]:
    """Open a store, and close it."""
    store = open_usage(str(path), clock or FakeClock(NOW))
    try:
        yield store
    finally:
        asyncio.run(store.close())


def wait_until(holds: Callable[[], bool]) -> None:
    """Wait for what the writer's thread does soon."""
    end = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def stored(path: Path) -> int:
    """Return how many requests a store has by now."""
    try:
        with opened_reading(path) as store:
            return store.totals()[0].requests if store.totals() else 0
    except (ConfigError, NotFound, NotReady):
        return 0


@contextmanager
def opened_reading(path: Path) -> Iterator[UsageStore]:
    """Open a store to read it."""
    store = open_usage(str(path), SystemClock(), reading=True)
    try:
        yield store
    finally:
        asyncio.run(store.close())
