"""One replica's state: what two missed looks mean, and what a replica that comes back has lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from fedllm.clock import FakeClock
from fedllm.ids import sha256
from fedllm.rng import SeededRng
from fedllm.serving.intake import ClientGone
from fedllm.serving.router import reply
from fedllm.serving.router.breaker import Breaker
from fedllm.serving.router.limits import AdaptiveLimit
from fedllm.serving.router.replica import Replica
from fedllm.serving.router.replica_file import ReplicaConfig
from fedllm.serving.router.stream import Stream

Drive = Callable[..., object]
OLD, NEW = sha256(b"old"), sha256(b"new")


def _replica(*, on_demand: bool = True) -> Replica:
    kind = SimpleNamespace(on_demand=on_demand)
    config = ReplicaConfig("one", "http://x", "native", "fedllm-secret")
    return Replica(config, kind, None, AdaptiveLimit(1.0, 2), Breaker(FakeClock(), SeededRng(1)))  # type: ignore[arg-type]


def test_one_missed_look_is_no_proof() -> None:
    """A replica is healthy with its first good look, and ill with its second bad one in a row."""
    replica = _replica()
    assert [replica.seen(healthy=h) for h in (False, True, False, True, False, False, False)] == [
        *(False, True, False, False, False, True, False)
    ]
    assert not replica.healthy


def test_who_comes_back_begins_anew() -> None:
    """Its circuit is closed, and nothing is prepared: it is a new process."""
    replica = _replica(on_demand=False)
    replica.seen(healthy=True)
    replica.prepared.add(OLD)
    replica.cannot.add(NEW)
    replica.breaker.trip()
    for healthy in (False, False, True):
        replica.seen(healthy=healthy)
    assert replica.breaker.state == "closed"
    assert not replica.has(OLD)
    assert replica.cannot == set()


def test_what_it_has() -> None:
    """The base always; a version if it was prepared, or is loaded on demand and has not been refused."""
    eager, lazy = _replica(on_demand=False), _replica()
    lazy.cannot.add(NEW)
    eager.prepared.add(OLD)
    assert [(r.has(None), r.has(OLD), r.has(NEW)) for r in (eager, lazy)] == [(True, True, False)] * 2


@pytest.mark.parametrize("spoil", ["healthy", "draining", "breaker", "limit"])
def test_room(spoil: str) -> None:
    """There is room if it is healthy, not draining, its circuit lets pass, and the limit is not reached."""
    replica = _replica()
    replica.seen(healthy=True)
    assert replica.room
    if spoil == "healthy":
        replica.healthy = False
    elif spoil == "draining":
        replica.draining = True
    elif spoil == "breaker":
        replica.breaker.trip()
    else:
        replica.in_flight = replica.limit.value
    assert not replica.room
    assert "secret" not in str(replica.row())


def test_a_stream_that_begins_for_nobody_is_closed(drive: Drive) -> None:
    """The first event comes in the very moment in which the client leaves: the stream is closed all the same."""

    class Late(Stream):
        closed = False

        def __init__(self) -> None:
            pass

        async def aclose(self) -> None:
            self.closed = True

    async def story() -> None:
        late, leaves = Late(), asyncio.Event()

        async def begin(job: object) -> Late:
            await leaves.wait()
            return late

        async def gone() -> bool:
            leaves.set()
            await asyncio.sleep(0.01)
            return True

        with pytest.raises(ClientGone):
            await reply._begin(SimpleNamespace(stream=begin), None, gone)  # type: ignore[arg-type]
        assert late.closed

    drive(story())
