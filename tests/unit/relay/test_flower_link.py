"""Both relays of the Flower carrier and the link between them, without Flower's processes: a grid in memory."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, cast

import grpc
import grpc.aio
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.proto.node_pb2 import Node
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from patience import NEVER_S, PATIENCE_S

from fedllm.clock import SystemClock
from fedllm.relay import flower, service
from fedllm.relay.bundle.fedllm_relay import client, server
from fedllm.relay.carrier import Reply
from fedllm.relay.flower import FlowerCarrier
from fedllm.relay.service import LINK, MAX_PART, MAX_PARTS, pack_frame, serve_deliver, serve_link, unpack_frame
from fedllm.rng import OsRng

TOKEN = "token"
Owner = Callable[[bytes], Awaitable[Reply]]


@pytest.fixture(autouse=True)
def _identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give this process what Flower gives the process of an app: messages carry it."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


class MemoryGrid:
    """Flower's `Grid` as the relay uses it: every message is a call of the ClientApp, made when it is pulled."""

    def __init__(self, sockets: dict[int, Path]) -> None:
        self._sockets = sockets
        self._messages: dict[str, Message] = {}
        self.pulled: list[int] = []
        self.spoil: Callable[[Message], Message] = lambda reply: reply
        self.stuck: set[int] = set()
        self.over = threading.Event()

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes."""
        return sorted(self._sockets)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Take messages in."""
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = message.object_id
            self._messages[message.object_id] = message
            ids.append(message.object_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the reply of one node."""
        (identifier,) = message_ids
        message = self._messages.pop(identifier)
        node = message.metadata.dst_node_id
        if node in self.stuck:
            self.over.wait()
            return []
        self.pulled.append(node)
        context = Context(1, node, {"socket": str(self._sockets[node])}, RecordDict(), {})
        return [self.spoil(client.app(message, context))]


@asynccontextmanager
async def _carrier(root: Path) -> AsyncIterator[FlowerCarrier]:
    """Yield the coordinator's end, with nothing but its socket."""
    carrier = FlowerCarrier(
        root, host="127.0.0.1", port=1, inner_port=1, clock=SystemClock(), rng=OsRng(), environ=os.environ
    )
    carrier._token = TOKEN
    link = await serve_link(root / "link.sock", carrier._serve)
    yield carrier
    await link.stop(0)


@contextlib.contextmanager
def _relay_run(root: Path, grid: MemoryGrid) -> Iterator[server.Link]:
    """Run the ServerApp's relay in a thread."""
    link = server.Link(str(root / "link.sock"))

    def work() -> None:
        link.send({"op": "hello", "token": TOKEN})
        try:
            server.Relay(cast("Grid", grid), link).run()
        finally:
            link.close()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield link
    finally:
        link.close()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


@asynccontextmanager
async def _federation(root: Path, owners: dict[int, Owner]) -> AsyncIterator[tuple[FlowerCarrier, MemoryGrid]]:
    sockets = {node: root / str(node) / "s" for node in owners}
    daemons = [await serve_deliver(sockets[node], deliver) for node, deliver in owners.items()]
    grid = MemoryGrid(sockets)
    async with _carrier(root / "c") as carrier:
        run = _relay_run(root / "c", grid)
        await asyncio.to_thread(run.__enter__)
        try:
            assert await carrier.nodes() == tuple(sorted(str(node) for node in owners))
            yield carrier, grid
        finally:
            grid.over.set()
            await asyncio.to_thread(run.__exit__, None, None, None)
    for daemon in daemons:
        await daemon.stop(0)


def _owner(*parts: bytes) -> Owner:
    async def deliver(data: bytes) -> Reply:
        return Reply(data[::-1], parts)

    return deliver


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - the other end of a socket
            await asyncio.sleep(0.01)


async def _all(carrier: FlowerCarrier, data: bytes) -> dict[str, Reply]:
    nodes = await carrier.nodes()
    async with aclosing(carrier.exchange(dict.fromkeys(nodes, data), deadline_s=PATIENCE_S)) as replies:
        return {node: reply async for node, reply in replies}


def test_parts_survive_both_relays_byte_for_byte(tmp_path: Path) -> None:
    """None, one of 4 MiB, and three with a short last one."""
    chunks = [os.urandom(4 << 20), os.urandom(1 << 20), os.urandom(7)]

    async def scenario() -> dict[str, Reply]:
        owners = {1: _owner(), 2: _owner(chunks[0]), 3: _owner(*chunks)}
        async with _federation(tmp_path, owners) as (carrier, _grid):
            await _all(carrier, b"a first exchange")
            return await _all(carrier, b"head")

    expected = {"1": Reply(b"daeh"), "2": Reply(b"daeh", (chunks[0],)), "3": Reply(b"daeh", tuple(chunks))}
    assert asyncio.run(scenario()) == expected


def test_no_other_reply_is_fetched_from_flower_while_one_is_held(tmp_path: Path) -> None:
    """Backpressure: the reader holds the first vector, so the relay asks Flower for no second one."""
    parts = [bytes([i]) * (1 << 20) for i in range(8)]

    async def scenario() -> None:
        async with _federation(tmp_path, {n: _owner(*parts) for n in (1, 2, 3)}) as (carrier, grid):
            order = []
            async with aclosing(carrier.exchange(dict.fromkeys("123", b"x"), deadline_s=PATIENCE_S)) as replies:
                async for node, reply in replies:
                    order.append(int(node))
                    assert reply.parts == tuple(parts)
                    await asyncio.sleep(0.3)
                    # at most the next one is on its way up, stopped in the link
                    assert len(grid.pulled) <= len(order) + 1
            assert sorted(order) == [1, 2, 3]

    asyncio.run(scenario())


def test_the_relay_looks_for_a_reply_when_its_node_asks_for_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not before, once it was seen to work: a look in the middle of an upload costs a second."""
    monkeypatch.setattr(flower, "TOLD_POLL_S", NEVER_S)

    async def scenario() -> None:
        async with _federation(tmp_path, {300: _owner(), 301: _owner()}) as (carrier, grid):
            carrier._told = True
            async with aclosing(carrier.exchange({"300": b"x", "301": b"x"}, deadline_s=NEVER_S)) as replies:
                reading = asyncio.create_task(anext(replies))
                await asyncio.sleep(0.5)
                assert grid.pulled == []
                await carrier._node_asked(PullMessagesRequest(node=Node(node_id=301)).SerializeToString())
                assert (await asyncio.wait_for(reading, PATIENCE_S))[0] == "301"
                assert grid.pulled == [301]

    asyncio.run(scenario())


def test_a_reader_that_stops_early_frees_the_link(tmp_path: Path) -> None:
    """The vectors of an exchange that is over are read and dropped; the next exchange goes on as ever."""
    parts = [bytes([i]) * (1 << 20) for i in range(4)]

    async def scenario() -> None:
        async with _federation(tmp_path, {n: _owner(*parts) for n in (1, 2, 3)}) as (carrier, _grid):
            async with aclosing(carrier.exchange(dict.fromkeys("123", b"x"), deadline_s=PATIENCE_S)) as replies:
                await anext(replies)
            assert carrier._parcels == {}
            assert set(await _all(carrier, b"again")) == {"1", "2", "3"}

    asyncio.run(scenario())


def test_a_run_killed_in_mid_vector_is_repeated_whole(tmp_path: Path) -> None:
    """What came of the reply before the run was lost is not mixed with what the next run brings."""

    async def frames(*sent: bytes) -> AsyncIterator[bytes]:
        for frame in sent:
            yield frame
        await asyncio.sleep(3600)

    async def scenario() -> None:
        async with _carrier(tmp_path) as carrier, grpc.aio.insecure_channel(f"unix:{tmp_path}/link.sock") as channel:
            link = channel.stream_stream(LINK)
            up: asyncio.Queue[bytes] = asyncio.Queue()

            async def dial() -> Any:
                call = link(None)
                await call.write(pack_frame({"op": "hello", "token": TOKEN}))
                await call.write(pack_frame({"op": "nodes", "nodes": ["1", "2"]}))
                return call

            async def tags(call: Any) -> dict[str, str]:
                header, _ = unpack_frame(await call.read())
                return {item["node"]: item["tag"] for item in header["items"]}

            first = await dial()
            await carrier.nodes()
            replies = carrier.exchange({"1": b"x", "2": b"y"}, deadline_s=PATIENCE_S)
            reading = asyncio.create_task(anext(replies))
            tag = (await tags(first))["1"]
            await first.write(pack_frame({"op": "reply", "tag": tag, "parts": 2}, b"stale head"))
            await first.write(pack_frame({"op": "part", "tag": tag}, b"stale part"))
            run = carrier._run
            assert run is not None
            await _until(lambda: run.assembly._parts == [b"stale part"])
            first.cancel()
            await _until(lambda: carrier._run is None)
            assert not reading.done()

            second = await dial()
            again = await tags(second)
            assert again == {"1": tag, "2": again["2"]}
            await second.write(pack_frame({"op": "reply", "tag": tag, "parts": 2}, b"head"))
            for part in (b"one", b"two"):
                await second.write(pack_frame({"op": "part", "tag": tag}, part))
            assert await reading == ("1", Reply(b"head", (b"one", b"two")))

            # the reader is busy with that vector when this run is lost as well: noticed all the same
            second.cancel()
            await _until(lambda: carrier._run is None)
            third = await dial()
            assert await tags(third) == {"2": again["2"]}
            await third.write(pack_frame({"op": "reply", "tag": again["2"], "parts": 0}, b"small"))
            assert await anext(replies) == ("2", Reply(b"small"))
            with pytest.raises(StopAsyncIteration):
                await anext(replies)
            assert up.empty()
            third.cancel()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "frames",
    [
        [({"op": "part", "tag": "x0"}, b"part without a reply")],
        [({"op": "reply", "tag": "x0", "parts": 2}, b"h"), ({"op": "part", "tag": "x1"}, b"another's part")],
        [({"op": "reply", "tag": "x0", "parts": 2}, b"h"), ({"op": "reply", "tag": "x1", "parts": 0}, b"h")],
        [({"op": "reply", "tag": "x0", "parts": MAX_PARTS + 1}, b"h")],
        [({"op": "reply", "tag": "x0", "parts": -1}, b"h")],
        [({"op": "reply", "tag": "x0"}, b"h")],
        [({"op": "reply", "tag": "x0", "parts": 0},)],
    ],
)
def test_a_run_that_sends_nonsense_is_hung_up_on(tmp_path: Path, frames: list[tuple[Any, ...]]) -> None:
    """Frames out of turn end the run; the coordinator is none the worse."""

    async def scenario() -> None:
        async with _carrier(tmp_path) as carrier, grpc.aio.insecure_channel(f"unix:{tmp_path}/link.sock") as channel:
            call = channel.stream_stream(LINK)(None)
            await call.write(pack_frame({"op": "hello", "token": TOKEN}))
            await call.write(pack_frame({"op": "nodes", "nodes": ["1", "2"]}))
            await carrier.nodes()
            reading = asyncio.create_task(anext(carrier.exchange({"1": b"x", "2": b"y"}, deadline_s=0.5), None))
            await call.read()
            for frame in frames:
                await call.write(pack_frame(*frame))
            assert await asyncio.wait_for(call.read(), PATIENCE_S) is grpc.aio.EOF
            assert carrier._run is None
            assert await reading is None

    asyncio.run(scenario())


def test_a_node_whose_upload_stops_does_not_hold_the_others_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower waits for such a reply for a very long time; the relay goes on without it."""
    monkeypatch.setattr(server, "STALL_S", 0.3)

    async def scenario() -> set[str]:
        async with _federation(tmp_path, {n: _owner(b"part") for n in (1, 2, 3)}) as (carrier, grid):
            grid.stuck.add(1)
            async with aclosing(carrier.exchange(dict.fromkeys("123", b"x"), deadline_s=NEVER_S)) as replies:
                return {(await anext(replies))[0] for _ in range(2)}

    assert asyncio.run(asyncio.wait_for(scenario(), PATIENCE_S)) == {"2", "3"}


@pytest.mark.parametrize("what", ["a part too large", "no such record", "no bytes", "too many parts"])
def test_a_hostile_node_fails_alone(tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its ClientApp returns, the relay run lives and the others are heard."""
    monkeypatch.setattr(server, "MAX_PARTS", 3)

    def spoil(reply: Message) -> Message:
        if reply.metadata.src_node_id != 1:
            return reply
        record = cast("Any", reply.content["parts"])
        if what == "no such record":
            reply.content = RecordDict()
        elif what == "no bytes":
            reply.content["envelope"] = ConfigRecord({"head": "text"})
        elif what == "a part too large":
            record["part-00000"] = client._array(b"p" * (MAX_PART + 1))
        else:
            record.update({f"part-{i}": client._array(b"p") for i in range(4)})
        return reply

    async def scenario() -> None:
        async with _federation(tmp_path, {n: _owner(b"part") for n in (1, 2)}) as (carrier, grid):
            grid.spoil = spoil
            assert set(await _all(carrier, b"x")) == {"2"}
            assert carrier.runs == 1

    asyncio.run(scenario())


def test_the_bundle_repeats_what_the_service_defines() -> None:
    """It must not import fedllm, so names, frames and bounds stand there again."""
    for name in ("LINK", "MAX_HEAD", "MAX_PART", "MAX_PARTS"):
        assert getattr(server, name) == getattr(service, name)
    assert client.DELIVER == service.DELIVER
    assert server._pack({"op": "x"}, b"1", b"") == pack_frame({"op": "x"}, b"1", b"")
    assert server._unpack(pack_frame({"op": "x"}, b"1", b"")) == unpack_frame(pack_frame({"op": "x"}, b"1", b""))
