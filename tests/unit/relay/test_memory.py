"""The carrier of simulations: it delivers, and it goes wrong in exactly the ways it is told."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from fedllm.clock import FakeClock
from fedllm.relay.memory import Direction, Faults, MemoryCarrier

Handler = Callable[[bytes], Awaitable[bytes]]


def _echo(name: str, seen: list[str]) -> Handler:
    async def handle(data: bytes) -> bytes:
        seen.append(name)
        return name.encode() + data

    return handle


def _carrier(faults: Faults, clock: FakeClock | None = None) -> tuple[MemoryCarrier, list[str]]:
    seen: list[str] = []
    return MemoryCarrier({n: _echo(n, seen) for n in "abc"}, faults=faults, clock=clock), seen


def _exchange(carrier: MemoryCarrier, deadline_s: float = 10.0) -> dict[str, bytes]:
    return asyncio.run(carrier.exchange(dict.fromkeys("abc", b"!"), deadline_s=deadline_s))


def test_every_node_is_asked_and_every_message_is_recorded() -> None:
    """The log holds both directions: the leak test reads it."""
    carrier, seen = _carrier(Faults())
    assert _exchange(carrier) == {"a": b"a!", "b": b"b!", "c": b"c!"}
    assert sorted(seen) == ["a", "b", "c"]
    assert [p.index for p in carrier.log] == list(range(6))
    assert {(p.node, p.data) for p in carrier.log if p.direction is Direction.TO_COORDINATOR} == {
        ("a", b"a!"), ("b", b"b!"), ("c", b"c!"),
    }  # fmt: skip


def test_a_lost_request_never_arrives_and_a_lost_reply_did() -> None:
    """The two losses look the same to the coordinator and differ for the owner: hence idempotent requests."""
    request_lost, seen = _carrier(Faults(drop=lambda p: p.node == "a" and p.direction is Direction.TO_OWNER))
    assert set(_exchange(request_lost)) == {"b", "c"}
    assert "a" not in seen
    reply_lost, seen = _carrier(Faults(drop=lambda p: p.node == "a" and p.direction is Direction.TO_COORDINATOR))
    assert set(_exchange(reply_lost)) == {"b", "c"}
    assert "a" in seen


def test_a_repeated_request_arrives_twice() -> None:
    """One reply returns; the handler was called twice."""
    carrier, seen = _carrier(Faults(duplicate=lambda p: p.node == "b"))
    assert set(_exchange(carrier)) == {"a", "b", "c"}
    assert seen.count("b") == 2


def test_a_message_later_than_the_deadline_is_missing() -> None:
    """A short delay only costs time; a long one costs the node, which works all the same."""
    late = {"a": 3.0, "b": 30.0}
    faults = Faults(delay_s=lambda p: late.get(p.node, 0.0) if p.direction is Direction.TO_OWNER else 0.0)
    carrier, seen = _carrier(faults, FakeClock())
    assert set(_exchange(carrier)) == {"a", "c"}
    assert "b" in seen


def test_nodes_are_asked_in_the_order_wanted_and_bytes_can_be_changed() -> None:
    """Reordering and tampering are the carrier's to do: signatures, not order, are what owners trust."""
    carrier, seen = _carrier(Faults(reorder=lambda nodes: list(nodes)[::-1], tamper=lambda p: p.data + b"?"))
    assert _exchange(carrier)["a"] == b"a!??"
    assert seen == ["c", "b", "a"]


def test_a_node_that_is_gone_is_missing() -> None:
    """Taking a handler away is a death."""
    seen: list[str] = []
    handlers = {n: _echo(n, seen) for n in "abc"}
    carrier = MemoryCarrier(handlers)
    del handlers["b"]
    assert asyncio.run(carrier.nodes()) == ("a", "c")
    assert set(_exchange(carrier)) == {"a", "c"}
