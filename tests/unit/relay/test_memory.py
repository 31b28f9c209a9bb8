"""The carrier of simulations: it delivers, and it goes wrong in exactly the ways it is told."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Iterable
from contextlib import aclosing

import pytest

from fedllm.clock import FakeClock
from fedllm.relay.carrier import Reply
from fedllm.relay.memory import Direction, Faults, Handler, MemoryCarrier, Passage


def _echo(name: str, seen: list[str]) -> Handler:
    async def handle(data: bytes) -> Reply:
        seen.append(name)
        return Reply(name.encode() + data)

    return handle


def _carrier(
    faults: Faults, clock: FakeClock | None = None, log: list[Passage] | None = None
) -> tuple[MemoryCarrier, list[str]]:
    seen: list[str] = []
    return MemoryCarrier({n: _echo(n, seen) for n in "abc"}, faults=faults, clock=clock, log=log), seen


async def _replies(
    carrier: MemoryCarrier, deadline_s: float = 10.0, nodes: Iterable[str] = "abc"
) -> list[tuple[str, Reply]]:
    async with aclosing(carrier.exchange(dict.fromkeys(nodes, b"!"), deadline_s=deadline_s)) as replies:
        return [each async for each in replies]


def _exchange(carrier: MemoryCarrier, deadline_s: float = 10.0) -> dict[str, bytes]:
    return {node: reply.head for node, reply in asyncio.run(_replies(carrier, deadline_s))}


def test_every_node_is_asked_and_every_message_is_recorded() -> None:
    """The log holds both directions: the leak test reads it."""
    log: list[Passage] = []
    carrier, seen = _carrier(Faults(), log=log)
    assert _exchange(carrier) == {"a": b"a!", "b": b"b!", "c": b"c!"}
    assert sorted(seen) == ["a", "b", "c"]
    assert [p.index for p in log] == list(range(6))
    assert {(p.node, p.data) for p in log if p.direction is Direction.TO_COORDINATOR} == {
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
    replies = asyncio.run(_replies(carrier))
    assert [(node, reply.head) for node, reply in replies] == [("c", b"c!??"), ("b", b"b!??"), ("a", b"a!??")]
    assert seen == ["c", "b", "a"]


def test_a_node_that_is_gone_is_missing() -> None:
    """Taking a handler away is a death."""
    seen: list[str] = []
    handlers = {n: _echo(n, seen) for n in "abc"}
    carrier = MemoryCarrier(handlers)
    del handlers["b"]
    assert asyncio.run(carrier.nodes()) == ("a", "c")
    assert set(_exchange(carrier)) == {"a", "c"}


class _Vectors:
    """Owners whose every reply has parts, and how many of these are alive at once."""

    def __init__(self, count: int, *, slow: bool = False) -> None:
        self._alive: weakref.WeakSet[_Part] = weakref.WeakSet()
        self.most = 0
        self.asked: list[str] = []
        self._slow = slow
        self.handlers = {f"{i:04d}": self._handler(f"{i:04d}") for i in range(count)}

    def _handler(self, name: str) -> Handler:
        async def handle(_data: bytes) -> Reply:
            self.asked.append(name)
            if self._slow:
                await asyncio.sleep(0)
            part = _Part(name)
            self._alive.add(part)
            self.most = max(self.most, len(self._alive))
            return Reply(name.encode(), (part,))  # type: ignore[arg-type]

        return handle


class _Part:
    """Stands for a chunk; unlike bytes it can be referred to weakly."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __len__(self) -> int:
        return 1 << 20


def test_parts_arrive_as_they_were_sent_or_as_a_tampering_carrier_wants() -> None:
    """None, one and three parts of up to 4 MiB; a fault may change the parts and leave the head."""
    parts = {"a": (), "b": (b"x" * (4 << 20),), "c": (b"1", b"", b"333")}

    def handler(node: str) -> Handler:
        async def handle(data: bytes) -> Reply:
            return Reply(node.encode() + data, parts[node])

        return handle

    handlers = {node: handler(node) for node in parts}
    honest = dict(asyncio.run(_replies(MemoryCarrier(handlers))))
    assert honest == {node: Reply(node.encode() + b"!", each) for node, each in parts.items()}
    faults = Faults(tamper_parts=lambda p: p.parts[::-1] if p.node == "c" else p.parts)
    changed = dict(asyncio.run(_replies(MemoryCarrier(handlers, faults=faults))))
    assert changed == {**honest, "c": Reply(b"c!", (b"333", b"", b"1"))}


def test_a_thousand_owners_vectors_are_never_in_memory_together() -> None:
    """Who iterates sets the pace: an owner is asked for its vector when the one before was let go."""
    vectors = _Vectors(1000)
    carrier = MemoryCarrier(vectors.handlers)

    async def scenario() -> list[str]:
        outbound = dict.fromkeys(vectors.handlers, b"!")
        order = []
        async with aclosing(carrier.exchange(outbound, deadline_s=10)) as replies:
            async for node, reply in replies:
                order.append(node)
                assert vectors.asked[-1] == node
                await asyncio.sleep(0)
                assert vectors.asked[-1] == node
                del reply
        return order

    assert asyncio.run(scenario()) == sorted(vectors.handlers)
    assert vectors.most == 1


def test_owners_at_work_are_heard_together_and_their_vectors_still_taken_one_by_one() -> None:
    """An owner that waits inside does not hold the others up; every reply is yielded once."""
    vectors = _Vectors(5, slow=True)
    replies = asyncio.run(_replies(MemoryCarrier(vectors.handlers), nodes=vectors.handlers))
    assert [node for node, _ in replies] == sorted(vectors.handlers)
    assert vectors.asked == sorted(vectors.handlers)


def test_a_reader_that_stops_early_leaves_nothing_running() -> None:
    """Closing the iteration cancels what is under way, a held vector included."""
    started: list[str] = []
    ended: list[str] = []

    def handler(node: str) -> Handler:
        async def handle(_data: bytes) -> Reply:
            started.append(node)
            try:
                await asyncio.sleep(0 if node == "a" else 3600)
            finally:
                ended.append(node)
            return Reply(b"head", (b"part",))

        return handle

    async def scenario() -> None:
        carrier = MemoryCarrier({node: handler(node) for node in "abc"})
        async with aclosing(carrier.exchange(dict.fromkeys("abc", b""), deadline_s=10)) as replies:
            async for node, _ in replies:
                assert node == "a"
                break
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(scenario())
    assert started == ["a", "b", "c"]
    assert sorted(ended) == ["a", "b", "c"]


def test_what_a_handler_raises_reaches_the_reader() -> None:
    """A handler is a daemon's `handle`, which never raises: if it does, that is a fault to be seen."""

    async def handle(_data: bytes) -> Reply:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        asyncio.run(_replies(MemoryCarrier({"a": handle})))
