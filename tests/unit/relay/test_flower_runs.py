"""Relay runs that follow one another, stop reading or fail, on a link in memory whose writes the test lets through."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from patience import NEVER_S, PATIENCE_S

from fedllm.clock import Clock, FakeClock, SystemClock
from fedllm.relay import flower
from fedllm.relay.carrier import Reply
from fedllm.relay.flower import FlowerCarrier
from fedllm.relay.parcels import next_in_time
from fedllm.relay.service import pack_frame, unpack_frame
from fedllm.rng import OsRng

pytestmark = pytest.mark.timeout(3 * PATIENCE_S)


class MemoryRun:
    """A relay run as the carrier sees one; like gRPC it takes one write at a time, and none of them back.

    Attributes
    ----------
    gate : asyncio.Event
        Writes stand in flow control while it is not set.
    down : asyncio.Queue
        Header and blobs of what got through.
    """

    def __init__(self, carrier: FlowerCarrier) -> None:
        self._carrier = carrier
        self._up: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._through: asyncio.Future[None] | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.standing = asyncio.Event()
        self.broken = False
        self.down: asyncio.Queue[tuple[dict[str, Any], list[bytes]]] = asyncio.Queue()
        self.serving = asyncio.create_task(carrier._serve(self._frames(), self._write))

    async def _frames(self) -> AsyncIterator[bytes]:
        while (frame := await self._up.get()) is not None:
            yield frame

    async def _write(self, frame: bytes) -> None:
        assert self._through is None, "a write while another stands"
        if self.broken:
            raise grpc.aio.UsageError("the stream is broken")
        self._through = asyncio.ensure_future(self._pass(frame))
        await asyncio.shield(self._through)

    async def _pass(self, frame: bytes) -> None:
        self.standing.set()
        await self.gate.wait()
        self._through = None
        self.down.put_nowait(unpack_frame(frame))

    def say(self, op: str, *blobs: bytes, **header: object) -> None:
        """Send one frame up."""
        self._up.put_nowait(pack_frame({"op": op, **header}, *blobs))

    async def hello(self, *nodes: str) -> None:
        """Say hello and report nodes; returns when both have arrived."""
        self.say("hello", token=self._carrier._token)
        self.say("nodes", nodes=nodes)
        await _until(lambda: self._up.empty() and self._carrier._connected.is_set())

    async def sent(self) -> tuple[dict[str, str], list[bytes]]:
        """Return the next requests: tags by node, and the bytes."""
        header, blobs = await asyncio.wait_for(self.down.get(), PATIENCE_S)
        assert header["op"] == "send"
        return {item["node"]: item["tag"] for item in header["items"]}, blobs

    async def over(self) -> None:
        """Wait until the carrier has ended the stream."""
        await asyncio.wait_for(asyncio.shield(self.serving), PATIENCE_S)

    def end(self) -> None:
        """End the stream from this end."""
        self._up.put_nowait(None)

    async def hang_up(self) -> None:
        """End the stream, and wait until the carrier has noticed."""
        self.end()
        await self.over()


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - of the carrier's tasks' making
            await asyncio.sleep(0.01)


async def _others_run() -> None:
    """Let everything that can happen without the test's help happen."""
    for _ in range(50):
        await asyncio.sleep(0)


def _carrier(root: Path, clock: Clock | None = None) -> FlowerCarrier:
    carrier = FlowerCarrier(
        root, host="127.0.0.1", port=1, inner_port=1, clock=clock or SystemClock(), rng=OsRng(), environ=os.environ
    )
    carrier._token = "token"
    return carrier


def _ask(
    carrier: FlowerCarrier, *nodes: str, data: bytes = b"x", deadline_s: float = NEVER_S
) -> asyncio.Task[tuple[str, Reply] | None]:
    """Return the first reply of an exchange, None without any."""
    return asyncio.create_task(anext(carrier.exchange(dict.fromkeys(nodes, data), deadline_s=deadline_s), None))


async def _ended(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def test_a_run_that_comes_before_the_end_of_the_last_was_noticed_is_sent_what_is_pending(tmp_path: Path) -> None:
    """It has reported no nodes yet, whatever the first had reported; the first one's stream is ended."""

    async def scenario() -> None:
        carrier = _carrier(tmp_path)
        first = MemoryRun(carrier)
        await first.hello("1")
        asking = _ask(carrier, "1")
        tags, _ = await first.sent()
        second = MemoryRun(carrier)
        second.say("hello", token="token")
        await first.over()
        nodes = asyncio.create_task(carrier.nodes())
        await _others_run()
        second.say("nodes", nodes=["1", "2"])
        assert await second.sent() == (tags, [b"x"])
        assert await nodes == ("1", "2")
        second.say("reply", b"head", tag=tags["1"], parts=0)
        assert await asyncio.wait_for(asking, PATIENCE_S) == ("1", Reply(b"head"))
        await second.hang_up()
        assert carrier._run is None

    asyncio.run(scenario())


def test_a_launch_waits_for_the_run_that_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of the launch before, which connected late, is not taken for it: it is about to be replaced."""
    monkeypatch.setattr(flower, "LAUNCH_TIMEOUT_S", NEVER_S)
    monkeypatch.setattr(flower, "flower_program", lambda _name: "/bin/true")

    async def scenario() -> None:
        carrier = _carrier(tmp_path)
        runs: list[MemoryRun] = []
        waited = asyncio.Event()

        async def listening(_port: int, _timeout_s: float) -> bool:
            runs.append(MemoryRun(carrier))
            await runs[0].hello("1")
            return True

        def alive() -> bool:
            waited.set()
            return True

        monkeypatch.setattr(flower, "listening", listening)
        monkeypatch.setattr(carrier.superlink, "alive", alive)
        launching = asyncio.create_task(carrier._launch())
        waiting = asyncio.create_task(waited.wait())
        await asyncio.wait({launching, waiting}, return_when=asyncio.FIRST_COMPLETED, timeout=PATIENCE_S)
        assert not launching.done()
        runs.append(MemoryRun(carrier))
        await runs[1].hello("1")
        assert await asyncio.wait_for(launching, PATIENCE_S)
        await runs[0].over()
        await runs[1].hang_up()

    asyncio.run(scenario())


def test_no_run_is_launched_while_one_is_connected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither when a run took the place of the one that was launched, nor when one came after it was given up."""

    async def scenario() -> None:
        runs: list[MemoryRun] = []
        connected_at_launch: list[bool] = []

        async def connect() -> None:
            runs.append(MemoryRun(carrier))
            await runs[-1].hello("1")

        async def launch() -> bool:
            connected_at_launch.append(carrier._run is not None)
            if len(connected_at_launch) == 1:
                return False  # this one connects in the pause that follows
            await connect()
            return True

        class Pausing(FakeClock):
            async def sleep(self, seconds: float) -> None:
                await connect()

        carrier = _carrier(tmp_path, Pausing())
        monkeypatch.setattr(carrier, "_launch", launch)
        keeping = asyncio.create_task(carrier._keep_run())
        await _until(lambda: len(runs) == 1 and carrier._connected.is_set())
        await connect()
        await runs[0].over()
        await _others_run()
        assert connected_at_launch == [False]
        await runs[1].hang_up()
        await _until(lambda: len(runs) == 3 and carrier._connected.is_set())
        assert connected_at_launch == [False, False]
        await _ended(keeping)
        await runs[2].hang_up()

    asyncio.run(scenario())


def test_a_request_follows_one_whose_exchange_was_cancelled_in_mid_write(tmp_path: Path) -> None:
    """The first frame stands in flow control and cannot be taken back; the second waits for it, and arrives."""

    async def scenario() -> None:
        carrier = _carrier(tmp_path)
        run = MemoryRun(carrier)
        await run.hello("1")
        run.gate.clear()
        first = _ask(carrier, "1", data=b"first")
        await asyncio.wait_for(run.standing.wait(), PATIENCE_S)
        await _ended(first)
        second = _ask(carrier, "1", data=b"second")
        third = _ask(carrier, "1", data=b"third")
        await _others_run()
        await _ended(third)  # not begun: nothing is left of it
        run.gate.set()
        assert (await run.sent())[1] == [b"first"]
        tags, data = await run.sent()
        assert data == [b"second"]
        run.say("reply", b"head", tag=tags["1"], parts=0)
        assert await asyncio.wait_for(second, PATIENCE_S) == ("1", Reply(b"head"))
        await run.hang_up()
        assert run.down.empty()

    asyncio.run(scenario())


@pytest.mark.parametrize("how", ["replaced", "ended"])
def test_a_request_that_is_not_read_is_not_waited_for_on_a_run_that_is_over(tmp_path: Path, how: str) -> None:
    """The exchange hears the next run's reply, long before its deadline."""

    async def scenario() -> None:
        carrier = _carrier(tmp_path)
        first = MemoryRun(carrier)
        await first.hello("1")
        first.gate.clear()
        asking = _ask(carrier, "1")
        await asyncio.wait_for(first.standing.wait(), PATIENCE_S)
        if how == "ended":
            first.end()
            await _until(lambda: carrier._run is None)
        second = MemoryRun(carrier)
        await second.hello("1")
        tags, _ = await second.sent()
        second.say("reply", b"head", tag=tags["1"], parts=0)
        assert await asyncio.wait_for(asking, PATIENCE_S) == ("1", Reply(b"head"))
        await second.hang_up()
        assert not first.serving.done()  # gRPC would never end the stream
        first.gate.set()
        await first.over()

    asyncio.run(scenario())


def test_a_write_that_fails_ends_the_run_and_the_next_one_is_sent_the_request(tmp_path: Path) -> None:
    """Its stream may look alive; what was to be written would never arrive on it."""

    async def scenario() -> None:
        carrier = _carrier(tmp_path)
        run = MemoryRun(carrier)
        await run.hello("1")
        run.broken = True
        asking = _ask(carrier, "1")
        await run.over()
        assert carrier._run is None
        run = MemoryRun(carrier)
        await run.hello("1")
        tags, data = await run.sent()
        assert data == [b"x"]
        run.say("reply", b"head", tag=tags["1"], parts=0)
        assert await asyncio.wait_for(asking, PATIENCE_S) == ("1", Reply(b"head"))
        await run.hang_up()

    asyncio.run(scenario())


@pytest.mark.parametrize("behind_another", [False, True])
def test_the_deadline_ends_an_exchange_whose_request_is_not_read(tmp_path: Path, behind_another: bool) -> None:
    """Neither its own frame in flow control nor that of another exchange holds it up any longer."""

    async def scenario() -> None:
        carrier = _carrier(tmp_path)
        run = MemoryRun(carrier)
        await run.hello("1")
        run.gate.clear()
        others = [_ask(carrier, "1")] if behind_another else []
        await _others_run()
        assert await asyncio.wait_for(_ask(carrier, "1", deadline_s=0.2), PATIENCE_S) is None
        await _ended(*others)
        assert carrier._parcels == {}
        run.gate.set()
        await run.hang_up()

    asyncio.run(scenario())


def test_a_reply_that_is_there_at_the_deadline_is_not_dropped(tmp_path: Path) -> None:
    """The reader was busy with the first reply while the second came, and until after the deadline."""

    async def scenario() -> None:
        clock = FakeClock()
        carrier = _carrier(tmp_path, clock)
        run = MemoryRun(carrier)
        await run.hello("1", "2", "3")
        replies = carrier.exchange(dict.fromkeys("123", b"x"), deadline_s=NEVER_S)
        first = asyncio.ensure_future(anext(replies))
        tags, _ = await run.sent()
        for node in ("1", "2"):
            run.say("reply", node.encode(), tag=tags[node], parts=0)
        assert await asyncio.wait_for(first, PATIENCE_S) == ("1", Reply(b"1"))
        await _until(lambda: carrier._parcels[tags["2"]].answered)
        clock.advance(2 * NEVER_S)
        assert [each async for each in replies] == [("2", Reply(b"2"))]
        await run.hang_up()

    asyncio.run(scenario())


def test_what_comes_in_the_moment_of_the_deadline_is_taken() -> None:
    """Whoever waits was woken with it and told that the time was over, both before it ran again."""

    async def scenario() -> None:
        queue: asyncio.Queue[str] = asyncio.Queue()
        waiting = asyncio.create_task(next_in_time(queue, 0.0))
        asyncio.get_running_loop().call_soon(queue.put_nowait, "reply")
        assert await waiting == "reply"
        assert await next_in_time(queue, -1.0) is None

    asyncio.run(scenario())
