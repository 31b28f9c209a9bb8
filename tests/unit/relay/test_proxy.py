"""The proxy before the SuperLink: what it lets through, what it holds back and for how long."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.proto.node_pb2 import Node

from fedllm.errors import PortBusy
from fedllm.relay import proxy
from fedllm.relay.proxy import FleetProxy, names_node

PULL = "/v1/fleet/pull-messages"


class Upstream:
    """Stands for the SuperLink: records what arrives, answers what it is told."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, bytes]] = []
        self.heads: list[bytes] = []
        self.answer = b""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request."""
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        self.heads.append(head)
        self.seen.append((head.split(b" ")[1].decode(), await reader.readexactly(length)))
        writer.write(b"HTTP/1.1 200 OK\r\nx-answer: yes\r\ncontent-length: %d\r\n\r\n" % len(self.answer) + self.answer)
        await writer.drain()
        writer.close()


class Client:
    """One connection to the proxy."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def ask(self, path: str, body: bytes = b"", head: str | None = None) -> tuple[int, bytes]:
        """Return status and body of the response."""
        if head is None:
            head = f"POST {path} HTTP/1.1\r\nhost: x\r\nflwr-signature: s\r\ncontent-length: {len(body)}\r\n\r\n"
        self.writer.write(head.encode() + body)
        answer = await self.reader.readuntil(b"\r\n\r\n")
        length = int(answer.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        return int(answer.split(b" ")[1]), await self.reader.readexactly(length)


class World:
    """A proxy between an upstream and clients."""

    def __init__(self, upstream: Upstream, fleet: FleetProxy, port: int, asked: list[bytes]) -> None:
        self.upstream, self.fleet, self.port, self.asked = upstream, fleet, port, asked

    async def client(self) -> Client:
        """Connect."""
        return Client(*await asyncio.open_connection("127.0.0.1", self.port))


@asynccontextmanager
async def _world() -> AsyncIterator[World]:
    upstream, asked = Upstream(), []
    server = await asyncio.start_server(upstream.serve, "127.0.0.1", 0)

    async def on_asked(body: bytes) -> None:
        asked.append(body)

    fleet = FleetProxy(server.sockets[0].getsockname()[1], on_asked)
    await fleet.open("127.0.0.1", 0)
    assert fleet._server is not None
    try:
        yield World(upstream, fleet, fleet._server.sockets[0].getsockname()[1], asked)
    finally:
        await fleet.close()
        server.close()


def test_a_request_to_the_fleet_api_passes_unchanged() -> None:
    """Bodies of many blocks both ways, headers, and a second request on the same connection."""

    async def scenario() -> None:
        async with _world() as world:
            body, world.upstream.answer = os.urandom(3_000_000), os.urandom(2_000_000)
            client = await world.client()
            for path in ("/v1/fleet/push-object", "/v1/fleet/get-fab"):
                assert await client.ask(path, body) == (200, world.upstream.answer)
                assert world.upstream.seen[-1] == (path, body)
            assert b"flwr-signature: s\r\n" in world.upstream.heads[0]
            client.writer.close()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "head",
    [
        "POST /v1/control/start-run HTTP/1.1\r\ncontent-length: 0\r\n\r\n",
        "POST /v1/runtime/acquire-task HTTP/1.1\r\ncontent-length: 0\r\n\r\n",
        "POST /v1/fleet/../control/start-run HTTP/1.1\r\ncontent-length: 0\r\n\r\n",
        "POST /v1/fleet/%2e%2e/control/start-run HTTP/1.1\r\ncontent-length: 0\r\n\r\n",
        "POST /v1/fleet/x?y HTTP/1.1\r\ncontent-length: 0\r\n\r\n",
        "POST http://x/v1/fleet/get-run HTTP/1.1\r\ncontent-length: 0\r\n\r\n",
        "GET /v1/fleet/get-run HTTP/1.1\r\ncontent-length: 0\r\n\r\n",
        "POST /v1/fleet/get-run HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 0\r\n\r\n",
        "POST /v1/fleet/get-run HTTP/1.1\r\ncontent-length: +1\r\n\r\n",
        "POST /v1/fleet/get-run HTTP/1.1\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n",
        "POST /v1/fleet/get-run HTTP/1.1\r\ncontent-length: 1\r\n transfer-encoding: chunked\r\n\r\n",
        "POST /v1/fleet/get-run HTTP/1.1\r\ncontent-length : 1\r\n\r\n",
        "POST /v1/fleet/get-run HTTP/1.1\r\n\r\n",
    ],
)
def test_nothing_else_reaches_the_superlink(head: str) -> None:
    """Neither the APIs that start code, nor a head on whose meaning two servers could differ."""

    async def scenario() -> None:
        async with _world() as world:
            client = await world.client()
            assert (await client.ask("", head=head))[0] == 400
            assert await client.reader.read() == b""
            assert world.upstream.seen == []
            client.writer.close()

    asyncio.run(scenario())


def test_a_request_for_messages_waits_for_a_push() -> None:
    """The first passes at once; the next, after one that brought nothing, when something was pushed."""

    async def scenario() -> None:
        async with _world() as world:
            client, other = await world.client(), await world.client()
            assert await client.ask(PULL, b"node 1") == (200, b"")
            held = asyncio.create_task(client.ask(PULL, b"node 1"))
            await asyncio.sleep(0.1)
            assert not held.done()
            # neither another node nor another request is held with it
            assert (await other.ask(PULL, b"node 2"))[0] == 200
            assert (await other.ask("/v1/fleet/send-node-heartbeat", b"node 1"))[0] == 200
            world.upstream.answer = b"message"
            world.fleet.pushed()
            assert await asyncio.wait_for(held, 1) == (200, b"message")
            assert world.asked == [b"node 1", b"node 1", b"node 2"]
            for each in (client, other):
                each.writer.close()

    asyncio.run(scenario())


def test_a_push_between_two_requests_is_not_missed() -> None:
    """What was pushed while the node slept is fetched without waiting."""

    async def scenario() -> None:
        async with _world() as world:
            client = await world.client()
            await client.ask(PULL, b"node 1")
            world.fleet.pushed()
            assert (await asyncio.wait_for(client.ask(PULL, b"node 1"), 1))[0] == 200
            client.writer.close()

    asyncio.run(scenario())


@pytest.mark.parametrize(("answer", "limit"), [(b"", "HOLD_S"), (b"message", "AGAIN_S")])
def test_nobody_waits_for_ever(answer: bytes, limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorter after a message: another may have been pushed with it."""
    monkeypatch.setattr(proxy, "HOLD_S", 60.0)
    monkeypatch.setattr(proxy, "AGAIN_S", 60.0)
    monkeypatch.setattr(proxy, limit, 0.1)

    async def scenario() -> None:
        async with _world() as world:
            world.upstream.answer = answer
            client = await world.client()
            await client.ask(PULL, b"node 1")
            assert await asyncio.wait_for(client.ask(PULL, b"node 1"), 5) == (200, answer)
            client.writer.close()

    asyncio.run(scenario())


def test_a_node_that_goes_while_it_waits_fetches_nothing() -> None:
    """A message that is handed to nobody would be lost."""

    async def scenario() -> None:
        async with _world() as world:
            client = await world.client()
            await client.ask(PULL, b"node 1")
            held = asyncio.create_task(client.ask(PULL, b"node 1"))
            await asyncio.sleep(0.05)
            client.writer.close()
            await asyncio.sleep(0.05)
            world.fleet.pushed()
            await asyncio.sleep(0.05)
            assert len(world.upstream.seen) == 1
            with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                await held

    asyncio.run(scenario())


def test_a_superlink_that_is_away_is_a_bad_gateway() -> None:
    """Flower's client tries again after that."""

    async def nothing(_body: bytes) -> None: ...

    async def scenario() -> None:
        fleet = FleetProxy(1, nothing)
        await fleet.open("127.0.0.1", 0)
        assert fleet._server is not None
        port = fleet._server.sockets[0].getsockname()[1]
        client = Client(*await asyncio.open_connection("127.0.0.1", port))
        assert (await client.ask("/v1/fleet/get-run", b"body"))[0] == 502
        client.writer.close()
        with pytest.raises(PortBusy):
            await FleetProxy(1, nothing).open("127.0.0.1", port)
        await fleet.close()

    asyncio.run(scenario())


def test_closing_ends_what_is_held() -> None:
    """No task and no connection is left."""

    async def scenario() -> None:
        async with _world() as world:
            client = await world.client()
            await client.ask(PULL, b"node 1")
            held = asyncio.create_task(client.ask(PULL, b"node 1"))
            await asyncio.sleep(0.05)
            await asyncio.wait_for(world.fleet.close(), 1)
            with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                await held
            client.writer.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("node", [1, 127, 128, 300, 2**32 + 5, 2**63 + 1, 2**64 - 1])
def test_a_nodes_request_is_recognised(node: int) -> None:
    """As Flower itself writes it; another node's is not."""
    body = PullMessagesRequest(node=Node(node_id=node)).SerializeToString(deterministic=True)
    assert names_node(body, str(node))
    assert not names_node(body, str(node ^ 0x5555_5555_5555))
