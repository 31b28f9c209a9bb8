"""The envelope service on its unix sockets, and the carrier that dials them."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, cast

import grpc
import grpc.aio
import pytest
from patience import NEVER_S, PATIENCE_S

from fedllm.clock import SystemClock
from fedllm.errors import ConfigError, DecodeError, PortBusy
from fedllm.relay import service
from fedllm.relay.carrier import Reply
from fedllm.relay.local import LocalCarrier
from fedllm.relay.service import (
    MAX_PART,
    MAX_SOCKET_PATH,
    SERVICE,
    deliver_channel,
    deliver_over,
    pack_frame,
    serve_deliver,
    unpack_frame,
)


async def _all(carrier: LocalCarrier, outbound: Mapping[str, bytes], *, deadline_s: float) -> dict[str, Reply]:
    async with aclosing(carrier.exchange(outbound, deadline_s=deadline_s)) as replies:
        return {node: reply async for node, reply in replies}


@asynccontextmanager
async def _carrier(
    root: Path, owners: Mapping[str, Callable[[bytes], Awaitable[Reply]]]
) -> AsyncIterator[LocalCarrier]:
    servers = [await serve_deliver(root / name / "s", deliver) for name, deliver in owners.items()]
    carrier = LocalCarrier({name: root / name / "s" for name in owners}, clock=SystemClock())
    yield carrier
    await carrier.close()
    for server in servers:
        await server.stop(0)


def test_envelopes_of_many_megabytes_pass_unchanged(tmp_path: Path) -> None:
    """The usual limit of gRPC, 4 MiB, does not apply; several owners are asked at once."""

    async def scenario() -> None:
        servers, sockets = [], {}
        for name in ("a", "b"):
            sockets[name] = tmp_path / name / "relay.sock"

            async def deliver(data: bytes, name: str = name) -> Reply:
                return Reply(name.encode() + data)

            servers.append(await serve_deliver(sockets[name], deliver))
        carrier = LocalCarrier(sockets, clock=SystemClock())
        assert await carrier.nodes() == ("a", "b")
        big = os.urandom(9_000_000)
        replies = await _all(carrier, {"a": big, "b": b"small"}, deadline_s=PATIENCE_S)
        assert replies == {"a": Reply(b"a" + big), "b": Reply(b"bsmall")}
        await carrier.close()
        for server in servers:
            await server.stop()
        assert await carrier.nodes() == ()

    asyncio.run(scenario())


def test_only_the_user_reaches_the_socket(tmp_path: Path) -> None:
    """Folder 0700, socket 0600."""

    async def scenario() -> None:
        path = tmp_path / "home" / "relay.sock"
        server = await serve_deliver(path, _echo)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        with pytest.raises(PortBusy):
            await serve_deliver(path, _echo)
        await server.stop()
        assert not path.exists()

    asyncio.run(scenario())


async def _echo(data: bytes) -> Reply:
    return Reply(data)


def test_a_socket_left_by_a_killed_daemon_is_replaced(tmp_path: Path) -> None:
    """Nobody answers there, so it is removed; a plain file of that name is not."""
    import socket

    path = tmp_path / "relay.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))

    async def scenario() -> None:
        server = await serve_deliver(path, _echo)
        await server.stop()
        path.write_text("precious")
        with pytest.raises(ConfigError):
            await serve_deliver(path, _echo)
        assert path.read_text() == "precious"

    asyncio.run(scenario())


def test_a_path_too_long_for_a_socket_is_a_configuration_error(tmp_path: Path) -> None:
    """The kernel's limit would otherwise come up as a riddle."""
    with pytest.raises(ConfigError, match=str(MAX_SOCKET_PATH)):
        asyncio.run(serve_deliver(tmp_path / ("x" * 120) / "relay.sock", _echo))


def test_a_daemon_that_fails_or_is_gone_is_missing(tmp_path: Path) -> None:
    """One owner's trouble neither raises nor holds up the others; the error's text stays at home."""

    async def fail(_data: bytes) -> Reply:
        raise RuntimeError("the patient's name")

    async def scenario() -> dict[str, Reply]:
        bad = await serve_deliver(tmp_path / "bad" / "s", fail)
        good = await serve_deliver(tmp_path / "good" / "s", _echo)
        sockets = {"bad": bad.path, "good": good.path, "gone": tmp_path / "gone" / "s"}
        carrier = LocalCarrier(sockets, clock=SystemClock())
        replies = await _all(carrier, dict.fromkeys([*sockets, "unknown"], b"x"), deadline_s=NEVER_S)
        await carrier.close()
        await bad.stop()
        await good.stop()
        return replies

    assert asyncio.run(asyncio.wait_for(scenario(), PATIENCE_S)) == {"good": Reply(b"x")}


def test_a_slow_daemon_is_given_up_at_the_deadline(tmp_path: Path) -> None:
    """The exchange ends on time with whatever came."""

    async def slow(data: bytes) -> Reply:
        await asyncio.sleep(NEVER_S)
        return Reply(data)

    async def scenario() -> dict[str, Reply]:
        server = await serve_deliver(tmp_path / "s", slow)
        carrier = LocalCarrier({"slow": server.path}, clock=SystemClock())
        replies = await _all(carrier, {"slow": b"x"}, deadline_s=0.3)
        await carrier.close()
        await server.stop(0)
        return replies

    assert asyncio.run(asyncio.wait_for(scenario(), PATIENCE_S)) == {}


def test_frames_of_the_link_are_exact() -> None:
    """What was packed is unpacked; anything cut, padded or not JSON is refused."""
    frame = pack_frame({"op": "send"}, b"one", b"", b"three")
    header, parts = unpack_frame(frame)
    assert (header["op"], parts) == ("send", [b"one", b"", b"three"])
    for bad in (b"", frame[:-1], frame + b"x", b"\xff\xff\xff\xff{}", b"\0\0\0\2[]"):
        with pytest.raises(DecodeError):
            unpack_frame(bad)


def test_parts_come_out_as_they_went_in(tmp_path: Path) -> None:
    """None, one, three, an empty one and one of 4 MiB: byte for byte and in order."""
    parts = {"none": (), "one": (os.urandom(4 << 20),), "three": (os.urandom(1 << 20), b"", os.urandom(7))}

    def owner(name: str) -> Callable[[bytes], Awaitable[Reply]]:
        async def deliver(data: bytes) -> Reply:
            return Reply(data, parts[name])

        return deliver

    async def scenario() -> dict[str, Reply]:
        async with _carrier(tmp_path, {name: owner(name) for name in parts}) as carrier:
            channel = deliver_channel(tmp_path / "three" / "s")
            assert await deliver_over(channel, b"h", timeout_s=PATIENCE_S) == Reply(b"h", parts["three"])
            await channel.close()
            return await _all(carrier, dict.fromkeys(parts, b"head"), deadline_s=PATIENCE_S)

    assert asyncio.run(scenario()) == {name: Reply(b"head", each) for name, each in parts.items()}


class _Watched(tuple[bytes, ...]):
    """Parts that count how many of them were asked for."""

    read = 0

    def __iter__(self) -> Iterator[bytes]:
        for part in super().__iter__():
            self.read += 1
            yield part


def _two_vectors(parts: int) -> tuple[dict[str, _Watched], dict[str, Callable[[bytes], Awaitable[Reply]]]]:
    watched = {name: _Watched([bytes([i]) * (1 << 20)] * parts) for i, name in enumerate("ab")}

    def owner(name: str) -> Callable[[bytes], Awaitable[Reply]]:
        async def deliver(data: bytes) -> Reply:
            return Reply(data, watched[name])

        return deliver

    return watched, {name: owner(name) for name in watched}


def test_the_second_vector_is_not_read_while_the_first_is_held(tmp_path: Path) -> None:
    """Backpressure reaches the owner: beyond the kilobytes that socket and gRPC buffer, its daemon sends nothing."""
    watched, owners = _two_vectors(24)

    async def scenario() -> None:
        async with _carrier(tmp_path, owners) as carrier:
            replies = carrier.exchange(dict.fromkeys(owners, b"head"), deadline_s=PATIENCE_S)
            async with aclosing(replies):
                first, reply = await anext(replies)
                (second,) = set(owners) - {first}
                assert reply.parts == tuple(watched[first])
                await asyncio.sleep(0.5)
                assert watched[second].read <= 2
                assert (await anext(replies))[0] == second
                assert watched[second].read == 24

    asyncio.run(scenario())


def _at_work() -> list[asyncio.Task[object]]:
    """Return the tasks of this loop, less those in which gRPC servers wait for calls and for their own end."""
    return [task for task in asyncio.all_tasks() if not task.get_coro().__qualname__.startswith("AioServer.")]


def test_a_reader_that_stops_early_leaves_nothing_running(tmp_path: Path) -> None:
    """The calls that were not read to their end are cancelled; the carrier can be used again."""
    _, owners = _two_vectors(24)

    async def scenario() -> None:
        async with _carrier(tmp_path, owners) as carrier:
            async with aclosing(carrier.exchange(dict.fromkeys(owners, b"head"), deadline_s=PATIENCE_S)) as replies:
                await anext(replies)
            async with asyncio.timeout(PATIENCE_S):
                while len(_at_work()) > 1:  # noqa: ASYNC110 - gRPC's own tasks end by themselves
                    await asyncio.sleep(0.01)
            assert set(await _all(carrier, dict.fromkeys(owners, b"again"), deadline_s=PATIENCE_S)) == {"a", "b"}

    asyncio.run(scenario())


@asynccontextmanager
async def _hostile(path: Path, messages: Callable[[], AsyncIterator[bytes]]) -> AsyncIterator[Path]:
    """Serve ``Deliver`` with messages that no honest daemon sends."""

    async def handle(_request: bytes, _context: object) -> AsyncIterator[bytes]:
        async for message in messages():
            yield message

    path.parent.mkdir(parents=True, exist_ok=True)
    server = grpc.aio.server(options=service.UNLIMITED)
    handler = grpc.unary_stream_rpc_method_handler(handle)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Deliver": handler}),))
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    yield path
    await server.stop(0)


async def _stalling() -> AsyncIterator[bytes]:
    yield b"stalls"
    yield b"first part"
    await asyncio.sleep(3600)


def test_an_owner_that_stops_in_mid_vector_is_given_up_and_the_others_are_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds the turn for as long as one part may take, no longer."""
    each_part = service.Delivery.each_part

    def hurried(delivery: service.Delivery) -> AsyncGenerator[bytes, None]:
        return each_part(delivery, stall_s=0.5 if delivery.head == b"stalls" else PATIENCE_S)

    monkeypatch.setattr(service.Delivery, "each_part", hurried)
    _, owners = _two_vectors(3)

    async def scenario() -> dict[str, Reply]:
        async with _hostile(tmp_path / "stalls" / "s", _stalling) as path, _carrier(tmp_path, owners):
            sockets = {"0": path, **{name: tmp_path / name / "s" for name in owners}}
            carrier = LocalCarrier(sockets, clock=SystemClock())
            replies = await _all(carrier, dict.fromkeys(sockets, b"head"), deadline_s=NEVER_S)
            await carrier.close()
            return replies

    assert set(asyncio.run(asyncio.wait_for(scenario(), PATIENCE_S))) == {"a", "b"}


class _Trickle:
    """A call whose every message takes a quarter of a second, on a loop whose time it is that passes it."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.cancelled = False

    async def read(self) -> bytes:
        """Return the next message."""
        self.now_s += 0.25
        return b"drop"

    def cancel(self) -> None:
        """Note that nothing more is wanted."""
        self.cancelled = True


def test_a_trickle_ends() -> None:
    """Parts that each come in time may not go on for ever: each adds less time than it takes."""

    async def scenario() -> int:
        call, count = _Trickle(), 0
        loop = asyncio.get_running_loop()
        loop.time = lambda: call.now_s  # type: ignore[method-assign]
        delivery = service.Delivery(cast("Any", call), b"head")
        with pytest.raises(TimeoutError):
            async for _part in delivery.each_part(stall_s=0.5, per_part_s=0.125):
                count += 1
                assert count < 100
        assert call.cancelled
        return count

    # half a second to begin with, and an eighth less after each
    assert asyncio.run(scenario()) == 4


@pytest.mark.parametrize("what", ["a part too large", "too many parts", "no head"])
def test_a_hostile_socket_cannot_fill_the_memory(tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes and numbers are bounded; the owner is missing, the others are not."""
    monkeypatch.setattr(service, "MAX_PARTS", 10)

    async def messages() -> AsyncIterator[bytes]:
        if what == "no head":
            return
        yield b"head"
        for _ in range(20):
            yield b"p" * (MAX_PART + 1 if what == "a part too large" else 1)

    async def scenario() -> None:
        async with _hostile(tmp_path / "bad" / "s", messages) as path, _carrier(tmp_path, {"good": _echo}):
            channel = deliver_channel(path)
            with pytest.raises(DecodeError):
                await deliver_over(channel, b"x", timeout_s=PATIENCE_S)
            await channel.close()
            carrier = LocalCarrier({"bad": path, "good": tmp_path / "good" / "s"}, clock=SystemClock())
            assert await _all(carrier, {"bad": b"x", "good": b"x"}, deadline_s=PATIENCE_S) == {"good": Reply(b"x")}
            await carrier.close()

    asyncio.run(scenario())


def test_what_a_daemon_has_begun_it_ends_although_its_caller_is_gone(tmp_path: Path) -> None:
    """Between a charge in the ledger and the record of the round nothing may be cut off by a lost connection."""

    async def scenario() -> list[str]:
        begun, may_end, steps = asyncio.Event(), asyncio.Event(), []

        async def deliver(_data: bytes) -> Reply:
            steps.append("charged")
            begun.set()
            await may_end.wait()
            steps.append("recorded")
            return Reply(b"done")

        server = await serve_deliver(tmp_path / "s" / "r.sock", deliver)
        channel = deliver_channel(tmp_path / "s" / "r.sock")
        call = asyncio.create_task(deliver_over(channel, b"begin", timeout_s=PATIENCE_S))
        await begun.wait()
        call.cancel()
        await channel.close()
        await asyncio.sleep(0.1)
        may_end.set()
        async with asyncio.timeout(PATIENCE_S):
            while len(steps) < 2:  # noqa: ASYNC110 - the daemon is not told
                await asyncio.sleep(0.01)
        await server.stop(0)
        return steps

    assert asyncio.run(scenario()) == ["charged", "recorded"]
