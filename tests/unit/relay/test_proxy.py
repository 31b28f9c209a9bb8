"""The proxy before the SuperLink: what it lets through, what it holds back and for how long."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import os
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
from patience import PATIENCE_S

from fedllm.errors import PortBusy
from fedllm.relay import proxy
from fedllm.relay.proxy import FleetProxy

pytestmark = pytest.mark.usefixtures("unhurried_proxy")
PULL = "/v1/fleet/pull-messages"


class Upstream:
    """Stands for the SuperLink: records what arrives, answers what it is told."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, bytes]] = []
        self.heads: list[bytes] = []
        self.broken_off = 0
        self.answer = b""
        self.headers = b"x-answer: yes\r\n"
        self.sends: int | None = None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request, with no more than `sends` bytes."""
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        self.heads.append(head)
        try:
            self.seen.append((head.split(b" ")[1].decode(), await reader.readexactly(length)))
            answer = b"HTTP/1.1 200 OK\r\n%scontent-length: %d\r\n\r\n" % (self.headers, len(self.answer))
            writer.write((answer + self.answer)[: self.sends])
            await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            self.broken_off += 1
        finally:
            writer.close()


class Client:
    """One connection to the proxy."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, path: str, body: bytes = b"", head: str | None = None) -> None:
        """Send a request."""
        if head is None:
            head = f"POST {path} HTTP/1.1\r\nhost: x\r\nflwr-signature: s\r\ncontent-length: {len(body)}\r\n\r\n"
        self.writer.write(head.encode() + body)

    async def last(self) -> int:
        """Return the status of a response after which the connection ends."""
        return int((await asyncio.wait_for(self.reader.read(), PATIENCE_S)).split(b" ")[1])

    async def ask(self, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """Return status and body of the response."""
        self.send(path, body)
        answer = await self.reader.readuntil(b"\r\n\r\n")
        length = int(answer.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        return int(answer.split(b" ")[1]), await self.reader.readexactly(length)


@dataclass
class World:
    """A proxy between an upstream and clients."""

    upstream: Upstream
    fleet: FleetProxy
    port: int
    asked: list[bytes]
    clients: list[Client] = field(default_factory=list)

    async def client(self) -> Client:
        """Connect."""
        self.clients.append(Client(*await asyncio.open_connection("127.0.0.1", self.port)))
        return self.clients[-1]


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - the other end of a socket
            await asyncio.sleep(0.01)


def _run(scenario: Callable[[World], Awaitable[None]]) -> None:
    """Run a test in a world of its own."""

    async def main() -> None:
        upstream, asked = Upstream(), []
        server = await asyncio.start_server(upstream.serve, "127.0.0.1", 0)

        async def on_asked(body: bytes) -> None:
            asked.append(body)

        fleet = FleetProxy(server.sockets[0].getsockname()[1], on_asked)
        world = World(upstream, fleet, await fleet.open("127.0.0.1", 0), asked)
        try:
            await scenario(world)
        finally:
            for client in world.clients:
                client.writer.close()
            await fleet.close()
            server.close()

    asyncio.run(main())


def test_a_request_to_the_fleet_api_passes_unchanged() -> None:
    """Bodies of many blocks both ways, headers, and a second request on the same connection."""

    async def scenario(world: World) -> None:
        body, world.upstream.answer = os.urandom(3_000_000), os.urandom(2_000_000)
        client = await world.client()
        for path in ("/v1/fleet/push-object", "/v1/fleet/get-fab"):
            assert await client.ask(path, body) == (200, world.upstream.answer)
            assert world.upstream.seen[-1] == (path, body)
        assert b"flwr-signature: s\r\n" in world.upstream.heads[0]
        # with Nagle's algorithm each answer would wait for an acknowledgement
        (connection,) = cast("Any", world.fleet._server).server_state.connections
        assert connection.transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

    _run(scenario)


REFUSED = [
    (404, "POST /v1/control/start-run HTTP/1.1", "content-length: 0"),
    (404, "POST /v1/runtime/acquire-task HTTP/1.1", "content-length: 0"),
    (404, "POST /v1/fleet/../control/start-run HTTP/1.1", "content-length: 0"),
    (404, "POST /v1/fleet/%2e%2e/control/start-run HTTP/1.1", "content-length: 0"),
    (404, "POST /v1/fleet/x%2d HTTP/1.1", "content-length: 0"),
    (404, "POST /v1/fleet/x?y HTTP/1.1", "content-length: 0"),
    (404, "POST /v1/fleet/ HTTP/1.1", "content-length: 0"),
    (404, f"POST /v1/fleet/{'x' * 65} HTTP/1.1", "content-length: 0"),
    (404, "POST http://x/v1/fleet/get-run HTTP/1.1", "content-length: 0"),
    (404, "GET /v1/fleet/get-run HTTP/1.1", "content-length: 0"),
    (404, "GET /v1/control/start-run HTTP/1.1", "connection: upgrade\r\nupgrade: websocket"),
    (411, "POST /v1/fleet/get-run HTTP/1.1", "x: y"),
    (411, "POST /v1/fleet/get-run HTTP/1.1", "transfer-encoding: chunked"),
    (411, "POST /v1/fleet/get-run HTTP/1.1", "content-length: 1\r\ntransfer-encoding: chunked"),
    (411, "POST /v1/fleet/get-run HTTP/1.1", "content-length: 1\r\nconnection: content-length"),
    (413, "POST /v1/fleet/get-run HTTP/1.1", f"content-length: {proxy.MAX_BODY + 1}"),
    (400, "POST /v1/fleet/get-run HTTP/1.1", "content-length: 1\r\ncontent-length: 0"),
    (400, "POST /v1/fleet/get-run HTTP/1.1", "content-length: +1"),
    (400, "POST /v1/fleet/get-run HTTP/1.1", "content-length: 1\r\n transfer-encoding: chunked"),
    (400, "POST /v1/fleet/get-run HTTP/1.1", "content-length : 1"),
    (400, "POST /v1/fleet/get-run HTTP/1.1", "transfer-encoding: gzip, chunked"),
    (400, "POST /v1/fleet/get-run", "content-length: 0"),
]


def test_nothing_else_reaches_the_superlink() -> None:
    """Neither the APIs that start code, nor a head on whose meaning two servers could differ."""

    async def scenario(world: World) -> None:
        for status, line, headers in REFUSED:
            client = await world.client()
            client.send("", head=f"{line}\r\nhost: x\r\n{headers}\r\n\r\n")
            assert await client.last() == status, (line, headers)
        assert world.upstream.heads == []

    _run(scenario)


def test_headers_pass_both_ways_except_those_of_one_connection() -> None:
    """Nothing is added, and what is compressed stays compressed."""

    async def scenario(world: World) -> None:
        world.upstream.answer = gzip.compress(b"message")
        world.upstream.headers = b"content-encoding: gzip\r\nkeep-alive: timeout=5\r\nx-answer: yes\r\n"
        client = await world.client()
        client.send("", head=(
            "POST /v1/fleet/get-run HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nFlwr-Signature: S\r\n"
            "Connection: X-Hop, close\r\nX-Hop: 1\r\nKeep-Alive: 5\r\nTE: trailers\r\nUpgrade: h2c\r\n"
            "Expect: 100-continue\r\n\r\n"
        ))  # fmt: skip
        assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        head, _, body = (await asyncio.wait_for(client.reader.read(), PATIENCE_S)).partition(b"\r\n\r\n")
        assert body == world.upstream.answer
        length = b"content-length: %d" % len(body)
        assert sorted(head.lower().split(b"\r\n")) == [
            b"connection: close", b"content-encoding: gzip", length, b"http/1.1 200 ok", b"x-answer: yes"
        ]  # fmt: skip
        (passed,) = world.upstream.heads
        assert sorted(passed.lower().split(b"\r\n")) == [
            b"", b"", b"content-length: 0", b"flwr-signature: s", b"host: x", b"post /v1/fleet/get-run http/1.1"
        ]  # fmt: skip

    _run(scenario)


@pytest.mark.parametrize("sends", [0, 10, 200])
def test_a_request_is_passed_on_once_whatever_becomes_of_its_answer(sends: int) -> None:
    """None, a piece of its head, and a piece of its body: that last one ends the node's connection."""

    async def scenario(world: World) -> None:
        world.upstream.answer, world.upstream.sends = os.urandom(1000), sends
        client = await world.client()
        if sends < 200:
            assert (await client.ask(PULL, b"node 1"))[0] == 502
        else:
            with pytest.raises(asyncio.IncompleteReadError):
                await client.ask(PULL, b"node 1")
        assert world.upstream.seen == [(PULL, b"node 1")]
        # and is no reason to hold the next one
        world.upstream.sends = None
        assert (await asyncio.wait_for((await world.client()).ask(PULL, b"node 1"), PATIENCE_S))[0] == 200

    _run(scenario)


def test_a_request_that_breaks_off_is_broken_off() -> None:
    """The SuperLink need not wait for the rest of what a node that went was sending."""

    async def scenario(world: World) -> None:
        client = await world.client()
        head = "POST /v1/fleet/push-object HTTP/1.1\r\nhost: x\r\ncontent-length: 300000\r\n\r\n"
        client.send("", b"x" * 200_000, head)
        await _until(lambda: bool(world.upstream.heads))
        client.writer.close()
        await _until(lambda: world.upstream.broken_off == 1)
        assert world.upstream.seen == []

    _run(scenario)


@pytest.mark.parametrize(
    "sent",
    [
        "",
        "POST /v1/fleet/get-run HTTP/1.1\r\nhost:",
        "POST /v1/fleet/get-run HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n1",
        f"POST {PULL} HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n1",
    ],
)
def test_a_peer_that_does_not_go_on_is_hung_up_on(sent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, in and after the head, and on a connection that served a request already."""
    monkeypatch.setattr(proxy, "IDLE_S", 0.2)

    async def served(world: World) -> Client:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            if (await (client := await world.client()).ask("/v1/fleet/get-fab"))[0] == 200:
                return client
        return await served(world)  # a machine that stood still let it idle before its first request

    async def scenario(world: World) -> None:
        peers = await asyncio.wait_for(served(world), PATIENCE_S), await world.client()
        seen = len(world.upstream.seen)
        for each in peers:
            each.send("", head=sent)
            with contextlib.suppress(ConnectionError):
                await asyncio.wait_for(each.reader.read(), PATIENCE_S)
        assert len(world.upstream.seen) == seen

    _run(scenario)


def test_a_peer_that_does_not_read_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds neither the SuperLink's connection nor its own."""
    monkeypatch.setattr(proxy, "IDLE_S", 0.2)

    async def scenario(world: World) -> None:
        world.upstream.answer = bytes(30_000_000)
        async with asyncio.timeout(PATIENCE_S):
            while not world.upstream.heads:  # see above
                (await world.client()).send("/v1/fleet/get-fab")
                await asyncio.sleep(0.1)
        state = cast("Any", world.fleet._server).server_state
        await _until(lambda: world.upstream.broken_off > 0 and not state.connections)
        for client in world.clients:
            with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                await asyncio.wait_for(client.reader.readexactly(30_000_000), PATIENCE_S)

    _run(scenario)


def test_connections_and_their_heads_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """One too many is told to try again, which Flower's client does."""
    monkeypatch.setattr(proxy, "_MAX_CONNECTIONS", 2)

    async def scenario(world: World) -> None:
        first = await world.client()
        assert (await first.ask("/v1/fleet/get-run"))[0] == 200
        assert (await (await world.client()).ask("/v1/fleet/get-run"))[0] == 503
        first.send("", head="POST /v1/fleet/get-run HTTP/1.1\r\nx: " + "y" * 40_000)
        assert await first.last() == 400

    _run(scenario)


def test_a_request_for_messages_waits_for_a_push() -> None:
    """The first passes at once; one after one that brought nothing when something was pushed since."""

    async def scenario(world: World) -> None:
        client, other = await world.client(), await world.client()
        assert await client.ask(PULL, b"node 1") == (200, b"")
        world.fleet.pushed()  # while the node sleeps: its next request passes as well
        assert await asyncio.wait_for(client.ask(PULL, b"node 1"), PATIENCE_S) == (200, b"")
        held = asyncio.create_task(client.ask(PULL, b"node 1"))
        await asyncio.sleep(0.1)
        assert not held.done()
        # neither another node nor another request is held with it
        assert (await other.ask(PULL, b"node 2"))[0] == 200
        assert (await other.ask("/v1/fleet/send-node-heartbeat", b"node 1"))[0] == 200
        world.upstream.answer = b"message"
        world.fleet.pushed()
        assert await asyncio.wait_for(held, PATIENCE_S) == (200, b"message")
        assert world.asked == [b"node 1", b"node 1", b"node 1", b"node 2"]

    _run(scenario)


@pytest.mark.parametrize(("answer", "limit"), [(b"", "HOLD_S"), (b"message", "AGAIN_S")])
def test_nobody_waits_for_ever(answer: bytes, limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorter after a message: another may have been pushed with it."""
    monkeypatch.setattr(proxy, limit, 0.1)

    async def scenario(world: World) -> None:
        world.upstream.answer = answer
        client = await world.client()
        await client.ask(PULL, b"node 1")
        assert await asyncio.wait_for(client.ask(PULL, b"node 1"), PATIENCE_S) == (200, answer)

    _run(scenario)


def test_a_node_that_goes_while_it_waits_fetches_nothing() -> None:
    """A message that is handed to nobody would be lost."""

    async def scenario(world: World) -> None:
        client = await world.client()
        await client.ask(PULL, b"node 1")
        held = asyncio.create_task(client.ask(PULL, b"node 1"))
        await _until(lambda: len(world.asked) == 2)
        client.writer.close()
        await _until(lambda: not cast("Any", world.fleet._server).server_state.connections)
        world.fleet.pushed()
        await asyncio.sleep(0.05)
        assert len(world.upstream.seen) == 1
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await held

    _run(scenario)


def test_a_superlink_that_is_away_is_a_bad_gateway() -> None:
    """Flower's client tries again after that."""

    async def nothing(_body: bytes) -> None: ...

    async def scenario() -> None:
        fleet = FleetProxy(1, nothing)
        port = await fleet.open("127.0.0.1", 0)
        client = Client(*await asyncio.open_connection("127.0.0.1", port))
        assert (await client.ask("/v1/fleet/get-run", b"body"))[0] == 502
        client.writer.close()
        with pytest.raises(PortBusy):
            await FleetProxy(1, nothing).open("127.0.0.1", port)
        await fleet.close()

    asyncio.run(scenario())


def test_closing_ends_everything() -> None:
    """No task and no connection is left, and no message is fetched for a node that would not get it."""

    async def scenario(world: World) -> None:
        client, idle, stalled = [await world.client() for _ in range(3)]
        await client.ask(PULL, b"node 1")
        held = asyncio.create_task(client.ask(PULL, b"node 1"))
        stalled.send("", head="POST /v1/fleet/get-run HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n1")
        await _until(lambda: len(world.upstream.heads) == 2 and len(world.asked) == 2)
        await asyncio.wait_for(world.fleet.close(), PATIENCE_S)
        assert await held == (503, b"")
        assert [await each.reader.read() for each in (client, idle)] == [b"", b""]
        assert await stalled.last() == 503
        assert len(world.upstream.seen) == 1
        await _until(lambda: asyncio.all_tasks() == {asyncio.current_task()})

    _run(scenario)


def test_an_owners_machine_needs_no_uvicorn() -> None:
    """It has the programs' commands from this package, and never listens."""
    code = "import sys; sys.modules['uvicorn'] = None; import fedllm.relay.node, fedllm.relay.proxy"
    subprocess.run([sys.executable, "-c", code], check=True)
