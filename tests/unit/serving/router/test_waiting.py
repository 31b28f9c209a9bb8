"""The waiting line: fair between tenants, no head that blocks, and no place that is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from fedllm.clock import SystemClock
from fedllm.errors import NotReady, Overloaded
from fedllm.ids import sha256
from fedllm.rng import SeededRng
from fedllm.serving.fair import OUTPUT_WEIGHT
from fedllm.serving.router.breaker import Breaker
from fedllm.serving.router.limits import AdaptiveLimit
from fedllm.serving.router.replica import Replica
from fedllm.serving.router.replica_file import ReplicaConfig
from fedllm.serving.router.waiting import NoneLeft, WaitingLine, Want

Drive = Callable[..., object]
OLD, NEW = sha256(b"old"), sha256(b"new")


def _line(*limits: int, max_waiting: int = 100) -> tuple[WaitingLine, list[Replica]]:
    """Return a line before healthy replicas with these limits."""
    replicas = {}
    for number, limit in enumerate(limits):
        replica = Replica(
            ReplicaConfig(f"r{number}", "http://x", "native"),
            SimpleNamespace(on_demand=True),  # type: ignore[arg-type]
            None,  # type: ignore[arg-type]
            AdaptiveLimit(1.0, limit),
            Breaker(SystemClock(), SeededRng(number)),
        )
        replica.seen(healthy=True)
        replicas[replica.name] = replica
    fleet = SimpleNamespace(replicas=replicas, on_change=None)
    return WaitingLine(fleet, SystemClock(), max_waiting=max_waiting, wait_s=60.0), list(replicas.values())  # type: ignore[arg-type]


def _want(tenant: str, *, digest: object = None, wait_s: float = 60.0, weight: float = 1.0, tokens: int = 10) -> Want:
    until_s = SystemClock().monotonic() + wait_s
    return Want(tenant, weight, b"key", digest, tokens, tokens, until_s)  # type: ignore[arg-type]


def test_the_tenant_with_the_least_service_goes_first(drive: Drive) -> None:
    """Ten requests of one tenant and two of another wait: with equal service they take turns, not the line's order."""

    async def story() -> None:
        line, _ = _line(1)
        place = await line.take(_want("someone"))
        order: list[str] = []

        async def ask(tenant: str) -> None:
            held = await line.take(_want(tenant))
            order.append(tenant)
            line.charge(tenant, OUTPUT_WEIGHT * 5)
            await asyncio.sleep(0)
            held.release()

        asking = [asyncio.create_task(ask("many")) for _ in range(10)]
        await asyncio.sleep(0)
        asking += [asyncio.create_task(ask("few")) for _ in range(2)]
        await asyncio.sleep(0)
        place.release()
        await asyncio.gather(*asking)
        assert sorted(order[:4]) == ["few", "few", "many", "many"]
        assert order[4:] == ["many"] * 8

    drive(story())


def test_weights_divide_the_service(drive: Drive) -> None:
    """A tenant of weight 3 is served three times as often as one of weight 1 while both wait."""

    async def story() -> None:
        line, _ = _line(1)
        place = await line.take(_want("someone"))
        order: list[str] = []

        async def ask(tenant: str, weight: float) -> None:
            held = await line.take(_want(tenant, weight=weight))
            order.append(tenant)
            held.release()

        tenants = (("heavy", 3.0), ("light", 1.0))
        asking = [asyncio.create_task(ask(t, w)) for _ in range(20) for t, w in tenants]
        await asyncio.sleep(0)
        place.release()
        await asyncio.gather(*asking)
        assert 14 <= order[:20].count("heavy") <= 16

    drive(story())


def test_nothing_blocks_the_head(drive: Drive) -> None:
    """A request that only a full replica may serve does not hold up those that another may."""

    async def story() -> None:
        line, (first, second) = _line(1, 1)
        second.cannot.add(NEW)
        held = await line.take(_want("a", digest=NEW))
        assert held.replica is first
        stuck = asyncio.create_task(line.take(_want("a", digest=NEW)))
        await asyncio.sleep(0)
        other = await line.take(_want("b", digest=OLD))
        assert other.replica is second
        assert not stuck.done()
        held.release()
        assert (await stuck).replica is first

    drive(story())


def test_no_place_is_lost(drive: Drive) -> None:
    """A request that is cancelled in the very moment in which it is granted a place gives it back."""

    async def story() -> None:
        line, (replica,) = _line(1)
        for _ in range(3):
            held = await line.take(_want("a"))
            waiting = asyncio.create_task(line.take(_want("a")))
            await asyncio.sleep(0)
            held.release()
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            assert (replica.in_flight, replica.tokens, len(line), line.backlog_tokens) == (0, 0, 0, 0)

    drive(story())


def test_a_place_is_given_back_once(drive: Drive) -> None:
    """Releasing twice does not make room for two."""

    async def story() -> None:
        line, (replica,) = _line(2)
        held, other = await line.take(_want("a")), await line.take(_want("a"))
        held.release()
        held.release()
        assert replica.in_flight == 1
        other.release()
        assert replica.in_flight == 0

    drive(story())


def test_bounds(drive: Drive) -> None:
    """A tenant that fills the line is refused while another still gets in; nobody waits longer than said."""

    async def story() -> None:
        line, _ = _line(1, max_waiting=2)
        held = await line.take(_want("a"))
        waiting = [asyncio.create_task(line.take(_want("a"))) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="2 requests wait for a replica, 2 are allowed"):
            await line.take(_want("a"))
        late = asyncio.create_task(line.take(_want("b", wait_s=0.01)))
        with pytest.raises(NotReady, match="within 60 s"):
            await late
        assert len(line) == 2
        held.release()
        for task in waiting:
            (await task).release()
        assert len(line) == 0

    drive(story())


def test_who_was_tried_everywhere_is_told(drive: Drive) -> None:
    """A request that all replicas have failed does not wait; while one is left, it does."""

    async def story() -> None:
        line, (first, second) = _line(1, 1)
        want = _want("a")
        want.tried.update({first.name, second.name})
        with pytest.raises(NoneLeft):
            await line.take(want)
        other = _want("a", digest=NEW)
        second.cannot.add(NEW)
        other.tried.add(first.name)
        with pytest.raises(NoneLeft):  # the other one does not have the version
            await line.take(other)
        want.tried.discard(second.name)
        assert (await line.take(want)).replica is second
        second.healthy = False
        waiting = asyncio.create_task(line.take(want))
        await asyncio.sleep(0)
        assert len(line) == 1
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)

    drive(story())
